// Tile sizes of the wgmma kernels of attention for each HEAD_DIM; attention.py reads them from here too. For each kernel:
// GROUPS         groups that multiply, of 64 queries each (FWD)
// KEYS, QUERIES  rows of a step: keys and values (FWD, DQ), or queries and dy (DKV)
// STAGES, VALUES steps that fit into shared memory; of values, if they are kept apart
// BUFFERS        tiles of the block's own rows that fit: with two, the next one comes while this one is worked on
#if HEAD_DIM == 64
#define FWD_GROUPS 3
#define FWD_KEYS 128
#define FWD_STAGES 2
#define DQ_KEYS 128
#define DQ_STAGES 4
#define DQ_VALUES 3
#define DQ_BUFFERS 1
#define DKV_QUERIES 64
#define DKV_STAGES 6
#define DKV_BUFFERS 2
#elif HEAD_DIM == 96
#define FWD_GROUPS 2
#define FWD_KEYS 128
#define FWD_STAGES 2
#define DQ_KEYS 96
#define DQ_STAGES 3
#define DQ_VALUES 2
#define DQ_BUFFERS 1
#define DKV_QUERIES 64
#define DKV_STAGES 4
#define DKV_BUFFERS 1
#elif HEAD_DIM == 128
#define FWD_GROUPS 2
#define FWD_KEYS 128
#define FWD_STAGES 2
#define DQ_KEYS 64
#define DQ_STAGES 4
#define DQ_VALUES 3
#define DQ_BUFFERS 1
#define DKV_QUERIES 48
#define DKV_STAGES 4
#define DKV_BUFFERS 1
#endif
