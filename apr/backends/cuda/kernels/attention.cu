// Causal softmax attention on CUDA cores, any head width up to MAX_D (Dao 2023, FlashAttention-2, algorithms 1 and 2).
//
//   y[t] = sum_j p[t,j] v[j],  p[t] = softmax_j(q[t] . k[j] / sqrt(D)),  lse[t] = log sum_j exp(q[t] . k[j] / sqrt(D))
//   over the keys j <= t + S - T and, with window > 0, j > t + S - T - window and, unless doc_start is null, j >= doc_start[t]
//   ds = p * (dy v^T - delta) / sqrt(D),  delta = sum_d dy * y;  dq = ds k;  dk = ds^T q;  dv = p^T dy
//   y, dy, q, dq (B,T,H,D), k, v, dk, dv (B,S,K,D), lse, delta (B,H,T) float; head h reads key/value head h / (H/K)
//   doc_start (B,T), not decreasing with t, is where the document of a query begins
//   positions are ..._row elements apart, sequences ..._batch, heads D
//
// grid (tiles * heads * B): the tiles that see most come first.
// A block of 16 x 16 threads owns TILE queries (attention_dkv: keys) of one head and goes through the others TILE at a
// time. Thread (x,y) has the rows y + 16 i and columns x + 16 j of a tile of scores, and of its rows' results the
// columns 4 x + 64 u to 4 x + 64 u + 3. Everything in shared memory is float.
#include "common.cuh"

#ifndef MAX_D
#define MAX_D 64
#endif
constexpr int TILE = 4096 / MAX_D, R = TILE / 16, QUADS = MAX_D / 64;
constexpr int P_ROW = (TILE / 4 | 1) * 4;  // floats between rows of scores; rows lie in different banks
typedef float Scores[R][R];
typedef float Result[R][QUADS][4];

__device__ __forceinline__ int row_floats(int D) { return ((D + 3) / 4 | 1) * 4; }

// tile[r,d] = x[first + r, d], 0 where there is none
__device__ __forceinline__ void load_tile(float* tile, const act* x, long long x_row, int first, int end, int D) {
  const int ld = row_floats(D);
  for (int r = threadIdx.y; r < TILE; r += 16)
    for (int d = threadIdx.x; d < ld; d += 16)
      tile[r * ld + d] = first + r < end && d < D ? to_float(x[(first + r) * x_row + d]) : 0;
}

// s = a b^T
__device__ __forceinline__ void multiply(Scores& s, const float* a, const float* b, int D) {
  const int ld = row_floats(D);
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < R; j++) s[i][j] = 0;
  for (int d = 0; d < D; d += 4) {
    float4 x[R], z[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
      x[i] = *reinterpret_cast<const float4*>(a + (threadIdx.y + 16 * i) * ld + d);
      z[i] = *reinterpret_cast<const float4*>(b + (threadIdx.x + 16 * i) * ld + d);
    }
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++)
        s[i][j] += x[i].x * z[j].x + x[i].y * z[j].y + x[i].z * z[j].z + x[i].w * z[j].w;
  }
}

// out += p x, after p, a tile of scores that every thread holds a part of, has gone through shared memory. A tile's
// products are summed apart and then added, since one long sum loses more: TILE + tiles roundings, not TILE * tiles.
__device__ __forceinline__ void add_product(Result& out, float* shared_p, const Scores& p, const float* x, int D) {
  const int ld = row_floats(D);
  __syncthreads();  // the scores before have been read
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < R; j++) shared_p[(threadIdx.y + 16 * i) * P_ROW + threadIdx.x + 16 * j] = p[i][j];
  __syncthreads();
  Result part = {};
  for (int r = 0; r < TILE; r += 4) {
    float4 a[R];
#pragma unroll
    for (int i = 0; i < R; i++) a[i] = *reinterpret_cast<const float4*>(shared_p + (threadIdx.y + 16 * i) * P_ROW + r);
#pragma unroll
    for (int u = 0; u < QUADS; u++) {
      const int c = 4 * threadIdx.x + 64 * u;
      if (c < D)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float4 b = *reinterpret_cast<const float4*>(x + (r + e) * ld + c);
#pragma unroll
          for (int i = 0; i < R; i++) {
            const float f = e == 0 ? a[i].x : e == 1 ? a[i].y : e == 2 ? a[i].z : a[i].w;
            part[i][u][0] += f * b.x, part[i][u][1] += f * b.y, part[i][u][2] += f * b.z, part[i][u][3] += f * b.w;
          }
        }
    }
  }
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int u = 0; u < QUADS; u++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[i][u][e] += part[i][u][e];
}

// y[first + row] = factor[row] * result, for the rows before end
__device__ __forceinline__ void write_rows(act* y, long long y_row, int first, int end, const Result& result,
                                           const float (&factor)[R], int D) {
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int t = first + threadIdx.y + 16 * i;
#pragma unroll
    for (int u = 0; u < QUADS; u++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int c = 4 * threadIdx.x + 64 * u + e;
        if (t < end && c < D) put(y[t * y_row + c], result[i][u][e] * factor[i]);
      }
  }
}

__device__ __forceinline__ bool sees(int t, int j, int offset, int window) {
  return j <= t + offset && (window == 0 || j > t + offset - window);
}
// Where the first tile of keys begins that queries from t on see; begin: where the document of query t does.
__device__ __forceinline__ int first_key(int t, int offset, int window, int begin) {
  return max(begin, window ? t + offset - window + 1 : 0) / TILE * TILE;
}
// Where the document of a query begins, doc_start being those of its sequence.
__device__ __forceinline__ int document(const int* doc_start, int t) { return doc_start ? doc_start[t] : 0; }

// Which tile, head and sequence a block has.
struct Place {
  int tile, head;
  long long batch;
};
__device__ __forceinline__ Place place(int heads, int B) {
  const int i = blockIdx.x % (heads * B);
  return {(int)(blockIdx.x / (heads * B)), i % heads, i / heads};
}

// shared: 3 tiles and the scores
extern "C" __global__ void __launch_bounds__(256, 1)
attention_fwd(act* y, float* lse, const act* q, const act* k, const act* v, const int* doc_start, long long y_batch,
              long long y_row, long long q_batch, long long q_row, long long k_batch, long long k_row, long long v_batch,
              long long v_row, int B, int T, int S, int H, int K, int D, int window, float scale) {
  extern __shared__ uint4 dynamic_shared[];
  float* const q_tile = reinterpret_cast<float*>(dynamic_shared);
  float *const k_tile = q_tile + TILE * row_floats(D), *const v_tile = k_tile + TILE * row_floats(D);
  float* const p_tile = v_tile + TILE * row_floats(D);
  const Place at = place(H, B);
  const int own = ((T - 1) / TILE - at.tile) * TILE, h = at.head, kv = h / (H / K), offset = S - T;
  const int end = min(T, own + TILE) + offset;
  q += at.batch * q_batch + h * D;
  k += at.batch * k_batch + kv * D;
  v += at.batch * v_batch + kv * D;
  if (doc_start) doc_start += at.batch * T;
  load_tile(q_tile, q, q_row, own, T, D);

  Result out = {};
  float top[R], sum[R] = {};
  int begin[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    top[i] = -3.402823466e38f;
    begin[i] = document(doc_start, min(own + (int)threadIdx.y + 16 * i, T - 1));
  }
  for (int j0 = first_key(own, offset, window, document(doc_start, own)); j0 < end; j0 += TILE) {
    __syncthreads();
    load_tile(k_tile, k, k_row, j0, S, D);
    load_tile(v_tile, v, v_row, j0, S, D);
    __syncthreads();
    Scores p;
    multiply(p, q_tile, k_tile, D);
#pragma unroll
    for (int i = 0; i < R; i++) {
      float m = top[i];
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int key = j0 + threadIdx.x + 16 * j;
        const bool seen = key >= begin[i] && sees(own + threadIdx.y + 16 * i, key, offset, window);
        p[i][j] = seen ? p[i][j] * scale : __uint_as_float(0xff800000u);
        m = fmaxf(m, p[i][j]);
      }
      for (int o = 8; o; o /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
      const float shrink = exp_(top[i] - m);
      top[i] = m;
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < R; j++) {
        p[i][j] = exp_(p[i][j] - m);
        sum[i] += p[i][j];
      }
#pragma unroll
      for (int u = 0; u < QUADS; u++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[i][u][e] *= shrink;
    }
    add_product(out, p_tile, p, v_tile, D);
  }
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int t = own + threadIdx.y + 16 * i;
    sum[i] = lanes_sum(sum[i], 16);
    if (threadIdx.x == 0 && t < T) lse[(at.batch * H + h) * T + t] = top[i] + logf(sum[i]);
    sum[i] = 1.f / sum[i];
  }
  write_rows(y + at.batch * y_batch + h * D, y_row, own, T, out, sum, D);
}

// dq, and delta for attention_dkv. shared: 4 tiles and the scores
extern "C" __global__ void __launch_bounds__(256, 1)
attention_dq(act* dq, float* delta, const act* dy, const act* y, const float* lse, const act* q, const act* k,
             const act* v, const int* doc_start, long long dq_batch, long long dq_row, long long dy_batch, long long dy_row,
             long long y_batch, long long y_row, long long q_batch, long long q_row, long long k_batch,
             long long k_row, long long v_batch, long long v_row, int B, int T, int S, int H, int K, int D, int window,
             float scale) {
  extern __shared__ uint4 dynamic_shared[];
  float* const q_tile = reinterpret_cast<float*>(dynamic_shared);
  float *const dy_tile = q_tile + TILE * row_floats(D), *const k_tile = dy_tile + TILE * row_floats(D);
  float *const v_tile = k_tile + TILE * row_floats(D), *const p_tile = v_tile + TILE * row_floats(D);
  const Place at = place(H, B);
  const int own = ((T - 1) / TILE - at.tile) * TILE, h = at.head, kv = h / (H / K), offset = S - T;
  const int end = min(T, own + TILE) + offset;
  const long long stats = (at.batch * H + h) * T;
  y += at.batch * y_batch + h * D;
  k += at.batch * k_batch + kv * D;
  v += at.batch * v_batch + kv * D;
  if (doc_start) doc_start += at.batch * T;
  load_tile(q_tile, q + at.batch * q_batch + h * D, q_row, own, T, D);
  load_tile(dy_tile, dy + at.batch * dy_batch + h * D, dy_row, own, T, D);

  Result out = {};
  float row_lse[R], row_delta[R], one[R];
  int begin[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int r = threadIdx.y + 16 * i, t = own + r;
    float sum = 0;
    for (int d = threadIdx.x; d < D; d += 16)  // of what this thread itself has put into dy_tile
      if (t < T) sum += dy_tile[r * row_floats(D) + d] * to_float(y[t * y_row + d]);
    row_delta[i] = lanes_sum(sum, 16);
    row_lse[i] = t < T ? lse[stats + t] : 0;
    begin[i] = document(doc_start, min(t, T - 1));
    if (threadIdx.x == 0 && t < T) delta[stats + t] = row_delta[i];
    one[i] = 1;
  }
  for (int j0 = first_key(own, offset, window, document(doc_start, own)); j0 < end; j0 += TILE) {
    __syncthreads();
    load_tile(k_tile, k, k_row, j0, S, D);
    load_tile(v_tile, v, v_row, j0, S, D);
    __syncthreads();
    Scores p, ds;
    multiply(p, q_tile, k_tile, D);
    multiply(ds, dy_tile, v_tile, D);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int t = own + threadIdx.y + 16 * i, key = j0 + threadIdx.x + 16 * j;
        const bool seen = t < T && key >= begin[i] && sees(t, key, offset, window);
        ds[i][j] = seen ? exp_(p[i][j] * scale - row_lse[i]) * (ds[i][j] - row_delta[i]) * scale : 0;
      }
    add_product(out, p_tile, ds, k_tile, D);
  }
  write_rows(dq + at.batch * dq_batch + h * D, dq_row, own, T, out, one, D);
}

// dk and dv; rows are keys, columns are queries. shared: 4 tiles and the scores
extern "C" __global__ void __launch_bounds__(256, 1)
attention_dkv(act* dk, act* dv, const act* dy, const float* lse, const float* delta, const act* q, const act* k,
              const act* v, const int* doc_start, long long dk_batch, long long dk_row, long long dv_batch, long long dv_row,
              long long dy_batch, long long dy_row, long long q_batch, long long q_row, long long k_batch,
              long long k_row, long long v_batch, long long v_row, int B, int T, int S, int H, int K, int D, int window,
              float scale) {
  extern __shared__ uint4 dynamic_shared[];
  float* const q_tile = reinterpret_cast<float*>(dynamic_shared);
  float *const dy_tile = q_tile + TILE * row_floats(D), *const k_tile = dy_tile + TILE * row_floats(D);
  float *const v_tile = k_tile + TILE * row_floats(D), *const p_tile = v_tile + TILE * row_floats(D);
  const Place at = place(K, B);
  const int own = at.tile * TILE, kv = at.head, group = H / K, offset = S - T;
  const int begin = max(0, own - offset) / TILE * TILE;
  const int end = window ? min(T, own + TILE - 1 - offset + window) : T;
  if (doc_start) doc_start += at.batch * T;
  load_tile(k_tile, k + at.batch * k_batch + kv * D, k_row, own, S, D);
  load_tile(v_tile, v + at.batch * v_batch + kv * D, v_row, own, S, D);

  Result out_k = {}, out_v = {};
  float one[R];
#pragma unroll
  for (int i = 0; i < R; i++) one[i] = 1;
  for (int h = kv * group; h < (kv + 1) * group; h++) {
    const long long stats = (at.batch * H + h) * T;
    for (int t0 = begin; t0 < end && document(doc_start, t0) < own + TILE; t0 += TILE) {
      __syncthreads();
      load_tile(q_tile, q + at.batch * q_batch + h * D, q_row, t0, T, D);
      load_tile(dy_tile, dy + at.batch * dy_batch + h * D, dy_row, t0, T, D);
      __syncthreads();
      Scores p, ds;
      multiply(p, k_tile, q_tile, D);
      multiply(ds, v_tile, dy_tile, D);
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int t = t0 + threadIdx.x + 16 * j;
        const float column_lse = t < T ? lse[stats + t] : 0, column_delta = t < T ? delta[stats + t] : 0;
        const int from = document(doc_start, min(t, T - 1));
#pragma unroll
        for (int i = 0; i < R; i++) {
          const int key = own + threadIdx.y + 16 * i;
          const bool seen = t < T && key >= from && sees(t, key, offset, window);
          p[i][j] = seen ? exp_(p[i][j] * scale - column_lse) : 0;
          ds[i][j] = seen ? p[i][j] * (ds[i][j] - column_delta) * scale : 0;
        }
      }
      add_product(out_v, p_tile, p, dy_tile, D);
      add_product(out_k, p_tile, ds, q_tile, D);
    }
  }
  write_rows(dk + at.batch * dk_batch + kv * D, dk_row, own, S, out_k, one, D);
  write_rows(dv + at.batch * dv_batch + kv * D, dv_row, own, S, out_v, one, D);
}
