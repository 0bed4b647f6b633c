// Rotary positions, in place (Su et al. 2021, eq. 34, with the halves split as in GPT-NeoX).
//
//   (x[d], x[d + D/2]) turned by sign * angle[t]:  a cos - b sin, b cos + a sin
//   x (B,T,heads,D), cos, sin (T,D/2) float; positions are x_row elements apart, sequences x_batch, heads D
//
// A thread turns the same N pairs of HEADS heads, so that cos and sin are read once for all of them.
#include "common.cuh"

constexpr int HEADS = 4;

template <int N>
__device__ __forceinline__ void turn(act* x, const float* cos, const float* sin, long long x_batch, long long x_row, int B,
                                     int T, int heads, int D, float sign) {
  const int half = D / 2, chunks = half / N, groups = (heads + HEADS - 1) / HEADS;
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, n = i / (chunks * groups);
  if (n >= (long long)B * T) return;
  const int left = i % (chunks * groups), d = left % chunks * N, first = left / chunks, t = n % T;
  float c[N], s[N];
  load_floats(c, cos + (long long)t * half + d);
  load_floats(s, sin + (long long)t * half + d);
  x += n / T * x_batch + t * x_row + d;
  Pack<N> a[HEADS], b[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (first + h * groups < heads) {
      a[h] = load<N>(x + (first + h * groups) * D);
      b[h] = load<N>(x + (first + h * groups) * D + half);
    }
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (first + h * groups < heads) {
      float p[N], q[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        p[j] = a[h][j] * c[j] - b[h][j] * (sign * s[j]);
        q[j] = b[h][j] * c[j] + a[h][j] * (sign * s[j]);
      }
      store(x + (first + h * groups) * D, rounded(p));
      store(x + (first + h * groups) * D + half, rounded(q));
    }
}

#define KERNEL(NAME, N)                                                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                                                   \
  NAME(act* x, const float* cos, const float* sin, long long x_batch, long long x_row, int B, int T, int heads, int D, \
       float sign) {                                                                                                  \
    turn<N>(x, cos, sin, x_batch, x_row, B, T, heads, D, sign);                                                       \
  }
KERNEL(rope_v, VEC)
KERNEL(rope_1, 1)
