// The gated MLP's product (Shazeer 2020).  s = sigmoid(gate) = 1 / (1 + exp(-gate))
//
//   y = gate * s * up
//   d gate = dy * up * s * (1 + gate * (1 - s));  d up = dy * gate * s
//   gu, dgu (N,2F) hold gate then up, y, dy (N,F)
//   swiglu_again: both, dgu in place of gu
//
// Launched by rows: swiglu_fwd, swiglu_bwd, swiglu_again
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
__device__ __forceinline__ void gradients(float (&dgate)[N], float (&dup)[N], float (&y)[N], const Pack<N>& gate,
                                          const Pack<N>& up, const Pack<N>& d) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float s = sigmoid(gate[i]);
    dgate[i] = d[i] * up[i] * s * (1.f + gate[i] * (1.f - s));
    dup[i] = d[i] * gate[i] * s;
    y[i] = gate[i] * s * up[i];
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
    float dgate[N], dup[N], y[N];
    gradients(dgate, dup, y, gate, up, d);
    store(dgu + row * 2 * F + f, rounded(dgate));
    store(dgu + row * 2 * F + F + f, rounded(dup));
  }
}

// A thread loads two pieces before it stores the first: the compiler cannot know that they do not meet.
template <int N>
__device__ __forceinline__ void again(act* __restrict__ y, act* gu, const act* __restrict__ dy, int F) {
  constexpr int PIECES = 2;
  const long long row = blockIdx.x;
  y += row * F, gu += row * 2 * F, dy += row * F;
  for (int first = threadIdx.x * N; first < F; first += PIECES * blockDim.x * N) {
    Pack<N> gate[PIECES], up[PIECES], d[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int f = first + p * blockDim.x * N;
      if (f < F) gate[p] = load<N>(gu + f), up[p] = load<N>(gu + F + f), d[p] = load<N>(dy + f);
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int f = first + p * blockDim.x * N;
      if (f >= F) break;
      float dgate[N], dup[N], out[N];
      gradients(dgate, dup, out, gate[p], up[p], d[p]);
      store(y + f, rounded(out));
      store(gu + f, rounded(dgate));
      store(gu + F + f, rounded(dup));
    }
  }
}

#define KERNELS(SUFFIX, N)                                                                                       \
  extern "C" __global__ void __launch_bounds__(512) swiglu_fwd##SUFFIX(act* y, const act* gu, int F) {           \
    forward<N>(y, gu, F);                                                                                        \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(512) swiglu_bwd##SUFFIX(act* dgu, const act* dy, const act* gu, int F) { \
    backward<N>(dgu, dy, gu, F);                                                                                 \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(512, 2) swiglu_again##SUFFIX(act* y, act* gu, const act* dy, int F) { \
    again<N>(y, gu, dy, F);                                                                                      \
  }
KERNELS(_v, VEC)
KERNELS(_1, 1)
