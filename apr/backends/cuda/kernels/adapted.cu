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
