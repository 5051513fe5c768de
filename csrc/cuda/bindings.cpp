// The ops of the CUDA backend.
#include "../bindings.h"

#include "runtime.h"

namespace mx::cuda {
namespace {

// The launchers, for csrc/bindings.h.
struct Backend {
  static constexpr auto kDevice = torch::headeronly::DeviceType::MX_DISPATCH_KEY;
  static constexpr const char* kDeviceName = kDevice == torch::headeronly::DeviceType::CUDA ? "CUDA" : "CPU";
  static constexpr bool kFloat64 = false;

  explicit Backend(const torch::stable::Tensor& tensor) : device(tensor.device()), runtime(tensor) {}

  Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) const {
    return empty_channels_last(n, c, h, w, type, device);
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    return empty_contiguous(shape, type, device);
  }

  // The kernels take weights as they are.
  int64_t packed_bytes(Dtype, int64_t, int64_t, bool) const { return 0; }

  void forward(Conv conv, const ForwardArgs& args) const {
    constexpr Forward* kLaunchers[kConvs] = {depthwise_forward, pointwise_forward, dense_forward};  // by Conv
    constexpr const char* kNames[kConvs] = {"depthwise_forward", "pointwise_forward", "dense_forward"};
    if (args.gate != nullptr)
      return Runtime::check(gated_pointwise_forward(args, runtime.launch()), "gated_pointwise_forward");
    Runtime::check(kLaunchers[int(conv)](args, runtime.launch()), kNames[int(conv)]);
  }

  void backward(Conv conv, const BackwardArgs& args) const {
    constexpr Backward* kLaunchers[kConvs] = {depthwise_backward, pointwise_backward, dense_backward};
    constexpr const char* kNames[kConvs] = {"depthwise_backward", "pointwise_backward", "dense_backward"};
    if (args.gate != nullptr)
      return Runtime::check(gated_pointwise_backward(args, runtime.launch()), "gated_pointwise_backward");
    Runtime::check(kLaunchers[int(conv)](args, runtime.launch()), kNames[int(conv)]);
  }

#define MX_LAUNCH(kernel, Args) \
  void kernel(const Args& args) const { Runtime::check(cuda::kernel(args, runtime.launch()), #kernel); }
  MX_LAUNCH(norm_act_forward, NormActArgs)
  MX_LAUNCH(norm_act_backward, NormActArgs)
  MX_LAUNCH(block_inference, BlockArgs)
  MX_LAUNCH(bn_from_running, RunningArgs)
#undef MX_LAUNCH

  torch::stable::Device device;
  Runtime runtime;
};

}  // namespace
}  // namespace mx::cuda

#define MX_DEFINE_OP(name, schema) m.def(schema);

// By way of these, the names that the macros below stand for are what is registered.
#define MX_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define MX_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

MX_LIBRARY(MX_CUDA_LIBRARY, m){MX_KERNEL_OPS(MX_DEFINE_OP)}

MX_LIBRARY_IMPL(MX_CUDA_LIBRARY, MX_DISPATCH_KEY, m) {
  using Ops = mx::Bindings<mx::cuda::Backend>;
  MX_KERNEL_OPS(MX_IMPLEMENT_OP)
}
