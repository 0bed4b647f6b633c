// Cross-entropy and its gradient in place.
//
//   loss[n] = logsumexp(logits[n]) - logits[n, targets[n]], in nats; 0 where the target is negative
//   logits[n] becomes scale * ((1 + 2 z_loss lse[n]) softmax(logits[n]) - onehot(targets[n])), lse = logsumexp(logits[n]),
//   and 0 where the target is negative: the gradient of scale * (loss + z_loss * lse^2)
//   loss (N,) float, logits (N,V) with rows logits_row elements apart, targets (N,) int; N*V may exceed 2^31
//
// A row belongs to a block, or in equal parts to the BLOCKS blocks of a cluster, which exchange maxima and sums. It is read
// once for the maximum and the sum of exponentials (Milakov and Gimelshein 2018), and the first packs of a part wait for the
// gradient in registers (OWN of each thread) or in shared memory (`held`); the rest is read again, from L2. Rows are taken from
// the last to the first: those were written last by the product before, and lie in L2. What is left of a row after whole packs,
// less than a pack, is taken one by one by the last block.
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

// Join what the blocks of a cluster have of a row, in order: all get the same bits. top, sum: of a block, for the others.
template <int BLOCKS>
__device__ __forceinline__ Softmax joined(const Softmax& mine, float* top, float* sum);

constexpr int GROUP = 4;  // packs that a thread works on at once
constexpr float LOG2E = 1.44269504f;

// The largest of m and the elements of p.
template <int N>
__device__ __forceinline__ float largest(const Pack<N>& p, float m) {
  if constexpr (IS_BF16 && N > 1) {
    const auto* const two = reinterpret_cast<const __nv_bfloat162*>(p.word);
    const __nv_bfloat162 top = __hmax2(__hmax2(two[0], two[1]), __hmax2(two[2], two[3]));
    return fmaxf(m, fmaxf(to_float(top.x), to_float(top.y)));
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) m = fmaxf(m, p[j]);
    return m;
  }
}
// exp(x - top), x <= top; in bfloat16 by a fused product, whose rounding of top * log2(e) all elements of a row share. From
// 2^15 on that rounding would be too much, and in the end infinite; but such numbers lie 128 or more apart, so that the
// power is 1 or 0 with any base.
__device__ __forceinline__ float exp_less(float x, float top) {
  const float base = fabsf(top) < 32768.f ? LOG2E : 1.f;  // log2 of it
  return IS_BF16 ? exp2f(fmaf(x, base, -top * base)) : expf(x - top);
}

// wait: room for `held` packs; tops, sums: for 32 floats each, of a block's shared memory
// With OWN a block has THREADS threads.
template <int N, int BLOCKS, int OWN, int THREADS>
__device__ __forceinline__ void cross_entropy(Pack<N>* wait, float* tops, float* sums, float* loss, act* logits,
                                              const int* targets, long long logits_row, int V, int held, int gradient,
                                              float scale, float z_loss) {
  const int n = (gridDim.x - 1 - blockIdx.x) / BLOCKS, target = targets[n], packs = V / N, warps = blockDim.x / 32;
  const int each = (packs + BLOCKS - 1) / BLOCKS, rank = blockIdx.x % BLOCKS;
  const int begin = rank * each, end = min(packs, begin + each), first_of = begin + threadIdx.x;
  // the thread's own element of what is left, if below V
  const int tail = rank == BLOCKS - 1 ? packs * N + threadIdx.x : V;
  act* const x = logits + n * logits_row;
  if (target < 0) {
    const float zero[N] = {};
    if (gradient) {
      for (int i = first_of; i < end; i += blockDim.x) store(x + (long long)i * N, rounded(zero));
      if (tail < V) put(x[tail], 0);
    }
    if (threadIdx.x == 0 && rank == 0) loss[n] = 0;
    return;
  }
  const float at_target = to_float(x[target]);  // read before a block of the row writes

  Softmax s{LOWEST, 0};
  const int rest = first_of + OWN * THREADS, left = end - first_of;
  act* const from = x + (long long)first_of * N;
  Pack<N> own[OWN > 0 ? OWN : 1];
  if constexpr (OWN > 0) {
#pragma unroll
    for (int g = 0; g < OWN; g++)
      if (g * THREADS < left) own[g] = load<N>(from + g * THREADS * N);
#pragma unroll
    for (int g = 0; g < OWN; g++)
      if (g * THREADS < left) s.top = largest(own[g], s.top);
#pragma unroll
    for (int g = 0; g < OWN; g++)
      if (g * THREADS < left)
#pragma unroll
        for (int j = 0; j < N; j++) s.sum += exp_less(own[g][j], s.top);
  }
  for (int first = rest; first < end; first += GROUP * blockDim.x) {
    Pack<N> p[GROUP];
    float m = s.top;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < end) p[g] = load<N>(x + (long long)i * N);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (OWN == 0 && i - begin < held) wait[i - begin] = p[g];
      if (i < end) m = largest(p[g], m);
    }
    s.sum *= exp_(s.top - m);
    s.top = m;
#pragma unroll
    for (int g = 0; g < GROUP; g++)
      if (first + g * blockDim.x < end)
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
  if constexpr (BLOCKS > 1) s = joined<BLOCKS>(s, tops, sums);

  if (threadIdx.x == 0 && rank == 0) loss[n] = logf(s.sum) + (s.top - at_target);
  if (!gradient) return;
  const float share = scale * (1 + 2 * z_loss * (s.top + logf(s.sum))) / s.sum;
  // on: elements from the first of a pack to the target
  auto gradient_of = [&](act* at, const Pack<N>& p, int on, auto exp_of) {
    float d[N];
#pragma unroll
    for (int j = 0; j < N; j++) d[j] = exp_of(p[j], s.top) * share;
    if (on >= 0 && on < N)
#pragma unroll
      for (int j = 0; j < N; j++)
        if (j == on) d[j] -= scale;
    store(at, rounded(d));
  };
  const int on = target - first_of * N;
  if constexpr (OWN > 0)
#pragma unroll
    for (int g = 0; g < OWN; g++)
      if (g * THREADS < left) gradient_of(from + g * THREADS * N, own[g], on - g * THREADS * N, exp_less);
  for (int first = rest; first < end; first += GROUP * blockDim.x) {
    Pack<N> p[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < end) p[g] = OWN == 0 && i - begin < held ? wait[i - begin] : load<N>(x + (long long)i * N);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int i = first + g * blockDim.x;
      if (i < end)
        gradient_of(x + (long long)i * N, p[g], target - i * N, [](float x, float top) { return exp_(x - top); });
    }
  }
  if (tail < V) put(x[tail], exp_(to_float(x[tail]) - s.top) * share - (tail == target ? scale : 0));
}
