// Sums over flat arrays, the sum of two, the factor that clips gradients, and AdamW (Loshchilov and Hutter 2019, algorithm 2).
//
//   total[0] += sum x, or sum x^2;  out = round(a + b);  factor[0] = min(1, max_norm / (sqrt(sum_sq[0]) + 1e-6))
//   g' = factor[0] * g;  m += (1 - beta1) (g' - m);  v += (1 - beta2) (g'^2 - v)
//   master -= lr * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + decay * master);  w = round(master);
//   square += sum master^2, of the new master
//   x, master, m, v, g (n,) float, w, out, a, b (n,); total, factor, sum_sq, square (1,)
//   double. master may be w itself, out a or b
//
// Sums are in double: every thread over its elements, every block, then sum_add over the blocks, in order. The
// elements after the last whole piece of VEC or 4 are taken one by one.
#include "common.cuh"

template <int N>
__device__ __forceinline__ void sum(double* partial, const float* x, long long n) {
  const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, threads = (long long)gridDim.x * blockDim.x;
  double total = 0;
#pragma unroll 4
  for (long long i = thread; i < n / N; i += threads) {
    float v[N];
    load_floats(v, x + i * N);
#pragma unroll
    for (int j = 0; j < N; j++) total += v[j];
  }
  const long long rest = n / N * N + thread;
  if (rest < n) total += x[rest];
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) sum_v(double* partial, const float* x, long long n) {
  sum<4>(partial, x, n);
}
extern "C" __global__ void __launch_bounds__(256) sum_1(double* partial, const float* x, long long n) {
  sum<1>(partial, x, n);
}

// partial[b] += sum of x^2, or with adds = 0 that sum, over the b-th `row` elements of x: where in a longer array they lie
// does not matter, so a rank that has some of the rows gets the bits of one that has all. A thread has N neighbours at a
// time; with a row of 256 N those that it has in adamw, whose sums over the new weights have the same bits.
template <int N>
__device__ __forceinline__ void squares(double* partial, const float* x, long long n, long long row, int adds) {
  x += blockIdx.x * row;
  const long long length = min(row, n - blockIdx.x * row);
  double total = 0;
#pragma unroll 4
  for (long long i = threadIdx.x; i < length / N; i += 256) {
    float v[N];
    load_floats(v, x + i * N);
#pragma unroll
    for (int j = 0; j < N; j++) total += (double)v[j] * v[j];
  }
  const long long left = length / N * N + threadIdx.x;
  if (left < length) total += (double)x[left] * x[left];
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = (adds ? partial[blockIdx.x] : 0) + total;
}

#define SQUARES(NAME, N)                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                     \
  NAME(double* partial, const float* x, long long n, long long row, int adds) {         \
    squares<N>(partial, x, n, row, adds);                                               \
  }
SQUARES(squares_8, 8)
SQUARES(squares_4, 4)
SQUARES(squares_1, 1)

// total[0] += sum of partial (parts,); one block
extern "C" __global__ void __launch_bounds__(1024) sum_add(double* total, const double* partial, int parts) {
  constexpr int AHEAD = 16;  // that a thread asks for at once
  double sum = 0;
  for (int first = threadIdx.x; first < parts; first += AHEAD * blockDim.x) {
    double x[AHEAD];
#pragma unroll
    for (int g = 0; g < AHEAD; g++) x[g] = first + g * blockDim.x < parts ? partial[first + g * blockDim.x] : 0;
#pragma unroll
    for (int g = 0; g < AHEAD; g++) sum += x[g];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) total[0] += sum;
}

template <int N>
__device__ __forceinline__ void add(act* out, const act* a, const act* b, long long n) {
  const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i + N <= n) {
    const Pack<N> x = load<N>(a + i), y = load<N>(b + i);
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] = x[j] + y[j];
    store(out + i, rounded(sum));
    return;
  }
  for (long long j = i; j < n; j++) put(out[j], to_float(a[j]) + to_float(b[j]));
}

extern "C" __global__ void __launch_bounds__(256) add_v(act* out, const act* a, const act* b, long long n) {
  add<VEC>(out, a, b, n);
}
extern "C" __global__ void __launch_bounds__(256) add_1(act* out, const act* a, const act* b, long long n) {
  add<1>(out, a, b, n);
}

// max_norm is the sum of two floats, which is a double to 48 bits. Not finite when sum_sq is not.
extern "C" __global__ void clip_factor(double* factor, const double* sum_sq, float max_norm, float max_norm_rest) {
  factor[0] = fmin(1., ((double)max_norm + max_norm_rest) / (sqrt(sum_sq[0]) + 1e-6)) + 0 * sum_sq[0];
}

struct Step {
  float factor, lr, rate1, rate2, bias1, bias2, eps, decay;  // rate = 1 - beta, bias = 1 - beta^step
  __device__ __forceinline__ void operator()(float& master, float& m, float& v, float g) const {
    g *= factor;
    m += rate1 * (g - m);
    v += rate2 * (g * g - v);
    master -= lr * (m / bias1 / (sqrtf(v / bias2) + eps) + decay * master);
  }
};

template <int N>
__device__ __forceinline__ void adamw(act* w, float* master, float* m, float* v, double* partial, const float* g,
                                      const Step& step, long long n) {
  const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  const bool own = (const void*)w != (const void*)master;
  double square = 0;
  if (i + N <= n) {
    float a[N], b[N], c[N], d[N];
    load_floats(a, master + i), load_floats(b, m + i), load_floats(c, v + i), load_floats(d, g + i);
#pragma unroll
    for (int j = 0; j < N; j++) step(a[j], b[j], c[j], d[j]);
    store_floats(master + i, a), store_floats(m + i, b), store_floats(v + i, c);
    if (own) store(w + i, rounded(a));
#pragma unroll
    for (int j = 0; j < N; j++) square += (double)a[j] * a[j];
  } else {
    for (long long j = i; j < n; j++) {
      step(master[j], m[j], v[j], g[j]);
      if (own) put(w[j], master[j]);
      square += (double)master[j] * master[j];
    }
  }
  square = block_sum(square);
  if (threadIdx.x == 0) partial[blockIdx.x] = square;
}

#define ADAMW(NAME, N)                                                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                                                 \
  NAME(act* w, float* master, float* m, float* v, double* partial, const float* g, const double* factor,            \
       long long n, float lr, float rate1, float rate2, float bias1, float bias2, float eps, float decay) {         \
    adamw<N>(w, master, m, v, partial, g, Step{(float)factor[0], lr, rate1, rate2, bias1, bias2, eps, decay}, n);            \
  }
ADAMW(adamw_v, VEC)
ADAMW(adamw_1, 1)
