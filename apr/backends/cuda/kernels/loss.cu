// Cross-entropy and its gradient in place, a block for each row: see loss.cuh. scale_at (1,) or null: in the place of scale.
#include "loss.cuh"

// shared: held * 16 bytes (held * sizeof(act))
#define KERNEL(NAME, N)                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024)                                                                \
  NAME(float* loss, act* logits, const int* targets, long long logits_row, int V, int held, int gradient,           \
       float scale, const double* scale_at, float z_loss) {                                                         \
    extern __shared__ uint4 dynamic_shared[];                                                                       \
    __shared__ float tops[32], sums[32];                                                                            \
    cross_entropy<N, 1, 0, 0>(reinterpret_cast<Pack<N>*>(dynamic_shared), tops, sums, loss, logits, targets, logits_row,  \
                        V, held, gradient, scale_at ? (float)*scale_at : scale, z_loss);                            \
  }
KERNEL(cross_entropy_v, VEC)
KERNEL(cross_entropy_1, 1)
