// The ops of `mobilenet_ext_cpu`.
#include "../bindings.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "blocks.h"
#include "runtime.h"

namespace mx::cpu {
namespace {

double value(const VectorArg& vector, int64_t i, double otherwise) {
  if (vector.data == nullptr) return otherwise;
  switch (vector.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(vector.data)[i];
    case Dtype::f64:
      return static_cast<const double*>(vector.data)[i];
    case Dtype::bf16:
      return float(static_cast<const torch::headeronly::BFloat16*>(vector.data)[i]);
    case Dtype::f16:
      return float(static_cast<const torch::headeronly::Half*>(vector.data)[i]);
  }
  return otherwise;
}

template <class A>
void write_bn(const RunningArgs& args) {
  A* bn = static_cast<A*>(args.bn);
  for (int64_t i = 0; i < args.c; ++i) {
    const double var = value(args.running_var, i, 1);
    const double rstd = 1 / std::sqrt(var + args.eps);
    bn[BN_MEAN * args.c + i] = A(value(args.running_mean, i, 0) - value(args.conv_bias, i, 0));
    bn[BN_SCALE * args.c + i] = A(value(args.gamma, i, 1) * rstd);
    bn[BN_SHIFT * args.c + i] = A(value(args.beta, i, 0));
    bn[BN_RSTD * args.c + i] = A(rstd);
    bn[BN_VAR * args.c + i] = A(var);
  }
}

// The kernels of the instruction set in use, for csrc/bindings.h.
struct Backend {
  static constexpr auto kDevice = torch::headeronly::DeviceType::CPU;
  static constexpr const char* kDeviceName = "CPU";
  static constexpr bool kFloat64 = true;

  explicit Backend(const Tensor&) {}

  Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) const {
    const torch::stable::Device device(kDevice);
    const size_t itemsize = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    const size_t bytes = size_t(n) * c * h * w * itemsize;
    if (bytes < kSmallestBlock) return empty_channels_last(n, c, h, w, type, device);
    void* const block = take_block(bytes);
    STD_TORCH_CHECK(block != nullptr, "not enough memory for an activation of ", bytes, " bytes");
    return torch::stable::from_blob(block, {n, c, h, w}, {h * w * c, 1, w * c, c}, device, type, return_block);
  }

  std::pair<ScalarType, int64_t> packed_weight(Dtype dtype, ScalarType type, int64_t c_out, int64_t c_in) const {
    const PackedLayout layout = kernels(dtype).packed_layout;
    const int64_t panels = (c_out + layout.columns - 1) / layout.columns;
    const int64_t steps = (c_in + layout.depth - 1) / layout.depth;
    return {layout.group > 1 ? type : acc_type(type), panels * layout.columns * steps * layout.depth};
  }

  void depthwise_forward(const ForwardArgs& args) const { kernels(args.dtype).depthwise_forward(args); }
  void depthwise_backward(const BackwardArgs& args) const { kernels(args.dtype).depthwise_backward(args); }
  void pointwise_forward(const ForwardArgs& args) const { kernels(args.dtype).pointwise_forward(args); }
  void pointwise_backward(const BackwardArgs& args) const { kernels(args.dtype).pointwise_backward(args); }
  void stem_forward(const ForwardArgs& args) const { kernels(args.dtype).stem_forward(args); }
  void stem_backward(const BackwardArgs& args) const { kernels(args.dtype).stem_backward(args); }
  void normalise_forward(const NormaliseArgs& args) const { kernels(args.dtype).normalise_forward(args); }
  void normalise_backward(const NormaliseArgs& args) const { kernels(args.dtype).normalise_backward(args); }
  void block_inference(const BlockArgs& args) const { kernels(args.dtype).block_inference(args); }
  void bn_from_running(const RunningArgs& args) const {
    args.running_mean.dtype == Dtype::f64 ? write_bn<double>(args) : write_bn<float>(args);
  }
};

}  // namespace
}  // namespace mx::cpu

STABLE_TORCH_LIBRARY_IMPL(mobilenet_ext_cpu, CPU, m) { MX_IMPLEMENT_OPS(m, mx::cpu::Backend) }
