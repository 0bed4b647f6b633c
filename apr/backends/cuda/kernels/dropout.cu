// Dropout whose mask is computed where it is needed, forward and backward (Srivastava et al. 2014): nothing stores it.
//
//   out = scale x where an element is kept, else 0;  scale = factor / (1 - p)
//   Element e of sequence b is kept where word e % 4 of Philox4x32-10 (Salmon et al. 2011, section 3.3) with the key
//   (seed, seed >> 32) and the counter (e / 4, module, counters[b]) is at least `least` = p 2^32
//   out, x (B,n) act, n = T C; counters (B,2) int: the number of a sequence in its step, and the step. out may be x
//
// grid (pieces of n, B or fewer), block (256): a thread has N neighbours of a sequence, 1 or a multiple of 4. The counters are
// read from memory, so that a recorded pass draws anew each step.
#include "common.cuh"

struct Words { unsigned w[4]; };

__device__ __forceinline__ Words philox(Words c, unsigned k0, unsigned k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const unsigned long long first = 0xD2511F53ull * c.w[0], second = 0xCD9E8D57ull * c.w[2];
    c = {{(unsigned)(second >> 32) ^ c.w[1] ^ k0, (unsigned)second, (unsigned)(first >> 32) ^ c.w[3] ^ k1, (unsigned)first}};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c;
}

template <int N>
__device__ __forceinline__ void drop(act* out, const act* x, const int* counters, long long seed, int module,
                                     long long least, float scale, long long n, int B) {
  const long long e = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (e >= n) return;
  const unsigned k0 = (unsigned)seed, k1 = (unsigned)((unsigned long long)seed >> 32);
  for (int b = blockIdx.y; b < B; b += gridDim.y) {
    const unsigned number = counters[2 * b], step = counters[2 * b + 1];
    const Pack<N> in = load<N>(x + b * n + e);
    float y[N];
#pragma unroll
    for (int first = 0; first < N; first += 4) {
      const Words drawn = philox({{(unsigned)((e + first) / 4), (unsigned)module, number, step}}, k0, k1);
#pragma unroll
      for (int i = 0; i < 4 && first + i < N; i++) {
        const int own = e % 4;  // of an element alone
        const unsigned word = N > 1 ? drawn.w[i] : own < 2 ? drawn.w[own == 1] : drawn.w[own == 3 ? 3 : 2];
        y[first + i] = word >= (unsigned)least ? in[first + i] * scale : 0.f;
      }
    }
    store(out + b * n + e, rounded(y));
  }
}

#define KERNELS(SUFFIX, N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256) dropout##SUFFIX(                                                  \
      act* out, const act* x, const int* counters, long long seed, int module, long long least, float scale,          \
      long long n, int B) {                                                                                           \
    drop<N>(out, x, counters, seed, module, least, scale, n, B);                                                      \
  }
KERNELS(_v, VEC)
KERNELS(_1, 1)
