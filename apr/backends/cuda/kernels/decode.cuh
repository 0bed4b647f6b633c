// How the kernels of a decode step follow each other: each begins while the one before it is at work, asks for what no
// kernel of the step writes (weights, cached keys), and then waits until all before it is done and seen.
#include "common.cuh"

// PTX
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Asks for whole 16 bytes of memory, to lie in the L2 cache.
__device__ __forceinline__ void ask_for(const void* p, long long bytes) {
  const unsigned long long first = (unsigned long long)p & ~15ull, size = ((unsigned long long)p + bytes - first) & ~15ull;
  if (size) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"((unsigned)size) : "memory");
}
#else
__device__ __forceinline__ void let_next_begin() {}
__device__ __forceinline__ void wait_for_before() {}
__device__ __forceinline__ void ask_for(const void*, long long) {}
#endif
extern __shared__ uint4 shared[];
// end of PTX
