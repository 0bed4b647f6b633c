// Cross-entropy and its gradient in place, a cluster of blocks for each long row: see loss.cuh. For sm_90 and later.
//
// A multiprocessor has several blocks: some read while others compute and write. A block keeps its part of a row of up to
// 153,600 elements of two bytes in registers, asked for at once.
#include "loss.cuh"
#include "cluster.cuh"

constexpr int CLUSTER = 8, CLUSTER_THREADS = 160, SUM_BYTES = 256, OWN = 15;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int BLOCKS_AT_ONCE = 3;  // with 4 a few registers would be spilled
#else
constexpr int BLOCKS_AT_ONCE = IS_BF16 ? 4 : 3;
#endif
static_assert(SUM_BYTES == 2 * 32 * sizeof(float), "tops and sums");

template <int BLOCKS>
__device__ __forceinline__ Softmax joined(const Softmax& mine, float* top, float* sum) {
  __syncthreads();  // all have read the sums of the warps
  if (threadIdx.x == 0) *top = mine.top, *sum = mine.sum;
  cluster_sync();
  Softmax s{of_block(top, 0), of_block(sum, 0)};
  for (int b = 1; b < BLOCKS; b++) s.join(of_block(top, b), of_block(sum, b));
  cluster_sync();  // no block leaves while another reads its shared memory
  return s;
}

// shared: SUM_BYTES
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(CLUSTER_THREADS, BLOCKS_AT_ONCE)
cross_entropy_cluster(float* loss, act* logits, const int* targets, long long logits_row, int V, int gradient, float scale,
                      const double* scale_at, float z_loss) {
  extern __shared__ uint4 dynamic_shared[];
  float* const sums = reinterpret_cast<float*>(own_shared(dynamic_shared));
  cross_entropy<VEC, CLUSTER, OWN, CLUSTER_THREADS>(nullptr, sums, sums + 32, loss, logits, targets, logits_row, V, 0,
                                                    gradient, scale_at ? (float)*scale_at : scale, z_loss);
}
