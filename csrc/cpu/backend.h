// The CPU backend as the torch bindings want it.
#pragma once

#include <exception>
#include <memory>

#include "../bindings.h"
#include "activation_memory.h"
#include "runtime.h"

namespace mx::cpu {

// The kernels of the instruction set in use, for csrc/bindings.h.
struct Backend {
  static constexpr auto kDevice = torch::headeronly::DeviceType::CPU;
  static constexpr const char* kDeviceName = "CPU";
  static constexpr bool kFloat64 = true;

  explicit Backend(const Tensor&) {}

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    return allocated([&] { return empty_contiguous(shape, type, torch::stable::Device(kDevice)); });
  }

  Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) const {
    const torch::stable::Device device(kDevice);
    const size_t itemsize = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    const size_t bytes = size_t(n) * c * h * w * itemsize;
    if (bytes < kSmallestKept) return allocated([&] { return empty_channels_last(n, c, h, w, type, device); });
    std::unique_ptr<void, void (*)(void*)> memory(take_memory(bytes), return_memory);
    STD_TORCH_CHECK(memory != nullptr, "not enough memory for an activation of ", bytes, " bytes");
    Tensor activation =
        torch::stable::from_blob(memory.get(), {n, c, h, w}, {h * w * c, 1, w * c, c}, device, type, return_memory);
    memory.release();  // to the tensor
    return activation;
  }

  int64_t packed_bytes(Dtype dtype, int64_t c_in, int64_t c_out, bool block) const {
    return kernels(dtype).packed_bytes(c_in, c_out, block);
  }

  void forward(Conv conv, const ForwardArgs& args) const { kernels(args.dtype).forward[int(conv)](args); }
  void backward(Conv conv, const BackwardArgs& args) const { kernels(args.dtype).backward[int(conv)](args); }
  void norm_act_forward(const NormActArgs& args) const { kernels(args.dtype).norm_act_forward(args); }
  void norm_act_backward(const NormActArgs& args) const { kernels(args.dtype).norm_act_backward(args); }
  void block_inference(const BlockArgs& args) const { kernels(args.dtype).block_inference(args); }
  void bn_from_running(const RunningArgs& args) const;

 private:
  // PyTorch's allocator does not know of idle memory: where it finds none, that goes first. Gradients of weights
  // and the like are not such pieces themselves, whose storage cannot be resized.
  template <class Allocate>
  static Tensor allocated(const Allocate& allocate) {
    try {
      return allocate();
    } catch (const std::exception&) {
      release_idle_memory();
      return allocate();
    }
  }
};

}  // namespace mx::cpu
