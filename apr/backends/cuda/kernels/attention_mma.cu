// Causal softmax attention on tensor cores, bf16: y, lse = attention(q, k, v) and its gradients, for one
// HEAD_DIM. y, q (B,T,H,D), k, v (B,S,K,D), lse (B,H,T). mma.sync, for sm_80 and later.
// With DOCUMENTS, doc_start (B,T) is where the document of each query begins, not decreasing with t; it sees no key before.
// Without, doc_start is null and the code is what it would be if there were none.
// A head is HEAD_DIM values; rows (all heads of a position) are ..._row values apart, sequences ..._batch;
// both are multiples of 8, and pointers of 16 bytes.
#include "common.cuh"
#include "attention_tiles.cuh"
#include "mma.cuh"
#include "attention_fwd.cuh"
#include "attention_bwd.cuh"
