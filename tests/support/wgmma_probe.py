"""A small kernel on wgmma.cuh that multiplies two arrays by a ring of tiles, in every way that wgmma takes its operands."""

from __future__ import annotations

import itertools

from apr.backends.cuda import kernels

K = 448  # terms of a sum, 7 stages
TEXT = """
#include <cuda_bf16.h>
typedef ACT act;
%s
// d (64,W) = a b^T (or, turned, of a^T and of b) over K terms in stages of 64, by one group; another thread loads.
constexpr int STAGES = 2, A_BYTES = 8192, B_TILES = RIGHT_TURNED ? (W + 63) / 64 : 1;
constexpr int B_BYTES = RIGHT_TURNED ? B_TILES * 8192 : W * 128;
extern "C" __global__ void __launch_bounds__(256, 1)
probe(float* d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
      const __grid_constant__ TensorMap y, int K) {
  const unsigned begin = shared_begin(), as = begin + 1024, bs = as + STAGES * A_BYTES;
  Ring<STAGES> ring(begin);
  if (threadIdx.x == 0) {
    ring.make(1);
    barriers_made();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_less<registers_of_loader(1)>();
    if (threadIdx.x == 0)
      for (int k = 0; k < K; k += 64, ring.next()) {
        ring.claim(A_BYTES + B_BYTES);
        tile_load(as + ring.stage * A_BYTES, &a, LEFT_TURNED ? 0 : k, 0, LEFT_TURNED ? k : 0, 0, ring.full());
        for (int n = 0; n < B_TILES; n++)
          tile_load(bs + ring.stage * B_BYTES + n * 8192, &b, RIGHT_TURNED ? 64 * n : k, 0, RIGHT_TURNED ? k : 0, 0, ring.full());
      }
  } else {
    registers_more<registers_of_others(1)>();
    const int lane = threadIdx.x %% 32, row = threadIdx.x %% 128 / 32 * 16 + lane / 4;
    float sum[W / 2];
    for (int i = 0; i < W / 2; i++) sum[i] = 0;
#pragma unroll 1
    for (int k = 0; k < K; k += 64, ring.next()) {
      const unsigned at = as + ring.stage * A_BYTES, bt = bs + ring.stage * B_BYTES;
      ring.wait();
#if LEFT_KEPT
      unsigned left[4][4];
#pragma unroll
      for (int x = 0; x < 16; x++)
        left[x / 4][x %% 4] = shared_get(at + cell(row + 8 * (x & 1), x / 4 * 2 + (x >> 1 & 1)) + lane %% 4 * 4);
      products_begin(sum, left);
#else
      products_begin(sum);
#endif
#pragma unroll
      for (int kk = 0; kk < 4; kk++) {
        const Matrix right = RIGHT_TURNED ? across_k(bt + kk * 2048, 8192) : along_k(bt + kk * 32);
#if LEFT_KEPT
        product<RIGHT_TURNED>(sum, left[kk], right, 1);
#else
        product<LEFT_TURNED, RIGHT_TURNED>(sum, LEFT_TURNED ? across_k(at + kk * 2048, 0) : along_k(at + kk * 32), right, 1);
#endif
      }
      products_commit();
      products_wait<0>(sum);
      ring.release();
    }
    for (int i = 0; i < W / 2; i++) d[(row + i / 2 %% 2 * 8) * W + i / 4 * 8 + lane %% 4 * 2 + i %% 2] = sum[i];
    for (int i = 0; i < 32; i += 2)  // the first 64 columns by TMA, too
      shared_put(as + cell(row + i / 2 %% 2 * 8, i / 4) + lane %% 4 * 4, pack(sum[i], sum[i + 1]));
    fence_async();
    group_sync(1);
    if (threadIdx.x == 128) {
      tile_store(&y, 0, 0, 0, 0, as);
      stores_commit();
      stores_wait();
    }
  }
}
"""
SHARED = 1024 + 1024 + 2 * (8192 + 16384)
VARIANTS = [
    dict(W=w, LEFT_TURNED=a, RIGHT_TURNED=b, LEFT_KEPT=r)
    for w, a, b, r in itertools.product((64, 96, 128), (0, 1), (0, 1), (0, 1))
    if not (a and (r or w != 96))
]


def text() -> str:
    """The text of the kernel with its headers."""
    return TEXT % kernels.header("wgmma")
