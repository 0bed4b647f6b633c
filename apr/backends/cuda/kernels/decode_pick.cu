// The next token of each sequence, drawn from its logits as inference/sampling.py's `pick` does, and the step that follows it.
//
//   logits (n,V), rows logits_row apart; allowed (V,) of 0 and 1, or null: ids that may be drawn; seen (n,V), 1 for tokens of
//   the sequence, read where there is a penalty; draws (n,slots) in [0,1): number `steps` of a sequence is its next
//   options (n,4): temperature, top_p, min_p, penalty (as an activation); top_k (n,)
//   tops (n,SLICES), sums (n,4), bins (n,2,BINS), the last two of zeros, which they are again at the end
//   chosen (n,) double: the token, or -1 where a logit is not finite; tokens = it, positions += 1 (below slots), steps += 1
//
// Three launches: decode_tops finds the largest logit of each slice of the vocabulary, lowest id first; decode_weigh, for
// temperatures above 0, counts and weighs them by bins of their distance to the largest; decode_pick has a block for a
// sequence. Weights are exp((x - largest) / T) in double, counted in units of 2^-44, so that sums do not depend on an order. A
// limit or a draw is the first token, likeliest first and lowest id first among equals, whose running count or weight
// reaches a bound: its bin, then the bits of its logit and of its id, DIGIT at a time. A bin of up to MOST tokens is
// listed once.
#include "decode.cuh"

// PTX
__device__ __forceinline__ unsigned long long* shared_words() { return reinterpret_cast<unsigned long long*>(shared); }
__device__ __forceinline__ void add(long long* p, unsigned long long x) { atomicAdd((unsigned long long*)p, x); }
// end of PTX
typedef unsigned long long u64;
constexpr int BINS = 2048, MOST = 2048, SLICES = 32, SLICE_THREADS = 256, THREADS = 512, OWN = BINS / THREADS;
constexpr double UNIT = 17592186044416.0;  // 2^44

struct Found { u64 count, weight, bin; };  // before a bin
// So many tokens, or where that is 0 a weight: at least so much, or more.
struct Bound {
  u64 count;
  double weight;
  bool more;
  __device__ __forceinline__ bool reached(u64 c, u64 w) const {
    return count ? c >= count : more ? (double)w > weight : (double)w >= weight;
  }
};

// The first of BINS at which the running sums reach a bound; false where none does.
__device__ __noinline__ bool first_bin(Found& found, const u64* counts, const u64* weights, const Bound bound) {
  __shared__ u64 totals[2][THREADS / 32];
  __shared__ Found result;
  __shared__ int any;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  u64 sum[2] = {0, 0};
  for (int b = OWN * t; b < OWN * t + OWN; b++) sum[0] += counts[b], sum[1] += weights[b];
  const u64 own[2] = {sum[0], sum[1]};
  for (int o = 1; o < 32; o *= 2)
    for (int i = 0; i < 2; i++) {
      const u64 left = __shfl_sync(~0u, sum[i], (lane - o) & 31);
      if (lane >= o) sum[i] += left;
    }
  if (t == 0) any = 0;
  if (lane == 31) totals[0][warp] = sum[0], totals[1][warp] = sum[1];
  __syncthreads();
  u64 c = found.count + sum[0] - own[0], w = found.weight + sum[1] - own[1];
  for (int i = 0; i < warp; i++) c += totals[0][i], w += totals[1][i];
  for (int b = OWN * t; b < OWN * t + OWN; b++) {
    const u64 count = c + counts[b], weight = w + weights[b];
    if (bound.reached(count, weight) && !bound.reached(c, w)) result = {c, w, (u64)b}, any = 1;
    c = count, w = weight;
  }
  __syncthreads();
  const bool is = any;
  if (is) found = result;
  __syncthreads();
  return is;
}

// smaller for larger logits, and back
__device__ __forceinline__ unsigned key(float x) {
  const unsigned u = __float_as_uint(x);
  return u >> 31 ? u : ~u ^ 0x80000000u;
}
__device__ __forceinline__ float logit(unsigned key) { return __uint_as_float(key >> 31 ? key : key ^ 0x7fffffffu); }

struct Row {
  const act* logits;
  const unsigned char *allowed, *seen;
  double temperature;
  float penalty, largest, bins;  // bins of a unit
  int V;

  __device__ __forceinline__ Row(const act* logits, const unsigned char* allowed, const unsigned char* seen,
                                 const double* options, int V)
      : logits(logits), allowed(allowed), seen(seen), temperature(options[0]), penalty((float)options[3]), V(V) {}
  __device__ __forceinline__ void below(float top) {
    largest = top, bins = fminf((float)(64 / temperature), 1e30f);
  }
  __device__ __forceinline__ float fined(float x, int i) const {
    if (penalty != 1.f && seen[i]) {
      act y;
      put(y, x > 0 ? x / penalty : x * penalty);
      x = to_float(y);
    }
    return x + 0.f;  // of -0, 0
  }
  __device__ __forceinline__ double share(float x) const { return exp(((double)x - (double)largest) / temperature); }
  __device__ __forceinline__ u64 weight(float x) const { return (u64)(share(x) * UNIT + 0.5); }
  __device__ __forceinline__ int bin(float x) const { return (int)fminf(BINS - 1.f, (largest - x) * bins); }
  // f(id, logit) for the ids of [begin, end) that may be drawn; begin is a multiple of VEC
  template <class F>
  __device__ __forceinline__ void each(int begin, int end, const F& f) const {
#pragma unroll 2
    for (int i = begin + threadIdx.x * VEC; i < end; i += blockDim.x * VEC) {
      const Pack<VEC> x = load<VEC>(logits + i);
#pragma unroll
      for (int j = 0; j < VEC; j++)
        if (i + j < end && (!allowed || allowed[i + j])) f(i + j, fined(x[j], i + j));
    }
  }
};
__device__ __forceinline__ int slice(int V) { return ((V + SLICES - 1) / SLICES + VEC - 1) / VEC * VEC; }

// grid (SLICES, n). tops: key, then id; 0 where a logit is not finite
extern "C" __global__ void __launch_bounds__(256)
decode_tops(long long* tops, const unsigned char* seen, const act* logits, const unsigned char* allowed,
            const double* options, long long logits_row, int V) {
  __shared__ u64 best[SLICE_THREADS / 32];
  const int n = blockIdx.y, begin = blockIdx.x * slice(V);
  let_next_begin();
  wait_for_before();
  const Row row(logits + n * logits_row, allowed, seen + (long long)n * V, options + 4 * n, V);
  u64 top = ~0ull;
  row.each(begin, min(V, begin + slice(V)), [&](int i, float x) {
    top = min(top, x - x == 0 ? (u64)key(x) << 32 | (unsigned)i : 0);
  });
  for (int o = 16; o; o /= 2) top = min(top, __shfl_xor_sync(~0u, top, o));
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < SLICE_THREADS / 32; i++) top = min(top, best[i]);
  if (threadIdx.x == 0) tops[n * SLICES + blockIdx.x] = top;
}
__device__ __forceinline__ u64 top_of(const long long* tops) {
  u64 top = ~0ull;
  for (int i = 0; i < SLICES; i++) top = min(top, (u64)tops[i]);
  return top;
}

// grid (SLICES, n). sums: tokens that min_p keeps, their weight, all tokens, their weight
extern "C" __global__ void __launch_bounds__(256)
decode_weigh(long long* bins, long long* sums, const long long* tops, const unsigned char* seen, const act* logits,
             const unsigned char* allowed, const double* options, long long logits_row, int V) {
  u64 *const counts = shared_words(), *const weights = counts + BINS;
  const int n = blockIdx.y, begin = blockIdx.x * slice(V);
  let_next_begin();
  wait_for_before();
  const u64 top = top_of(tops + n * SLICES);
  Row row(logits + n * logits_row, allowed, seen + (long long)n * V, options + 4 * n, V);
  const double min_p = options[4 * n + 2];
  if (row.temperature == 0 || top == 0) return;
  row.below(logit(top >> 32));
  for (int i = threadIdx.x; i < 2 * BINS; i += SLICE_THREADS) counts[i] = 0;
  __syncthreads();
  u64 sum[4] = {0, 0, 0, 0};
  row.each(begin, min(V, begin + slice(V)), [&](int, float x) {
    const double share = row.share(x);
    const u64 w = (u64)(share * UNIT + 0.5);
    const int b = row.bin(x);
    atomicAdd(counts + b, (u64)1);
    atomicAdd(weights + b, w);
    sum[2]++, sum[3] += w;
    if (share >= min_p) sum[0]++, sum[1] += w;
  });
  for (int i = 0; i < 4; i++) {
    const u64 of_warp = lanes_sum(sum[i], 32);
    if (threadIdx.x % 32 == 0) add(sums + 4 * n + i, of_warp);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * BINS; i += SLICE_THREADS)
    if (counts[i]) add(bins + (long long)n * 2 * BINS + i, counts[i]);
}

struct Work {  // in shared memory
  u64 bins_counts[BINS], bins_weights[BINS], counts[BINS], weights[BINS], list[MOST];
};
// Place of a token: likeliest first, lowest id first among equals. An id takes so many bits, at most 31.
constexpr int DIGIT = 11, KEY_BITS = 32;
static_assert(1 << DIGIT == BINS, "a digit has a bin for each value");
__device__ __forceinline__ int id_bits(int V) { return KEY_BITS - __clz(V); }
__device__ __forceinline__ u64 place_of(float x, int id, int bits) { return (u64)key(x) << bits | (unsigned)id; }

// f(place, logit) for the tokens of a bin: of the list where there is one.
template <class F>
__device__ __forceinline__ void of_bin(const Row& row, const Work& work, int b, int listed, const F& f) {
  const int bits = id_bits(row.V);
  if (listed) {
    for (int i = threadIdx.x; i < listed; i += THREADS) f(work.list[i], logit((unsigned)(work.list[i] >> bits)));
  } else {
    row.each(0, row.V, [&](int i, float x) {
      if (row.bin(x) == b) f(place_of(x, i, bits), x);
    });
  }
}

// The first token at which the running sums reach a bound: sums with it, and its id. False: none.
__device__ __noinline__ bool descend(const Row& row, Work& work, u64& count, u64& sum, int& id, const Bound bound) {
  __shared__ int size;
  Found at = {0, 0, 0};
  if (!first_bin(at, work.bins_counts, work.bins_weights, bound)) return false;
  const int b = at.bin;
  int listed = 0;
  if (work.bins_counts[b] <= MOST) {
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
    of_bin(row, work, b, 0, [&](u64 place, float) { work.list[atomicAdd(&size, 1)] = place; });
    listed = work.bins_counts[b];
  }
  u64 found = 0;  // the leading bits of the place
  const int of_id = id_bits(row.V);
#pragma unroll 1
  for (int left = KEY_BITS + of_id; left > 0;) {
    const int bits = min(DIGIT, left), shift = left - bits;
    for (int i = threadIdx.x; i < BINS; i += THREADS) work.counts[i] = work.weights[i] = 0;
    __syncthreads();
    of_bin(row, work, b, listed, [&](u64 place, float x) {
      if (place >> left != found) return;
      const int i = (int)(place >> shift) & ((1 << bits) - 1);
      atomicAdd(work.counts + i, (u64)1);
      atomicAdd(work.weights + i, row.weight(x));
    });
    __syncthreads();
    first_bin(at, work.counts, work.weights, bound);
    found = found << bits | at.bin;
    left = shift;
  }
  id = (int)(found & ((1ull << of_id) - 1));
  count = at.count + 1, sum = at.weight + row.weight(logit((unsigned)(found >> of_id)));
  return true;
}

extern "C" __global__ void __launch_bounds__(512, 1)
decode_pick(int* tokens, int* positions, int* steps, double* chosen, unsigned char* seen, long long* bins, long long* sums,
            const long long* tops, const act* logits, const unsigned char* allowed, const double* draws,
            const double* options, const int* top_k, long long logits_row, int V, int slots) {
  Work& work = *reinterpret_cast<Work*>(shared_words());
  const int n = blockIdx.x;
  let_next_begin();
  wait_for_before();
  const u64 top = top_of(tops + n * SLICES);
  Row row(logits + n * logits_row, allowed, seen + (long long)n * V, options + 4 * n, V);
  int id = (int)(unsigned)top;
  if (row.temperature > 0 && top) {
    row.below(logit(top >> 32));
    const double top_p = options[4 * n + 1], min_p = options[4 * n + 2];
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) {
      long long& of = bins[(long long)n * 2 * BINS + i];
      work.bins_counts[i] = of, of = 0;
    }
    u64 count = sums[4 * n + 2], total = sums[4 * n + 3], c, w;
    const u64 kept = sums[4 * n], kept_weight = sums[4 * n + 1];
    __syncthreads();
    if (threadIdx.x < 4) sums[4 * n + threadIdx.x] = 0;
    // What is kept: so many of the likeliest tokens, of that weight.
    int last;
    const u64 k_most = top_k[n];
    if (k_most && k_most < count && descend(row, work, c, w, last, {k_most, 0, false})) count = c, total = w;
    const Bound least = {0, top_p * (double)total, false};
    if (top_p < 1 && descend(row, work, c, w, last, least) && c < count) count = c, total = w;
    if (min_p > 0 && kept < count) count = kept, total = kept_weight;
    descend(row, work, c, w, id, {0, draws[(long long)n * slots + steps[n]] * (double)total, true});
  }
  __syncthreads();
  if (threadIdx.x) return;
  chosen[n] = top ? id : -1;
  tokens[n] = id, positions[n] = min(positions[n] + 1, slots - 1), steps[n] = min(steps[n] + 1, slots - 1);
  seen[(long long)n * V + id] = 1;
}
