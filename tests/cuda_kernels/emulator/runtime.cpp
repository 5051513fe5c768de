// The emulated device's side of csrc/cuda/runtime.h: CPU tensors, no stream, and a device of any size.
#include "cuda/runtime.h"

#include <string.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace mx::cuda {
namespace {

bool tf32_allowed = false;

}  // namespace

struct Runtime::State {
  std::vector<torch::stable::Tensor> temporaries;

  static void* allocate(void* state, size_t bytes) {
    auto& temporaries = static_cast<State*>(state)->temporaries;
    // Some more, for the alignment that the launchers are promised. Filled with NaN bits: nobody may count on zeros.
    temporaries.push_back(torch::stable::empty({int64_t(bytes + 256)}, torch::headeronly::ScalarType::Byte,
                                               std::nullopt,
                                               torch::stable::Device(torch::headeronly::DeviceType::CPU)));
    void* data = temporaries.back().mutable_data_ptr();
    memset(data, 0xff, bytes + 256);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data) + 255) / 256 * 256);
  }
};

Runtime::Runtime(const torch::stable::Tensor&) : state_(std::make_unique<State>()) {
  Gpu gpu{};
  check(look_at(0, gpu), "properties of the GPU");
  launch_ = Launch{nullptr, gpu, tf32_allowed, &State::allocate, state_.get()};
}

Runtime::~Runtime() = default;

void Runtime::check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error ", int(error));
}

}  // namespace mx::cuda

extern "C" __attribute__((visibility("default"))) void mx_cuda_allow_tf32(bool allow) {
  mx::cuda::tf32_allowed = allow;
}
