// Rows of the embedding and their gradient.
//
//   y[n] = w[ids[n]];  dw[ids[n]] += dy[n]
//   y, dy (N,C), ids (N,) int, w (V,C), dw (V,C) float
//
// Backward is the same bits every time, without float atomics: positions are sorted by id, equal ids by position
// (embedding_rank counts how many come before each, embedding_sort puts them there), then embedding_bwd gives each
// block TILE neighbours of that order. A block owns the ids that begin and end in it; what continues from or into
// another block goes through carry (tiles,2,C) float, which embedding_add adds up in order.
#include "common.cuh"

constexpr int RANK_THREADS = 128, RANK_EACH = 4, TILE = 32;

// block (x,y): blockDim.x threads share a row, blockDim.y rows
template <int N>
__device__ __forceinline__ void rows(act* y, const int* ids, const act* w, int count, int C) {
  const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  if (n >= count) return;
  const long long from = (long long)ids[n] * C;
  for (int c = threadIdx.x * N; c < C; c += blockDim.x * N) store(y + n * C + c, load<N>(w + from + c));
}

// part[s,n] = how many of the ids of slice s come before position n: smaller ones, and equal ones at earlier positions.
// part (gridDim.y, N); slices are `slice` long, a multiple of RANK_THREADS; a block has RANK_THREADS * RANK_EACH positions
extern "C" __global__ void __launch_bounds__(RANK_THREADS)
embedding_rank(int* part, const int* ids, int N, int slice) {
  __shared__ int4 tile[RANK_THREADS / 4];
  const int first = blockIdx.x * RANK_THREADS * RANK_EACH + threadIdx.x;
  int id[RANK_EACH], count[RANK_EACH] = {};
#pragma unroll
  for (int e = 0; e < RANK_EACH; e++) {
    const int n = first + e * RANK_THREADS;
    id[e] = n < N ? ids[n] : 0;
  }
  const int begin = blockIdx.y * slice, end = min(N, begin + slice);
  for (int m = begin; m < end; m += RANK_THREADS) {
    __syncthreads();
    reinterpret_cast<int*>(tile)[threadIdx.x] = m + threadIdx.x < end ? ids[m + threadIdx.x] : 0x7fffffff;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < RANK_EACH; e++) {
      const int n = first + e * RANK_THREADS;
      // Positions of this block that lie in the tile are compared one by one, the others all in the same way.
      const int below = m + RANK_THREADS <= n - (int)threadIdx.x ? id[e] + 1 : id[e];
#pragma unroll 8
      for (int i = 0; i < RANK_THREADS / 4; i++) {
        const int4 v = tile[i];
        count[e] += (v.x < below) + (v.y < below) + (v.z < below) + (v.w < below);
      }
      if (m == n - (int)threadIdx.x)
        for (int i = 0; i < threadIdx.x; i++) count[e] += reinterpret_cast<const int*>(tile)[i] == id[e];
    }
  }
#pragma unroll
  for (int e = 0; e < RANK_EACH; e++) {
    const int n = first + e * RANK_THREADS;
    if (n < N) part[(long long)blockIdx.y * N + n] = count[e];
  }
}

// order[r] = n and sorted[r] = ids[n] for the position n of rank r = sum_s part[s,n].  order, sorted, ids (N,)
extern "C" __global__ void __launch_bounds__(256)
embedding_sort(int* order, int* sorted, const int* part, const int* ids, int N, int slices) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= N) return;
  int rank = 0;
  for (int s = 0; s < slices; s++) rank += part[(long long)s * N + n];
  order[rank] = n;
  sorted[rank] = ids[n];
}

// grid (tiles, pieces of C): a thread has N columns
template <int N>
__device__ __forceinline__ void backward(float* dw, float* carry, const act* dy, const int* order, const int* sorted,
                                         int count, int C) {
  const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (c >= C) return;
  const int first = blockIdx.x * TILE, last = min(count, first + TILE);
  bool from_before = first > 0 && sorted[first - 1] == sorted[first];
  float sum[N] = {};
  carry += (long long)blockIdx.x * 2 * C + c;
  for (int p = first; p < last; p++) {
    const int id = sorted[p];
    const Pack<N> x = load<N>(dy + (long long)order[p] * C + c);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += x[i];
    const bool ends = p + 1 == count || sorted[p + 1] != id;
    if (!ends && p + 1 < last) continue;
    if (from_before || !ends) {
      store_floats(from_before ? carry : carry + C, sum);
    } else {
      float* to = dw + (long long)id * C + c;
      float old[N];
      load_floats(old, to);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += old[i];
      store_floats(to, sum);
    }
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = 0;
    from_before = false;
  }
}

// dw[id] += the parts of an id that lies in several tiles; the tile in which it begins adds them up in order.
extern "C" __global__ void __launch_bounds__(256)
embedding_add(float* dw, const float* carry, const int* sorted, int N, int C) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  int tile = blockIdx.x, next = (tile + 1) * TILE;  // where the next tile begins
  if (c >= C || next >= N) return;
  const int id = sorted[next];
  if (sorted[next - 1] != id || (tile > 0 && sorted[tile * TILE - 1] == id)) return;  // none begins here that continues
  float sum = carry[((long long)tile * 2 + 1) * C + c];
  while (next < N && sorted[next] == id && sorted[next - 1] == id) {
    sum += carry[(long long)++tile * 2 * C + c];
    next += TILE;
  }
  dw[(long long)id * C + c] += sum;
}

#define KERNELS(SUFFIX, N)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
  embedding_fwd##SUFFIX(act* y, const int* ids, const act* w, int count, int C) {                                    \
    rows<N>(y, ids, w, count, C);                                                                                    \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
  embedding_bwd##SUFFIX(float* dw, float* carry, const act* dy, const int* order, const int* sorted, int count, int C) { \
    backward<N>(dw, carry, dy, order, sorted, count, C);                                                             \
  }
KERNELS(_v, VEC)
KERNELS(_1, 1)
