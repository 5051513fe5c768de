// What the launchers need from PyTorch for one call: its device made current, its stream, temporary memory.
//
// The emulated device (tests/cuda_kernels/emulator) has an implementation of its own.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "kernels.h"

namespace mx::cuda {

// The namespace of this library's ops, and the dispatch key to register for, which names the device of its tensors too.
#if !defined(MX_EMULATED_DEVICE)
#define MX_CUDA_LIBRARY mobilenet_ext_cuda
#define MX_DISPATCH_KEY CUDA
#else
#define MX_CUDA_LIBRARY mobilenet_ext_cuda_emulated
#define MX_DISPATCH_KEY CPU
#endif

class Runtime {
 public:
  // Makes the tensor's device the current one until this object dies.
  explicit Runtime(const torch::stable::Tensor& tensor);
  ~Runtime();
  Runtime(const Runtime&) = delete;

  const Launch& launch() const { return launch_; }

  // Throws with CUDA's description of the error, unless there is none.
  static void check(cudaError_t error, const char* op);

 private:
  struct State;
  std::unique_ptr<State> state_;
  Launch launch_;
};

}  // namespace mx::cuda

// Whether products of float32 may round their operands to TF32, for all calls from now on (by ctypes from Python,
// which follows PyTorch's setting: the stable ABI does not show it).
extern "C" void mx_cuda_allow_tf32(bool allow);
