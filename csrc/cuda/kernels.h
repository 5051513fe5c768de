// The CUDA backend's launchers: they take raw pointers (csrc/args.h) and a stream, and include no torch header.
//
// A launcher only queues work on the stream. It returns the first CUDA error, cudaErrorInvalidValue for a dtype that it
// does not know (float64), and launches nothing where the output has no elements and nothing is to be written.
#pragma once
#include <cuda_runtime_api.h>

#include "../args.h"

namespace mx::cuda {

struct Launch {
  cudaStream_t stream;
  int capability;       // 10*major + minor of the device's compute capability: 75, 80, 90
  int multiprocessors;  // kernels with partial results start a few programs on each, whatever the tensor's size
  bool tf32;            // products of float32 may round their operands to TF32
  // Temporary device memory, 256-byte aligned, for the kernels queued by this launcher.
  void* (*allocate)(void* state, size_t bytes);
  void* state;

  template <class T>
  T* temporary(size_t count) const {
    return static_cast<T*>(allocate(state, count * sizeof(T)));
  }
};

// Training (bn_y, gamma, beta, eps) or inference (epilogue_bn, epilogue_relu), as ForwardArgs says.
cudaError_t depthwise_forward(const ForwardArgs& args, const Launch& launch);
cudaError_t depthwise_backward(const BackwardArgs& args, const Launch& launch);
cudaError_t pointwise_forward(const ForwardArgs& args, const Launch& launch);
cudaError_t pointwise_backward(const BackwardArgs& args, const Launch& launch);
cudaError_t stem_forward(const ForwardArgs& args, const Launch& launch);
cudaError_t stem_backward(const BackwardArgs& args, const Launch& launch);
cudaError_t normalise_forward(const NormaliseArgs& args, const Launch& launch);
cudaError_t normalise_backward(const NormaliseArgs& args, const Launch& launch);
cudaError_t block_inference(const BlockArgs& args, const Launch& launch);
cudaError_t bn_from_running(const RunningArgs& args, const Launch& launch);

}  // namespace mx::cuda
