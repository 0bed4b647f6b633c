// The gated MLP's product (Shazeer 2020).  s = sigmoid(gate) = 1 / (1 + exp(-gate))
//
//   y = gate * s * up
//   d gate = dy * up * s * (1 + gate * (1 - s));  d up = dy * gate * s
//   gu, dgu (N,2F) hold gate then up, y, dy (N,F)
//
// Launched by rows: swiglu_fwd, swiglu_bwd
#include "common.cuh"

// exp(-gate) overflows to infinity, of which the inverse is 0.
__device__ __forceinline__ float sigmoid(float gate) { return inverse(1.f + exp_(-gate)); }

template <int N>
__device__ __forceinline__ void forward(act* __restrict__ y, const act* __restrict__ gu, int F) {
  const long long row = blockIdx.x;
#pragma unroll 2
  for (int f = threadIdx.x * N; f < F; f += blockDim.x * N) {
    const Pack<N> gate = load<N>(gu + row * 2 * F + f), up = load<N>(gu + row * 2 * F + F + f);
    float out[N];
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
    store(y + row * F + f, rounded(out));
  }
}

template <int N>
__device__ __forceinline__ void backward(act* __restrict__ dgu, const act* __restrict__ dy, const act* __restrict__ gu,
                                         int F) {
  const long long row = blockIdx.x;
#pragma unroll 2
  for (int f = threadIdx.x * N; f < F; f += blockDim.x * N) {
    const Pack<N> gate = load<N>(gu + row * 2 * F + f), up = load<N>(gu + row * 2 * F + F + f);
    const Pack<N> d = load<N>(dy + row * F + f);
    float dgate[N], dup[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float s = sigmoid(gate[i]);
      dgate[i] = d[i] * up[i] * s * (1.f + gate[i] * (1.f - s));
      dup[i] = d[i] * gate[i] * s;
    }
    store(dgu + row * 2 * F + f, rounded(dgate));
    store(dgu + row * 2 * F + F + f, rounded(dup));
  }
}

#define KERNELS(SUFFIX, N)                                                                                       \
  extern "C" __global__ void __launch_bounds__(512) swiglu_fwd##SUFFIX(act* y, const act* gu, int F) {           \
    forward<N>(y, gu, F);                                                                                        \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(512) swiglu_bwd##SUFFIX(act* dgu, const act* dy, const act* gu, int F) { \
    backward<N>(dgu, dy, gu, F);                                                                                 \
  }
KERNELS(_v, VEC)
KERNELS(_1, 1)
