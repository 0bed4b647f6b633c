// Linear maps of a few tokens, whose time is that of reading the weights once: y = norm(x) w^T + b, and what follows it.
//
//   x (N,K) act, w (O,K) act or int8 with scale (O,) float, b (O,) act or null, y (N,O) act
//   STAGED: x, of a few tokens, is held in shared memory, after RMSNorm where norm (K,) is given, as add_rmsnorm
//   without delta
//   ADDED: y = round(y + round(sum));  GATED: w (2F,K) holds gate then up, y (N,F) = silu(gate) * up of the rounded sums,
//   without b
//
// A block has a tile of 8 outputs (GATED: 8 of gate and 8 of up) for every `splits` warps, which share the steps of 32
// inputs of a tile, and their sums are added in order. So the bits of a token depend on O and K alone: neither on the
// other tokens nor on their number. In bfloat16 a lane has 8 neighbouring inputs of one output, 16 bytes (int8: 8), which
// are two operands of mma in another order of k; the same order is used for x. Of int8, GROUP = 2 steps of a lane are
// neighbours in memory, so that four lanes read 64 bytes of a row. A warp has UNROLL steps in registers: the first are asked
// for before anything else, and as one is used, the one UNROLL steps ahead is asked for in its place; it comes from the L2
// cache, for which all of a block is asked at the beginning, as is its share of what the next launch reads, ahead
// (ahead_size,). In float32 all products are those of CUDA cores.
#include "decode.cuh"
#ifndef TOKEN_TILES
#define TOKEN_TILES 0  // of 16 tokens; 0: half a one, STAGED
#endif

// PTX
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two neighbouring int8 of four as bf16, exactly: 128 + the low 7 bits, less 128, or 256 where the sign is set.
__device__ __forceinline__ unsigned two_of_int8(unsigned four, int high) {
  const unsigned two = __byte_perm(four, 0, high ? 0x4342 : 0x4140);
  unsigned r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(r)
      : "r"(0x43004300u | (two & 0x007f007fu)), "r"(0x3f803f80u), "r"(0xc300c300u | (two & 0x00800080u)));
  return r;
}
__device__ __forceinline__ act* shared_rows() { return reinterpret_cast<act*>(shared); }
// end of PTX
constexpr int WARPS = 8, MOST_WARPS = 16, TILE = 8, STEP = 32, PAD = 32, TOKENS = 16;
constexpr bool STAGED = TOKEN_TILES == 0;
constexpr int ROWS = STAGED ? 8 : TOKENS;

// RMSNorm of N rows by the first WARPS warps of a block.  y[n] = round(x[n] * rstd * w); sums (N,WARPS) in shared memory
//
// A thread has the same elements of all rows, so that w may be y[0].
__device__ __forceinline__ void norm_rows(act* y, int y_row, const act* x, const act* w, float* sums, float eps, int N,
                                          int K) {
  constexpr int ACROSS = WARPS * 32 * VEC;
  const int warp = threadIdx.x / 32, first = warp < WARPS ? threadIdx.x * VEC : K;
  for (int n = 0; n < N; n++) {
    float sum = 0;
#pragma unroll 2
    for (int k = first; k < K; k += ACROSS) {
      const Pack<VEC> p = load<VEC>(x + (long long)n * K + k);
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += p[j] * p[j];
    }
    sum = lanes_sum(sum, 32);
    if (warp < WARPS && threadIdx.x % 32 == 0) sums[n * WARPS + warp] = sum;
  }
  __syncthreads();
  for (int n = N - 1; n >= 0; n--) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sums[n * WARPS + i];
    const float r = 1.f / sqrtf(sum / K + eps);
    for (int k = first; k < K; k += ACROSS) {
      const Pack<VEC> p = load<VEC>(x + (long long)n * K + k), weight = load<VEC>(w + k);
      float out[VEC];
#pragma unroll
      for (int j = 0; j < VEC; j++) out[j] = p[j] * r * weight[j];
      store(y + n * y_row + k, rounded(out));
    }
  }
}

// Where staged rows lie, behind the sums of all warps.
template <int HALVES>
__device__ __forceinline__ act* rows_of() {
  return shared_rows() + blockDim.x / 32 * HALVES * ROWS * TILE * 4 / sizeof(act);
}

// Eight neighbouring weights of a row as they lie in memory, zeros where there are none; and as four pairs of bf16.
__device__ __forceinline__ uint4 eight(const act* w, bool some) {
  return some ? *reinterpret_cast<const uint4*>(w) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ uint2 eight(const signed char* w, bool some) {
  return some ? *reinterpret_cast<const uint2*>(w) : make_uint2(0, 0);
}
__device__ __forceinline__ uint4 pairs(const uint4& x) { return x; }
__device__ __forceinline__ uint4 pairs(const uint2& x) {
  return make_uint4(two_of_int8(x.x, 0), two_of_int8(x.x, 1), two_of_int8(x.y, 0), two_of_int8(x.y, 1));
}

// Steps [from, to) of a tile: of HALVES matrices, `next` weights apart, the UNROLL next ones are in registers.
template <int HALVES, int UNROLL, class W>
struct Weights {
  static constexpr int GROUP = sizeof(W) == 1 ? 2 : 1;
  static_assert(UNROLL % GROUP == 0, "whole groups in registers");
  decltype(eight((const W*)nullptr, true)) at[HALVES][UNROLL];
  const W* mine;
  long long next;
  int to, K;

  // The first input of this lane in step s + u; s is a multiple of GROUP.
  static __device__ __forceinline__ int input(int s, int u) {
    return (s + u / GROUP * GROUP) * STEP + threadIdx.x % 4 * (8 * GROUP) + u % GROUP * 8;
  }
  __device__ __forceinline__ void ask(int s, int u) {
    const int k = input(s, u);
#pragma unroll
    for (int h = 0; h < HALVES; h++) at[h][u] = eight(mine + h * next + k, s + u < to && k < K);
  }
  __device__ __forceinline__ void begin(int from) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) ask(from, u);
  }
};
// Sums of a tile from step `from` on, into part (HALVES, tokens, TILE).
template <int M, int HALVES, int UNROLL, class W>
__device__ __forceinline__ void tile_sums(float* part, Weights<HALVES, UNROLL, W>& w, const act* x, int x_row, int N, int from) {
  if constexpr (STAGED) x = rows_of<HALVES>();
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  float c[HALVES][M][4] = {};
#pragma unroll 1
  for (int s = from; s < w.to; s += UNROLL) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int k = w.input(s, u);
      const bool some = s + u < w.to && k < w.K;
      uint4 b[HALVES];
#pragma unroll
      for (int h = 0; h < HALVES; h++) b[h] = pairs(w.at[h][u]);
      w.ask(s + UNROLL, u);
#pragma unroll
      for (int m = 0; m < M; m++) {
        const int n = m * TOKENS + g;
        const uint4 low = eight(x + (STAGED ? n * x_row : (long long)n * x_row) + k, some && n < N);
        const uint4 high = eight(x + (long long)(n + 8) * x_row + k, !STAGED && some && n + 8 < N);
        const unsigned a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int h = 0; h < HALVES; h++) mma(c[h][m], a[0], b[h].x, b[h].y), mma(c[h][m], a[1], b[h].z, b[h].w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < HALVES * M * 4; i++) {
    const int h = i / 4 / M, m = i / 4 % M, e = i % 4, n = m * TOKENS + g + e / 2 * 8;
    if (!(STAGED && e / 2) && n < N) part[(h * M * ROWS + n) * TILE + q * 2 + e % 2] = c[h][m][e];
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
                                         const W* ahead, long long ahead_size, float eps, int added, int N, int O, int K, int splits) {
  constexpr int HALVES = GATED + 1, SUMS = M * ROWS * TILE, BYTES = sizeof(W);
  constexpr int UNROLL = GATED ? (STAGED ? 4 : 2) : STAGED ? 10 / BYTES : 4;  // as many as there are registers for
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  constexpr int GROUP = Weights<HALVES, UNROLL, W>::GROUP, INPUTS = GROUP * STEP;
  const int groups = (K + INPUTS - 1) / INPUTS, tiles = warps / splits;
  const int split = warp % splits, first = (blockIdx.x * tiles + warp / splits) * TILE;
  const int from = split * groups / splits * GROUP, to = (split + 1) * groups / splits * GROUP;
  let_next_begin();
  float* const parts = reinterpret_cast<float*>(shared_rows());
  const W* const mine = w + (long long)min(first + lane / 4, O - 1) * K;
  Weights<HALVES, UNROLL, W> weights = {{}, mine, (long long)O * K, to, K};
  if constexpr (IS_BF16) weights.begin(from);
  if (threadIdx.x <= HALVES) {
    const long long own = (long long)tiles * TILE * K, share = (ahead_size + gridDim.x - 1) / gridDim.x;
    const bool rest = threadIdx.x == HALVES;
    const long long at = blockIdx.x * (rest ? share : own), end = rest ? ahead_size : weights.next;
    const W* const of = rest ? ahead : w + threadIdx.x * weights.next;
    if (at < end) ask_for(of + at, min(rest ? share : own, end - at) * BYTES);
  }
  // What is added to the first output of a thread is asked for before its sum.
  const auto output_of = [&](int i) { return (blockIdx.x * tiles + i / TILE / N) * TILE + i % TILE; };
  const auto bias_of = [&](int o) { return !GATED && b && o < O ? to_float(b[o]) : 0.f; };
  float bias = bias_of(output_of(threadIdx.x));
  if (STAGED && norm && warp < WARPS)  // a thread finds the weights of the norm where it puts what it makes with them
    for (int k = threadIdx.x * VEC; k < K; k += WARPS * 32 * VEC) store(rows_of<HALVES>() + k, load<VEC>(norm + k));
  wait_for_before();
  const auto old_of = [&](int i) {
    const int o = output_of(i);
    return !GATED && added && i < tiles * N * TILE && o < O ? to_float(y[(long long)(i / TILE % N) * O + o]) : 0.f;
  };
  float old = old_of(threadIdx.x);
  const int x_row = STAGED ? K + PAD : K;
  if constexpr (STAGED) {
    if (norm) norm_rows(rows_of<HALVES>(), x_row, x, rows_of<HALVES>(), parts, eps, N, K);
    else
      for (int n = 0; n < N; n++)
#pragma unroll 2
        for (int k = threadIdx.x * VEC; k < K; k += blockDim.x * VEC)
          store(rows_of<HALVES>() + n * x_row + k, load<VEC>(x + (long long)n * K + k));
    __syncthreads();
  }
  if (first < O) {
    float* const part = parts + warp * HALVES * SUMS;
    if constexpr (IS_BF16) tile_sums<M>(part, weights, x, x_row, N, from);
    else
      for (int h = 0; h < HALVES; h++)
        tile_sums_wide(part + h * SUMS, STAGED ? rows_of<HALVES>() : x, x_row, w + h * weights.next, first, O, N, K, from, to);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tiles * N * TILE; i += blockDim.x) {
    const int r = i % TILE, n = i / TILE % N, tile = i / TILE / N, o = output_of(i);
    if (i >= blockDim.x) bias = bias_of(o), old = old_of(i);
    if (o >= O) continue;
    act& at = y[(long long)n * O + o];
    float out[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      float sum = 0;
      for (int s = 0; s < splits; s++) sum += parts[((tile * splits + s) * HALVES + half) * SUMS + n * TILE + r];
      if (scale) sum *= scale[half * O + o];
      if (!GATED && b) sum += bias;
      act z;
      put(z, sum);
      out[half] = to_float(z);
    }
    if constexpr (GATED) put(at, out[0] * inverse(1.f + exp_(-out[0])) * out[1]);
    else put(at, added ? old + out[0] : out[0]);
  }
}

// y (N,K) = norm of x; a block has a row
extern "C" __global__ void __launch_bounds__(256) decode_norm(act* y, const act* x, const act* w, float eps, int K) {
  __shared__ float sums[WARPS];
  const long long at = (long long)blockIdx.x * K;
  let_next_begin();
  wait_for_before();
  norm_rows(y + at, K, x + at, w, sums, eps, 1, K);
}
// y[n] = scale[id] * w[id], id = ids[n].  y (N,K), ids (N,), w (V,K); a block has a row
extern "C" __global__ void __launch_bounds__(256)
decode_rows_int8(act* y, const int* ids, const signed char* w, const float* scale, int K) {
  const long long id = ids[blockIdx.x];
  for (int k = threadIdx.x; k < K; k += blockDim.x) put(y[(long long)blockIdx.x * K + k], scale[id] * (float)w[id * K + k]);
}

// Three blocks of 8 warps on a multiprocessor, so that those of a gate and up all run at once; few registers, so that there is
// room for the blocks of the next kernel. For sm_100 the compilers would spill.
#if __CUDA_ARCH__ >= 1000
constexpr bool TIGHT = false;
#else
constexpr bool TIGHT = true;
#endif
#define __gated_bounds__ __launch_bounds__(256, TOKEN_TILES < 2 && IS_BF16 && TIGHT ? 3 : 2)
#define __plain_bounds__ __launch_bounds__(512, STAGED && TIGHT ? 2 : 1)
#define KERNEL(NAME, GATED, W, B)                                                                                       \
  extern "C" __global__ void B                                                                                          \
  NAME(act* y, const act* x, const W* w, const float* scale, const act* b, const act* norm, const W* ahead,             \
       long long ahead_size, float eps, int added, int N, int O, int K, int splits) {                                   \
    multiply<TOKEN_TILES ? TOKEN_TILES : 1, GATED>(y, x, w, scale, b, norm, ahead, ahead_size, eps, added, N, O,        \
                                                            K, splits);                                                 \
  }
KERNEL(decode_linear, false, act, __plain_bounds__)
KERNEL(decode_gated, true, act, __gated_bounds__)
KERNEL(decode_linear_int8, false, signed char, __plain_bounds__)
KERNEL(decode_gated_int8, true, signed char, __gated_bounds__)
