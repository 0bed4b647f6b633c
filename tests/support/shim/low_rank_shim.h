// What low_rank.cu uses beyond cuda_shim.h, on the host, in place of the PTX in it.
#include "mma_shim.h"

// movmatrix.trans: lane l gets rows 2 (l%4) and 2 (l%4) + 1 of column l / 4.
inline unsigned transposed(unsigned x) {
  const int column = shim::lane() / 4, row = shim::lane() % 4 * 2;
  const unsigned low = __shfl_sync(~0u, x, row * 4 + column / 2), high = __shfl_sync(~0u, x, row * 4 + 4 + column / 2);
  const int up = column % 2 * 16;
  return (low >> up & 0xffff) | (high >> up & 0xffff) << 16;
}
