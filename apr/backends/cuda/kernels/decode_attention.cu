// Attention of one new token of each sequence over its KV cache, the cache split over blocks.
//
//   qk (n,(H+K)*D), rows qk_row apart, and v (n,K*D), rows v_row apart: of the new tokens; q_norm, k_norm (D,) or null:
//   RMSNorm of each head; cos, sin (positions,D/2) float or null: rotation by the angles of positions (n,)
//   keys, values (rows,slots,K,D): the new ones are put at slot positions[n]; y (n,H*D)
//   part (n, K*groups, splits, HEADS*(D+2)) float, arrived (n, K*groups) int of zeros, which it is again at the end
//
// grid (splits of KEYS slots, K*groups, n): a group is up to HEADS query heads of one key/value head, whose bits do not
// depend on how many these are. Blocks whose slots
// nobody sees end at once. Each turns its queries; those that hold the newest slot put the key and value there, all the same
// bits. LANES lanes have a key, and all keys of a block that are cached are asked for at once, before the kernels ahead are
// done: none of them writes such a slot, or a position. Turns with no slot in use are left out. What a block finds lies in
// `part`; the last to arrive adds the parts in order. The bits depend on the sequence alone.
#include "decode.cuh"

// PTX
__device__ __forceinline__ float* shared_floats() { return reinterpret_cast<float*>(shared); }
// end of PTX
#ifndef LANES
#define LANES 8
#define HEADS 4
#endif
constexpr int THREADS = 512, TURNS = 8, AT_ONCE = THREADS / LANES, KEYS = TURNS * AT_ONCE;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float row_max(float x) {  // over a warp
  for (int o = 16; o; o /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
__device__ __forceinline__ float as_act(float x) {
  act y;
  put(y, x);
  return to_float(y);
}
// A head, normalised where there is a norm and turned where there are angles, each rounded: by a warp.
__device__ __forceinline__ void head(float* y, const act* x, const act* norm, const float* cos, const float* sin, float eps,
                                     int D) {
  const int lane = threadIdx.x % 32;
  float r = 1;
  if (norm) {
    float sum = 0;
    for (int d = lane; d < D; d += 32) sum += to_float(x[d]) * to_float(x[d]);
    r = 1.f / sqrtf(lanes_sum(sum, 32) / D + eps);
  }
  for (int d = lane; d < D / 2; d += 32) {
    float a = to_float(x[d]), b = to_float(x[d + D / 2]);
    if (norm) a = as_act(a * r * to_float(norm[d])), b = as_act(b * r * to_float(norm[d + D / 2]));
    y[d] = cos ? as_act(a * cos[d] - b * sin[d]) : a;
    y[d + D / 2] = cos ? as_act(b * cos[d] + a * sin[d]) : b;
  }
}

template <int N>
__device__ __forceinline__ void attend(act* y, act* keys, act* values, const act* qk, const act* v, const act* q_norm,
                                       const act* k_norm, const float* cos, const float* sin, const int* positions,
                                       float* part, int* arrived, long long qk_row, long long v_row, int slots, int H, int K,
                                       int D, int window, float scale, float eps) {
  let_next_begin();
  const int n = blockIdx.z, pos = positions[n], per = H / K, groups = (per + HEADS - 1) / HEADS;
  const int kv = blockIdx.y / groups, h0 = kv * per + blockIdx.y % groups * HEADS, heads = min(HEADS, (kv + 1) * per - h0);
  const int low = window ? max(0, pos - window + 1) : 0, first = low / KEYS, last = pos / KEYS, split = blockIdx.x;
  if (split < first || split > last) return;
  float* const queries = shared_floats();    // (HEADS,D)
  float* const p = queries + HEADS * D;      // (HEADS,KEYS)
  float* const sums = p + HEADS * KEYS;      // (HEADS,2): largest score and sum
  float* const of_warps = sums + 2 * HEADS;  // (THREADS/32,HEADS,D); before, the new key
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const c = cos ? cos + (long long)pos * (D / 2) : nullptr;
  const float* const s = sin ? sin + (long long)pos * (D / 2) : nullptr;
  const long long row = (long long)K * D, at = (long long)n * slots * row + kv * D;
  const int pieces = D / N, piece = lane % LANES, mine = threadIdx.x / LANES, from = split * KEYS;
  const bool has = piece < pieces;
  const int turns = (min(pos - from, KEYS - 1)) / AT_ONCE + 1;  // of this block
  // All that is in the cache already is asked for at once.
  Pack<N> k[TURNS], x[TURNS];
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    const int j = from + mine + t * AT_ONCE;
    if (has && j >= low && j < pos) {
      k[t] = load<N>(keys + at + j * row + piece * N);
      x[t] = load<N>(values + at + j * row + piece * N);
    }
  }
  wait_for_before();
  if (warp < heads) head(queries + warp * D, qk + n * qk_row + (h0 + warp) * D, q_norm, c, s, eps, D);
  if (split == last && warp == THREADS / 32 - 1) {
    head(of_warps, qk + n * qk_row + (H + kv) * D, k_norm, c, s, eps, D);
    for (int d = lane; d < D / 2; d += 32)
      for (int i = d; i < D; i += D / 2) {  // what this lane has made
        put(keys[at + pos * row + i], of_warps[i]);
        values[at + pos * row + i] = v[n * v_row + kv * D + i];
      }
  }
  __syncthreads();
  float q[HEADS][N] = {};
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (has && h < heads)
#pragma unroll
      for (int i = 0; i < N; i++) q[h][i] = queries[h * D + piece * N + i];
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    if (t >= turns) break;
    const int j = mine + t * AT_ONCE;
    const bool seen = from + j >= low && from + j <= pos;
    if (has && from + j == pos) {
      k[t] = load<N>(keys + at + pos * row + piece * N);
      x[t] = load<N>(values + at + pos * row + piece * N);
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float dot = 0;
      if (seen && has)
#pragma unroll
        for (int i = 0; i < N; i++) dot += q[h][i] * k[t][i];
      const float score = lanes_sum(dot, LANES);
      if (piece == 0) p[h * KEYS + j] = seen ? score * scale : minus_infinity();
    }
  }
  __syncthreads();
  if (warp < heads) {
    float most = minus_infinity(), sum = 0;
#pragma unroll 4
    for (int j = lane; j < turns * AT_ONCE; j += 32) most = fmaxf(most, p[warp * KEYS + j]);
    most = row_max(most);
#pragma unroll 4
    for (int j = lane; j < turns * AT_ONCE; j += 32) {
      const float x = exp_(p[warp * KEYS + j] - most);
      sum += x, p[warp * KEYS + j] = x;
    }
    sum = lanes_sum(sum, 32);
    if (lane == 0) sums[2 * warp] = most, sums[2 * warp + 1] = sum;
  }
  __syncthreads();
  float out[HEADS][N] = {};
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    if (t >= turns) break;
    const int j = mine + t * AT_ONCE;
    if (has && from + j >= low && from + j <= pos)
#pragma unroll
      for (int h = 0; h < HEADS; h++)
        if (h < heads)
#pragma unroll
          for (int i = 0; i < N; i++) out[h][i] += p[h * KEYS + j] * x[t][i];
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int i = 0; i < N; i++) {
      float sum = out[h][i];
#pragma unroll
      for (int o = 16; o >= LANES; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane < LANES && has && h < heads) of_warps[(warp * HEADS + h) * D + piece * N + i] = sum;
    }
  __syncthreads();
  if (first == last) {  // nobody to wait for
    for (int i = threadIdx.x; i < heads * D; i += THREADS) {
      float sum = 0;
      for (int w = 0; w < THREADS / 32; w++) sum += of_warps[w * HEADS * D + i];
      put(y[((long long)n * H + h0) * D + i], sum / sums[2 * (i / D) + 1]);
    }
    return;
  }
  const long long place = (long long)n * gridDim.y + blockIdx.y, next = HEADS * (D + 2);
  float* const parts = part + place * gridDim.x * next;
  for (int i = threadIdx.x; i < heads * D; i += THREADS) {
    float sum = 0;
    for (int w = 0; w < THREADS / 32; w++) sum += of_warps[w * HEADS * D + i];
    parts[split * next + i] = sum;
  }
  if (threadIdx.x < 2 * heads) parts[split * next + HEADS * D + threadIdx.x] = sums[threadIdx.x];
  __threadfence();
  __syncthreads();
  int* const turn = reinterpret_cast<int*>(queries);
  if (threadIdx.x == 0) turn[0] = atomicAdd(arrived + place, 1);
  __syncthreads();
  if (turn[0] != last - first) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[place] = 0;
  if (warp >= heads) return;
  const volatile float* const all = parts;
  const int statistics = HEADS * D + 2 * warp;
  float most = minus_infinity(), sum = 0;
  for (int i = first + lane; i <= last; i += 32) most = fmaxf(most, all[i * next + statistics]);
  most = row_max(most);
  for (int d = lane; d < D; d += 32) {
    float total = 0;
    sum = 0;
#pragma unroll 8
    for (int i = first; i <= last; i++) {
      const float factor = exp_(all[i * next + statistics] - most);
      total += factor * all[i * next + warp * D + d], sum += factor * all[i * next + statistics + 1];
    }
    put(y[((long long)n * H + h0 + warp) * D + d], total / sum);
  }
}

#define KERNEL(NAME, N)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                       \
  NAME(act* y, act* keys, act* values, const act* qk, const act* v, const act* q_norm, const act* k_norm,                 \
       const float* cos, const float* sin, const int* positions, float* part, int* arrived, long long qk_row,             \
       long long v_row, int slots, int H, int K, int D, int window, float scale, float eps) {                             \
    attend<N>(y, keys, values, qk, v, q_norm, k_norm, cos, sin, positions, part, arrived, qk_row, v_row, slots, H, K, D,  \
              window, scale, eps);                                                                                        \
  }
KERNEL(decode_attention_v, VEC)
KERNEL(decode_attention_1, 1)
