// Tensor-core tiles in shared memory: PTX wrappers and the three products that attention is made of.
// PTX ISA, "Matrix fragments for mma.m16n8k16" (.bf16), ldmatrix and cp.async; sm_80 and later.
//
// A tile is rows x HEAD_DIM bf16. Eight neighbouring values are one 16-byte cell; the cell index is XORed
// with bits of the row, so that eight rows of one column of cells lie in different banks.
//
// Accumulator fragment c[4] of a 16 x 8 block: c[e] is row lane/4 + 8*(e/2), column 2*(lane%4) + e%2.
#include "fragments.cuh"
#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef DOCUMENTS
#define DOCUMENTS 0
#endif
constexpr int CELLS = HEAD_DIM / 8;                      // cells in a row
constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int SWIZZLE = HEAD_DIM % 64 == 0 ? 8 : 4;      // cells that the XOR permutes among themselves
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 128, "head width must be 32, 64, 96 or 128");
// PTX
// 16 (8) bytes from global to shared memory without passing registers; zeros where !valid.
__device__ __forceinline__ void copy16(unsigned dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy8(unsigned dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(valid ? 8 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// end of PTX

// Byte offset of a cell in a tile.
__device__ __forceinline__ unsigned cell(int row, int column) {
  return row * ROW_BYTES + ((column ^ (SWIZZLE == 8 ? row & 7 : (row >> 1) & 3)) << 4);
}
// The address that a lane gives to ldmatrix for the cells 2k, 2k+1 of 16 rows, from the one for k = 0.
__device__ __forceinline__ unsigned step(unsigned address, int k) {
  return (address ^ ((2 * k % SWIZZLE) << 4)) + 2 * k / SWIZZLE * SWIZZLE * 16;
}
// Lane's cell for a left operand (16 rows x 16) and, with .trans, for a right operand stored k x n.
__device__ __forceinline__ unsigned lane_a(int lane) { return cell(lane & 15, lane >> 4); }
// Lane's cell for a right operand stored n x k.
__device__ __forceinline__ unsigned lane_b(int lane) { return cell((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1); }

// Copies one tile of ROWS rows after another to shared memory, all threads together. A thread always copies the
// same columns, so that between its cells only one pointer moves.
template <int ROWS, int THREADS>
struct Loader {
  static constexpr int ACROSS = CELLS == 12 ? 4 : CELLS, PASS = THREADS / ACROSS;  // threads of a row, rows at once
  static_assert(THREADS % ACROSS == 0 && PASS % 8 == 0 && ROWS % PASS == 0, "every thread copies alike");
  const act* from;
  long long stride;

  __device__ __forceinline__ Loader(const act* x, long long stride, int row) : stride(stride) {
    from = x + (row + (int)threadIdx.x / ACROSS) * stride + threadIdx.x % ACROSS * 8;
  }
  // The next tile; of its rows the first `rows` exist, the others become 0.
  __device__ __forceinline__ void load(unsigned tile, int rows) {
    const int first = threadIdx.x / ACROSS;
    const unsigned to = tile + cell(first, threadIdx.x % ACROSS);
#pragma unroll
    for (int i = 0; i < ROWS / PASS; i++) {
#pragma unroll
      for (int n = 0; n < CELLS / ACROSS; n++)
        copy16(to + i * PASS * ROW_BYTES + n * ACROSS * 16, from + n * ACROSS * 8, first + i * PASS < rows);
      from += PASS * stride;
    }
  }
};

// The warp's 16 M rows of a tile as left operands.
template <int M>
__device__ __forceinline__ void load_rows(unsigned (&a)[M][HEAD_DIM / 16][4], unsigned address) {
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) ldmatrix(a[i][k], step(address, k) + i * 16 * ROW_BYTES);
}

// Sixteen columns of the warp's left operand: kept in registers, or read from a tile again.
template <int M>
__device__ __forceinline__ void left_operand(unsigned (&g)[M][4], const unsigned (&a)[M][HEAD_DIM / 16][4], int k) {
#pragma unroll
  for (int i = 0; i < M * 4; i++) g[i / 4][i % 4] = a[i / 4][k][i % 4];
}
template <int M>
__device__ __forceinline__ void left_operand(unsigned (&g)[M][4], unsigned a, int k) {
#pragma unroll
  for (int i = 0; i < M; i++) ldmatrix(g[i], step(a, k) + i * 16 * ROW_BYTES);
}
template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M * N * 4; i++) c[i / (N * 4)][i / 4 % N][i % 4] = 0;
}
// c (16M x 8N) = a b^T, a (16M x HEAD_DIM), b (8N x HEAD_DIM) rows of a tile. With a in registers the first columns are
// complete early; eight blocks at once are enough to hide the latency of mma.
template <int M, int N, class A>
__device__ __forceinline__ void product_nt(float (&c)[M][N][4], const A& a, unsigned b) {
  constexpr int GROUP = sizeof(A) > 4 && N * M > 8 ? 8 / M : N;
  clear(c);
#pragma unroll
  for (int first = 0; first < N; first += GROUP)
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
      unsigned g[M][4];
      left_operand(g, a, k);
#pragma unroll
      for (int n = first / 2; n < (first + GROUP) / 2; n++) {
        unsigned f[4];
        ldmatrix(f, step(b, k) + n * 16 * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < M; i++) mma(c[i][2 * n], g[i], f[0], f[1]), mma(c[i][2 * n + 1], g[i], f[2], f[3]);
      }
    }
}
// Two such products in turn: twice as many sums that do not wait for each other.
template <int M, int N, class A, class X>
__device__ __forceinline__ void products_nt(float (&c)[M][N][4], const A& a, unsigned b, float (&z)[M][N][4],
                                            const X& x, unsigned y) {
  clear(c);
  clear(z);
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) {
    unsigned g[M][4], h[M][4];
    left_operand(g, a, k);
    left_operand(h, x, k);
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
      unsigned f[4], e[4];
      ldmatrix(f, step(b, k) + n * 16 * ROW_BYTES);
      ldmatrix(e, step(y, k) + n * 16 * ROW_BYTES);
#pragma unroll
      for (int i = 0; i < M; i++) mma(c[i][2 * n], g[i], f[0], f[1]), mma(c[i][2 * n + 1], g[i], f[2], f[3]);
#pragma unroll
      for (int i = 0; i < M; i++) mma(z[i][2 * n], h[i], e[0], e[1]), mma(z[i][2 * n + 1], h[i], e[2], e[3]);
    }
  }
}
// c (16M x HEAD_DIM) += a b, a (16M x 16K) in registers, b (16K x HEAD_DIM) rows of a tile.
template <int M, int K>
__device__ __forceinline__ void product_nn(float (&c)[M][CELLS][4], const unsigned (&a)[M][K][4], unsigned b) {
#pragma unroll
  for (int k = 0; k < K; k++)
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; n++) {
      unsigned f[4];
      ldmatrix_trans(f, step(b, n) + k * 16 * ROW_BYTES);
#pragma unroll
      for (int i = 0; i < M; i++) mma(c[i][2 * n], a[i][k], f[0], f[1]), mma(c[i][2 * n + 1], a[i][k], f[2], f[3]);
    }
}
// An accumulator (16M x 16K), rounded to bf16, as left operand: the two layouts agree.
template <int M, int N>
__device__ __forceinline__ void as_left(unsigned (&a)[M][N / 2][4], const float (&c)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        a[i][n / 2][n % 2 * 2 + half] = pack(c[i][n][2 * half], c[i][n][2 * half + 1]);
}

// The warp's 16M accumulator rows times scale[row], as bf16, through its own rows of a tile to rows
// [row, rows) of x, 16 bytes a lane. The warp must be done with these rows of the tile.
template <int M>
__device__ __forceinline__ void store_rows(act* x, long long stride, int row, int rows, unsigned char* tile,
                                           const float (&c)[M][CELLS][4], const float (&scale)[M][2]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int n = 0; n < CELLS; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(unsigned*)(tile + cell(i * 16 + lane / 4 + 8 * half, n) + lane % 4 * 4) =
            pack(c[i][n][2 * half] * scale[i][half], c[i][n][2 * half + 1] * scale[i][half]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M * 16 * CELLS / 32; i++) {
    const int at = lane + i * 32, r = at / CELLS, column = at % CELLS;
    if (row + r < rows) *(uint4*)(x + (row + r) * stride + column * 8) = *(const uint4*)(tile + cell(r, column));
  }
}

// Scores that the mask hides become minus infinity: column - row > ahead, and with a window column - row <= behind,
// where rows and columns count from the first of the block. TURNED: queries are the columns.
template <bool TURNED, int M, int N>
__device__ __forceinline__ void mask(float (&s)[M][N][4], int ahead, int window) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = i * 16 + lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
        const int j = TURNED ? row - column : column - row;
        if (j > ahead || (window && j <= ahead - window)) s[i][n][e] = minus_infinity();
      }
}

// Scores of keys before the document of their query become minus infinity. t, j: query and key of the first score.
template <bool TURNED, int M, int N>
__device__ __forceinline__ void mask_documents(float (&s)[M][N][4], const Borders& borders, int t, int j) {
  if (!DOCUMENTS || borders.at(t + (TURNED ? 8 * N : 16 * M) - 1) <= j) return;  // all are seen
  static_assert(M <= 2 && N <= 8 && (!TURNED || N <= 4), "a lane for each query");
  const int lane = threadIdx.x % 32, own = borders.at(t + lane) - j;
  if (TURNED) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int hidden = __shfl_sync(~0u, own, n * 8 + lane % 4 * 2 + odd) - lane / 4;
#pragma unroll
        for (int i = 0; i < M * 2; i++)
          if (i * 8 < hidden) s[i / 2][n][i % 2 * 2 + odd] = minus_infinity();
      }
  } else {
#pragma unroll
    for (int i = 0; i < M * 2; i++) {
      const int hidden = __shfl_sync(~0u, own, i * 8 + lane / 4) - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
          if (n * 8 + odd < hidden) s[i / 2][n][i % 2 * 2 + odd] = minus_infinity();
    }
  }
}

// Which tile, batch and head a block works on: the grid is (pairs of a group * parts, tiles, groups), and pairs are
// (batch, kv head). Groups come one after another, because what their blocks share fits in the level-2 cache; within
// a group all blocks of the first tile, the longest, come first, so that short ones fill the end.
struct Place { int tile, batch, kv, part; };
__device__ __forceinline__ Place place(int kv_heads, int parts) {
  const int pair = blockIdx.z * (gridDim.x / parts) + blockIdx.x / parts;
  return {(int)blockIdx.y, pair / kv_heads, pair % kv_heads, (int)blockIdx.x % parts};
}
