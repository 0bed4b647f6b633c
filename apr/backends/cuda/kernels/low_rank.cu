// Both products of adapters that read the same rows, which are read once (Hu et al. 2022).  p = x f, q += factor x^T l
//
//   x (N,W) act, of whole packs, l (N,R) act, f act, f(w,r) = f[w * across + r * down], q float, in the same places
//   p (N,R) act; R 8 or 16
//
// A block has `groups` groups of 32 columns, at most two of a warp, and `tiles` tiles of 16 tokens. In tensor cores
// (mma.m16n8k16) a tile of x is the left operand of p, with the columns that a lane holds as its k; transposed, it is the
// right operand of q^T = l^T x, whose sums stay in registers. Sums of p over the warps of a block meet in shared memory, and
// some of the warps add them while the others go on. low_rank_add adds what the blocks have, in order, and rounds p: the bits
// depend on N, W and R alone.
#include "common.cuh"

// PTX
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// An 8 x 8 matrix of bf16 transposed, of which a lane holds two neighbours of row lane / 4.
__device__ __forceinline__ unsigned transposed(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// end of PTX
constexpr int WARPS = 16, TOKENS = 16, COLUMNS = 32, RANKS = 16, GROUPS = 2, AHEAD = 2;
constexpr int TILE = TOKENS * RANKS, TURNS = WARPS * 32 / TILE;  // threads of a turn add the sums of a tile

__device__ __forceinline__ unsigned pair(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&two);
}

// What a lane has of 16 tokens: of each group 8 columns of two rows, and pairs of ranks of the same rows of l.
struct Tile {
  uint4 x[GROUPS][2];
  unsigned l[4];
};

// parts (column blocks, tiles of all, TILE), a tile as two fragments of 16 x 8; sums (token blocks,RANKS,W)
extern "C" __global__ void __launch_bounds__(WARPS * 32, 16 / WARPS)
low_rank(float* parts, float* sums, const act* x, const act* l, const act* f, int x_row, int l_row, int across, int down,
         int N, int W, int R, int groups, int tiles) {
  __shared__ float4 block[2][2][WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int all = (N + TOKENS - 1) / TOKENS, from = blockIdx.y * tiles, to = min(from + tiles, all);
  int column[GROUPS];  // the first of a lane; W: none
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int group = warp + j * WARPS, at = (blockIdx.x * groups + group) * COLUMNS + q * 8;
    column[j] = group < groups && at < W ? at : W;
  }
  // The columns of a lane as k of two steps: 4 s + 2 h + e of its eight is k = 2 q + 8 h + e of step s.
  unsigned right[GROUPS][2][2][2];
#pragma unroll
  for (int i = 0; i < GROUPS * 8; i++) {
    const int j = i / 8, s = i / 4 % 2, n = i / 2 % 2, h = i % 2, rank = 8 * n + g;
    right[j][s][n][h] = 0;
    if (column[j] < W && rank < R) {
      const act* const at = f + (long long)(column[j] + 4 * s + 2 * h) * across + (long long)rank * down;
      right[j][s][n][h] = pair(to_float(at[0]), to_float(at[across]));
    }
  }
  Tile next[AHEAD];
  const auto ask = [&](Tile& tile, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int n = t * TOKENS + g + 8 * half;
      const bool some = t < to && n < N;
#pragma unroll
      for (int j = 0; j < GROUPS; j++)
        tile.x[j][half] = some && column[j] < W
                              ? *reinterpret_cast<const uint4*>(x + (long long)n * x_row + column[j])
                              : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int rank = 8 * k + 2 * q;
        tile.l[2 * half + k] = some && rank < R ? *reinterpret_cast<const unsigned*>(l + (long long)n * l_row + rank) : 0;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++) ask(next[i], from + i);
  float sum[GROUPS][4][4] = {};
#pragma unroll 1
  for (int first = from; first < to; first += AHEAD)
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int t = first + i;
      if (t >= to) break;
      unsigned left[4];
#pragma unroll
      for (int k = 0; k < 4; k++) left[k] = transposed(next[i].l[k]);
      float part[2][4] = {};
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const uint4 a = next[i].x[j][0], b = next[i].x[j][1];
        const unsigned rows[4][2] = {{a.x, b.x}, {a.y, b.y}, {a.z, b.z}, {a.w, b.w}};
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const unsigned tile[4] = {rows[2 * s][0], rows[2 * s][1], rows[2 * s + 1][0], rows[2 * s + 1][1]};
#pragma unroll
          for (int n = 0; n < 2; n++) mma(part[n], tile, right[j][s][n][0], right[j][s][n][1]);
        }
#pragma unroll
        for (int c = 0; c < 4; c++) mma(sum[j][c], left, transposed(rows[c][0]), transposed(rows[c][1]));
      }
      ask(next[i], t + AHEAD);
#pragma unroll
      for (int n = 0; n < 2; n++) block[t % 2][n][warp][lane] = make_float4(part[n][0], part[n][1], part[n][2], part[n][3]);
      __syncthreads();
      if (threadIdx.x / TILE != t % TURNS) continue;
      const int at = threadIdx.x % TILE, n = at / (TILE / 2);
      const float* const of = reinterpret_cast<const float*>(block[t % 2][n]) + at % (TILE / 2);
      float of_all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) of_all += of[w * 128];
      parts[((long long)blockIdx.x * all + t) * TILE + at] = of_all;
    }
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
    if (column[j] < W)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float* const at = sums + ((long long)blockIdx.y * RANKS + 4 * e + g) * W + column[j];
        const float eight[8] = {sum[j][0][e], sum[j][0][e + 1], sum[j][1][e], sum[j][1][e + 1],
                                sum[j][2][e], sum[j][2][e + 1], sum[j][3][e], sum[j][3][e + 1]};
        store_floats(at, eight);
      }
}

// A thread has four ranks of a column of q, or what a lane has of a fragment of p.
extern "C" __global__ void __launch_bounds__(256)
low_rank_add(act* p, float* q, const float* parts, const float* sums, float factor, int p_row, int across, int down, int N,
             int W, int R, int column_blocks, int token_blocks) {
  int i = blockIdx.x * 256 + threadIdx.x;
  float all[4] = {};
  if (i < W * (R / 4)) {
    const int w = i % W, r = i / W * 4;
#pragma unroll 4
    for (int b = 0; b < token_blocks; b++)
#pragma unroll
      for (int k = 0; k < 4; k++) all[k] += sums[((long long)b * RANKS + r + k) * W + w];
#pragma unroll
    for (int k = 0; k < 4; k++) q[(long long)w * across + (long long)(r + k) * down] += factor * all[k];
    return;
  }
  i -= W * (R / 4);
  const int tiles = (N + TOKENS - 1) / TOKENS, n = i / (TILE / 4) * TOKENS + i % 32 / 4, r = i / 32 % 2 * 8 + i % 4 * 2;
  if (i >= tiles * (TILE / 4) || r >= R) return;
#pragma unroll 4
  for (int b = 0; b < column_blocks; b++) {
    float four[4];
    load_floats(four, parts + (long long)b * tiles * TILE + 4 * i);
#pragma unroll
    for (int k = 0; k < 4; k++) all[k] += four[k];
  }
  if (n < N) *reinterpret_cast<unsigned*>(p + (long long)n * p_row + r) = pair(all[0], all[1]);
  if (n + 8 < N) *reinterpret_cast<unsigned*>(p + (long long)(n + 8) * p_row + r) = pair(all[2], all[3]);
}
