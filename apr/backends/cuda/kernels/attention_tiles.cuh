// Tile sizes of the attention kernels for each HEAD_DIM; attention.py reads them from here too. For each kernel:
// M       16-row blocks of a warp: its queries (FWD, DQ) or keys (DKV)
// WARPS   warps of a block
// STAGE   rows of a stage: keys and values, or queries and dy (DKV)
// STEP    rows of a stage that are worked on at once
// BLOCKS  blocks on a multiprocessor, which limits registers
// KEPT    how many of the block's own operands stay in registers: q; q, dy; k, v
#if HEAD_DIM == 32
#define FWD_M 2
#define FWD_WARPS 4
#define FWD_STAGE 64
#define FWD_STEP 64
#define FWD_BLOCKS 2
#define FWD_KEPT 1
#define DQ_M 2
#define DQ_WARPS 4
#define DQ_STAGE 64
#define DQ_STEP 32
#define DQ_BLOCKS 2
#define DQ_KEPT 2
#define DKV_M 2
#define DKV_WARPS 4
#define DKV_STAGE 32
#define DKV_STEP 32
#define DKV_BLOCKS 2
#define DKV_KEPT 0
#elif HEAD_DIM == 64
#define FWD_M 2
#define FWD_WARPS 4
#define FWD_STAGE 64
#define FWD_STEP 64
#define FWD_BLOCKS 2
#define FWD_KEPT 1
#define DQ_M 2
#define DQ_WARPS 4
#define DQ_STAGE 64
#define DQ_STEP 32
#define DQ_BLOCKS 2
#define DQ_KEPT 2
#define DKV_M 2
#define DKV_WARPS 4
#define DKV_STAGE 32
#define DKV_STEP 32
#define DKV_BLOCKS 2
#define DKV_KEPT 0
#elif HEAD_DIM == 96
#define FWD_M 1
#define FWD_WARPS 4
#define FWD_STAGE 64
#define FWD_STEP 64
#define FWD_BLOCKS 2
#define FWD_KEPT 1
#define DQ_M 1
#define DQ_WARPS 4
#define DQ_STAGE 64
#define DQ_STEP 32
#define DQ_BLOCKS 2
#define DQ_KEPT 2
#define DKV_M 1
#define DKV_WARPS 4
#define DKV_STAGE 64
#define DKV_STEP 16
#define DKV_BLOCKS 2
#define DKV_KEPT 2
#elif HEAD_DIM == 128
#define FWD_M 2
#define FWD_WARPS 4
#define FWD_STAGE 64
#define FWD_STEP 32
#define FWD_BLOCKS 2
#define FWD_KEPT 0
#define DQ_M 1
#define DQ_WARPS 4
#define DQ_STAGE 64
#define DQ_STEP 32
#define DQ_BLOCKS 2
#define DQ_KEPT 2
#define DKV_M 1
#define DKV_WARPS 8
#define DKV_STAGE 64
#define DKV_STEP 16
#define DKV_BLOCKS 1
#define DKV_KEPT 2
#endif
// Where documents are masked fewer registers are left.
#if DOCUMENTS && HEAD_DIM == 64
#undef DQ_KEPT
#define DQ_KEPT 1
#undef DKV_STEP
#define DKV_STEP 16
#endif
#if DOCUMENTS && HEAD_DIM == 128
#undef DKV_KEPT
#define DKV_KEPT 1
#endif
