// What the launchers know of a GPU.
#include "device.h"
#include "kernels.h"

namespace mx::cuda {
namespace {

// One of the kernels, which are all compiled for the same architectures.
__global__ void any_kernel() {}

}  // namespace

cudaError_t look_at(int device, Gpu& gpu) {
  cudaError_t error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(any_kernel));
  gpu.architecture = attributes.ptxVersion;
  return error;
}

}  // namespace mx::cuda
