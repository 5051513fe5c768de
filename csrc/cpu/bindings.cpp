// The ops of `mobilenet_ext_cpu`.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "backend.h"
#include "plan.h"

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
  args.depthwise.bn = data(depthwise_bn);
  args.depthwise_weight = data(depthwise_weight);
  args.pointwise_weight = data(pointwise_weight);
  const bool block = depthwise_weight.has_value();
  Tensor packed = call.empty({call.backend.packed_bytes(args.dtype, c_in, c_out, block)}, ScalarType::Byte);
  kernels(args.dtype).pack(args, packed.mutable_data_ptr());
  return packed;
}

}  // namespace

void Backend::bn_from_running(const RunningArgs& args) const {
  args.running_mean.dtype == Dtype::f64 ? write_bn<double>(args) : write_bn<float>(args);
}

}  // namespace mx::cpu

STABLE_TORCH_LIBRARY_IMPL(mobilenet_ext_cpu, CPU, m) {
  using Ops = mx::Bindings<mx::cpu::Backend>;
  MX_KERNEL_OPS(MX_IMPLEMENT_OP)
  m.impl("pack", TORCH_BOX(&mx::cpu::pack));
  m.impl("make_plan", TORCH_BOX(&mx::cpu::make_plan));
  m.impl("run_plan", TORCH_BOX(&mx::cpu::run_plan));
}
