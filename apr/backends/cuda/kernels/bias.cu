// Gradient of a bias.  db[o] += sum_n dy[n,o];  db (O,) float, dy (N,O) with dy_row elements between rows
//
// grid (pieces of O, parts of N), block (x,y): a thread sums N columns over every y-th row of its part. The block adds
// its sums in the order of threadIdx.y into partial (gridDim.y, O), and bias_add adds those over the parts.
#include "common.cuh"

constexpr int AHEAD = 8;  // rows that a thread asks for at once

template <int N>
__device__ __forceinline__ void columns(float* partial, const act* dy, long long dy_row, int rows, int O) {
  __shared__ __align__(16) float sums[256 * N];
  const int o = (blockIdx.x * blockDim.x + threadIdx.x) * N, each = (rows + gridDim.y - 1) / gridDim.y;
  const int first = blockIdx.y * each, last = min(rows, first + each);
  float sum[N] = {};
  if (o < O)
    for (int n = first + threadIdx.y; n < last; n += AHEAD * blockDim.y) {
      Pack<N> x[AHEAD];
#pragma unroll
      for (int g = 0; g < AHEAD; g++)
        if (n + g * blockDim.y < last) x[g] = load<N>(dy + (n + g * blockDim.y) * dy_row + o);
#pragma unroll
      for (int g = 0; g < AHEAD; g++)
        if (n + g * blockDim.y < last)
#pragma unroll
          for (int i = 0; i < N; i++) sum[i] += x[g][i];
    }
  store_floats(sums + (threadIdx.y * blockDim.x + threadIdx.x) * N, sum);
  __syncthreads();
  if (threadIdx.y || o >= O) return;
  for (int y = 1; y < blockDim.y; y++)
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += sums[(y * blockDim.x + threadIdx.x) * N + i];
  store_floats(partial + (long long)blockIdx.y * O + o, sum);
}

extern "C" __global__ void __launch_bounds__(256)
bias_bwd_v(float* partial, const act* dy, long long dy_row, int rows, int O) {
  columns<VEC>(partial, dy, dy_row, rows, O);
}
extern "C" __global__ void __launch_bounds__(256)
bias_bwd_1(float* partial, const act* dy, long long dy_row, int rows, int O) {
  columns<1>(partial, dy, dy_row, rows, O);
}

// db += sum over parts. db (n,), partial (parts,n)
extern "C" __global__ void __launch_bounds__(1024) bias_add(float* db, const float* partial, int parts, int n) {
  add_partials(db, partial, parts, n);
}
