// The torch side of a backend written in C++: checks the tensors (csrc/checks.h), allocates the outputs and calls the
// kernels.
//
// Backend is a class that is made of a call's first tensor and lives as long as the call, with
//   kDevice, kDeviceName, kFloat64            where its tensors live, and whether float64 is among their dtypes
//   empty(shape, type)                        allocates a contiguous tensor
//   empty_activation(n, c, h, w, type)        allocates a channels_last tensor
//   packed_bytes(dtype, c_in, c_out, block)   size of what may come as `packed` to a pointwise convolution or a block
//   forward(conv, const ForwardArgs&), backward(conv, const BackwardArgs&), norm_act_forward(const NormActArgs&) ...
//                                             the kernels
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace mx {

// The ops, by their names in csrc/ops.h.
template <class Backend>
struct Bindings {
  template <Conv conv>
  static std::tuple<Tensor, Tensor> conv_forward(const Tensor& u, const OptionalTensor& bn_u, int64_t act_u,
                                                 const Tensor& weight, int64_t stride,
                                                 const std::vector<int64_t>& padding, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, double eps, bool stats,
                                                 const OptionalTensor& bias, double slope_u) {
    return run_forward(conv, u, bn_u, act_u, slope_u, std::nullopt, weight, stride, padding, gamma, beta, eps, stats,
                       bias);
  }

  static std::tuple<Tensor, Tensor> gated_pointwise_forward(const Tensor& u, const OptionalTensor& bn_u, int64_t act_u,
                                                            const Tensor& gate, const Tensor& weight,
                                                            const OptionalTensor& gamma, const OptionalTensor& beta,
                                                            double eps, bool stats, const OptionalTensor& bias,
                                                            double slope_u) {
    return run_forward(Conv::pointwise, u, bn_u, act_u, slope_u, gate, weight, 1, kNoPadding, gamma, beta, eps, stats,
                       bias);
  }

  template <Conv conv>
  static std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& dz, const OptionalTensor& y,
                                                          const OptionalTensor& grad_bn_y, const Tensor& u,
                                                          const OptionalTensor& bn_u, int64_t act_u, bool batch_stats_u,
                                                          const Tensor& weight, int64_t stride,
                                                          const std::vector<int64_t>& padding, bool need_input,
                                                          bool need_weight, double slope_u) {
    return run_backward(conv, dz, y, grad_bn_y, u, bn_u, act_u, slope_u, batch_stats_u, std::nullopt, weight, stride,
                        padding, need_input, need_weight);
  }

  static std::tuple<Tensor, Tensor, Tensor> gated_pointwise_backward(const Tensor& dz, const OptionalTensor& y,
                                                                     const OptionalTensor& grad_bn_y, const Tensor& u,
                                                                     const OptionalTensor& bn_u, int64_t act_u,
                                                                     const Tensor& gate, const Tensor& weight,
                                                                     bool need_input, bool need_weight,
                                                                     double slope_u) {
    return run_backward(Conv::pointwise, dz, y, grad_bn_y, u, bn_u, act_u, slope_u, false, gate, weight, 1, kNoPadding,
                        need_input, need_weight);
  }

  template <Conv conv>
  static Tensor conv_inference(const Tensor& x, const OptionalTensor& bn_y, int64_t act_y, const Tensor& weight,
                               int64_t stride, const std::vector<int64_t>& padding, const OptionalTensor& packed,
                               const OptionalTensor& residual, double slope_y) {
    return run_inference(conv, x, std::nullopt, bn_y, act_y, slope_y, weight, stride, padding, packed, residual);
  }

  static Tensor gated_pointwise_inference(const Tensor& x, const Tensor& gate, const OptionalTensor& bn_y,
                                          int64_t act_y, const Tensor& weight, const OptionalTensor& packed,
                                          const OptionalTensor& residual, double slope_y) {
    return run_inference(Conv::pointwise, x, gate, bn_y, act_y, slope_y, weight, 1, kNoPadding, packed, residual);
  }

  static constexpr auto* depthwise_forward = &conv_forward<Conv::depthwise>;
  static constexpr auto* depthwise_backward = &conv_backward<Conv::depthwise>;
  static constexpr auto* depthwise_inference = &conv_inference<Conv::depthwise>;
  static constexpr auto* pointwise_forward = &conv_forward<Conv::pointwise>;
  static constexpr auto* pointwise_backward = &conv_backward<Conv::pointwise>;
  static constexpr auto* pointwise_inference = &conv_inference<Conv::pointwise>;
  static constexpr auto* dense_forward = &conv_forward<Conv::dense>;
  static constexpr auto* dense_backward = &conv_backward<Conv::dense>;
  static constexpr auto* dense_inference = &conv_inference<Conv::dense>;

  static Tensor block_inference(const Tensor& x, const Tensor& depthwise_bn, int64_t depthwise_act,
                                const Tensor& depthwise_weight, int64_t stride, const std::vector<int64_t>& padding,
                                const Tensor& pointwise_bn, int64_t pointwise_act, const Tensor& pointwise_weight,
                                const OptionalTensor& packed, const OptionalTensor& residual, double depthwise_slope,
                                double pointwise_slope) {
    const Call<Backend> call(x);
    ConvShape s = call.check_conv(Conv::depthwise, x, depthwise_weight, stride, padding);
    check_block(s.g.kernel, padding);
    const int64_t c = s.g.c_in;
    STD_TORCH_CHECK(pointwise_weight.dim() == 4 && pointwise_weight.size(0) > 0,
                    "pointwise_weight: expected 4 dimensions and at least one output channel, got ",
                    shape_text(pointwise_weight.sizes()));
    const int64_t c_out = pointwise_weight.size(0);
    call.check_dense(pointwise_weight, "pointwise_weight", s.type, {c_out, c, 1, 1});
    s.g.c_out = c_out;
    BlockArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.x = data(x);
    args.depthwise =
        call.check_norm_act(depthwise_bn, "depthwise_bn", depthwise_act, "depthwise_act", depthwise_slope, s.type, c);
    args.pointwise = call.check_norm_act(pointwise_bn, "pointwise_bn", pointwise_act, "pointwise_act", pointwise_slope,
                                         s.type, c_out);
    args.depthwise_weight = data(depthwise_weight);
    args.pointwise_weight = data(pointwise_weight);
    if (packed) call.check_packed(*packed, s.dtype, s.g.c_in, s.g.c_out, true);
    args.packed = data(packed);
    args.residual = check_residual(call, residual, s.type, {s.g.n, c_out, s.g.out_h, s.g.out_w});
    Tensor y = call.empty_activation(s.g.n, c_out, s.g.out_h, s.g.out_w, s.type);
    args.y = y.mutable_data_ptr();
    call.backend.block_inference(args);
    return y;
  }

  static Tensor norm_act_forward(const Tensor& y, const Tensor& bn_y, int64_t act, bool pool,
                                 const OptionalTensor& residual, double slope) {
    const Call<Backend> call(y);
    NormActArgs args = check_norm_act(call, y, bn_y, act, slope, pool);
    STD_TORCH_CHECK(!(pool && residual), "residual: expected none where the output is pooled");
    args.residual = check_residual(call, residual, y.scalar_type(), {y.size(0), y.size(1), y.size(2), y.size(3)});
    Tensor out =
        call.empty_activation(y.size(0), y.size(1), pool ? 1 : y.size(2), pool ? 1 : y.size(3), y.scalar_type());
    args.out = out.mutable_data_ptr();
    call.backend.norm_act_forward(args);
    return out;
  }

  static std::tuple<Tensor, Tensor> norm_act_backward(const Tensor& grad, const Tensor& y, const Tensor& bn_y,
                                                      int64_t act, bool batch_stats, bool pool,
                                                      const OptionalTensor& grad_pooled, bool need_dz, double slope) {
    const Call<Backend> call(y);
    NormActArgs args = check_norm_act(call, y, bn_y, act, slope, pool);
    const ScalarType type = y.scalar_type();
    const int64_t n = y.size(0), c = y.size(1), h = y.size(2), w = y.size(3);
    call.check_activation_like(grad, "grad", type, {n, c, pool ? 1 : h, pool ? 1 : w});
    STD_TORCH_CHECK(!(pool && grad_pooled), "grad_pooled: expected none where grad is that of the pooled output");
    if (grad_pooled) call.check_activation_like(*grad_pooled, "grad_pooled", type, {n, c, 1, 1});
    Tensor dz = need_dz ? call.empty_activation(n, c, h, w, type) : call.empty({0}, type);
    Tensor grad_bn_y = call.empty({GRAD_ROWS, c}, acc_type(type));
    args.batch_stats = batch_stats;
    args.grad = data(grad);
    args.grad_pooled = data(grad_pooled);
    args.dz = need_dz ? dz.mutable_data_ptr() : nullptr;
    args.grad_bn_y = grad_bn_y.mutable_data_ptr();
    call.backend.norm_act_backward(args);
    return {dz, grad_bn_y};
  }

  static Tensor bn_from_running(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& gamma,
                                const OptionalTensor& beta, const OptionalTensor& conv_bias, double eps) {
    STD_TORCH_CHECK(running_mean.dim() == 1, "running_mean: expected 1 dimension, got ", running_mean.dim());
    const Call<Backend> call(running_mean);
    RunningArgs args{};
    args.c = running_mean.size(0);
    args.running_mean = vector_arg(call, running_mean, "running_mean", args.c);
    args.running_var = vector_arg(call, running_var, "running_var", args.c);
    args.gamma = vector_arg(call, gamma, "gamma", args.c);
    args.beta = vector_arg(call, beta, "beta", args.c);
    args.conv_bias = vector_arg(call, conv_bias, "conv_bias", args.c);
    args.eps = eps;
    Tensor bn = call.empty({BN_ROWS, args.c}, acc_type(running_mean.scalar_type()));
    args.bn = bn.mutable_data_ptr();
    call.backend.bn_from_running(args);
    return bn;
  }

 private:
  inline static const std::vector<int64_t> kNoPadding{0, 0, 0, 0};

  static std::tuple<Tensor, Tensor> run_forward(Conv conv, const Tensor& u, const OptionalTensor& bn_u, int64_t act_u,
                                                double slope_u, const OptionalTensor& gate, const Tensor& weight,
                                                int64_t stride, const std::vector<int64_t>& padding,
                                                const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                                bool stats, const OptionalTensor& bias) {
    const Call<Backend> call(u);
    const ConvShape s = call.check_conv(conv, u, weight, stride, padding);
    const ScalarType acc = acc_type(s.type);
    ForwardArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.u = data(u);
    args.input = call.check_input(conv, bn_u, act_u, slope_u, s.type, s.g.c_in);
    args.gate = check_gate(call, gate, s);
    args.weight = data(weight);
    if (gamma) call.check_dense(*gamma, "gamma", acc, {s.g.c_out});
    if (beta) call.check_dense(*beta, "beta", acc, {s.g.c_out});
    if (bias) call.check_dense(*bias, "bias", acc, {s.g.c_out});
    args.bias = data(bias);
    Tensor y = call.empty_activation(s.g.n, s.g.c_out, s.g.out_h, s.g.out_w, s.type);
    Tensor bn_y = stats ? call.empty({BN_ROWS, s.g.c_out}, acc) : call.empty({0}, acc);
    args.y = y.mutable_data_ptr();
    if (stats) args.statistics = {bn_y.mutable_data_ptr(), data(gamma), data(beta), eps};
    call.backend.forward(conv, args);
    return {y, bn_y};
  }

  // dz_u, the gradient of the weight and grad_bn_u; with a gate da, the gradient of the weight and that of the gate.
  static std::tuple<Tensor, Tensor, Tensor> run_backward(
      Conv conv, const Tensor& dz, const OptionalTensor& y, const OptionalTensor& grad_bn_y, const Tensor& u,
      const OptionalTensor& bn_u, int64_t act_u, double slope_u, bool batch_stats_u, const OptionalTensor& gate,
      const Tensor& weight, int64_t stride, const std::vector<int64_t>& padding, bool need_input, bool need_weight) {
    const Call<Backend> call(u);
    const ConvShape s = call.check_conv(conv, u, weight, stride, padding);
    const ScalarType acc = acc_type(s.type);
    call.check_activation_like(dz, "dz", s.type, {s.g.n, s.g.c_out, s.g.out_h, s.g.out_w});
    if (y) call.check_activation_like(*y, "y", s.type, {s.g.n, s.g.c_out, s.g.out_h, s.g.out_w});
    if (grad_bn_y) call.check_dense(*grad_bn_y, "grad_bn_y", acc, {GRAD_ROWS, s.g.c_out});
    BackwardArgs args{};
    args.input = call.check_input(conv, bn_u, act_u, slope_u, s.type, s.g.c_in);
    args.gate = check_gate(call, gate, s);
    Tensor dz_u = need_input ? call.empty_activation(s.g.n, s.g.c_in, s.g.h, s.g.w, s.type) : call.empty({0}, s.type);
    Tensor grad_weight = need_weight ? call.empty({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, acc)
                                     : call.empty({0}, acc);
    Tensor of_input = !need_input ? call.empty({0}, acc)
                      : gate      ? call.empty({s.g.n, s.g.c_in, 1, 1}, acc)
                      : bn_u      ? call.empty({GRAD_ROWS, s.g.c_in}, acc)
                                  : call.empty({0}, acc);
    args.dtype = s.dtype;
    args.g = s.g;
    args.dz = data(dz);
    args.grad_bn_y = data(grad_bn_y);
    args.y = grad_bn_y ? data(y) : nullptr;
    args.u = data(u);
    args.batch_stats_u = batch_stats_u;
    args.weight = data(weight);
    args.dz_u = need_input ? dz_u.mutable_data_ptr() : nullptr;
    args.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
    if (need_input && gate) args.grad_gate = of_input.mutable_data_ptr();
    if (need_input && !gate && bn_u) args.grad_bn_u = of_input.mutable_data_ptr();
    if (need_input || need_weight) call.backend.backward(conv, args);
    return {dz_u, grad_weight, of_input};
  }

  static Tensor run_inference(Conv conv, const Tensor& x, const OptionalTensor& gate, const OptionalTensor& bn_y,
                              int64_t act_y, double slope_y, const Tensor& weight, int64_t stride,
                              const std::vector<int64_t>& padding, const OptionalTensor& packed,
                              const OptionalTensor& residual) {
    const Call<Backend> call(x);
    const ConvShape s = call.check_conv(conv, x, weight, stride, padding);
    ForwardArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.u = data(x);
    args.gate = check_gate(call, gate, s);
    args.weight = data(weight);
    args.output = call.check_norm_act(bn_y, "bn_y", act_y, "act_y", slope_y, s.type, s.g.c_out);
    if (packed) {
      STD_TORCH_CHECK(conv == Conv::pointwise, "packed: expected for a pointwise convolution only");
      call.check_packed(*packed, s.dtype, s.g.c_in, s.g.c_out, false);
    }
    args.packed = data(packed);
    args.residual = check_residual(call, residual, s.type, {s.g.n, s.g.c_out, s.g.out_h, s.g.out_w});
    Tensor y = call.empty_activation(s.g.n, s.g.c_out, s.g.out_h, s.g.out_w, s.type);
    args.y = y.mutable_data_ptr();
    call.backend.forward(conv, args);
    return y;
  }

  static const void* check_gate(const Call<Backend>& call, const OptionalTensor& gate, const ConvShape& s) {
    if (gate) call.check_activation_like(*gate, "gate", s.type, {s.g.n, s.g.c_in, 1, 1});
    return data(gate);
  }

  static const void* check_residual(const Call<Backend>& call, const OptionalTensor& residual, ScalarType type,
                                    std::initializer_list<int64_t> shape) {
    if (residual) call.check_activation_like(*residual, "residual", type, shape);
    return data(residual);
  }

  static NormActArgs check_norm_act(const Call<Backend>& call, const Tensor& y, const Tensor& bn_y, int64_t act,
                                    double slope, bool pool) {
    call.check_activation(y, "y");
    NormActArgs args{};
    args.dtype = dtype_of<Backend>(y, "y");
    args.n = y.size(0);
    args.hw = y.size(2) * y.size(3);
    args.c = y.size(1);
    args.y = data(y);
    args.norm_act = call.check_norm_act(bn_y, "bn_y", act, "act", slope, y.scalar_type(), y.size(1));
    args.pool = pool;
    return args;
  }

  static VectorArg vector_arg(const Call<Backend>& call, const OptionalTensor& t, const char* name, int64_t c) {
    if (!t) return VectorArg{nullptr, Dtype::f32};
    call.check_dense(*t, name, t->scalar_type(), {c});
    return VectorArg{data(t), dtype_of<Backend>(*t, name)};
  }
};

}  // namespace mx

// Registers an op of csrc/ops.h for the `Ops`, a Bindings, that are in scope: MX_KERNEL_OPS(MX_IMPLEMENT_OP).
#define MX_IMPLEMENT_OP(name, schema) m.impl(#name, TORCH_BOX(Ops::name));
