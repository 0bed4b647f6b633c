// A matrix under adapters (Hu et al. 2022).  out = w + factor b a;  of 8-bit integers out[o] = row[o] w[o] + factor (b a)[o]
//
//   out (O,I) act, w (O,I) act or int8, row (O,) float, b (O,R), a (R,I) float, or both null with R = 0
//
// grid (pieces of I, O / ROWS), block (x): a thread has N columns of ROWS rows. The products are added in the order of R,
// in float, and the sum is rounded once. Rows of b lie in shared memory, RANKS of their elements at a time.
#include "common.cuh"

constexpr int ROWS = 8, RANKS = 32;

// N neighbouring elements of a row of w.
template <int N>
__device__ __forceinline__ void read(float (&x)[N], const act* p) {
  const Pack<N> w = load<N>(p);
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = w[i];
}
template <int N>
__device__ __forceinline__ void read(float (&x)[N], const signed char* p) {
  if constexpr (N == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const char4 w = *reinterpret_cast<const char4*>(p + i);
      x[i] = w.x, x[i + 1] = w.y, x[i + 2] = w.z, x[i + 3] = w.w;
    }
  }
}

template <int N, class W>
__device__ __forceinline__ void sums(act* __restrict__ out, const W* __restrict__ w, const float* __restrict__ row,
                                     const float* __restrict__ b, const float* __restrict__ a, float factor, int O, int I,
                                     int R) {
  __shared__ float part[ROWS][RANKS];
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * N, first = blockIdx.y * ROWS;
  float sum[ROWS][N] = {};
  for (int r0 = 0; r0 < R; r0 += RANKS) {
    const int ranks = min(RANKS, R - r0);
    for (int t = threadIdx.x; t < ROWS * RANKS; t += blockDim.x) {
      const int o = first + t / RANKS, r = t % RANKS;
      part[t / RANKS][r] = o < O && r < ranks ? b[(long long)o * R + r0 + r] : 0.f;
    }
    __syncthreads();
    if (i < I)
      for (int r = 0; r < ranks; r++) {
        float x[N];
        load_floats(x, a + (long long)(r0 + r) * I + i);
#pragma unroll
        for (int o = 0; o < ROWS; o++)
#pragma unroll
          for (int j = 0; j < N; j++) sum[o][j] += part[o][r] * x[j];
      }
    __syncthreads();
  }
  if (i >= I) return;
#pragma unroll
  for (int o = 0; o < ROWS; o++) {
    if (first + o >= O) break;
    const long long at = (long long)(first + o) * I + i;
    float x[N];
    read(x, w + at);
    const float scale = row ? row[first + o] : 1.f;
#pragma unroll
    // a product of its own: no fused sum, so that w alone has the bits of the reference
    for (int j = 0; j < N; j++) x[j] = row ? __fmul_rn(scale, x[j]) : x[j];
    if (R)
#pragma unroll
      for (int j = 0; j < N; j++) x[j] += factor * sum[o][j];
    store(out + at, rounded(x));
  }
}

// The same for R up to FEW, and rows of w and out of whole 16 bytes: a thread keeps a of its QUAD columns in registers, for
// `rows` rows of a block, of which TURN are asked for at once. Ranks that are not there are zeros, so that no bit differs.
constexpr int FEW = 16, QUAD = 4, TURN = 8, MOST_ROWS = 64;

__device__ __forceinline__ void four(float (&x)[QUAD], const float4& w) { x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w; }
__device__ __forceinline__ void four(float (&x)[QUAD], const uint2& w) {
  x[0] = __uint_as_float(w.x << 16), x[1] = __uint_as_float(w.x & 0xffff0000u);
  x[2] = __uint_as_float(w.y << 16), x[3] = __uint_as_float(w.y & 0xffff0000u);
}
__device__ __forceinline__ void four(float (&x)[QUAD], const char4& w) { x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w; }
__device__ __forceinline__ void put_four(float* p, const float (&x)[QUAD]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void put_four(__nv_bfloat16* p, const float (&x)[QUAD]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]), high = __floats2bfloat162_rn(x[2], x[3]);
  *reinterpret_cast<uint2*>(p) = make_uint2(*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high));
}
__device__ __forceinline__ float4 quad_of(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ uint2 quad_of(const __nv_bfloat16* p) { return *reinterpret_cast<const uint2*>(p); }
__device__ __forceinline__ char4 quad_of(const signed char* p) { return *reinterpret_cast<const char4*>(p); }

template <class W>
__device__ __forceinline__ void sums_few(act* __restrict__ out, const W* __restrict__ w, const float* __restrict__ row,
                                         const float* __restrict__ b, const float* __restrict__ a, float factor, int O, int I,
                                         int R, int rows) {
  __shared__ float4 part[MOST_ROWS][FEW / 4];
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * QUAD, first = blockIdx.y * rows, last = min(first + rows, O);
  for (int t = threadIdx.x; t < (last - first) * FEW; t += blockDim.x)
    reinterpret_cast<float*>(part)[t] = t % FEW < R ? b[(long long)(first + t / FEW) * R + t % FEW] : 0.f;
  __syncthreads();
  if (i >= I) return;
  float own[FEW][QUAD];
#pragma unroll
  for (int r = 0; r < FEW; r++) {
    const float4 x = r < R ? quad_of(a + (long long)r * I + i) : make_float4(0, 0, 0, 0);
    four(own[r], x);
  }
  for (int o = first; o < last; o += TURN) {
    decltype(quad_of(w)) read[TURN];
#pragma unroll
    for (int t = 0; t < TURN; t++)
      if (o + t < last) read[t] = quad_of(w + (long long)(o + t) * I + i);
#pragma unroll
    for (int t = 0; t < TURN; t++) {
      if (o + t >= last) break;
      float sum[QUAD] = {}, x[QUAD];
#pragma unroll
      for (int r = 0; r < FEW; r += 4) {
        const float4 f = part[o + t - first][r / 4];
        const float of[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int j = 0; j < QUAD; j++) sum[j] += of[k] * own[r + k][j];
      }
      four(x, read[t]);
      const float scale = row ? row[o + t] : 1.f;
#pragma unroll
      for (int j = 0; j < QUAD; j++) x[j] = (row ? __fmul_rn(scale, x[j]) : x[j]) + factor * sum[j];
      put_four(out + (long long)(o + t) * I + i, x);
    }
  }
}
extern "C" __global__ void __launch_bounds__(128, 4)
adapted_few(act* out, const act* w, const float* b, const float* a, float factor, int O, int I, int R, int rows) {
  sums_few(out, w, nullptr, b, a, factor, O, I, R, rows);
}
extern "C" __global__ void __launch_bounds__(128, 4)
adapted_int8_few(act* out, const signed char* w, const float* row, const float* b, const float* a, float factor, int O, int I,
                 int R, int rows) {
  sums_few(out, w, row, b, a, factor, O, I, R, rows);
}

#define KERNELS(SUFFIX, N)                                                                                             \
  extern "C" __global__ void __launch_bounds__(128) adapted##SUFFIX(                                                   \
      act* out, const act* w, const float* b, const float* a, float factor, int O, int I, int R) {                     \
    sums<N>(out, w, nullptr, b, a, factor, O, I, R);                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128) adapted_int8##SUFFIX(                                              \
      act* out, const signed char* w, const float* row, const float* b, const float* a, float factor, int O, int I,    \
      int R) {                                                                                                         \
    sums<N>(out, w, row, b, a, factor, O, I, R);                                                                       \
  }
KERNELS(_v, VEC)
KERNELS(_1, 1)
