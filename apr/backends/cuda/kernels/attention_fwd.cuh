// Causal softmax attention on tensor cores, bf16, forward (Dao 2023, FlashAttention-2, algorithm 1).
//
//   y[t] = sum_j p[t,j] v[j],  p[t] = softmax_j(q[t] . k[j] / sqrt(D)),  lse[t] = log sum_j exp(q[t] . k[j] / sqrt(D))
//   over the keys j <= t + S - T and, with window > 0, j > t + S - T - window and, with DOCUMENTS, j >= doc_start[t].
//   y (B,T,H,D), lse (B,H,T) float32, q (B,T,H,D), k, v (B,S,K,D); head h reads kv head h / (H/K)
//
// A block owns FWD_ROWS queries of one head, a warp 16 FWD_M of them; keys and values pass through shared memory
// in two stages. p is rounded to bf16 for p v; scores, softmax and sums are float32.

constexpr int FWD_ROWS = 16 * FWD_M * FWD_WARPS;
constexpr int FWD_THREADS = 32 * FWD_WARPS;
constexpr int FWD_BYTES = 2 * FWD_STAGE * ROW_BYTES;  // keys, then values
constexpr float SLACK = 8;     // top follows only jumps above 2^8, so that few steps rescale
constexpr float LARGE = 4096;  // p of a step that sums to more in a thread: top is too low

// p = 2^(score - top) of the warp's rows, and its sum over the step, which leaves s.
__device__ __forceinline__ void forward_exp(float (&s)[FWD_M][FWD_STEP / 8][4], float (&part)[FWD_M][2],
                                            const float (&top)[FWD_M][2], float c) {
#pragma unroll
  for (int i = 0; i < FWD_M; i++) {
    part[i][0] = part[i][1] = 0;
#pragma unroll
    for (int n = 0; n < FWD_STEP / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[i][n][e] = power2(fmaf(s[i][n][e], c, -top[i][e / 2]));
        part[i][e / 2] += s[i][n][e];
      }
  }
}
// top follows the scores of this step where they are far above it; what was summed so far shrinks with it.
__device__ __forceinline__ void forward_top(const float (&s)[FWD_M][FWD_STEP / 8][4], float (&o)[FWD_M][CELLS][4],
                                            float (&top)[FWD_M][2], float (&sum)[FWD_M][2], float c) {
  float shrink[FWD_M][2];
  bool grown = false;
#pragma unroll
  for (int i = 0; i < FWD_M; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float m = s[i][0][2 * half];
#pragma unroll
      for (int n = 0; n < FWD_STEP / 8; n++) m = fmaxf(m, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = c * fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float old = top[i][half];
      if (m > old + SLACK) top[i][half] = m, grown = true;
      shrink[i][half] = power2(old - top[i][half]);
    }
  if (!__any_sync(~0u, grown)) return;
#pragma unroll
  for (int i = 0; i < FWD_M; i++) {
    sum[i][0] *= shrink[i][0];
    sum[i][1] *= shrink[i][1];
#pragma unroll
    for (int n = 0; n < CELLS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[i][n][e] *= shrink[i][e / 2];
  }
}
// Adds FWD_STEP keys to the warp's o = sum p v and sum = sum p. CAREFUL: some keys may be hidden, and top is brought
// up to date first; otherwise the sum of p tells whether top still serves, and if not, nothing is added: false.
template <bool CAREFUL, class Q>
__device__ __forceinline__ bool forward_step(float (&o)[FWD_M][CELLS][4], float (&top)[FWD_M][2],
                                             float (&sum)[FWD_M][2], const Q& q, unsigned k, unsigned v, float c,
                                             int ahead, int window, const Borders& borders, int t, int j) {
  float s[FWD_M][FWD_STEP / 8][4], part[FWD_M][2];
  product_nt(s, q, k);
  if (CAREFUL) {
    mask<false>(s, ahead, window);
    mask_documents<false>(s, borders, t, j);
    forward_top(s, o, top, sum, c);
  }
  forward_exp(s, part, top, c);
  bool high = false;
#pragma unroll
  for (int i = 0; i < FWD_M; i++) high |= fmaxf(part[i][0], part[i][1]) > LARGE;
  if (!CAREFUL && __any_sync(~0u, high)) return false;
#pragma unroll
  for (int i = 0; i < FWD_M; i++) sum[i][0] += part[i][0], sum[i][1] += part[i][1];
  unsigned p[FWD_M][FWD_STEP / 16][4];
  as_left(p, s);
  product_nn(o, p, v);
  return true;
}

// shared: FWD_ROWS queries, two stages = (FWD_ROWS + 4 FWD_STAGE) * 2 * HEAD_DIM bytes
extern "C" __global__ void __launch_bounds__(FWD_THREADS, FWD_BLOCKS)
attention_fwd_mma(act* y, float* lse, const act* q, const act* k, const act* v, const int* doc_start, long long q_row,
                  long long q_batch, long long k_row, long long k_batch, long long v_row, long long v_batch, int B,
                  int T, int S, int H, int K, int window, float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, offset = S - T;
  const Place at = place(K, H / K);
  if (at.batch >= B) return;  // the last group may be smaller
  const int head = at.kv * (H / K) + at.part, t_block = ((int)gridDim.y - 1 - at.tile) * FWD_ROWS;
  const int t_warp = t_block + warp * 16 * FWD_M;
  const int end = (min(T, t_block + FWD_ROWS) + offset + FWD_STAGE - 1) / FWD_STAGE;
  int tile = window ? max(0, t_block + offset - window + 1) / FWD_STAGE : 0;
  const Borders borders = {doc_start, at.batch, T};
  if (DOCUMENTS) tile = max(tile, borders.at(t_block) / FWD_STAGE);
  q += at.batch * q_batch + head * HEAD_DIM;
  k += at.batch * k_batch + at.kv * HEAD_DIM;
  v += at.batch * v_batch + at.kv * HEAD_DIM;

  const unsigned q_tile = shared_address(shared), stages = q_tile + FWD_ROWS * ROW_BYTES;
  const unsigned q_warp = q_tile + warp * 16 * FWD_M * ROW_BYTES + lane_a(lane);
  Loader<FWD_STAGE, FWD_THREADS> keys(k, k_row, tile * FWD_STAGE), values(v, v_row, tile * FWD_STAGE);
  Loader<FWD_ROWS, FWD_THREADS>(q, q_row, t_block).load(q_tile, T - t_block);
  keys.load(stages, S - tile * FWD_STAGE);
  values.load(stages + FWD_BYTES / 2, S - tile * FWD_STAGE);
  copy_commit();
  copy_wait();
  __syncthreads();
#if FWD_KEPT
  unsigned q_left[FWD_M][HEAD_DIM / 16][4];
  load_rows(q_left, q_warp);
#else
  const unsigned q_left = q_warp;
#endif

  const float c = scale * LOG2E;  // scores are kept in powers of two
  float o[FWD_M][CELLS][4] = {}, top[FWD_M][2], sum[FWD_M][2] = {};
#pragma unroll
  for (int i = 0; i < FWD_M * 2; i++) top[i / 2][i % 2] = -1e30f;

  for (int stage = 0; tile < end; tile++, stage ^= 1) {
    const unsigned next = stages + (stage ^ 1) * FWD_BYTES;
    keys.load(next, S - (tile + 1) * FWD_STAGE);  // nothing after the last tile
    values.load(next + FWD_BYTES / 2, S - (tile + 1) * FWD_STAGE);
    copy_commit();
    // Seen from the warp's first row: row r sees columns of the stage up to ahead + r.
    const int ahead = t_warp + offset - tile * FWD_STAGE;
    const unsigned k_tile = stages + stage * FWD_BYTES + lane_b(lane);
    const unsigned v_tile = stages + stage * FWD_BYTES + FWD_BYTES / 2 + lane_a(lane);
    const bool whole = ahead >= FWD_STAGE - 1 && (!window || ahead - window + 16 * FWD_M - 1 < 0) &&
                       (!DOCUMENTS || borders.at(t_warp + 16 * FWD_M - 1) <= tile * FWD_STAGE);
#pragma unroll 1
    for (int j = 0; j < FWD_STAGE; j += FWD_STEP) {
      const unsigned k_step = k_tile + j * ROW_BYTES, v_step = v_tile + j * ROW_BYTES;
      if (whole && forward_step<false>(o, top, sum, q_left, k_step, v_step, c, 0, 0, borders, 0, 0))
        continue;
      const int key = tile * FWD_STAGE + j;
      if (ahead - j + 16 * FWD_M - 1 >= 0 && !(window && ahead - j - window >= FWD_STEP - 1) &&
          (!DOCUMENTS || borders.at(t_warp) < key + FWD_STEP))
        forward_step<true>(o, top, sum, q_left, k_step, v_step, c, ahead - j, window, borders, t_warp, key);
    }
    copy_wait();
    __syncthreads();
  }

  lse += ((long long)at.batch * H + head) * T;
#pragma unroll
  for (int i = 0; i < FWD_M; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float total = quad_sum(sum[i][half]);
      const int t = t_warp + i * 16 + lane / 4 + 8 * half;
      if (lane % 4 == 0 && t < T) lse[t] = (top[i][half] + log2f(total)) * LN2;
      sum[i][half] = 1 / total;
    }
  store_rows(y + (long long)at.batch * T * H * HEAD_DIM + head * HEAD_DIM, (long long)H * HEAD_DIM, t_warp, T,
             shared + warp * 16 * FWD_M * ROW_BYTES, o, sum);
}
