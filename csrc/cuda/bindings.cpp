// The ops of `mobilenet_ext_cuda`.
#include "../bindings.h"

#include "runtime.h"

namespace mx::cuda {
namespace {

// The launchers, for csrc/bindings.h.
struct Backend {
  static constexpr auto kDevice = torch::headeronly::DeviceType::MX_DISPATCH_KEY;
  static constexpr const char* kDeviceName = kDevice == torch::headeronly::DeviceType::CUDA ? "CUDA" : "CPU";
  static constexpr bool kFloat64 = false;

  explicit Backend(const torch::stable::Tensor& tensor) : runtime(tensor) {}

#define MX_LAUNCH(kernel, Args) \
  void kernel(const Args& args) const { Runtime::check(cuda::kernel(args, runtime.launch()), #kernel); }
  MX_LAUNCH(depthwise_forward, ForwardArgs)
  MX_LAUNCH(depthwise_backward, BackwardArgs)
  MX_LAUNCH(pointwise_forward, ForwardArgs)
  MX_LAUNCH(pointwise_backward, BackwardArgs)
  MX_LAUNCH(stem_forward, ForwardArgs)
  MX_LAUNCH(stem_backward, BackwardArgs)
  MX_LAUNCH(normalise_forward, NormaliseArgs)
  MX_LAUNCH(normalise_backward, NormaliseArgs)
  MX_LAUNCH(block_inference, BlockArgs)
  MX_LAUNCH(bn_from_running, RunningArgs)
#undef MX_LAUNCH

  Runtime runtime;
};

}  // namespace
}  // namespace mx::cuda

#define MX_DEFINE_OP(schema) m.def(schema);

STABLE_TORCH_LIBRARY(mobilenet_ext_cuda, m){MX_KERNEL_OPS(MX_DEFINE_OP)}

STABLE_TORCH_LIBRARY_IMPL(mobilenet_ext_cuda, MX_DISPATCH_KEY, m) {
  MX_IMPLEMENT_OPS(m, mx::cuda::Backend)
}
