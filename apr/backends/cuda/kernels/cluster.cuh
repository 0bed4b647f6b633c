// Clusters of blocks: PTX wrappers. PTX ISA, "barrier.cluster", "mapa"; sm_90 and later.
// PTX
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// *p as block `rank` of the cluster has it in its shared memory
__device__ __forceinline__ float of_block(const float* p, unsigned rank) {
  unsigned there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
// The dynamic shared memory of this block; on the host, where blocks of a cluster run side by side, a part of it.
__device__ __forceinline__ uint4* own_shared(uint4* dynamic_shared) { return dynamic_shared; }
// end of PTX
