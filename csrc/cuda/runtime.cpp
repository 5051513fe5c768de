// Device, stream and memory of a call, through libtorch's stable ABI.
#include "runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <vector>

namespace mx::cuda {
namespace {

std::atomic<bool> tf32_allowed{false};

// Asked for once, for every call needs it. Neither question synchronises or takes part in a stream capture.
Gpu gpu_of(int device) {
  constexpr int kDevices = 128;
  static std::atomic<uint64_t> known[kDevices];  // 0: not asked yet
  uint64_t packed = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    Gpu gpu{};
    Runtime::check(look_at(device, gpu), "properties of the GPU");
    packed = uint64_t(gpu.architecture) << 32 | uint64_t(gpu.multiprocessors);
    if (device < kDevices) known[device].store(packed, std::memory_order_relaxed);
  }
  return {int(packed >> 32), int(packed & 0xffffffff)};
}

}  // namespace

struct Runtime::State {
  torch::stable::Device device;
  torch::stable::accelerator::DeviceGuard guard;
  // Freed when the call returns, like any tensor that a stream still uses: PyTorch hands the memory out again to later
  // work on the same stream only.
  std::vector<torch::stable::Tensor> temporaries;

  explicit State(const torch::stable::Device& d) : device(d), guard(d.index()) {}

  static void* allocate(void* state, size_t bytes) {
    State& s = *static_cast<State*>(state);
    s.temporaries.push_back(torch::stable::empty({int64_t(bytes > 0 ? bytes : 1)}, torch::headeronly::ScalarType::Byte,
                                                 std::nullopt, s.device));
    return s.temporaries.back().mutable_data_ptr();
  }
};

Runtime::Runtime(const torch::stable::Tensor& tensor) : state_(std::make_unique<State>(tensor.device())) {
  const int index = int(state_->device.index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  launch_ = Launch{static_cast<cudaStream_t>(stream), gpu_of(index), tf32_allowed.load(std::memory_order_relaxed),
                   &State::allocate, state_.get()};
}

Runtime::~Runtime() = default;

void Runtime::check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace mx::cuda

extern "C" __attribute__((visibility("default"))) void mx_cuda_allow_tf32(bool allow) {
  mx::cuda::tf32_allowed.store(allow, std::memory_order_relaxed);
}
