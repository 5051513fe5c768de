// The CUDA backend's launchers: they take raw pointers (csrc/args.h) and a stream, and include no torch header.
//
// A launcher only queues work on the stream. It returns the first CUDA error, and cudaErrorInvalidValue for what it
// does not know: float64, a dense convolution of an input that is not plain, and a gate of 2^31 images. It launches
// nothing where the output has no elements and nothing is to be written.
#pragma once
#include <cuda_runtime_api.h>

#include "../args.h"

namespace mx::cuda {

struct Gpu {
  // 10*major + minor of the compute capability that the code it runs was compiled for: 75, 80, 90. The GPU may be
  // newer: of PTX for 7.5 the driver makes code for any, without what the kernels have for 8.0.
  int architecture;
  int multiprocessors;  // kernels with partial results start a few programs on each, whatever the tensor's size
};

// `device` is the current one.
cudaError_t look_at(int device, Gpu& gpu);

struct Launch {
  cudaStream_t stream;
  Gpu gpu;
  bool tf32;  // products of float32 may round their operands to TF32
  // Temporary device memory, 256-byte aligned, for the kernels queued by this launcher.
  void* (*allocate)(void* state, size_t bytes);
  void* state;

  template <class T>
  T* temporary(size_t count) const {
    return static_cast<T*>(allocate(state, count * sizeof(T)));
  }
};

using Forward = cudaError_t(const ForwardArgs& args, const Launch& launch);
using Backward = cudaError_t(const BackwardArgs& args, const Launch& launch);

Forward depthwise_forward, pointwise_forward, dense_forward, gated_pointwise_forward;
Backward depthwise_backward, pointwise_backward, dense_backward, gated_pointwise_backward;
cudaError_t norm_act_forward(const NormActArgs& args, const Launch& launch);
cudaError_t norm_act_backward(const NormActArgs& args, const Launch& launch);
cudaError_t block_inference(const BlockArgs& args, const Launch& launch);
cudaError_t bn_from_running(const RunningArgs& args, const Launch& launch);

}  // namespace mx::cuda
