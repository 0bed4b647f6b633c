// What the decode_*.cu kernels use beyond cuda_shim.h, on the host, in place of the PTX in them.
#include "mma_shim.h"
inline act* shared_rows() { return reinterpret_cast<act*>(shim::shared_base()); }
inline float* shared_floats() { return reinterpret_cast<float*>(shim::shared_base()); }
inline unsigned long long* shared_words() { return reinterpret_cast<unsigned long long*>(shim::shared_base()); }
template <class T> T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}
inline void add(long long* p, unsigned long long x) { *p += x; }
inline void __threadfence() {}
