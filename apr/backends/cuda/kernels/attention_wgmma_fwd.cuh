// Causal softmax attention on wgmma and TMA, forward: the formulas of attention_fwd.cuh (Shah et al. 2024,
// FlashAttention-3, algorithm 2).
//
// A block has one group that loads and FWD_GROUPS that multiply, each for its own 64 queries of one head. Keys and values
// come in steps, from the last to the first. While the scores of one step are computed, the values of the step before are
// added up; two groups ask for their products in turns (Shah et al. 2024, section 3.1), so that one computes powers while the
// other multiplies. p is rounded to bf16 for p v; scores, softmax and sums are float32.
constexpr int FWD_QUERIES = 64 * FWD_GROUPS, FWD_THREADS = 128 * (FWD_GROUPS + 1);
constexpr int FWD_OWN = FWD_QUERIES * ROW, FWD_STAGE = FWD_KEYS * ROW;  // bytes: q, then y; k or v
constexpr int FWD_BUFFERS = 2;                                           // the next queries come while these are worked on
constexpr int TURN = 4;  // named barrier of the first group's turns; then that of the second

// What of the keys a query sees.
struct Sight {
  const int* doc_start;
  int T, offset, window;
  __device__ __forceinline__ int from(int batch, int t) const {  // does not decrease with t
    const int first = window ? max(0, t + offset - window + 1) : 0;
    return DOCUMENTS ? max(first, Borders{doc_start, batch, T}.at(t)) : first;
  }
  __device__ __forceinline__ int to(int t) const { return t + offset; }
};
// Queries of a head that a block works on (pair = batch * H + head), and the steps of keys that one of them sees. Groups of
// pairs come one after another, because what their blocks share fits in the level-2 cache; within a group all blocks of the
// last tile, the longest, come first.
struct Work {
  int pair, query, first, last;
  __device__ __forceinline__ Work(int item, const Sight& sight, int B, int H, int group) {
    const int tiles = (sight.T + FWD_QUERIES - 1) / FWD_QUERIES, before = item / (group * tiles) * group;
    const int pairs = min(group, B * H - before), i = item - before * tiles;
    pair = before + i % pairs, query = (tiles - 1 - i / pairs) * FWD_QUERIES;
    first = sight.from(pair / H, query) / FWD_KEYS;
    last = sight.to(min(sight.T, query + FWD_QUERIES) - 1) / FWD_KEYS;
  }
};

// Scores of keys that queries t and t + 8 do not see become minus infinity.
__device__ __forceinline__ void hide_step(float (&s)[FWD_KEYS / 2], const Sight& sight, int batch, int t, int key) {
  key += threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int to = sight.to(t + 8 * h) - key, from = sight.from(batch, t + 8 * h) - key;
#pragma unroll
    for (int i = 2 * h; i < FWD_KEYS / 2; i += 4)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (i / 4 * 8 + e > to || i / 4 * 8 + e < from) s[i + e] = minus_infinity();
  }
}
// s becomes p = 2^(c s - top). top follows the largest c s of a row only where it is far below one of the warp's: then
// what was summed so far is to shrink; tells whether.
__device__ __forceinline__ bool softmax_step(float (&s)[FWD_KEYS / 2], float (&top)[2], float (&sum)[2],
                                             float (&shrink)[2], float c) {
  constexpr float FAR = 8;  // powers of two
  float largest[2];
  bool grown = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float m = s[2 * h];
#pragma unroll
    for (int i = 0; i < FWD_KEYS / 2; i += 4) m = fmaxf(m, fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
    largest[h] = c * m;
    grown |= largest[h] > top[h] + FAR;
  }
  grown = __any_sync(~0u, grown);
  if (grown)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      largest[h] = fmaxf(top[h], quad_max(largest[h]));
      shrink[h] = power2(top[h] - largest[h]);
      top[h] = largest[h];
      sum[h] *= shrink[h];
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float add = 0;
#pragma unroll
    for (int i = 0; i < FWD_KEYS / 2; i++)
      if (i / 2 % 2 == h) add += s[i] = power2(fmaf(s[i], c, -top[h]));
    sum[h] += add;
  }
  return grown;
}

// shared: 1024 to begin at a multiple of it, barriers, FWD_BUFFERS of queries, FWD_STAGES of keys, of values
extern "C" __global__ void __launch_bounds__(FWD_THREADS, 1)
attention_fwd_wgmma(const __grid_constant__ TensorMap y, float* lse, const __grid_constant__ TensorMap q,
                    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const int* doc_start, int B,
                    int T, int S, int H, int K, int window, int pairs, float scale) {
  const unsigned barriers = shared_begin(), owned = barriers + BARRIERS, key_stages = owned + FWD_BUFFERS * FWD_OWN;
  const unsigned value_stages = key_stages + FWD_STAGES * FWD_STAGE;
  typedef Ring<FWD_BUFFERS> Own;
  typedef Ring<FWD_STAGES> Steps;
  const unsigned key_barriers = barriers + Own::BYTES, value_barriers = key_barriers + Steps::BYTES;
  const int group = group_of_warp() - 1, items = (T + FWD_QUERIES - 1) / FWD_QUERIES * B * H;
  const Sight sight = {doc_start, T, S - T, window};
  if (threadIdx.x == 0) {
    Own(barriers).make(FWD_GROUPS);
    Steps(key_barriers).make(FWD_GROUPS);
    Steps(value_barriers).make(FWD_GROUPS);
    barriers_made();
  }
  __syncthreads();
  unsigned step = 0;  // so far
  if (group < 0) {
    registers_less<registers_of_loader(FWD_GROUPS)>();
    if (threadIdx.x) return;
    for (int turn = 0, item; (item = turn_item(turn)) < items; turn++) {
      const Work at(item, sight, B, H, pairs);
      const int batch = at.pair / H, kv = at.pair % H / (H / K);
      const Own own(barriers, turn);
      own.claim(FWD_OWN);
      rows_load(owned + own.stage * FWD_OWN, FWD_QUERIES, &q, at.pair % H, at.query, batch, own.full());
#pragma unroll 1
      for (int n = at.last; n >= at.first; n--, step++) {
        const Steps keys(key_barriers, step), values(value_barriers, step);
        keys.claim(FWD_STAGE);
        rows_load(key_stages + keys.stage * FWD_STAGE, FWD_KEYS, &k, kv, n * FWD_KEYS, batch, keys.full());
        values.claim(FWD_STAGE);
        rows_load(value_stages + values.stage * FWD_STAGE, FWD_KEYS, &v, kv, n * FWD_KEYS, batch, values.full());
      }
    }
    return;
  }
  registers_more<registers_of_others(FWD_GROUPS)>();
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float c = scale * LOG2E;  // scores are kept in powers of two
  // Each group has one turn for each step of an item, whether it sees the step or not.
  const auto turn_begin = [&] {
    if (FWD_GROUPS == 2) turn_wait(TURN + group);
  };
  const auto turn_end = [&] {
    if (FWD_GROUPS == 2) turn_pass(TURN + 1 - group);
  };
  if (group == 1) turn_end();
  const auto skip = [&](int count) {  // steps that no query of the group sees
#pragma unroll 1
    for (; count > 0; count--, step++) {
      turn_begin();
      turn_end();
      const Steps keys(key_barriers, step), values(value_barriers, step);
      keys.wait();
      values.wait();
      keys.release();
      values.release();
    }
  };
  for (int turn = 0, item; (item = turn_item(turn)) < items; turn++) {
    const Work at(item, sight, B, H, pairs);
    const Own own(barriers, turn);
    const int t0 = at.query + group * 64;
    const unsigned rows = owned + own.stage * FWD_OWN + group * 64 * TILE_ROW;
    const int last = t0 < T ? min(at.last, sight.to(t0 + 63) / FWD_KEYS) : at.first - 1;
    const int first = max(at.first, sight.from(at.pair / H, t0) / FWD_KEYS);
    // Steps that all of its queries see whole.
    const int whole_last = (sight.to(t0) + 1) / FWD_KEYS - 1;
    const int whole_first = max(first, (sight.from(at.pair / H, t0 + 63) + FWD_KEYS - 1) / FWD_KEYS);
    own.wait();
    skip(at.last - last);
    int n = last;
    if (n >= first) {
      float o[HEAD_DIM / 2] = {}, s[FWD_KEYS / 2], top[2] = {-1e30f, -1e30f}, sum[2] = {}, shrink[2];
      unsigned p[FWD_KEYS / 16][4];
      {
        const Steps keys(key_barriers, step);
        keys.wait();
        turn_begin();
        products_begin();
        scores<FWD_QUERIES, FWD_KEYS>(s, rows, key_stages + keys.stage * FWD_STAGE);
        turn_end();
        products_wait<0>(s);
        keys.release();
      }
      hide_step(s, sight, at.pair / H, t0 + row, n * FWD_KEYS);
      softmax_step(s, top, sum, shrink, c);
      as_left(p, s);
      const auto add_step = [&](bool hidden) {
        const Steps values(value_barriers, step), keys(key_barriers, ++step);
        values.wait();
        keys.wait();
        turn_begin();
        products_begin(o, p);
        scores<FWD_QUERIES, FWD_KEYS>(s, rows, key_stages + keys.stage * FWD_STAGE);
        gather(o, p, value_stages + values.stage * FWD_STAGE);
        turn_end();
        products_wait<1>(s);
        keys.release();
        if (hidden) hide_step(s, sight, at.pair / H, t0 + row, n * FWD_KEYS);
        const bool grown = softmax_step(s, top, sum, shrink, c);
        products_wait<0>(o);
        values.release();
        if (grown)
#pragma unroll
          for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= shrink[i / 2 % 2];
        as_left(p, s);
      };
      n--;
#pragma unroll 1
      for (; n > whole_last && n >= first; n--) add_step(true);
#pragma unroll 1
      for (; n >= whole_first; n--) add_step(false);
#pragma unroll 1
      for (; n >= first; n--) add_step(true);
      const Steps values(value_barriers, step++);
      values.wait();
      products_begin(o, p);
      gather(o, p, value_stages + values.stage * FWD_STAGE);
      products_wait<0>(o);
      values.release();
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int t = t0 + row + 8 * h;
        const float total = quad_sum(sum[h]);
        if (lane % 4 == 0 && t < T) lse[(long long)at.pair * T + t] = (top[h] + log2f(total)) * LN2;
        sum[h] = 1 / total;
      }
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= sum[i / 2 % 2];
      rows_put(rows, FWD_QUERIES, o, 1);  // in place of the queries
      fence_async();
      group_sync(1 + group);
      if (threadIdx.x % 128 == 0) {
        rows_store(&y, rows, FWD_QUERIES, at.pair % H, t0, at.pair / H);
        stores_commit();
      }
    }
    skip(n + 1 - at.first);
    if (threadIdx.x % 128 == 0) stores_wait();
    own.release();
  }
}
