// Gradients of causal softmax attention on tensor cores, bf16 (Dao 2023, FlashAttention-2, algorithm 2).
//
//   p = exp(q k^T / sqrt(D) - lse),  dp = dy v^T,  ds = p * (dp - delta),  delta[t] = sum_d dy[t,d] y[t,d]
//   p is 0 for the keys that attention_fwd hides
//   dq = ds k / sqrt(D);  dk = ds^T q / sqrt(D),  dv = p^T dy, both summed over the H/K heads of a kv head
//   dq, dy, y, q (B,T,H,D), dk, dv, k, v (B,S,K,D), lse (B,H,T)
//
// Two kernels that share nothing but stats (B,H,T,2) = lse in powers of two, delta: attention_dq_mma has a block
// for each block of queries, attention_dkv_mma one for each block of keys. p and ds are computed twice, and
// every sum has one order. p and ds are rounded to bf16 for the products; all sums are float32.

// Products are computed in pairs where one alone has too few independent sums to hide the latency of mma.
constexpr bool DQ_PAIRED = DQ_M * DQ_STEP < 64;
#if __CUDA_ARCH__ >= 1000
constexpr bool DKV_PAIRED = true;  // fewer registers there: HEAD_DIM 64 spills otherwise
#else
constexpr bool DKV_PAIRED = DKV_M * DKV_STEP < 64;
#endif
constexpr int DQ_ROWS = 16 * DQ_M * DQ_WARPS;
constexpr int DQ_THREADS = 32 * DQ_WARPS;
constexpr int DQ_BYTES = 2 * DQ_STAGE * ROW_BYTES;  // keys, then values

constexpr int DKV_ROWS = 16 * DKV_M * DKV_WARPS;
constexpr int DKV_THREADS = 32 * DKV_WARPS;
constexpr int DKV_BYTES = DKV_STAGE * (2 * ROW_BYTES + 8);  // queries, dy, stats

// y of the warp's rows: the four lanes of a fragment row hold it together, in the order of row_delta.
template <int M>
__device__ __forceinline__ void load_y(uint4 (&r)[M][2][CELLS / 4], const act* y, long long stride, int t, int T) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < M * 2; i++)
#pragma unroll
    for (int n = 0; n < CELLS / 4; n++)
      r[i / 2][i % 2][n] = *(const uint4*)(y + min(t + i * 8 + lane / 4, T - 1) * stride + (n * 4 + lane % 4) * 8);
}
// delta of the warp's rows, dy in a tile, where rows past the end are 0.
template <int M>
__device__ __forceinline__ void row_delta(float (&delta)[M][2], const unsigned char* dy,
                                          const uint4 (&y)[M][2][CELLS / 4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < M * 2; i++) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < CELLS / 4; n++) {
      const uint4 a = *(const uint4*)(dy + cell(i * 8 + lane / 4, n * 4 + lane % 4)), b = y[i / 2][i % 2][n];
      sum += dot2(a.x, b.x) + dot2(a.y, b.y) + dot2(a.z, b.z) + dot2(a.w, b.w);
    }
    delta[i / 2][i % 2] = quad_sum(sum);
  }
}

// Adds ds k over DQ_STEP keys to the warp's sum. EDGE: some are hidden.
template <bool EDGE, class Q, class Y>
__device__ __forceinline__ void dq_step(float (&sum)[DQ_M][CELLS][4], const Q& q, const Y& dy, unsigned k, unsigned v,
                                        const float (&top)[DQ_M][2], const float (&delta)[DQ_M][2], float c, int ahead,
                                        int window, const Borders& borders, int t, int j) {
  const int lane = threadIdx.x % 32;
  float s[DQ_M][DQ_STEP / 8][4], ds[DQ_M][DQ_STEP / 8][4];
  if (DQ_PAIRED) {
    products_nt(s, q, k + lane_b(lane), ds, dy, v + lane_b(lane));
  } else {
    product_nt(s, q, k + lane_b(lane));
  }
  if (EDGE) mask<false>(s, ahead, window);
  if (EDGE) mask_documents<false>(s, borders, t, j);
  if (!DQ_PAIRED) product_nt(ds, dy, v + lane_b(lane));
#pragma unroll
  for (int i = 0; i < DQ_M; i++)
#pragma unroll
    for (int n = 0; n < DQ_STEP / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        ds[i][n][e] = power2(fmaf(s[i][n][e], c, -top[i][e / 2])) * (ds[i][n][e] - delta[i][e / 2]);
  unsigned left[DQ_M][DQ_STEP / 16][4];
  as_left(left, ds);
  product_nn(sum, left, k + lane_a(lane));
}

// shared: DQ_ROWS queries, DQ_ROWS dy, two stages = (2 DQ_ROWS + 4 DQ_STAGE) * 2 * HEAD_DIM bytes
extern "C" __global__ void __launch_bounds__(DQ_THREADS, DQ_BLOCKS)
attention_dq_mma(act* dq, float* stats, const act* dy, const act* y, const float* lse, const act* q, const act* k,
                 const act* v, const int* doc_start, long long dq_row, long long dq_batch, long long q_row,
                 long long q_batch, long long k_row, long long k_batch, long long v_row, long long v_batch, int B,
                 int T, int S, int H, int K, int window, float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, offset = S - T;
  const Place at = place(K, H / K);
  if (at.batch >= B) return;  // the last group may be smaller
  const int head = at.kv * (H / K) + at.part, t_block = ((int)gridDim.y - 1 - at.tile) * DQ_ROWS;
  const int t_warp = t_block + warp * 16 * DQ_M;
  const int end = (min(T, t_block + DQ_ROWS) + offset + DQ_STAGE - 1) / DQ_STAGE;
  int tile = window ? max(0, t_block + offset - window + 1) / DQ_STAGE : 0;
  const Borders borders = {doc_start, at.batch, T};
  if (DOCUMENTS) tile = max(tile, borders.at(t_block) / DQ_STAGE);
  const long long y_row = (long long)H * HEAD_DIM;
  dq += at.batch * dq_batch + head * HEAD_DIM;
  q += at.batch * q_batch + head * HEAD_DIM;
  dy += at.batch * T * y_row + head * HEAD_DIM;
  y += at.batch * T * y_row + head * HEAD_DIM;
  lse += ((long long)at.batch * H + head) * T;
  stats += ((long long)at.batch * H + head) * T * 2;
  k += at.batch * k_batch + at.kv * HEAD_DIM;
  v += at.batch * v_batch + at.kv * HEAD_DIM;

  const unsigned q_tile = shared_address(shared), dy_tile = q_tile + DQ_ROWS * ROW_BYTES;
  const unsigned stages = dy_tile + DQ_ROWS * ROW_BYTES, own = warp * 16 * DQ_M * ROW_BYTES + lane_a(lane);
  Loader<DQ_STAGE, DQ_THREADS> keys(k, k_row, tile * DQ_STAGE), values(v, v_row, tile * DQ_STAGE);
  Loader<DQ_ROWS, DQ_THREADS>(q, q_row, t_block).load(q_tile, T - t_block);
  Loader<DQ_ROWS, DQ_THREADS>(dy, y_row, t_block).load(dy_tile, T - t_block);
  keys.load(stages, S - tile * DQ_STAGE);
  values.load(stages + DQ_BYTES / 2, S - tile * DQ_STAGE);
  copy_commit();

  float delta[DQ_M][2], top[DQ_M][2];  // top: lse in powers of two
  uint4 y_rows[DQ_M][2][CELLS / 4];
  load_y(y_rows, y, y_row, t_warp, T);
#pragma unroll
  for (int i = 0; i < DQ_M * 2; i++) top[i / 2][i % 2] = lse[min(t_warp + i * 8 + lane / 4, T - 1)] * LOG2E;
  copy_wait();
  __syncthreads();
  row_delta(delta, shared + (DQ_ROWS + warp * 16 * DQ_M) * ROW_BYTES, y_rows);
#pragma unroll
  for (int i = 0; i < DQ_M * 2; i++) {
    const int t = t_warp + i * 8 + lane / 4;
    if (lane % 4 == 0 && t < T) ((float2*)stats)[t] = make_float2(top[i / 2][i % 2], delta[i / 2][i % 2]);
  }
#if DQ_KEPT > 0
  unsigned q_left[DQ_M][HEAD_DIM / 16][4];
  load_rows(q_left, q_tile + own);
#else
  const unsigned q_left = q_tile + own;
#endif
#if DQ_KEPT > 1
  unsigned dy_left[DQ_M][HEAD_DIM / 16][4];
  load_rows(dy_left, dy_tile + own);
#else
  const unsigned dy_left = dy_tile + own;
#endif

  const float c = scale * LOG2E;
  float sum[DQ_M][CELLS][4] = {};
  for (int stage = 0; tile < end; tile++, stage ^= 1) {
    if (tile + 1 < end) {
      const unsigned next = stages + (stage ^ 1) * DQ_BYTES;
      keys.load(next, S - (tile + 1) * DQ_STAGE);
      values.load(next + DQ_BYTES / 2, S - (tile + 1) * DQ_STAGE);
      copy_commit();
    }
    // Seen from the warp's first row: row r sees columns of the stage up to ahead + r.
    const int ahead = t_warp + offset - tile * DQ_STAGE;
    const unsigned k_tile = stages + stage * DQ_BYTES, v_tile = k_tile + DQ_BYTES / 2;
    if (ahead >= DQ_STAGE - 1 && (!window || ahead - window + 16 * DQ_M - 1 < 0) &&
        (!DOCUMENTS || borders.at(t_warp + 16 * DQ_M - 1) <= tile * DQ_STAGE)) {
#pragma unroll 1
      for (int j = 0; j < DQ_STAGE; j += DQ_STEP)
        dq_step<false>(sum, q_left, dy_left, k_tile + j * ROW_BYTES, v_tile + j * ROW_BYTES, top, delta, c, 0, 0,
                       borders, 0, 0);
    } else {
#pragma unroll 1
      for (int j = 0; j < DQ_STAGE; j += DQ_STEP)
        if (ahead - j + 16 * DQ_M - 1 >= 0 && !(window && ahead - j - window >= DQ_STEP - 1) &&
            (!DOCUMENTS || borders.at(t_warp) < tile * DQ_STAGE + j + DQ_STEP))
          dq_step<true>(sum, q_left, dy_left, k_tile + j * ROW_BYTES, v_tile + j * ROW_BYTES, top, delta, c, ahead - j,
                        window, borders, t_warp, tile * DQ_STAGE + j);
    }
    copy_wait();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < DQ_M; i++) delta[i][0] = delta[i][1] = scale;
  store_rows(dq, dq_row, t_warp, T, shared + warp * 16 * DQ_M * ROW_BYTES, sum, delta);
}

// The warp's accumulator rows [row, rows) times scale to float32 rows of x.
template <int M>
__device__ __forceinline__ void store_partial(float* x, long long stride, int row, int rows,
                                              const float (&c)[M][CELLS][4], float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + i * 16 + half * 8 + lane / 4;
      if (r >= rows) continue;
#pragma unroll
      for (int n = 0; n < CELLS; n++)
        *(float2*)(x + r * stride + n * 8 + lane % 4 * 2) =
            make_float2(c[i][n][2 * half] * scale, c[i][n][2 * half + 1] * scale);
    }
}

// Adds p^T dy and ds^T q over DKV_STEP queries, whose lse and delta are in stats. EDGE: some are hidden.
template <bool EDGE, class KEYS, class VALUES>
__device__ __forceinline__ void dkv_step(float (&dk)[DKV_M][CELLS][4], float (&dv)[DKV_M][CELLS][4], const KEYS& k,
                                         const VALUES& v, unsigned q, unsigned dy, const float4* stats, float c,
                                         int ahead, int window, const Borders& borders, int t, int j) {
  const int lane = threadIdx.x % 32;
  float p[DKV_M][DKV_STEP / 8][4], ds[DKV_M][DKV_STEP / 8][4];
  if (DKV_PAIRED) {
    products_nt(p, k, q + lane_b(lane), ds, v, dy + lane_b(lane));
  } else {
    product_nt(p, k, q + lane_b(lane));
  }
  if (EDGE) mask<true>(p, ahead, window);
  if (EDGE) mask_documents<true>(p, borders, t, j);
  if (!DKV_PAIRED) product_nt(ds, v, dy + lane_b(lane));
#pragma unroll
  for (int n = 0; n < DKV_STEP / 8; n++) {
    const float4 row = stats[n * 4 + lane % 4];  // lse, delta of two queries
#pragma unroll
    for (int i = 0; i < DKV_M; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        p[i][n][e] = power2(fmaf(p[i][n][e], c, -(e % 2 ? row.z : row.x)));
        ds[i][n][e] = p[i][n][e] * (ds[i][n][e] - (e % 2 ? row.w : row.y));
      }
  }
  unsigned left[DKV_M][DKV_STEP / 16][4];
  as_left(left, p);
  product_nn(dv, left, dy + lane_a(lane));
  as_left(left, ds);
  product_nn(dk, left, q + lane_a(lane));
}

// A block adds up the heads [part * H/K / splits, (part + 1) * H/K / splits) of its kv head. With splits > 1 it
// leaves float32 sums in partial (splits,2,B,S,K,D), dk then dv, for attention_dkv_sum.
// shared: DKV_ROWS keys, DKV_ROWS values, two stages = (2 DKV_ROWS + 4 DKV_STAGE) * 2 * HEAD_DIM + 16 DKV_STAGE
extern "C" __global__ void __launch_bounds__(DKV_THREADS, DKV_BLOCKS)
attention_dkv_mma(act* dk, act* dv, float* partial /* or null */, const act* dy, const float* stats, const act* q,
                  const act* k, const act* v, const int* doc_start, long long dk_row, long long dk_batch,
                  long long dv_row, long long dv_batch, long long q_row, long long q_batch, long long k_row, long long k_batch,
                  long long v_row, long long v_batch, int B, int T, int S, int H, int K, int window,
                  int splits, float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, offset = S - T;
  const Place at = place(K, splits);
  if (at.batch >= B) return;  // the last group may be smaller
  const int j_block = at.tile * DKV_ROWS, j_warp = j_block + warp * 16 * DKV_M;
  const int begin = max(0, j_block - offset) / DKV_STAGE;
  const int last = window ? min(T, min(S, j_block + DKV_ROWS) - 1 - offset + window) : T;
  int end = last > 0 ? (last + DKV_STAGE - 1) / DKV_STAGE : 0;
  const Borders borders = {doc_start, at.batch, T};
  if (DOCUMENTS) {
    // Stages of queries whose documents begin after the block's keys are left out: they are the last ones.
    int seen = 0;
    for (int tile = begin; tile < end; tile += DKV_THREADS) {
      const int own = tile + threadIdx.x;
      seen += __syncthreads_count(own < end && borders.at(own * DKV_STAGE) < j_block + DKV_ROWS);
    }
    end = min(end, begin + seen);
  }
  int head = at.kv * (H / K) + at.part * (H / K) / splits;
  const int heads_end = end <= begin ? head : at.kv * (H / K) + (at.part + 1) * (H / K) / splits;
  const long long y_row = (long long)H * HEAD_DIM;
  dy += at.batch * T * y_row;
  stats += (long long)at.batch * H * T * 2;
  q += at.batch * q_batch;
  k += at.batch * k_batch + at.kv * HEAD_DIM;
  v += at.batch * v_batch + at.kv * HEAD_DIM;

  const unsigned k_tile = shared_address(shared), v_tile = k_tile + DKV_ROWS * ROW_BYTES;
  const unsigned stages = v_tile + DKV_ROWS * ROW_BYTES, own = warp * 16 * DKV_M * ROW_BYTES + lane_a(lane);
  Loader<DKV_STAGE, DKV_THREADS> queries(q + head * HEAD_DIM, q_row, begin * DKV_STAGE);
  Loader<DKV_STAGE, DKV_THREADS> gradients(dy + head * HEAD_DIM, y_row, begin * DKV_STAGE);
  const long long q_back = HEAD_DIM - (end - begin) * DKV_STAGE * q_row;  // from the end of a head to the next one
  const long long y_back = HEAD_DIM - (end - begin) * DKV_STAGE * y_row;
  auto load_stage = [&](unsigned to, int h, int tile) {
    const int t = tile * DKV_STAGE + threadIdx.x;
    queries.load(to, T - tile * DKV_STAGE);
    gradients.load(to + DKV_STAGE * ROW_BYTES, T - tile * DKV_STAGE);
    if (threadIdx.x < DKV_STAGE)
      copy8(to + DKV_STAGE * 2 * ROW_BYTES + threadIdx.x * 8, stats + ((long long)h * T + t) * 2, t < T);
    if (tile + 1 == end) queries.from += q_back, gradients.from += y_back;
    copy_commit();
  };
  Loader<DKV_ROWS, DKV_THREADS>(k, k_row, j_block).load(k_tile, S - j_block);
  Loader<DKV_ROWS, DKV_THREADS>(v, v_row, j_block).load(v_tile, S - j_block);
  if (head < heads_end) load_stage(stages, head, begin);
  copy_commit();
  copy_wait();
  __syncthreads();
#if DKV_KEPT > 0
  unsigned k_left[DKV_M][HEAD_DIM / 16][4];
  load_rows(k_left, k_tile + own);
#else
  const unsigned k_left = k_tile + own;
#endif
#if DKV_KEPT > 1
  unsigned v_left[DKV_M][HEAD_DIM / 16][4];
  load_rows(v_left, v_tile + own);
#else
  const unsigned v_left = v_tile + own;
#endif

  const float c = scale * LOG2E;
  float dk_sum[DKV_M][CELLS][4] = {}, dv_sum[DKV_M][CELLS][4] = {};
  for (int stage = 0, tile = begin; head < heads_end; stage ^= 1) {
    const int t_tile = tile * DKV_STAGE;
    if (++tile == end) tile = begin, head++;
    if (head < heads_end) load_stage(stages + (stage ^ 1) * DKV_BYTES, head, tile);
    const unsigned q_stage = stages + stage * DKV_BYTES;
    const float4* row_stats = (const float4*)(shared + (q_stage - k_tile) + DKV_STAGE * 2 * ROW_BYTES);
    // Seen from the warp's first key: query t of the stage sees keys up to ahead + t.
    const int ahead = t_tile + offset - j_warp;
    const unsigned dy_stage = q_stage + DKV_STAGE * ROW_BYTES;
    if (ahead >= 16 * DKV_M - 1 && (!window || ahead - window + DKV_STAGE - 1 < 0) &&
        (!DOCUMENTS || borders.at(t_tile + DKV_STAGE - 1) <= j_warp)) {
#pragma unroll 1
      for (int t = 0; t < DKV_STAGE; t += DKV_STEP)
        dkv_step<false>(dk_sum, dv_sum, k_left, v_left, q_stage + t * ROW_BYTES, dy_stage + t * ROW_BYTES,
                        row_stats + t / 2, c, 0, 0, borders, 0, 0);
    } else {
#pragma unroll 1
      for (int t = 0; t < DKV_STAGE; t += DKV_STEP)
        if (ahead + t + DKV_STEP - 1 >= 0 && !(window && ahead + t - window >= 16 * DKV_M - 1) &&
            (!DOCUMENTS || borders.at(t_tile + t) < j_warp + 16 * DKV_M))
          dkv_step<true>(dk_sum, dv_sum, k_left, v_left, q_stage + t * ROW_BYTES, dy_stage + t * ROW_BYTES,
                         row_stats + t / 2, c, ahead + t, window, borders, t_tile + t, j_warp);
    }
    copy_wait();
    __syncthreads();
  }

  if (splits == 1) {
    float one[DKV_M][2], scales[DKV_M][2];
#pragma unroll
    for (int i = 0; i < DKV_M; i++) one[i][0] = one[i][1] = 1, scales[i][0] = scales[i][1] = scale;
    unsigned char* rows = shared + warp * 16 * DKV_M * ROW_BYTES;
    store_rows(dv + at.batch * dv_batch + at.kv * HEAD_DIM, dv_row, j_warp, S, rows, dv_sum, one);
    store_rows(dk + at.batch * dk_batch + at.kv * HEAD_DIM, dk_row, j_warp, S, rows, dk_sum, scales);
  } else {
    const long long row = (long long)K * HEAD_DIM, size = (long long)B * S * row;
    partial += at.part * 2 * size + at.batch * S * row + at.kv * HEAD_DIM;
    store_partial(partial, row, j_warp, S, dk_sum, scale);
    store_partial(partial + size, row, j_warp, S, dv_sum, 1.0f);
  }
}

// dk, dv = sum over splits of partial (splits,2,B,S,K,D), in order; four values a thread, 256 threads a block.
extern "C" __global__ void attention_dkv_sum(act* dk, act* dv, const float* partial, long long dk_row,
                                             long long dk_batch, long long dv_row, long long dv_batch, int B, int S,
                                             int K, int splits) {
  const int quads = K * HEAD_DIM / 4;
  const long long size = (long long)B * S * quads, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= 2 * size) return;
  const bool second = i >= size;
  const long long at = second ? i - size : i, b = at / ((long long)S * quads), j = at / quads % S, d = at % quads * 4;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int split = 0; split < splits; split++) {
    const float4 x = ((const float4*)partial)[split * 2 * size + i];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  act* to = second ? dv + b * dv_batch + j * dv_row + d : dk + b * dk_batch + j * dk_row + d;
  *(uint2*)to = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
}
