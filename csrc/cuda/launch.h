// A launch on a real device: host code only, on CUDA's runtime API.
#pragma once
#include <cuda_runtime_api.h>

namespace mx::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args...); more than 48 KiB of shared memory is asked for.
//
// What is returned is this launch's own error. The runtime's last error is left alone where there is none, for it may
// be of somebody else, and is cleared of ours, which the next one to ask would take for his.
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  const auto run = [&](Parameters... parameters) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024) {
      const cudaError_t error =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
      if (error != cudaSuccess) return error;
    }
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  };
  const cudaError_t error = run(static_cast<Parameters>(args)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace mx::cuda
