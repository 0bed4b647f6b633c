// Cross-entropy and its gradient in place, a cluster of blocks for each long row: see loss.cuh. For sm_90 and later.
//
// With a quarter of a row a block takes so little shared memory that a multiprocessor has two: one reads while the other
// computes and writes. All that it reads of a row of up to 159,744 elements of two bytes is asked for at once.
#include "loss.cuh"
#include "cluster.cuh"

constexpr int CLUSTER = 4, CLUSTER_THREADS = 384, SUM_BYTES = 256, AHEAD = 13;

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

// shared: SUM_BYTES + held * 16 bytes
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(CLUSTER_THREADS, 2)
cross_entropy_cluster(float* loss, act* logits, const int* targets, long long logits_row, int V, int held, int gradient,
                      float scale, const double* scale_at, float z_loss) {
  extern __shared__ uint4 dynamic_shared[];
  float* const sums = reinterpret_cast<float*>(own_shared(dynamic_shared));
  auto* const wait = reinterpret_cast<Pack<VEC>*>(sums + SUM_BYTES / sizeof(float));
  cross_entropy<VEC, CLUSTER, AHEAD>(wait, sums, sums + 32, loss, logits, targets, logits_row, V, held, gradient,
                                     scale_at ? (float)*scale_at : scale, z_loss);
}
