// Runs CUDA kernels on the host: every thread of a block is a fiber that runs until it waits for others, and whose turn
// comes in random order; some warps are slow. Blocks, or clusters of them, run one after the other, in random order too. A barrier that is
// missing therefore shows in the result. It knows what the plain kernels use; nothing of tensor cores, asynchronous
// copies or divergent warps.
#pragma once
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // there is one system thread, so all fibers share it

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(4) char4 { signed char x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
using std::fmax, std::fmin, std::sqrt;
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __expf(float x) { return expf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }

thread_local uint4 dynamic_shared[(256 << 10) / 16];
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
constexpr int MOST = 2048, MOST_BLOCKS = 8;
constexpr size_t STACK = (32 << 10) + 320;  // bytes; no power of two, so that stacks share the cache

struct Gate {  // opens when all its members have arrived
  int members = 0, arrived = 0;
  unsigned opened = 0;
  void check() { if (arrived && arrived >= members) arrived = 0, opened++; }
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;  // jumps, because swapcontext asks the system for the signal mask every time
  uint3 index, of;  // in its block; of the block
  unsigned rank;  // of the block in its cluster
  Gate* waits;
  unsigned seen;
  bool started = false, done;
};
inline jmp_buf scheduler;
inline Fiber fibers[MOST];
alignas(64) inline char stacks[MOST][STACK];
inline Gate blocks[MOST_BLOCKS], cluster, warps[MOST / 32];
inline Gate& block = blocks[0];
inline size_t stride;  // bytes from the shared memory of a block to that of the next one in its cluster
inline unsigned char slots[MOST / 32][32][8];  // what the lanes of a warp exchange
inline size_t now;
inline uint64_t state;
inline void (*body)(void**);
inline void** arguments;
inline int fault;  // a number other than 0 ends the launch
// What a kind of hardware adds: work that is done between the turns of threads (some of it, or all when no thread can go
// on; tells whether there was any), and what is done before and after each block.
inline bool (*deferred)(bool all);
inline void (*before_block)(), (*after_block)();

inline unsigned random(unsigned n) {  // xorshift64*
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return (state * 0x2545F4914F6CDD1Dull >> 33) % n;
}
template <class T> void shuffle(std::vector<T>& x) {
  for (size_t i = x.size(); i > 1; i--) std::swap(x[i - 1], x[random(i)]);
}
inline void wait(Gate& g) {
  Fiber& f = fibers[now];
  f.waits = &g, f.seen = g.opened;
  g.arrived++, g.check();
  if (!_setjmp(f.at)) _longjmp(scheduler, 1);
}
inline void watch(Gate& g) {  // until it opens; nobody counts on this thread
  Fiber& f = fibers[now];
  f.waits = &g, f.seen = g.opened;
  if (!_setjmp(f.at)) _longjmp(scheduler, 1);
}
inline void enter() {  // once for a fiber; the next kernel goes on in its loop
  for (;;) {
    body(arguments);
    Fiber& f = fibers[now];
    f.done = true;
    for (Gate* g : {&blocks[f.rank], &warps[now / 32], &cluster}) g->members--, g->check();  // those who have left are not waited for
    if (!_setjmp(f.at)) _longjmp(scheduler, 1);
  }
}
__attribute__((noinline)) inline void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stacks[now], f.start.uc_stack.ss_size = STACK;
  makecontext(&f.start, enter, 0);
  setcontext(&f.start);
}

// The blocks of a cluster, usually one; false if threads wait for each other for ever.
inline bool run_blocks(unsigned first, unsigned count) {
  const size_t each = blockDim.x * blockDim.y * blockDim.z, n = each * count;
  for (Gate& b : blocks) b = Gate{(int)each};
  cluster = Gate{(int)n};
  for (Gate& w : warps) w = Gate{};
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; i++) {
    Fiber& f = fibers[order[i] = i];
    const unsigned t = i % each, b = first + (f.rank = i / each);
    f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    f.of = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    f.waits = nullptr, f.done = false;
    warps[i / 32].members++;
  }
  bool slow[MOST / 32];
  for (bool& s : slow) s = random(4) == 0;
  if (before_block) before_block();
  for (bool ran = true, slept = true; (ran || slept) && !fault;) {
    const bool all = !ran;  // a slow warp runs when no other can
    ran = slept = false;
    if (deferred) ran = deferred(all);
    shuffle(order);
    for (size_t i : order) {
      Fiber& f = fibers[i];
      if (f.done || (f.waits && f.waits->opened == f.seen)) continue;
      if (slow[i / 32] && !all) {
        slept = true;
        continue;
      }
      ran = true, now = i, threadIdx = f.index, blockIdx = f.of;
      resume(f);
    }
  }
  if (after_block && !cluster.members && !fault) after_block();
  if (cluster.members)
    for (Fiber& f : fibers) f.started = false;  // where they wait, they stay
  return cluster.members == 0;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) { kernel(*static_cast<A*>(args[I])...); }
template <class... A>
void call(void (*kernel)(A...), void** args) { call(kernel, args, std::index_sequence_for<A...>()); }

// g: grid x y z, block x y z, bytes of dynamic shared memory, seed, blocks of a cluster. 0, or 1 for threads that wait for
// ever, 2 for a write beyond the dynamic shared memory, or a fault.
inline int launch(void (*kernel)(void**), const int* g, void** args) {
  gridDim = {(unsigned)g[0], (unsigned)g[1], (unsigned)g[2]}, blockDim = {(unsigned)g[3], (unsigned)g[4], (unsigned)g[5]};
  state = g[7] * 0x9E3779B97F4A7C15ull + 1;
  body = kernel, arguments = args, fault = 0;
  const unsigned count = g[8];
  std::vector<unsigned> clusters(gridDim.x * gridDim.y * gridDim.z / count);
  for (unsigned i = 0; i < clusters.size(); i++) clusters[i] = i * count;
  shuffle(clusters);
  stride = (g[6] + 1024 + 1023) / 1024 * 1024;
  auto* const bytes = reinterpret_cast<unsigned char*>(dynamic_shared);
  for (unsigned first : clusters) {
    std::memset(bytes, 0xff, stride * count);  // NaN
    const bool ended = run_blocks(first, count);
    if (fault) return fault;
    if (!ended) return 1;
    for (unsigned b = 0; b < count; b++)
      for (int i = 0; i < 1024; i++)
        if (bytes[b * stride + g[6] + i] != 0xff) return 2;
  }
  return 0;
}
}  // namespace shim

inline void __syncthreads() { shim::wait(shim::blocks[shim::fibers[shim::now].rank]); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  const size_t warp = shim::now / 32, lane = shim::now % 32;
  std::memcpy(shim::slots[warp][lane], &x, sizeof x);
  shim::wait(shim::warps[warp]);
  std::memcpy(&x, shim::slots[warp][lane ^ mask], sizeof x);
  shim::wait(shim::warps[warp]);
  return x;
}
#define SHIM_KERNEL(NAME) \
  extern "C" int shim_##NAME(const int* g, void** args) { \
    return shim::launch([](void** a) { shim::call(NAME, a); }, g, args); \
  }
