// What the kernels use of NVIDIA's header of this name, for the host: bfloat16 rounded to nearest even.
#pragma once
#include <cstring>

struct __nv_bfloat16 { unsigned short bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __bfloat162float(__nv_bfloat16 a) {
  const unsigned u = (unsigned)a.bits << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  if (x != x) return {0x7fff};
  return {(unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  auto larger = [](__nv_bfloat16 a, __nv_bfloat16 b) {
    const float x = __bfloat162float(a), y = __bfloat162float(b);
    return x != x || x < y ? b : a;
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
