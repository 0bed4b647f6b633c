// Hopper's asynchronous machinery for one block, sm_90a: mbarriers, copies of boxes by TMA, products by wgmma.
// PTX ISA: "mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions", "setmaxnreg".
//
// A group is 128 neighbouring threads that multiply together. A tile in shared memory has rows of 128 bytes (64 bf16)
// and begins at a multiple of 1024; its 16-byte cells are XORed with the row mod 8, as TMA writes them and wgmma reads
// them (128B swizzle). A matrix with more than 64 columns is several tiles, one behind the other.
//
// Rules that no compiler checks (the emulator in tests/support/shim does, but for those in brackets):
// - products_begin(d...) before the first product of a batch, once all waits for barriers are done: a wait between
//   products makes ptxas serialise them (C7520). It names every accumulator, and every fragment, that plain code has written.
// - [a left operand in registers is written anew in every turn of a loop: one that a loop only reads may get the registers of
//   those that it writes, from ptxas 12.9 and 13.0; tests/support/sass.py looks at the compiled code.]
// - products_wait<N>(d...) names every accumulator that is read afterwards. [Otherwise the compiler may move the reads in
//   front of the wait: to it, a product is done where it stands.]
// - shared memory that plain code has written is read by TMA or wgmma only after fence_async() of the threads that
//   wrote it and then a group_sync().
// - every warp gives a buffer back to the loader, after its wait for the products that read it. One release for a group
//   is not enough: a warp that lags behind may miss a phase of the barrier, and then waits for ever or reads what comes
//   next.
#include "fragments.cuh"

struct alignas(64) TensorMap { unsigned long long words[16]; };  // CUtensorMap
typedef unsigned long long Matrix;                               // an operand in shared memory, as wgmma reads it
constexpr int TILE_COLUMNS = 64, TILE_ROW = 128;                 // bf16, bytes

// Registers of a thread, where `groups` groups multiply and one loads: at entry, of the loader, of the others. All that
// the groups ask for must be there, or setmaxnreg waits for ever.
constexpr int registers_at_entry(int groups) { return 65536 / (128 * (groups + 1)) / 8 * 8; }
constexpr int registers_of_loader(int groups) { return groups > 2 ? 32 : 40; }
constexpr int registers_of_others(int groups) {
  const int share = (registers_at_entry(groups) * (groups + 1) - registers_of_loader(groups)) / groups / 8 * 8;
  return share < 240 ? share : 240;
}

// An operand whose rows of 64 are along k: `at` is the first of 8 n rows; 16 k further on are 32 bytes further on.
__device__ __forceinline__ Matrix along_k(unsigned at) {
  return (Matrix)(at >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// An operand whose rows are a k each, and along the rows are its rows or columns: those after the first 64 are in tiles
// `next` bytes further on; 16 k further on are 16 rows = 2048 bytes further on.
__device__ __forceinline__ Matrix across_k(unsigned at, unsigned next) {
  return (Matrix)(at >> 4) | (Matrix)(next >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
// The same operand, so many bytes further on.
__device__ __forceinline__ Matrix further(Matrix x, unsigned bytes) {
  return (x & ~0xffffffffull) | ((unsigned)x + (bytes >> 4));
}
// Byte offset of a 16-byte cell in a tile.
__device__ __forceinline__ unsigned cell(int row, int column) { return row * TILE_ROW + ((column ^ (row & 7)) << 4); }

// The thread's group, as a number that the compiler knows to be that of the whole warp: then descriptors of operands are
// computed once a warp, in uniform registers.
__device__ __forceinline__ int group_of_warp() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// PTX
__device__ __forceinline__ unsigned shared_begin() {  // of the dynamic shared memory, at a multiple of 1024
  extern __shared__ __align__(1024) unsigned char shared[];
  return (shared_address(shared) + 1023) & ~1023u;
}
__device__ __forceinline__ unsigned shared_get(unsigned at) {
  unsigned r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ uint4 shared_get4(unsigned at) {
  uint4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ void shared_put(unsigned at, unsigned x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// mbarriers: a phase ends when `count` threads have arrived and all bytes that were announced have come.
__device__ __forceinline__ void barrier_make(unsigned at, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(unsigned at, unsigned bytes) {  // arrives, too
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Returns once the phase of this parity has ended; at first that of parity 1 has.
__device__ __forceinline__ void barrier_wait(unsigned at, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nL: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
               "@p bra D;\nbra L;\nD:\n}"
               ::"r"(at), "r"(parity) : "memory");
}

// Boxes of 64 columns of one head and so many rows, as the tensor map says: column, head, row, sequence. Zeros stand for
// what lies outside of the array, and nothing is stored there.
__device__ __forceinline__ void tile_load(unsigned to, const TensorMap* map, int column, int head, int row, int batch,
                                          unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row), "r"(batch) : "memory");
}
__device__ __forceinline__ void tile_store(const TensorMap* map, int column, int head, int row, int batch,
                                           unsigned from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(column), "r"(head), "r"(row), "r"(batch) : "memory");
}
// Multiples of 16 bytes.
__device__ __forceinline__ void bytes_load(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void stores_wait() {  // until shared memory has been read
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Named barriers, 1 to 15; 0 is __syncthreads.
__device__ __forceinline__ void group_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_pass(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
template <int N>
__device__ __forceinline__ void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// What is in these registers is settled here: neither written later nor read before.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(unsigned (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N * 4; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
template <class... D>
__device__ __forceinline__ void products_begin(D&... d) {
  (settle(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last N batches are done.
template <int N, class... D>
__device__ __forceinline__ void products_wait(D&... d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  (settle(d), ...);
}
// d (64 x W) = a (64 x 16) b (16 x W) + (add ? d : 0). TURN_A, TURN_B: the operand is across_k, otherwise along_k.
// d: as accumulators of mma.m16n8k16, warp w has the rows from 16 w: d[4 n + e] is row lane/4 + 8*(e/2), column
// 8 n + 2*(lane%4) + e%2. a in registers: as a left operand of mma.m16n8k16.
#define OUT4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT8(d, i) OUT4(d, i), OUT4(d, i + 4)
#define OUT16(d, i) OUT8(d, i), OUT8(d, i + 8)
#define OUT24(d) OUT16(d, 0), OUT8(d, 16)
#define OUT32(d) OUT16(d, 0), OUT16(d, 16)
#define OUT48(d) OUT32(d), OUT16(d, 32)
#define OUT64(d) OUT48(d), OUT16(d, 48)
#define LIST24 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
#define LIST32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define LIST48 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define PRODUCTS(N, W, R0, R1, R2, R3, R4, R5, R6)                                                                     \
  template <int TURN_A, int TURN_B>                                                                                    \
  __device__ __forceinline__ void product(float (&d)[N], Matrix a, Matrix b, int add) {                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" W "k16.f32.bf16.bf16 {" LIST##N "}, "                             \
                 R0 ", " R1 ", p, 1, 1, " R3 ", " R4 ";\n}"                                                            \
                 : OUT##N(d) : "l"(a), "l"(b), "r"(add), "n"(TURN_A), "n"(TURN_B));                                    \
  }                                                                                                                    \
  template <int TURN_B>                                                                                                \
  __device__ __forceinline__ void product(float (&d)[N], const unsigned (&a)[4], Matrix b, int add) {                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5 ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" W "k16.f32.bf16.bf16 {" LIST##N "}, "                             \
                 "{" R0 "," R1 "," R2 "," R3 "}, " R4 ", p, 1, 1, " R6 ";\n}"                                          \
                 : OUT##N(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TURN_B));             \
  }
PRODUCTS(24, "48", "%24", "%25", "%26", "%27", "%28", "%29", "%30")
PRODUCTS(32, "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PRODUCTS(48, "96", "%48", "%49", "%50", "%51", "%52", "%53", "%54")
PRODUCTS(64, "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
// end of PTX

// Buffers that one thread fills and all warps of some groups read, in turn; each side has a Ring of its own. Barriers full and empty of
// STAGES buffers, 16 bytes a buffer, begin at `barriers`.
template <int STAGES>
struct Ring {
  static constexpr int BYTES = 16 * STAGES;
  unsigned barriers;
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ Ring(unsigned barriers) : barriers(barriers) {}
  // As it is after so many buffers.
  __device__ __forceinline__ Ring(unsigned barriers, unsigned turn)
      : barriers(barriers), stage(turn % STAGES), parity(turn / STAGES & 1) {}
  __device__ __forceinline__ unsigned full() const { return barriers + 16 * stage; }
  __device__ __forceinline__ void make(int groups) const {  // by one thread of the block
    for (int s = 0; s < STAGES; s++) barrier_make(barriers + 16 * s, 1), barrier_make(barriers + 16 * s + 8, 4 * groups);
  }
  __device__ __forceinline__ void claim(unsigned bytes) const {  // the buffer is free, and so many bytes will come
    barrier_wait(full() + 8, parity ^ 1);
    barrier_expect(full(), bytes);
  }
  __device__ __forceinline__ void wait() const { barrier_wait(full(), parity); }
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) barrier_arrive(full() + 8);
  }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// An accumulator rounded to bf16, as left operands of 16 columns each: the two layouts agree.
template <int N>
__device__ __forceinline__ void as_left(unsigned (&a)[N][4], const float (&d)[8 * N]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) a[i / 4][i % 4] = pack(d[2 * i], d[2 * i + 1]);
}
// What a persistent block works on in its n-th turn. The longest come first, and every other turn the order of blocks is
// reversed, so that all blocks get about the same.
__device__ __forceinline__ int turn_item(int n) {
  return n * gridDim.x + (n & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}
