// What loss_cluster.cu uses beyond cuda_shim.h, on the host, in place of the PTX wrappers of cluster.cuh.
inline void cluster_sync() { shim::wait(shim::cluster); }
inline float of_block(const float* p, unsigned rank) {
  auto* const own = reinterpret_cast<const unsigned char*>(p) - shim::fibers[shim::now].rank * shim::stride;
  return *reinterpret_cast<const float*>(own + rank * shim::stride);
}
inline uint4* own_shared(uint4* shared) { return shared + shim::fibers[shim::now].rank * shim::stride / sizeof(uint4); }
