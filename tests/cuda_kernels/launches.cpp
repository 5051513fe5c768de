// csrc/cuda/launch.h on a CUDA runtime whose answers a test chooses.
#include <vector>

#include "cuda/launch.h"

namespace {

cudaError_t last_error, of_attribute, of_launch;
int shared_asked_for;
std::vector<int> arguments;

void kernel(int, char) {}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  shared_asked_for = value;
  if (of_attribute != cudaSuccess) last_error = of_attribute;
  return of_attribute;
}

cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void** pointers, size_t, cudaStream_t) {
  if (function != reinterpret_cast<const void*>(kernel)) return cudaErrorInvalidDeviceFunction;
  arguments = {*static_cast<int*>(pointers[0]), *static_cast<char*>(pointers[1])};
  if (of_launch != cudaSuccess) last_error = of_launch;
  return of_launch;
}

// What a launch returns, with an error of somebody else in the runtime before it; and what is there after it.
__attribute__((visibility("default"))) int launched(int before, int attribute, int launch, int shared_bytes, int* after,
                                                    int* asked_for, int* first, int* second) {
  last_error = cudaError_t(before), of_attribute = cudaError_t(attribute), of_launch = cudaError_t(launch);
  shared_asked_for = 0, arguments = {0, 0};
  const int error = mx::cuda::launch(kernel, 1, 32, size_t(shared_bytes), nullptr, 7L, 'x');
  *after = last_error, *asked_for = shared_asked_for, *first = arguments[0], *second = arguments[1];
  return error;
}
}
