// Linear maps of a few tokens, whose time is that of reading the weights once: y = norm(x) w^T + b, and what follows it.
//
//   x (N,K) act, w (O,K) act or int8 with scale (O,) float, b (O,) act or null, y (N,O) act
//   STAGED: x is held in shared memory, after RMSNorm where norm (K,) is given, as add_rmsnorm without delta
//   ADDED: y = round(y + round(sum));  GATED: w (2F,K) holds gate then up, y (N,F) = silu(gate) * up of the rounded sums
//
// A block has a tile of 8 outputs (GATED: 8 of gate and 8 of up) for every `splits` warps, which share the steps of 32
// inputs of a tile, and their sums are added in order. So the bits of a token depend on O and K alone: neither on the
// other tokens nor on their number. In bfloat16 a lane has 8 neighbouring inputs of one output, 16 bytes, which are two
// operands of mma in another order of k; the same order is used for x. In float32 all products are those of CUDA cores.
#include "common.cuh"
#ifndef TOKEN_TILES
#define TOKEN_TILES 1
#endif

// PTX
__device__ __forceinline__ unsigned pack(float low, float high) {  // two bf16, round to nearest even
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
extern __shared__ uint4 shared[];
__device__ __forceinline__ act* shared_rows() { return reinterpret_cast<act*>(shared); }
// end of PTX
constexpr int WARPS = 8, TILE = 8, STEP = 32, PAD = 32, TOKENS = 16;

// The norm of one row, by a warp.  y = round(x * rstd * w); the first HELD packs of a lane are in flight together.
__device__ __forceinline__ void norm_row(act* y, const act* x, const act* w, float eps, int K) {
  constexpr int HELD = 4, ACROSS = 32 * VEC;
  const int lane = threadIdx.x % 32;
  Pack<VEC> held[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int k = i * ACROSS + lane * VEC;
    if (k < K) held[i] = load<VEC>(x + k);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (i * ACROSS + lane * VEC < K)
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += held[i][j] * held[i][j];
  for (int k = HELD * ACROSS + lane * VEC; k < K; k += ACROSS) {
    const Pack<VEC> p = load<VEC>(x + k);
#pragma unroll
    for (int j = 0; j < VEC; j++) sum += p[j] * p[j];
  }
  const float r = 1.f / sqrtf(lanes_sum(sum, 32) / K + eps);
  const auto put_row = [&](int k, const Pack<VEC>& p, const Pack<VEC>& weight) {
    float out[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) out[j] = p[j] * r * weight[j];
    store(y + k, rounded(out));
  };
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (i * ACROSS + lane * VEC < K) put_row(i * ACROSS + lane * VEC, held[i], load<VEC>(w + i * ACROSS + lane * VEC));
  for (int k = HELD * ACROSS + lane * VEC; k < K; k += ACROSS) put_row(k, load<VEC>(x + k), load<VEC>(w + k));
}

// Eight neighbouring weights of a row, as four pairs of bf16; zeros where there are none.
__device__ __forceinline__ uint4 eight(const act* w, bool some) {
  return some ? *reinterpret_cast<const uint4*>(w) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ uint4 eight(const signed char* w, bool some) {
  if (!some) return make_uint4(0, 0, 0, 0);
  float x[8];
  const unsigned* const two = reinterpret_cast<const unsigned*>(w);
#pragma unroll
  for (int i = 0; i < 8; i++)  // 2^23 + 128 + q, less 2^23 + 128
    x[i] = __uint_as_float(0x4b000000u | (((two[i / 4] ^ 0x80808080u) >> (8 * (i % 4))) & 255u)) - 8388736.f;
  return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// The weights of UNROLL steps from s on: of HALVES matrices of O rows, one behind the other.
template <int HALVES, int UNROLL, class W>
__device__ __forceinline__ void load_steps(uint4 (&b)[HALVES][UNROLL], const W* mine, long long next, int s, int to, int K) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < HALVES; h++)
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      b[h][u] = eight(mine + h * next + (s + u) * STEP, s + u < to && (s + u) * STEP + q * 8 < K);
}
// Sums of a tile over the steps [from, to), into part (HALVES, tokens, TILE); b: the first UNROLL of them.
template <int M, int HALVES, int UNROLL, class W>
__device__ __forceinline__ void tile_sums(float* part, uint4 (&b)[HALVES][UNROLL], const act* x, int x_row, const W* mine,
                                          long long next, int N, int K, int from, int to) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  float c[HALVES][M][4] = {};
#pragma unroll 1
  for (int s = from; s < to; s += UNROLL) {
    if (s > from) load_steps(b, mine, next, s, to, K);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int k = (s + u) * STEP + q * 8;
      const bool some = s + u < to && k < K;
#pragma unroll
      for (int m = 0; m < M; m++) {
        const int n = m * TOKENS + g;
        const uint4 low = eight(x + (long long)n * x_row + k, some && n < N);
        const uint4 high = eight(x + (long long)(n + 8) * x_row + k, some && n + 8 < N);
        const unsigned a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int h = 0; h < HALVES; h++) mma(c[h][m], a[0], b[h][u].x, b[h][u].y), mma(c[h][m], a[1], b[h][u].z, b[h][u].w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < HALVES * M * 4; i++) {
    const int h = i / 4 / M, m = i / 4 % M, e = i % 4;
    part[(h * M * TOKENS + m * TOKENS + g + e / 2 * 8) * TILE + q * 2 + e % 2] = c[h][m][e];
  }
}
// The same in float32: a lane has every 32nd group of four inputs.
__device__ __forceinline__ float4 four(const float* w) { return *reinterpret_cast<const float4*>(w); }
__device__ __forceinline__ float4 four(const signed char* w) {
  return make_float4(w[0], w[1], w[2], w[3]);
}
template <class W>
__device__ __forceinline__ void tile_sums_wide(float* part, const float* x, int x_row, const W* w, int first, int O, int N,
                                               int K, int from, int to) {
  const int lane = threadIdx.x % 32, end = min(to * STEP, K);
  for (int n = 0; n < N; n++) {
    float c[TILE] = {};
    for (int k = from * STEP + lane * 4; k < end; k += 128) {
      const float4 a = four(x + (long long)n * x_row + k);
#pragma unroll
      for (int r = 0; r < TILE; r++) {
        const float4 b = four(w + (long long)min(first + r, O - 1) * K + k);
        c[r] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const float sum = lanes_sum(c[r], 32);
      if (lane == 0) part[n * TILE + r] = sum;
    }
  }
}

template <int M, bool GATED, class W>
__device__ __forceinline__ void multiply(act* y, const act* x, const W* w, const float* scale, const act* b, const act* norm,
                                         float eps, int added, int staged, int N, int O, int K, int splits) {
  constexpr int HALVES = GATED + 1, SUMS = M * TOKENS * TILE, UNROLL = GATED ? 2 : 4 / M;  // sums of a warp and tile
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int steps = (K + STEP - 1) / STEP, tiles = warps / splits;
  const int split = warp % splits, first = (blockIdx.x * tiles + warp / splits) * TILE;
  const int from = split * steps / splits, to = (split + 1) * steps / splits;
  float* const parts = reinterpret_cast<float*>(shared_rows());
  const W* const mine = w + (long long)min(first + lane / 4, O - 1) * K + lane % 4 * 8;
  const long long next = (long long)O * K;
  uint4 begin[HALVES][UNROLL];
  if constexpr (IS_BF16) load_steps(begin, mine, next, from, to, K);
  int x_row = K;
  if (staged) {
    act* const rows = shared_rows() + warps * HALVES * SUMS * 4 / (int)sizeof(act);
    if (norm)
      for (int n = warp; n < N; n += warps) norm_row(rows + n * (K + PAD), x + (long long)n * K, norm, eps, K);
    else
#pragma unroll 4
      for (int i = threadIdx.x; i < N * (K / VEC); i += blockDim.x)
        store(rows + i / (K / VEC) * (K + PAD) + i % (K / VEC) * VEC, load<VEC>(x + (long long)i * VEC));
    x = rows, x_row = K + PAD;
    __syncthreads();
  }
  if (first < O) {
    float* const part = parts + warp * HALVES * SUMS;
    if constexpr (IS_BF16) tile_sums<M>(part, begin, x, x_row, mine, next, N, K, from, to);
    else
      for (int h = 0; h < HALVES; h++) tile_sums_wide(part + h * SUMS, x, x_row, w + h * next, first, O, N, K, from, to);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tiles * N * TILE; i += blockDim.x) {
    const int r = i % TILE, n = i / TILE % N, tile = i / TILE / N, o = (blockIdx.x * tiles + tile) * TILE + r;
    if (o >= O) continue;
    float out[GATED + 1];
#pragma unroll
    for (int half = 0; half < GATED + 1; half++) {
      float sum = 0;
      for (int s = 0; s < splits; s++) sum += parts[((tile * splits + s) * (GATED + 1) + half) * SUMS + n * TILE + r];
      if (scale) sum *= scale[half * O + o];
      if (b) sum += to_float(b[half * O + o]);
      act z;
      put(z, sum);
      out[half] = to_float(z);
    }
    act& at = y[(long long)n * O + o];
    if constexpr (GATED) put(at, out[0] * inverse(1.f + exp_(-out[0])) * out[1]);
    else put(at, added ? to_float(at) + out[0] : out[0]);
  }
}

// One row of y for each token.  y (N,K) = norm of x
extern "C" __global__ void __launch_bounds__(256) decode_norm(act* y, const act* x, const act* w, float eps, int N, int K) {
  const int n = blockIdx.x * WARPS + threadIdx.x / 32;
  if (n < N) norm_row(y + (long long)n * K, x + (long long)n * K, w, eps, K);
}
// y[n] = scale[id] * w[id], id = ids[n].  y (N,K), ids (N,), w (V,K); a block has a row
extern "C" __global__ void __launch_bounds__(256)
decode_rows_int8(act* y, const int* ids, const signed char* w, const float* scale, int K) {
  const long long id = ids[blockIdx.x];
  for (int k = threadIdx.x; k < K; k += blockDim.x) put(y[(long long)blockIdx.x * K + k], scale[id] * (float)w[id * K + k]);
}

// Three blocks on a multiprocessor, so that those of a gate and up all run at once.
#define __bounds__ __launch_bounds__(256, TOKEN_TILES == 1 && IS_BF16 ? 3 : 2)
#define KERNEL(NAME, GATED, W)                                                                                           \
  extern "C" __global__ void __bounds__                                                                                  \
  NAME(act* y, const act* x, const W* w, const float* scale, const act* b, const act* norm, float eps, int added,        \
       int staged, int N, int O, int K, int splits) {                                                                    \
    multiply<TOKEN_TILES, GATED>(y, x, w, scale, b, norm, eps, added, staged, N, O, K, splits);                          \
  }
KERNEL(decode_linear, false, act)
KERNEL(decode_gated, true, act)
KERNEL(decode_linear_int8, false, signed char)
KERNEL(decode_gated_int8, true, signed char)
