// What the kernels share: the activation type, 16-byte accesses, sums over a row, ordered sums of partial results.
//
// Activations and weights are `act`, set by -DACT; all arithmetic is in float, and an activation is rounded where it is
// stored and nowhere else. A kernel exists as NAME_v, which moves VEC activations at a time and wants 16-byte aligned
// rows, and as NAME_1, which does not. Offsets are long long: arrays may have more than 2^31 elements.
#include <cuda_bf16.h>
#ifndef ACT
#define ACT __nv_bfloat16
#endif
typedef ACT act;
constexpr bool IS_BF16 = sizeof(act) == 2;
constexpr int VEC = 16 / sizeof(act);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float& y, float x) { y = x; }
__device__ __forceinline__ void put(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

// exp(x) and 1/x: of full precision where activations are float, of the hardware (2^-21) where they are rounded to bf16.
__device__ __forceinline__ float exp_(float x) { return IS_BF16 ? __expf(x) : expf(x); }
__device__ __forceinline__ float inverse(float x) { return IS_BF16 ? __fdividef(1.f, x) : 1.f / x; }

// N neighbouring activations as they lie in memory.
template <int N>
struct Pack {
  unsigned word[4];
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (!IS_BF16) return __uint_as_float(word[i]);
    return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
  }
};
template <>
struct Pack<1> {
  act value;
  __device__ __forceinline__ float operator[](int) const { return to_float(value); }
};

template <int N>
__device__ __forceinline__ Pack<N> load(const act* p) {
  static_assert(N == VEC, "a whole 16-byte access");
  const uint4 u = *reinterpret_cast<const uint4*>(p);
  return {{u.x, u.y, u.z, u.w}};
}
template <>
__device__ __forceinline__ Pack<1> load<1>(const act* p) {
  return {*p};
}

__device__ __forceinline__ void store(act* p, const Pack<VEC>& x) {
  *reinterpret_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
__device__ __forceinline__ void store(act* p, const Pack<1>& x) { *p = x.value; }

// x rounded to activations, to nearest even.
template <int N>
__device__ __forceinline__ Pack<N> rounded(const float (&x)[N]) {
  Pack<N> r;
  if constexpr (N == 1) {
    put(r.value, x[0]);
  } else if constexpr (IS_BF16) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      r.word[i] = *reinterpret_cast<const unsigned*>(&two);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) r.word[i] = __float_as_uint(x[i]);
  }
  return r;
}

// N floats, 1 or a multiple of 4.
template <int N>
__device__ __forceinline__ void load_floats(float (&x)[N], const float* p) {
  if constexpr (N == 1) x[0] = *p;
#pragma unroll
  for (int i = 0; i + 3 < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}
template <int N>
__device__ __forceinline__ void store_floats(float* p, const float (&x)[N]) {
  if constexpr (N == 1) *p = x[0];
#pragma unroll
  for (int i = 0; i + 3 < N; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

// Sum over groups of `lanes` neighbouring lanes, a power of two; every lane gets the same bits.
template <class T>
__device__ __forceinline__ T lanes_sum(T x, int lanes) {
  for (int o = lanes / 2; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// Sum over the block, whose number of threads is a multiple of 32; every thread gets the same bits.
template <class T>
__device__ __forceinline__ T block_sum(T x) {
  __shared__ T part[32];
  const int t = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  x = lanes_sum(x, 32);
  if (t % 32 == 0) part[t / 32] = x;
  __syncthreads();
  x = lanes_sum(t % 32 < warps ? part[t % 32] : T(0), 32);
  __syncthreads();
  return x;
}

// Sum over the blockDim.x threads of a row: a part of a warp, or the whole block.
__device__ __forceinline__ float row_sum(float x) {
  return blockDim.x <= 32 ? lanes_sum(x, blockDim.x) : block_sum(x);
}

// y[c] += sum_p partial[p,c], p in order within 32 interleaved sums, which are then added in order.
// y (n,), partial (parts,n); block (32,32), a block has 32 columns.
__device__ __forceinline__ void add_partials(float* y, const float* partial, int parts, int n) {
  __shared__ float sums[32][33];
  const int c = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (c < n)
#pragma unroll 4
    for (int p = threadIdx.y; p < parts; p += 32) sum += partial[(long long)p * n + c];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < n) {
    sum = 0;
    for (int i = 0; i < 32; i++) sum += sums[i][threadIdx.x];
    y[c] += sum;
  }
}
