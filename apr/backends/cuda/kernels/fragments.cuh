// What tensor-core kernels share: bf16 pairs, powers of two, sums over the lanes that hold a row of a fragment.
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// PTX
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ unsigned pack(float low, float high) {  // two bf16, round to nearest even
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float power2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// end of PTX
__device__ __forceinline__ float low_half(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ float dot2(unsigned a, unsigned b) {
  return low_half(a) * low_half(b) + high_half(a) * high_half(b);
}
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float quad_sum(float x) {  // over the four lanes that share a fragment row
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Where the documents of the queries of a sequence begin. Only with DOCUMENTS: without it nothing of it is compiled.
struct Borders {
  const int* doc_start;
  int batch, T;
  __device__ __forceinline__ int at(int t) const { return doc_start[(long long)batch * T + min(t, T - 1)]; }
};
