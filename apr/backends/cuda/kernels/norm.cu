// RMSNorm over the last axis, with the residual add before it, and over each head (Zhang and Sennrich 2019, eq. 4).
//
//   add_rmsnorm   res = round(res_in + delta);  rstd = (mean_c res^2 + eps)^(-1/2);  y = res * rstd * w
//                 dres += rstd * (g - xhat * mean_c(g * xhat)),  g = dy * w,  xhat = res * rstd;  dw += sum_n dy * xhat
//                 res, y, res_in, delta, dres, dy (N,C), rstd (N,) float, w (C,), dw (C,) float; delta may be null
//   head_rmsnorm  the same without res and with dx overwritten, over x, y, dx, dy (N,heads,D): a row n begins ..._row
//                 elements after the one before, heads are D apart; rstd (N,heads) float, w (D,), dw (D,) float
//
// The norm is computed from the rounded res, so that backward sees what forward saw. The weights' gradients are summed
// per block over its rows into partial (gridDim.x, C), and then over blocks by norm_add. In add_rmsnorm_v and
// head_rmsnorm a row belongs to blockDim.x threads, a power of two up to 32 or the whole block, each of which holds up
// to EACH (EACH_HEAD) of its elements in registers; in add_rmsnorm_1 a block has one row of any length. A norm over all
// heads is head_rmsnorm of one head.
#include "common.cuh"

constexpr int PACKS = 4, EACH = PACKS * VEC, EACH_HEAD = 16, MOST_THREADS = 512, FEW_THREADS = 256;

__device__ __forceinline__ float inverse_rms(float sum, int n, float eps) { return 1.f / sqrtf(sum / n + eps); }

// One row, in K pieces of N elements a thread, that is held as x: y = x * rstd * w
template <int N, int K>
__device__ __forceinline__ void normalise(act* y, float* rstd, const Pack<N> (&x)[K], const act* w, float eps, int C,
                                          bool live) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < K; k++)
    if ((k * blockDim.x + threadIdx.x) * N < C)
#pragma unroll
      for (int i = 0; i < N; i++) sum += x[k][i] * x[k][i];
  const float r = inverse_rms(row_sum(live ? sum : 0), C, eps);
  if (!live) return;
  if (threadIdx.x == 0) *rstd = r;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c < C) {
      const Pack<N> weight = load<N>(w + c);
      float out[N];
#pragma unroll
      for (int i = 0; i < N; i++) out[i] = x[k][i] * r * weight[i];
      store(y + c, rounded(out));
    }
  }
}

template <int N>
__device__ __forceinline__ void head_fwd(act* y, float* rstd, const act* x, const act* w, float eps, long long y_row,
                                         long long rstd_row, long long x_row, int rows, int heads, int D) {
  constexpr int K = EACH_HEAD / N;
  const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y, n = row / heads;
  const int h = row % heads;
  const bool live = row < (long long)rows * heads;
  Pack<N> held[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < D) held[k] = load<N>(x + n * x_row + h * D + c);
  }
  normalise<N, K>(y + n * y_row + h * D, rstd + n * rstd_row + h, held, w, eps, D, live);
}

// Gradient of one row, and its part of dw. OLD: dx is added to.
template <int N, int K, bool OLD>
__device__ __forceinline__ void gradient(act* dx, float (&dw)[K][N], const act* dy, const act* x, float r, const act* w,
                                         int C, bool live) {
    Pack<N> up[K], held[K], old[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < C) {
      up[k] = load<N>(dy + c);
      held[k] = load<N>(x + c);
      if constexpr (OLD) old[k] = load<N>(dx + c);
    }
  }
  float dot = 0;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < C) {
      const Pack<N> weight = load<N>(w + c);
#pragma unroll
      for (int i = 0; i < N; i++) dot += up[k][i] * weight[i] * (held[k][i] * r);
    }
  }
  const float mean = row_sum(dot) / C;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < C) {
      const Pack<N> weight = load<N>(w + c);
      float out[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float xhat = held[k][i] * r;
        dw[k][i] += up[k][i] * xhat;
        out[i] = r * (up[k][i] * weight[i] - xhat * mean);
        if constexpr (OLD) out[i] += old[k][i];
      }
      store(dx + c, rounded(out));
    }
  }
}

// partial[blockIdx.x] = sum of dw over the block's rows, in the order of threadIdx.y. A block of several rows has at most 256
// threads.
template <int N, int K>
__device__ __forceinline__ void write_partial(float* partial, const float (&dw)[K][N], int C) {
  __shared__ __align__(16) float sums[256 * K * N];
  partial += (long long)blockIdx.x * C;
  float* row = blockDim.y > 1 ? sums + threadIdx.y * C : partial;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c < C) store_floats(row + c, dw[k]);
  }
  if (blockDim.y == 1) return;
  __syncthreads();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < C; c += blockDim.x * blockDim.y) {
    float sum = sums[c];
    for (int y = 1; y < blockDim.y; y++) sum += sums[y * C + c];
    partial[c] = sum;
  }
}

template <int N>
__device__ __forceinline__ void head_bwd(act* dx, float* partial, const act* dy, const act* x, const float* rstd,
                                         const act* w, long long dx_row, long long dy_row, long long x_row,
                                         long long rstd_row, int rows, int heads, int D) {
  float dw[EACH_HEAD / N][N] = {};
  const long long all = (long long)rows * heads;
  for (long long first = (long long)blockIdx.x * blockDim.y; first < all; first += gridDim.x * blockDim.y) {
    const long long row = first + threadIdx.y, n = row / heads, h = row % heads;
    const bool live = row < all;
    gradient<N, EACH_HEAD / N, false>(dx + n * dx_row + h * D, dw, dy + n * dy_row + h * D, x + n * x_row + h * D,
                                      live ? rstd[n * rstd_row + h] : 0, w, D, live);
  }
  write_partial(partial, dw, D);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
add_rmsnorm_fwd_v(act* res, act* y, float* rstd, const act* res_in, const act* delta, const act* w, float eps, int rows,
                  int C) {
  constexpr int N = VEC, K = EACH / N;
  const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y, at = row * C;
  const bool live = row < rows;
  Pack<N> x[K], d[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < C) {
      x[k] = load<N>(res_in + at + c);
      if (delta) d[k] = load<N>(delta + at + c);
    }
  }
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (live && c < C && delta) {
      float sum[N];
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] = x[k][i] + d[k][i];
      x[k] = rounded(sum);
    }
    if (live && c < C && (delta || res != res_in)) store(res + at + c, x[k]);
  }
  normalise<N, K>(y + at, rstd + row, x, w, eps, C, live);
}

extern "C" __global__ void __launch_bounds__(1024)
add_rmsnorm_fwd_1(act* res, act* y, float* rstd, const act* res_in, const act* delta, const act* w, float eps, int rows,
                  int C) {
  const long long at = (long long)blockIdx.x * C;
  float sum = 0;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    const float x[1] = {to_float(res_in[at + c]) + (delta ? to_float(delta[at + c]) : 0)};
    const Pack<1> r = rounded(x);
    store(res + at + c, r);
    sum += r[0] * r[0];
  }
  const float r = inverse_rms(block_sum(sum), C, eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (int c = threadIdx.x; c < C; c += blockDim.x) put(y[at + c], to_float(res[at + c]) * r * to_float(w[c]));
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
add_rmsnorm_bwd_v(act* dres, float* partial, const act* dy, const act* res, const float* rstd, const act* w, int rows,
                  int C) {
  float dw[EACH / VEC][VEC] = {};
  for (long long first = (long long)blockIdx.x * blockDim.y; first < rows; first += gridDim.x * blockDim.y) {
    const long long row = first + threadIdx.y, at = row * C;
    const bool live = row < rows;
    gradient<VEC, EACH / VEC, true>(dres + at, dw, dy + at, res + at, live ? rstd[row] : 0, w, C, live);
  }
  write_partial(partial, dw, C);
}

extern "C" __global__ void __launch_bounds__(1024)
add_rmsnorm_bwd_1(act* dres, float* partial, const act* dy, const act* res, const float* rstd, const act* w, int rows,
                  int C) {
  partial += (long long)blockIdx.x * C;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const long long at = (long long)row * C;
    const float r = rstd[row];
    float dot = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x)
      dot += to_float(dy[at + c]) * to_float(w[c]) * (to_float(res[at + c]) * r);
    const float mean = block_sum(dot) / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      const float up = to_float(dy[at + c]), xhat = to_float(res[at + c]) * r;
      partial[c] = (row == blockIdx.x ? 0 : partial[c]) + up * xhat;
      put(dres[at + c], to_float(dres[at + c]) + r * (up * to_float(w[c]) - xhat * mean));
    }
  }
}

#define HEAD(SUFFIX, N, THREADS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                            \
  head_rmsnorm_fwd##SUFFIX(act* y, float* rstd, const act* x, const act* w, float eps, long long y_row,               \
                           long long rstd_row, long long x_row, int rows, int heads, int D) {                         \
    head_fwd<N>(y, rstd, x, w, eps, y_row, rstd_row, x_row, rows, heads, D);                                          \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                            \
  head_rmsnorm_bwd##SUFFIX(act* dx, float* partial, const act* dy, const act* x, const float* rstd, const act* w,     \
                           long long dx_row, long long dy_row, long long x_row, long long rstd_row, int rows,         \
                           int heads, int D) {                                                                        \
    head_bwd<N>(dx, partial, dy, x, rstd, w, dx_row, dy_row, x_row, rstd_row, rows, heads, D);                        \
  }
HEAD(_v, VEC, MOST_THREADS)
HEAD(_1, 1, FEW_THREADS)

// dw += sum over blocks. dw (n,), partial (parts,n)
extern "C" __global__ void __launch_bounds__(1024) norm_add(float* dw, const float* partial, int parts, int n) {
  add_partials(dw, partial, parts, n);
}
