// What attention_mma.cu uses beyond cuda_shim.h, on the host: in place of the PTX wrappers of mma.cuh, the same functions by
// the layouts of the PTX ISA ("Matrix fragments for mma.m16n8k16", ldmatrix). A copy to shared memory is done at once, so
// that a wait that is missing shows as a race only. Products are summed in float, in the order of k.
#pragma once

namespace shim {
inline unsigned char published[32][32][24];  // by the lanes of a warp
inline size_t warp() { return now / 32; }
inline size_t lane() { return now % 32; }
inline void publish(const void* x, size_t bytes) {
  std::memcpy(published[warp()][lane()], x, bytes);
  wait(warps[warp()]);
}
template <class T> T of_lane(size_t from, size_t offset = 0) {
  T x;
  std::memcpy(&x, published[warp()][from] + offset, sizeof x);
  return x;
}
inline void read() { wait(warps[warp()]); }  // all lanes have read what was published
inline unsigned char* shared_base() { return reinterpret_cast<unsigned char*>(dynamic_shared); }
}  // namespace shim

template <class T> T __shfl_sync(unsigned, T x, int from) {
  shim::publish(&x, sizeof x);
  x = shim::of_lane<T>(from % 32);
  shim::read();
  return x;
}
inline bool __any_sync(unsigned, bool x) {
  shim::publish(&x, 1);
  bool any = false;
  for (int i = 0; i < 32; i++) any |= shim::of_lane<bool>(i);
  shim::read();
  return any;
}
inline unsigned __ballot_sync(unsigned, bool x) {
  shim::publish(&x, 1);
  unsigned all = 0;
  for (int i = 0; i < 32; i++) all |= unsigned(shim::of_lane<bool>(i)) << i;
  shim::read();
  return all;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline void __syncwarp() { shim::wait(shim::warps[shim::warp()]); }
inline int __syncthreads_count(bool x) {
  static int count;
  if (shim::now == 0) count = 0;
  shim::wait(shim::block);
  count += x;
  shim::wait(shim::block);
  const int all = count;
  shim::wait(shim::block);
  return all;
}

inline unsigned shared_address(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - shim::shared_base()); }
inline void copy(unsigned to, const void* from, bool valid, size_t bytes) {
  if (valid) std::memcpy(shim::shared_base() + to, from, bytes);
  else std::memset(shim::shared_base() + to, 0, bytes);
}
inline void copy16(unsigned to, const void* from, bool valid) { copy(to, from, valid, 16); }
inline void copy8(unsigned to, const void* from, bool valid) { copy(to, from, valid, 8); }
inline void copy_commit() {}
inline void copy_wait() {}

// Matrix m is 8 rows of 8 bf16 at the addresses of the lanes 8 m to 8 m + 7.
inline void ldmatrix(unsigned (&r)[4], unsigned address) {
  const size_t lane = shim::lane();
  shim::publish(&address, 4);
  for (int m = 0; m < 4; m++)
    std::memcpy(&r[m], shim::shared_base() + shim::of_lane<unsigned>(8 * m + lane / 4) + lane % 4 * 4, 4);
  shim::read();
}
inline void ldmatrix_trans(unsigned (&r)[4], unsigned address) {
  const size_t lane = shim::lane();
  shim::publish(&address, 4);
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 2; i++)
      std::memcpy(reinterpret_cast<char*>(&r[m]) + 2 * i,
                  shim::shared_base() + shim::of_lane<unsigned>(8 * m + lane % 4 * 2 + i) + lane / 4 * 2, 2);
  shim::read();
}
inline float half_of(unsigned x, int i) { return __uint_as_float(i ? x & 0xffff0000u : x << 16); }
// a[0..3]: rows lane/4 and lane/4 + 8, k from 2 (lane%4), then the same rows, k + 8; b0, b1: column lane/4, the same k.
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const size_t lane = shim::lane();
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  shim::publish(mine, sizeof mine);
  for (int e = 0; e < 4; e++) {
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const size_t quad = k % 8 / 2, high = k / 8;
      const unsigned x = shim::of_lane<unsigned>(lane / 4 * 4 + quad, 4 * (e / 2 + 2 * high));
      const unsigned y = shim::of_lane<unsigned>((lane % 4 * 2 + e % 2) * 4 + quad, 4 * (4 + high));
      sum += half_of(x, k % 2) * half_of(y, k % 2);
    }
    c[e] += sum;
  }
  shim::read();
}
inline unsigned pack(float low, float high) {
  const __nv_bfloat16 a = __float2bfloat16_rn(low), b = __float2bfloat16_rn(high);
  unsigned short x, y;
  std::memcpy(&x, &a, 2), std::memcpy(&y, &b, 2);
  return x | unsigned(y) << 16;
}
inline float power2(float x) { return exp2f(x); }
