// What the wgmma kernels of attention share: rows of heads of HEAD_DIM in tiles of 64 columns side by side, loaded, multiplied
// and stored. Heads of 96 take two tiles, of which the last 32 columns are zeros.
constexpr int TILES = (HEAD_DIM + 63) / 64;
constexpr int ROW = TILES * TILE_ROW;  // bytes of a row of all of them
constexpr int BARRIERS = 1024;         // bytes of shared memory for barriers

__device__ __forceinline__ void rows_load(unsigned to, int rows, const TensorMap* map, int head, int row, int batch,
                                          unsigned barrier) {
#pragma unroll
  for (int n = 0; n < TILES; n++) tile_load(to + n * rows * TILE_ROW, map, n * 64, head, row, batch, barrier);
}
// d (64 x B_ROWS) = a b^T, a: 64 rows of A_ROWS
template <int A_ROWS, int B_ROWS>
__device__ __forceinline__ void scores(float (&d)[B_ROWS / 2], unsigned a, unsigned b) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    product<0, 0>(d, further(along_k(a), k / 4 * A_ROWS * TILE_ROW + k % 4 * 32),
                  further(along_k(b), k / 4 * B_ROWS * TILE_ROW + k % 4 * 32), k);
  products_commit();
}
// d (64 x HEAD_DIM) += a b, b: 16 K rows
template <int K>
__device__ __forceinline__ void gather(float (&d)[HEAD_DIM / 2], const unsigned (&a)[K][4], unsigned b) {
#pragma unroll
  for (int k = 0; k < K; k++)
    product<1>(d, a[k], further(across_k(b, K * 16 * TILE_ROW), k * 16 * TILE_ROW), 1);
  products_commit();
}
// The group's rows times scale, as bf16, to 64 rows of shared memory that only this group still uses.
__device__ __forceinline__ void rows_put(unsigned to, int rows, const float (&d)[HEAD_DIM / 2], float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      shared_put(to + n / 8 * rows * TILE_ROW + cell(row + 8 * half, n % 8) + lane % 4 * 4,
                 pack(d[n * 4 + 2 * half] * scale, d[n * 4 + 2 * half + 1] * scale));
}
__device__ __forceinline__ void rows_store(const TensorMap* map, unsigned from, int rows, int head, int row, int batch) {
#pragma unroll
  for (int n = 0; n < TILES; n++) tile_store(map, n * 64, head, row, batch, from + n * rows * TILE_ROW);
}
