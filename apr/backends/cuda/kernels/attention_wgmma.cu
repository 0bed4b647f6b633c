// Causal softmax attention on wgmma and TMA, bf16, for one HEAD_DIM: what attention_mma.cu computes, for sm_90a. Arrays come as
// tensor maps of their heads, or lie densely.
#include "common.cuh"
#include "attention_wgmma_tiles.cuh"
#include "wgmma.cuh"
#include "attention_wgmma_rows.cuh"
#include "attention_wgmma_fwd.cuh"
#include "attention_wgmma_bwd.cuh"
