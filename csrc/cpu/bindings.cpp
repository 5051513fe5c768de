// The ops of `mobilenet_ext_cpu`.
#include "../bindings.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

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

  int64_t packed_bytes(Dtype dtype, int64_t c_in, int64_t c_out, bool block) const {
    return kernels(dtype).packed_bytes(c_in, c_out, block);
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

// Of a block, or without depthwise_weight of a pointwise convolution.
Tensor pack(const OptionalTensor& depthwise_bn, const OptionalTensor& depthwise_weight,
            const Tensor& pointwise_weight) {
  const Call<Backend> call(pointwise_weight);
  STD_TORCH_CHECK(pointwise_weight.dim() == 4, "pointwise_weight: expected 4 dimensions, got ",
                  shape_text(pointwise_weight.sizes()));
  const int64_t c_out = pointwise_weight.size(0), c_in = pointwise_weight.size(1);
  const ScalarType type = pointwise_weight.scalar_type();
  BlockArgs args{};
  args.dtype = dtype_of<Backend>(pointwise_weight, "pointwise_weight");
  call.check_dense(pointwise_weight, "pointwise_weight", type, {c_out, c_in, 1, 1});
  if (depthwise_weight) {
    STD_TORCH_CHECK(depthwise_bn.has_value(), "depthwise_bn: expected with a depthwise_weight");
    call.check_dense(*depthwise_weight, "depthwise_weight", type, {c_in, 1, 3, 3});
    call.check_dense(*depthwise_bn, "depthwise_bn", acc_type(type), {BN_ROWS, c_in});
  }
  args.g.c_in = c_in;
  args.g.c_out = c_out;
  args.depthwise_bn = data(depthwise_bn);
  args.depthwise_weight = data(depthwise_weight);
  args.pointwise_weight = data(pointwise_weight);
  const bool block = depthwise_weight.has_value();
  Tensor packed = call.empty({call.backend.packed_bytes(args.dtype, c_in, c_out, block)}, ScalarType::Byte);
  kernels(args.dtype).pack(args, packed.mutable_data_ptr());
  return packed;
}

// A chain of inference ops in one call. `program` has four numbers a step: which op (in the order of the cases), and
// its stride, padding and relu, 0 where it has none; `tensors` are their tensors behind the activation, in order.
Tensor run_plan(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& program) {
  using Ops = Bindings<Backend>;
  STD_TORCH_CHECK(!program.empty() && program.size() % 4 == 0, "program: expected four numbers a step");
  Tensor a = x;
  const Tensor* next = tensors.data();
  const auto take = [&](int64_t count) {
    STD_TORCH_CHECK(tensors.data() + tensors.size() - next >= count, "tensors: too few for the program");
    next += count;
    return next - count;
  };
  for (size_t i = 0; i < program.size(); i += 4) {
    const int64_t stride = program[i + 1], padding = program[i + 2], relu = program[i + 3];
    switch (program[i]) {
      case 0: {
        const Tensor* const t = take(2);
        a = Ops::stem_inference(a, t[0], t[1], stride, padding, relu);
        break;
      }
      case 1: {
        const Tensor* const t = take(2);
        a = Ops::depthwise_inference(a, t[0], t[1], stride, padding, relu);
        break;
      }
      case 2: {
        const Tensor* const t = take(3);
        a = Ops::pointwise_inference(a, t[0], t[1], relu, t[2]);
        break;
      }
      case 3: {
        const Tensor* const t = take(5);
        a = Ops::block_inference(a, t[0], t[1], stride, t[2], t[3], t[4]);
        break;
      }
      case 4:
        a = Ops::bn_relu_pool_forward(a, *take(1));
        break;
      default:
        STD_TORCH_CHECK(false, "program: no op ", program[i]);
    }
  }
  return a;
}

}  // namespace
}  // namespace mx::cpu

STABLE_TORCH_LIBRARY_IMPL(mobilenet_ext_cpu, CPU, m) {
  MX_IMPLEMENT_OPS(m, mx::cpu::Backend)
  m.impl("pack", TORCH_BOX(&mx::cpu::pack));
  m.impl("run_plan", TORCH_BOX(&mx::cpu::run_plan));
}
