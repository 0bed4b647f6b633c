// Gradients of causal softmax attention on wgmma and TMA: the formulas of attention_bwd.cuh, also in two kernels that share
// nothing but stats (B,H,P,2) = lse in powers of two, delta; P = stats_rows(T), and queries from T on have lse = infinity, so
// that they see nothing. p and ds are computed twice, and every sum has one order.
//
// A block has one group that loads and two that multiply, each for its own 64 rows: queries in attention_dq_wgmma, keys in
// attention_dkv_wgmma. It works on one tile after another, longest first. While one group computes powers
// and rounds, the other's products and its own last ones are at work. With wide heads (AHEAD) a group asks for the scores of
// the next step before it works on dp of this one, and passes by steps of which it sees nothing; with heads of 64 that is slower.
//
// Left operands in registers (p and ds) are written anew in each step. k and v of attention_dkv_wgmma stay in shared memory:
// ptxas (12.9 and 13.0) gives a fragment that is to outlive a step the registers of those that are written within it.
constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1);
constexpr int LOADER_REGISTERS = registers_of_loader(GROUPS), GROUP_REGISTERS = registers_of_others(GROUPS);
constexpr int DQ_QUERIES = 64 * GROUPS, DKV_KEYS = 64 * GROUPS;
constexpr int DQ_OWN = 2 * DQ_QUERIES * ROW, DQ_STAGE = DQ_KEYS * ROW;  // q, dy; k or v
constexpr int DKV_OWN = 2 * DKV_KEYS * ROW, DKV_STAGE = 2 * DKV_QUERIES * ROW + 1024;  // k, v; q, dy, stats
constexpr int STATS_BYTES = DKV_QUERIES * 8;
constexpr bool AHEAD = HEAD_DIM > 64;

struct Range { int begin, end; };  // of steps

constexpr int STATS_MORE = 64;  // which the last step of attention_dkv_wgmma may reach
static_assert(DKV_QUERIES <= STATS_MORE && DKV_QUERIES % 16 == 0, "queries of a step");
__device__ __forceinline__ int stats_rows(int T) { return (T + DQ_QUERIES - 1) / DQ_QUERIES * DQ_QUERIES + STATS_MORE; }

// As mask() of mma.cuh, for the 16 rows of a warp. TURNED: queries are the columns.
template <bool TURNED, int N>
__device__ __forceinline__ void hide(float (&s)[N], int ahead, int window) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int j = TURNED ? row - column : column - row;
    if (j > ahead || (window && j <= ahead - window)) s[i] = minus_infinity();
  }
}

// shared: 1024 to begin at a multiple of it, barriers, DQ_BUFFERS of queries and dy, stages of keys, of values, results
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dq_wgmma(const __grid_constant__ TensorMap dq, float* stats, const __grid_constant__ TensorMap dy,
                   const act* y, const float* lse, const __grid_constant__ TensorMap q,
                   const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const int* doc_start, int B,
                   int T, int S, int H, int K, int window, float scale) {
  const unsigned barriers = shared_begin(), owned = barriers + BARRIERS, key_stages = owned + DQ_BUFFERS * DQ_OWN;
  const unsigned value_stages = key_stages + DQ_STAGES * DQ_STAGE, results = value_stages + DQ_VALUES * DQ_STAGE;
  Ring<DQ_BUFFERS> own(barriers);
  Ring<DQ_STAGES> keys(barriers + own.BYTES);
  Ring<DQ_VALUES> values(barriers + own.BYTES + keys.BYTES);
  const int group = AHEAD ? group_of_warp() : threadIdx.x / 128, lane = threadIdx.x % 32, offset = S - T;
  const int tiles = (T + DQ_QUERIES - 1) / DQ_QUERIES, pairs = B * H;
  auto steps = [&](int tile, int batch) -> Range {
    const int t = tile * DQ_QUERIES, end = min(T, t + DQ_QUERIES) + offset;
    int begin = window ? max(0, t + offset - window + 1) : 0;
    if (DOCUMENTS) begin = max(begin, Borders{doc_start, batch, T}.at(t));
    return {begin / DQ_KEYS, (end + DQ_KEYS - 1) / DQ_KEYS};
  };
  if (threadIdx.x == 0) {
    own.make(GROUPS);
    keys.make(GROUPS);
    values.make(GROUPS);
    barriers_made();
  }
  __syncthreads();
  if (group == GROUPS) {
    registers_less<LOADER_REGISTERS>();
    if (threadIdx.x % 128) return;
    for (int i, turn = 0; (i = turn_item(turn)) < tiles * pairs; turn++, own.next()) {
      const int tile = tiles - 1 - i / pairs, head = i % pairs % H, batch = i % pairs / H;
      const unsigned to = owned + own.stage * DQ_OWN;
      own.claim(DQ_OWN);
      rows_load(to, DQ_QUERIES, &q, head, tile * DQ_QUERIES, batch, own.full());
      rows_load(to + DQ_OWN / 2, DQ_QUERIES, &dy, head, tile * DQ_QUERIES, batch, own.full());
      const Range range = steps(tile, batch);
#pragma unroll 1
      for (int n = range.begin; n < range.end; n++, keys.next(), values.next()) {
        keys.claim(DQ_STAGE);
        rows_load(key_stages + keys.stage * DQ_STAGE, DQ_KEYS, &k, head / (H / K), n * DQ_KEYS, batch, keys.full());
        values.claim(DQ_STAGE);
        rows_load(value_stages + values.stage * DQ_STAGE, DQ_KEYS, &v, head / (H / K), n * DQ_KEYS, batch, values.full());
      }
    }
    return;
  }
  registers_more<GROUP_REGISTERS>();
  const float c = scale * LOG2E;
  const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  for (int i, turn = 0; (i = turn_item(turn)) < tiles * pairs; turn++) {
    const int tile = tiles - 1 - i / pairs, head = i % pairs % H, batch = i % pairs / H;
    const int t_group = tile * DQ_QUERIES + group * 64, t_warp = t_group + threadIdx.x / 32 % 4 * 16;
    const Range range = steps(tile, batch);
    const Borders borders = {doc_start, batch, T};
    const unsigned q_rows = owned + own.stage * DQ_OWN + group * 64 * TILE_ROW, dy_rows = q_rows + DQ_OWN / 2;
    float sum[HEAD_DIM / 2] = {}, s[DQ_KEYS / 2], dp[DQ_KEYS / 2], more[DQ_KEYS / 2];
    float (&p)[DQ_KEYS / 2] = AHEAD ? more : s;
    float top[2], delta[2];
    unsigned ds[DQ_KEYS / 16][4];
    int begins[2];  // documents of the thread's two queries
    uint4 y_row[2][HEAD_DIM / 32];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = min(t_group + row + 8 * half, T - 1);
      top[half] = lse[((long long)batch * H + head) * T + t] * LOG2E;
      if (DOCUMENTS) begins[half] = borders.at(t);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 32; n++)
        y_row[half][n] = *(const uint4*)(y + (((long long)batch * T + t) * H + head) * HEAD_DIM + (n * 4 + lane % 4) * 8);
    }
    own.wait();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float add = 0;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 32; n++) {
        const int at = n * 4 + lane % 4;
        const uint4 a = shared_get4(dy_rows + at / 8 * DQ_QUERIES * TILE_ROW + cell(row + 8 * half, at % 8));
        const uint4 b = y_row[half][n];
        add += dot2(a.x, b.x) + dot2(a.y, b.y) + dot2(a.z, b.z) + dot2(a.w, b.w);
      }
      delta[half] = quad_sum(add);
      const int t = t_group + row + 8 * half;
      float* to = stats + (((long long)batch * H + head) * stats_rows(T) + t) * 2;
      if (lane % 4 == 0) to[0] = t < T ? top[half] : -minus_infinity(), to[1] = delta[half];
    }
    if (tile == tiles - 1 && threadIdx.x < STATS_MORE) {
      float* to = stats + (((long long)batch * H + head + 1) * stats_rows(T) - STATS_MORE + threadIdx.x) * 2;
      to[0] = -minus_infinity(), to[1] = 0;
    }
    // Steps of which the group sees something, or one.
    const int end = AHEAD ? min(range.end, (t_group + 63 + offset) / DQ_KEYS + 1) : range.end;
    const int begin = AHEAD && window ? min(end - 1, max(range.begin, (t_group + offset - window + 1) / DQ_KEYS)) : range.begin;
    const auto pass = [&](int count) {
#pragma unroll 1
      for (; count > 0; count--, keys.next(), values.next()) {
        keys.wait();
        values.wait();
        keys.release();
        values.release();
      }
    };
    unsigned held = 0;  // the barrier of the step before, whose keys are still read
    const auto step = [&](int n, bool is_last) {
      const unsigned now = key_stages + keys.stage * DQ_STAGE;
      if (AHEAD) {
        values.wait();
        products_wait<0>(s);
        products_begin();
      } else {
        keys.wait();
        values.wait();
        products_begin();
        scores<DQ_QUERIES, DQ_KEYS>(s, q_rows, now);
      }
      scores<DQ_QUERIES, DQ_KEYS>(dp, dy_rows, value_stages + values.stage * DQ_STAGE);
      if (!AHEAD) products_wait<1>(s);
      if (held && lane == 0) barrier_arrive(held);
      held = keys.full() + 8;
      keys.next();
      const int j = n * DQ_KEYS, ahead = t_warp + offset - j;
      if (ahead < DQ_KEYS - 1 || (window && ahead - window + 15 >= 0)) hide<false>(s, ahead, window);
      if (DOCUMENTS && borders.at(t_warp + 15) > j)
#pragma unroll
        for (int e = 0; e < DQ_KEYS / 2; e++)
          if (j + e / 4 * 8 + lane % 4 * 2 + e % 2 < begins[e / 2 % 2]) s[e] = minus_infinity();
#pragma unroll
      for (int e = 0; e < DQ_KEYS / 2; e++) p[e] = power2(fmaf(s[e], c, -top[e / 2 % 2]));
      if (AHEAD && !is_last) {
        keys.wait();
        products_begin(s);
        scores<DQ_QUERIES, DQ_KEYS>(s, q_rows, key_stages + keys.stage * DQ_STAGE);
        products_wait<1>(dp);
      } else {
        products_wait<0>(dp);
      }
      values.release();
      values.next();
      if (is_last) own.release();
#pragma unroll
      for (int e = 0; e < DQ_KEYS / 2; e++) p[e] *= dp[e] - delta[e / 2 % 2];
      as_left(ds, p);
      products_begin(sum, ds);
      gather(sum, ds, now);
    };
    if (AHEAD) {
      pass(begin - range.begin);
      keys.wait();
      products_begin(sum);
      scores<DQ_QUERIES, DQ_KEYS>(s, q_rows, key_stages + keys.stage * DQ_STAGE);
#pragma unroll 1
      for (int n = begin; n < end - 1; n++) step(n, false);
      step(end - 1, true);
    } else {
#pragma unroll 1
      for (int n = begin; n < end; n++) step(n, n == end - 1);
    }
    products_wait<0>(sum);
    if (lane == 0) barrier_arrive(held);
    pass(range.end - end);
    const unsigned result = results + group * 64 * TILE_ROW;
    if (threadIdx.x % 128 == 0) stores_wait();  // of the tile before
    group_sync(1 + group);
    rows_put(result, DQ_QUERIES, sum, scale);
    fence_async();
    group_sync(1 + group);
    if (threadIdx.x % 128 == 0) {
      rows_store(&dq, result, DQ_QUERIES, head, t_group, batch);
      stores_commit();
    }
    own.next();
  }
  if (threadIdx.x % 128 == 0) stores_wait();
}

// A block adds up a part of the steps (64 queries of a head) that see its keys. With splits > 1 it leaves float32 sums
// in partial (splits,2,B,S,K,D), dk then dv, for attention_dkv_sum.
// shared: barriers, DKV_BUFFERS of keys and values, DKV_STAGES of queries, dy and stats, 1024 to begin at a multiple of it
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dkv_wgmma(const __grid_constant__ TensorMap dk, const __grid_constant__ TensorMap dv,
                    float* partial /* or null */, const __grid_constant__ TensorMap dy, const float* stats,
                    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap v, const int* doc_start, int B, int T, int S, int H, int K, int window,
                    int splits, float scale) {
  const unsigned barriers = shared_begin(), owned = barriers + BARRIERS, stages = owned + DKV_BUFFERS * DKV_OWN;
  Ring<DKV_BUFFERS> own(barriers);
  Ring<DKV_STAGES> queries(barriers + Ring<DKV_BUFFERS>::BYTES);
  const int group = AHEAD ? group_of_warp() : threadIdx.x / 128, lane = threadIdx.x % 32, offset = S - T, each = H / K;
  const int tiles = (S + DKV_KEYS - 1) / DKV_KEYS, parts = B * K * splits;
  auto steps = [&](int tile, int batch) -> Range {  // by whole warps
    const int j = tile * DKV_KEYS, begin = max(0, j - offset) / DKV_QUERIES;
    const int last = window ? min(T, min(S, j + DKV_KEYS) - 1 - offset + window) : T;
    int end = last > 0 ? (last + DKV_QUERIES - 1) / DKV_QUERIES : 0;
    if (DOCUMENTS) {  // without the queries whose documents begin after the keys: they are the last ones
      const Borders borders = {doc_start, batch, T};
      int seen = 0;
      for (int n = begin; n < end; n += 32)
        seen += __popc(__ballot_sync(~0u, n + lane < end && borders.at((n + lane) * DKV_QUERIES) < j + DKV_KEYS));
      end = begin + seen;
    }
    return {begin, max(begin, end)};
  };
  if (threadIdx.x == 0) {
    own.make(GROUPS);
    queries.make(GROUPS);
    barriers_made();
  }
  __syncthreads();
  if (group == GROUPS) {
    registers_less<LOADER_REGISTERS>();
    if (threadIdx.x % 128 >= 32) return;
    for (int i, turn = 0; (i = turn_item(turn)) < tiles * parts; turn++, own.next()) {
      const int tile = i / parts, part = i % parts % splits, kv = i % parts / splits % K, batch = i % parts / splits / K;
      const Range range = steps(tile, batch);
      const int count = range.end - range.begin, last = (part + 1) * each * count / splits;
      if (lane) continue;
      const unsigned to = owned + own.stage * DKV_OWN;
      own.claim(DKV_OWN);
      rows_load(to, DKV_KEYS, &k, kv, tile * DKV_KEYS, batch, own.full());
      rows_load(to + DKV_OWN / 2, DKV_KEYS, &v, kv, tile * DKV_KEYS, batch, own.full());
#pragma unroll 1
      for (int n = part * each * count / splits; n < last; n++, queries.next()) {
        const int head = kv * each + n / count, t = (range.begin + n % count) * DKV_QUERIES;
        const unsigned to = stages + queries.stage * DKV_STAGE;
        queries.claim(2 * DKV_QUERIES * ROW + STATS_BYTES);
        rows_load(to, DKV_QUERIES, &q, head, t, batch, queries.full());
        rows_load(to + DKV_QUERIES * ROW, DKV_QUERIES, &dy, head, t, batch, queries.full());
        bytes_load(to + 2 * DKV_QUERIES * ROW, stats + (((long long)batch * H + head) * stats_rows(T) + t) * 2, STATS_BYTES,
                   queries.full());
      }
    }
    return;
  }
  registers_more<GROUP_REGISTERS>();
  const float c = scale * LOG2E;
  for (int i, turn = 0; (i = turn_item(turn)) < tiles * parts; turn++) {
    const int tile = i / parts, part = i % parts % splits, kv = i % parts / splits % K, batch = i % parts / splits / K;
    const int j_group = tile * DKV_KEYS + group * 64, j_warp = j_group + threadIdx.x / 32 % 4 * 16;
    const Range range = steps(tile, batch);
    const int count = range.end - range.begin, first = part * each * count / splits;
    const int last = (part + 1) * each * count / splits;
    const Borders borders = {doc_start, batch, T};
    const unsigned k_rows = owned + own.stage * DKV_OWN + group * 64 * TILE_ROW, v_rows = k_rows + DKV_OWN / 2;
    float dk_sum[HEAD_DIM / 2] = {}, dv_sum[HEAD_DIM / 2] = {}, s[DKV_QUERIES / 2], dp[DKV_QUERIES / 2];
    float more[DKV_QUERIES / 2], (&p)[DKV_QUERIES / 2] = AHEAD ? more : s;
    int n = first, t = (range.begin + (count ? first % count : 0)) * DKV_QUERIES;
    const auto next = [&] {
      n++, queries.next();
      t = t + DKV_QUERIES < range.end * DKV_QUERIES ? t + DKV_QUERIES : range.begin * DKV_QUERIES;
    };
    const auto find = [&] {  // the next step of which the group sees something, or the last
#pragma unroll 1
      for (; n < last - 1; next()) {
        const bool early = t + DKV_QUERIES - 1 + offset < j_group;
        if (!early && !(window && t + offset - window >= j_group + 63)) break;
        queries.wait();
        queries.release();
      }
      queries.wait();
    };
    unsigned held = 0;  // the barrier of the step before, whose queries are still read
    const auto step = [&](bool is_last) {
      unsigned left[DKV_QUERIES / 16][4], right[DKV_QUERIES / 16][4];
      const unsigned now = stages + queries.stage * DKV_STAGE, dy_now = now + DKV_QUERIES * ROW;
      const unsigned row_stats = now + 2 * DKV_QUERIES * ROW + lane % 4 * 16;  // of two queries in each 64 bytes
      if (AHEAD) {
        products_wait<0>(s);
        products_begin();
      } else {
        queries.wait();
        products_begin();
        scores<DKV_KEYS, DKV_QUERIES>(s, k_rows, now);
      }
      scores<DKV_KEYS, DKV_QUERIES>(dp, v_rows, dy_now);
      if (!AHEAD) products_wait<1>(s);
      if (held && lane == 0) barrier_arrive(held);
      held = queries.full() + 8;
      // Seen from the warp's first key: query t of the step sees keys up to ahead + t.
      const int t_now = t, ahead = t_now + offset - j_warp;
      if (ahead < 15 || (window && ahead - window + DKV_QUERIES - 1 >= 0)) hide<true>(s, ahead, window);
      if (DOCUMENTS && borders.at(t_now + DKV_QUERIES - 1) > j_warp)
#pragma unroll
        for (int e = 0; e < DKV_QUERIES / 2; e++)
          if (j_warp + lane / 4 + e / 2 % 2 * 8 < borders.at(t_now + e / 4 * 8 + lane % 4 * 2 + e % 2)) s[e] = minus_infinity();
#pragma unroll
      for (int i = 0; i < DKV_QUERIES / 8; i++) {
        const uint4 x = shared_get4(row_stats + i * 64);
#pragma unroll
        for (int e = 0; e < 4; e++) p[i * 4 + e] = power2(fmaf(s[i * 4 + e], c, -__uint_as_float(e % 2 ? x.z : x.x)));
      }
      as_left(left, p);
      next();
      if (AHEAD && !is_last) find();
      if (AHEAD) products_begin(s, dv_sum, left);
      else products_begin(dv_sum, left);
      gather(dv_sum, left, dy_now);
      if (AHEAD && !is_last) {
        scores<DKV_KEYS, DKV_QUERIES>(s, k_rows, stages + queries.stage * DKV_STAGE);
        products_wait<1>(dp, dv_sum);  // not enough registers for both left operands
      } else if (AHEAD) {
        products_wait<0>(dp, dv_sum);
      } else {
        products_wait<1>(dp);
      }
#pragma unroll
      for (int i = 0; i < DKV_QUERIES / 8; i++) {
        const uint4 x = shared_get4(row_stats + i * 64);
#pragma unroll
        for (int e = 0; e < 4; e++) p[i * 4 + e] *= dp[i * 4 + e] - __uint_as_float(e % 2 ? x.w : x.y);
      }
      as_left(right, p);
      products_begin(dk_sum, right);
      gather(dk_sum, right, now);
    };
    own.wait();
    if (AHEAD) {
      if (n < last) {
        find();
        products_begin(dk_sum, dv_sum);
        scores<DKV_KEYS, DKV_QUERIES>(s, k_rows, stages + queries.stage * DKV_STAGE);
#pragma unroll 1
        while (n < last - 1) step(false);
        step(true);
      }
    } else {
#pragma unroll 1
      while (n < last) step(false);
    }
    products_wait<0>(dk_sum, dv_sum);
    if (held && lane == 0) barrier_arrive(held);
    group_sync(1 + group);
    if (splits == 1) {
      rows_put(k_rows, DKV_KEYS, dk_sum, scale);
      rows_put(v_rows, DKV_KEYS, dv_sum, 1);
      fence_async();
      group_sync(1 + group);
      if (threadIdx.x % 128 == 0) {
        rows_store(&dk, k_rows, DKV_KEYS, kv, j_group, batch);
        rows_store(&dv, v_rows, DKV_KEYS, kv, j_group, batch);
        stores_commit();
        stores_wait();
      }
    } else {
      const long long size = (long long)B * S * K * HEAD_DIM;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int j = j_warp + lane / 4 + 8 * half;
        float* to = partial + part * 2 * size + (((long long)batch * S + j) * K + kv) * HEAD_DIM + lane % 4 * 2;
        if (j < S)
#pragma unroll
          for (int n = 0; n < HEAD_DIM / 8; n++) {
            *(float2*)(to + n * 8) = make_float2(dk_sum[n * 4 + 2 * half] * scale, dk_sum[n * 4 + 2 * half + 1] * scale);
            *(float2*)(to + size + n * 8) = make_float2(dv_sum[n * 4 + 2 * half], dv_sum[n * 4 + 2 * half + 1]);
          }
      }
    }
    own.release();
    own.next();
  }
}
