// Cross-entropy and its gradient in place.
//
//   loss[n] = logsumexp(logits[n]) - logits[n, targets[n]], in nats; 0 where the target is negative
//   logits[n] becomes scale * ((1 + 2 z_loss lse[n]) softmax(logits[n]) - onehot(targets[n])), lse = logsumexp(logits[n]),
//   and 0 where the target is negative: the gradient of scale * (loss + z_loss * lse^2)
//   loss (N,) float, logits (N,V) with rows logits_row elements apart, targets (N,) int; N*V may exceed 2^31
//
// A block has one row. It is read once for the maximum and the sum of exponentials (Milakov and Gimelshein 2018), and
// its first `held` packs wait in shared memory for the gradient; the rest is read again, from L2. Blocks take the rows
// from the last to the first: those were written last by the product before, and lie in L2. What is left of a row after
// whole packs, less than a pack, is taken one by one.
#include "common.cuh"

struct Softmax {
  float top, sum;  // maximum, sum of exp(x - maximum); no NaN arises where there is no x yet
  __device__ __forceinline__ void join(float other_top, float other_sum) {
    const float m = fmaxf(top, other_top);
    sum = sum * exp_(top - m) + other_sum * exp_(other_top - m);
    top = m;
  }
};
constexpr float LOWEST = -3.402823466e38f;
constexpr int GROUP = 4;  // packs that a thread asks for before it waits for the first

template <int N>
__device__ __forceinline__ void cross_entropy(float* loss, act* logits, const int* targets, long long logits_row, int V,
                                              int held, int gradient, float scale, float z_loss) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ float tops[32], sums[32];
  Pack<N>* const wait = reinterpret_cast<Pack<N>*>(dynamic_shared);
  const int n = gridDim.x - 1 - blockIdx.x, target = targets[n], packs = V / N, warps = blockDim.x / 32;
  const int tail = packs * N + threadIdx.x;  // the thread's own element of it, if below V
  act* const x = logits + n * logits_row;
  if (target < 0) {
    const float zero[N] = {};
    if (gradient) {
      for (int i = threadIdx.x; i < packs; i += blockDim.x) store(x + (long long)i * N, rounded(zero));
      if (tail < V) put(x[tail], 0);
    }
    if (threadIdx.x == 0) loss[n] = 0;
    return;
  }
  const float at_target = to_float(x[target]);

  Softmax s{LOWEST, 0};
  for (int first = threadIdx.x; first < packs; first += GROUP * blockDim.x) {
    Pack<N> p[GROUP];
    float m = s.top;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < packs) p[g] = load<N>(x + (long long)i * N);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < held) wait[i] = p[g];
      if (i < packs)
#pragma unroll
        for (int j = 0; j < N; j++) m = fmaxf(m, p[g][j]);
    }
    s.sum *= exp_(s.top - m);
    s.top = m;
#pragma unroll
    for (int g = 0; g < GROUP; g++)
      if (first + g * blockDim.x < packs)
#pragma unroll
        for (int j = 0; j < N; j++) s.sum += exp_(p[g][j] - m);
  }
  if (tail < V) s.join(to_float(x[tail]), 1);
  for (int o = 16; o; o /= 2) {
    const float top = __shfl_xor_sync(~0u, s.top, o), sum = __shfl_xor_sync(~0u, s.sum, o);
    s.join(top, sum);
  }
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = s.top, sums[threadIdx.x / 32] = s.sum;
  __syncthreads();
  s = Softmax{tops[0], sums[0]};
  for (int i = 1; i < warps; i++) s.join(tops[i], sums[i]);

  if (threadIdx.x == 0) loss[n] = logf(s.sum) + (s.top - at_target);
  if (!gradient) return;
  const float share = scale * (1 + 2 * z_loss * (s.top + logf(s.sum))) / s.sum;
  for (int first = threadIdx.x; first < packs; first += GROUP * blockDim.x) {
    Pack<N> p[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < packs) p[g] = i < held ? wait[i] : load<N>(x + (long long)i * N);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i >= packs) break;
      float d[N];
#pragma unroll
      for (int j = 0; j < N; j++) d[j] = exp_(p[g][j] - s.top) * share;
      if (i == target / N)
#pragma unroll
        for (int j = 0; j < N; j++)
          if (j == target % N) d[j] -= scale;
      store(x + (long long)i * N, rounded(d));
    }
  }
  if (tail < V) put(x[tail], exp_(to_float(x[tail]) - s.top) * share - (tail == target ? scale : 0));
}

// shared: held * 16 bytes (held * sizeof(act))
#define KERNEL(NAME, N)                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024)                                                                \
  NAME(float* loss, act* logits, const int* targets, long long logits_row, int V, int held, int gradient,           \
       float scale, float z_loss) {                                                                                 \
    cross_entropy<N>(loss, logits, targets, logits_row, V, held, gradient, scale, z_loss);                          \
  }
KERNEL(cross_entropy_v, VEC)
KERNEL(cross_entropy_1, 1)
