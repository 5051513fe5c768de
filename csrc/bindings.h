// The torch side of a backend written in C++: checks the tensors, allocates the outputs and calls the kernels.
//
// The checks keep a wrong call from reading or writing outside a tensor. Messages for users, which name the arguments
// of the public functions, come from Python before a kernel op is called.
//
// Backend is a class that is made of a call's first tensor and lives as long as the call, with
//   kDevice, kDeviceName, kFloat64            where its tensors live, and whether float64 is among their dtypes
//   empty(shape, type)                        allocates a contiguous tensor
//   empty_activation(n, c, h, w, type)        allocates a channels_last tensor
//   packed_bytes(dtype, c_in, c_out, block)   size of what may come as `packed` to a pointwise convolution or a block
//   depthwise_forward(const ForwardArgs&) ... a method for each kernel
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "args.h"
#include "ops.h"

namespace mx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Backend>
Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Dtype::f32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  if (type == ScalarType::Half) return Dtype::f16;
  STD_TORCH_CHECK(Backend::kFloat64 && type == ScalarType::Double, name, ": expected float32, ",
                  Backend::kFloat64 ? "float64, " : "", "bfloat16 or float16, got scalar type ", int(type));
  return Dtype::f64;
}

inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_channels_last(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type,
                                  torch::stable::Device device) {
  return torch::stable::empty({n, c, h, w}, type, std::nullopt, device, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_contiguous(std::initializer_list<int64_t> shape, ScalarType type, torch::stable::Device device) {
  return torch::stable::empty({shape.begin(), shape.size()}, type, std::nullopt, device);
}

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

enum class Conv { depthwise, pointwise, stem };

inline int64_t kernel_size(Conv conv) { return conv == Conv::pointwise ? 1 : 3; }

inline void check_settings(int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  STD_TORCH_CHECK(padding == 0 || padding == 1, "padding: expected 0 or 1, got ", padding);
}

inline Geometry conv_geometry(Conv conv, int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_out, int stride,
                              int padding) {
  const int64_t kernel = kernel_size(conv);
  STD_TORCH_CHECK(h + 2 * padding >= kernel && w + 2 * padding >= kernel,
                  "input: the padded image is smaller than the kernel; shape ", shape_text(std::array{n, c_in, h, w}),
                  ", padding ", padding);
  return {
      n,      h,      w, c_in, c_out, (h + 2 * padding - kernel) / stride + 1, (w + 2 * padding - kernel) / stride + 1,
      stride, padding};
}

struct ConvShape {
  Geometry g;
  Dtype dtype;
  ScalarType type;
};

// The tensors of one call, all on one device.
template <class Backend>
struct Call {
  torch::stable::Device device;
  Backend backend;

  explicit Call(const Tensor& first) : device(checked_device(first)), backend(first) {}

  static torch::stable::Device checked_device(const Tensor& first) {
    STD_TORCH_CHECK(first.device().type() == Backend::kDevice, "expected a ", Backend::kDeviceName, " tensor");
    return first.device();
  }

  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.device() == device, name, ": expected a ", Backend::kDeviceName,
                    " tensor, on the device of the first one");
  }

  void check_type(const Tensor& t, const char* name, ScalarType type) const {
    check_device(t, name);
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected scalar type ", int(type), ", got ",
                    int(t.scalar_type()));
  }

  void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    const auto sizes = t.sizes();
    bool same = sizes.size() == shape.size();
    size_t i = 0;
    for (int64_t size : shape) same = same && sizes[i++] == size;
    STD_TORCH_CHECK(same, name, ": expected shape ", shape_text({shape.begin(), shape.size()}), ", got ",
                    shape_text(sizes));
  }

  // That the memory of a dense tensor is there: storages are resized by whoever holds one (FSDP frees a parameter's),
  // and the tensor's sizes do not tell.
  void check_storage(const Tensor& t, const char* name) const {
    const int64_t numel = t.numel();
    if (numel == 0) return;
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    const int64_t needed = (t.storage_offset() + numel) * int64_t(t.element_size());
    STD_TORCH_CHECK(needed <= bytes, name, ": expected a storage of at least ", needed, " bytes, got one of ", bytes,
                    " (freed or resized after the tensor was made)");
  }

  // A 4-D activation, dense in channels_last. Strides of dimensions of size 1 mean nothing.
  void check_activation(const Tensor& t, const char* name) const {
    dtype_of<Backend>(t, name);
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions, got ", t.dim());
    STD_TORCH_CHECK(t.size(1) > 0, name, ": expected at least one channel");
    if (t.numel() == 0) return;
    int64_t expected = 1;
    for (int dim : {1, 3, 2, 0}) {
      STD_TORCH_CHECK(t.size(dim) == 1 || t.stride(dim) == expected, name,
                      ": expected channels_last memory format without gaps; shape ", shape_text(t.sizes()),
                      ", strides ", shape_text(t.strides()));
      expected *= t.size(dim);
    }
    check_storage(t, name);
  }

  void check_activation_like(const Tensor& t, const char* name, ScalarType type,
                             std::initializer_list<int64_t> shape) const {
    check_activation(t, name);
    check_type(t, name, type);
    check_shape(t, name, shape);
  }

  void check_dense(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) const {
    check_type(t, name, type);
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    check_storage(t, name);
  }

  void check_packed(const Tensor& packed, Dtype dtype, int64_t c_in, int64_t c_out, bool block) const {
    check_dense(packed, "packed", ScalarType::Byte, {backend.packed_bytes(dtype, c_in, c_out, block)});
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const { return backend.empty(shape, type); }

  Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) const {
    return backend.empty_activation(n, c, h, w, type);
  }

  // Checks a weight for activations of c_in channels.
  void check_weight(Conv conv, const Tensor& weight, ScalarType type, int64_t c_in) const {
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions, got ", weight.dim());
    const int64_t c_out = weight.size(0), kernel = kernel_size(conv);
    STD_TORCH_CHECK(c_out > 0, "weight: expected at least one output channel");
    if (conv == Conv::depthwise)
      check_dense(weight, "weight", type, {c_in, 1, kernel, kernel});
    else
      check_dense(weight, "weight", type, {c_out, c_in, kernel, kernel});
  }

  // Checks u and weight against each other.
  ConvShape check_conv(Conv conv, const Tensor& u, const Tensor& weight, int64_t stride, int64_t padding) const {
    check_activation(u, "input");
    check_weight(conv, weight, u.scalar_type(), u.size(1));
    check_settings(stride, padding);
    const Geometry g =
        conv_geometry(conv, u.size(0), u.size(2), u.size(3), u.size(1), weight.size(0), int(stride), int(padding));
    return {g, dtype_of<Backend>(u, "input"), u.scalar_type()};
  }
};

template <class Backend>
struct Bindings {
  using ForwardKernel = void (Backend::*)(const ForwardArgs&) const;
  using BackwardKernel = void (Backend::*)(const BackwardArgs&) const;

  static std::tuple<Tensor, Tensor> conv_forward(Conv conv, ForwardKernel kernel, const Tensor& u,
                                                 const OptionalTensor& bn_u, const Tensor& weight, int64_t stride,
                                                 int64_t padding, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, double eps, bool stats) {
    const Call<Backend> call(u);
    const ConvShape s = call.check_conv(conv, u, weight, stride, padding);
    const ScalarType acc = acc_type(s.type);
    if (bn_u) call.check_dense(*bn_u, "bn_u", acc, {BN_ROWS, s.g.c_in});
    if (gamma) call.check_dense(*gamma, "gamma", acc, {s.g.c_out});
    if (beta) call.check_dense(*beta, "beta", acc, {s.g.c_out});
    Tensor y = call.empty_activation(s.g.n, s.g.c_out, s.g.out_h, s.g.out_w, s.type);
    Tensor bn_y = stats ? call.empty({BN_ROWS, s.g.c_out}, acc) : call.empty({0}, acc);
    ForwardArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.u = data(u);
    args.bn_u = data(bn_u);
    args.weight = data(weight);
    args.y = y.mutable_data_ptr();
    args.bn_y = stats ? bn_y.mutable_data_ptr() : nullptr;
    args.gamma = data(gamma);
    args.beta = data(beta);
    args.eps = eps;
    (call.backend.*kernel)(args);
    return {y, bn_y};
  }

  static std::tuple<Tensor, Tensor, Tensor> conv_backward(Conv conv, BackwardKernel kernel, const Tensor& h,
                                                          const OptionalTensor& y, const OptionalTensor& grad_bn_y,
                                                          const Tensor& u, const OptionalTensor& bn_u,
                                                          bool batch_stats_u, const Tensor& weight, int64_t stride,
                                                          int64_t padding, bool need_input, bool need_weight) {
    const Call<Backend> call(u);
    const ConvShape s = call.check_conv(conv, u, weight, stride, padding);
    const ScalarType acc = acc_type(s.type);
    call.check_activation_like(h, "h", s.type, {s.g.n, s.g.c_out, s.g.out_h, s.g.out_w});
    if (y) call.check_activation_like(*y, "y", s.type, {s.g.n, s.g.c_out, s.g.out_h, s.g.out_w});
    if (grad_bn_y) call.check_dense(*grad_bn_y, "grad_bn_y", acc, {GRAD_ROWS, s.g.c_out});
    if (bn_u) call.check_dense(*bn_u, "bn_u", acc, {BN_ROWS, s.g.c_in});
    const bool need_grad_bn = need_input && bn_u;
    Tensor h_u = need_input ? call.empty_activation(s.g.n, s.g.c_in, s.g.h, s.g.w, s.type) : call.empty({0}, s.type);
    Tensor grad_weight = need_weight ? call.empty({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, acc)
                                     : call.empty({0}, acc);
    Tensor grad_bn_u = need_grad_bn ? call.empty({GRAD_ROWS, s.g.c_in}, acc) : call.empty({0}, acc);
    BackwardArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.h = data(h);
    args.grad_bn_y = data(grad_bn_y);
    args.y = grad_bn_y ? data(y) : nullptr;
    args.u = data(u);
    args.bn_u = data(bn_u);
    args.batch_stats_u = batch_stats_u;
    args.weight = data(weight);
    args.h_u = need_input ? h_u.mutable_data_ptr() : nullptr;
    args.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
    args.grad_bn_u = need_grad_bn ? grad_bn_u.mutable_data_ptr() : nullptr;
    if (need_input || need_weight) (call.backend.*kernel)(args);
    return {h_u, grad_weight, grad_bn_u};
  }

  static Tensor conv_inference(Conv conv, ForwardKernel kernel, const Tensor& x, const OptionalTensor& bn_y,
                               const Tensor& weight, int64_t stride, int64_t padding, bool relu,
                               const OptionalTensor& packed = {}) {
    const Call<Backend> call(x);
    const ConvShape s = call.check_conv(conv, x, weight, stride, padding);
    if (packed) call.check_packed(*packed, s.dtype, s.g.c_in, s.g.c_out, false);
    if (bn_y) call.check_dense(*bn_y, "bn_y", acc_type(s.type), {BN_ROWS, s.g.c_out});
    Tensor y = call.empty_activation(s.g.n, s.g.c_out, s.g.out_h, s.g.out_w, s.type);
    ForwardArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.u = data(x);
    args.weight = data(weight);
    args.y = y.mutable_data_ptr();
    args.epilogue_bn = data(bn_y);
    args.epilogue_relu = relu;
    args.packed = data(packed);
    (call.backend.*kernel)(args);
    return y;
  }

  static std::tuple<Tensor, Tensor> depthwise_forward(const Tensor& u, const OptionalTensor& bn_u, const Tensor& weight,
                                                      int64_t stride, int64_t padding, const OptionalTensor& gamma,
                                                      const OptionalTensor& beta, double eps, bool stats) {
    return conv_forward(Conv::depthwise, &Backend::depthwise_forward, u, bn_u, weight, stride, padding, gamma, beta,
                        eps, stats);
  }

  static std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& h, const OptionalTensor& y,
                                                               const OptionalTensor& grad_bn_y, const Tensor& u,
                                                               const OptionalTensor& bn_u, bool batch_stats_u,
                                                               const Tensor& weight, int64_t stride, int64_t padding,
                                                               bool need_input, bool need_weight) {
    return conv_backward(Conv::depthwise, &Backend::depthwise_backward, h, y, grad_bn_y, u, bn_u, batch_stats_u, weight,
                         stride, padding, need_input, need_weight);
  }

  static std::tuple<Tensor, Tensor> pointwise_forward(const Tensor& u, const OptionalTensor& bn_u, const Tensor& weight,
                                                      const OptionalTensor& gamma, const OptionalTensor& beta,
                                                      double eps, bool stats) {
    return conv_forward(Conv::pointwise, &Backend::pointwise_forward, u, bn_u, weight, 1, 0, gamma, beta, eps, stats);
  }

  static std::tuple<Tensor, Tensor, Tensor> pointwise_backward(const Tensor& h, const OptionalTensor& y,
                                                               const OptionalTensor& grad_bn_y, const Tensor& u,
                                                               const OptionalTensor& bn_u, bool batch_stats_u,
                                                               const Tensor& weight, bool need_input,
                                                               bool need_weight) {
    return conv_backward(Conv::pointwise, &Backend::pointwise_backward, h, y, grad_bn_y, u, bn_u, batch_stats_u, weight,
                         1, 0, need_input, need_weight);
  }

  static std::tuple<Tensor, Tensor> stem_forward(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                                                 const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                                 bool stats) {
    return conv_forward(Conv::stem, &Backend::stem_forward, x, std::nullopt, weight, stride, padding, gamma, beta, eps,
                        stats);
  }

  static std::tuple<Tensor, Tensor> stem_backward(const Tensor& h, const OptionalTensor& y,
                                                  const OptionalTensor& grad_bn_y, const Tensor& x,
                                                  const Tensor& weight, int64_t stride, int64_t padding,
                                                  bool need_input, bool need_weight) {
    const auto grads = conv_backward(Conv::stem, &Backend::stem_backward, h, y, grad_bn_y, x, std::nullopt, false,
                                     weight, stride, padding, need_input, need_weight);
    return {std::get<0>(grads), std::get<1>(grads)};
  }

  static Tensor depthwise_inference(const Tensor& x, const OptionalTensor& bn_y, const Tensor& weight, int64_t stride,
                                    int64_t padding, bool relu) {
    return conv_inference(Conv::depthwise, &Backend::depthwise_forward, x, bn_y, weight, stride, padding, relu);
  }

  static Tensor pointwise_inference(const Tensor& x, const OptionalTensor& bn_y, const Tensor& weight, bool relu,
                                    const OptionalTensor& packed) {
    return conv_inference(Conv::pointwise, &Backend::pointwise_forward, x, bn_y, weight, 1, 0, relu, packed);
  }

  static Tensor stem_inference(const Tensor& x, const OptionalTensor& bn_y, const Tensor& weight, int64_t stride,
                               int64_t padding, bool relu) {
    return conv_inference(Conv::stem, &Backend::stem_forward, x, bn_y, weight, stride, padding, relu);
  }

  static Tensor block_inference(const Tensor& x, const Tensor& depthwise_bn, const Tensor& depthwise_weight,
                                int64_t stride, const Tensor& pointwise_bn, const Tensor& pointwise_weight,
                                const OptionalTensor& packed) {
    const Call<Backend> call(x);
    ConvShape s = call.check_conv(Conv::depthwise, x, depthwise_weight, stride, 1);
    const int64_t c = s.g.c_in;
    STD_TORCH_CHECK(pointwise_weight.dim() == 4 && pointwise_weight.size(0) > 0,
                    "pointwise_weight: expected 4 dimensions and at least one output channel, got ",
                    shape_text(pointwise_weight.sizes()));
    const int64_t c_out = pointwise_weight.size(0);
    call.check_dense(pointwise_weight, "pointwise_weight", s.type, {c_out, c, 1, 1});
    call.check_dense(depthwise_bn, "depthwise_bn", acc_type(s.type), {BN_ROWS, c});
    call.check_dense(pointwise_bn, "pointwise_bn", acc_type(s.type), {BN_ROWS, c_out});
    s.g.c_out = c_out;
    Tensor y = call.empty_activation(s.g.n, c_out, s.g.out_h, s.g.out_w, s.type);
    BlockArgs args{};
    args.dtype = s.dtype;
    args.g = s.g;
    args.x = data(x);
    args.depthwise_bn = data(depthwise_bn);
    args.depthwise_weight = data(depthwise_weight);
    args.pointwise_bn = data(pointwise_bn);
    args.pointwise_weight = data(pointwise_weight);
    if (packed) call.check_packed(*packed, s.dtype, s.g.c_in, s.g.c_out, true);
    args.packed = data(packed);
    args.y = y.mutable_data_ptr();
    call.backend.block_inference(args);
    return y;
  }

  // --- normalise, ReLU, pool
  // ------------------------------------------------------------------------------------------

  static NormaliseArgs check_normalise(const Call<Backend>& call, const Tensor& y, const Tensor& bn_y) {
    call.check_activation(y, "y");
    call.check_dense(bn_y, "bn_y", acc_type(y.scalar_type()), {BN_ROWS, y.size(1)});
    NormaliseArgs args{};
    args.dtype = dtype_of<Backend>(y, "y");
    args.n = y.size(0);
    args.hw = y.size(2) * y.size(3);
    args.c = y.size(1);
    args.y = data(y);
    args.bn_y = data(bn_y);
    return args;
  }

  static Tensor normalise_forward(const Tensor& y, const Tensor& bn_y, bool relu, bool pool) {
    const Call<Backend> call(y);
    NormaliseArgs args = check_normalise(call, y, bn_y);
    Tensor out =
        call.empty_activation(y.size(0), y.size(1), pool ? 1 : y.size(2), pool ? 1 : y.size(3), y.scalar_type());
    args.relu = relu;
    args.pool = pool;
    args.out = out.mutable_data_ptr();
    call.backend.normalise_forward(args);
    return out;
  }

  static std::tuple<Tensor, Tensor> normalise_backward(const Tensor& grad, const Tensor& y, const Tensor& bn_y,
                                                       bool batch_stats, bool relu, bool pool) {
    const Call<Backend> call(y);
    NormaliseArgs args = check_normalise(call, y, bn_y);
    call.check_activation_like(grad, "grad", y.scalar_type(),
                               {y.size(0), y.size(1), pool ? 1 : y.size(2), pool ? 1 : y.size(3)});
    Tensor h = call.empty_activation(y.size(0), y.size(1), y.size(2), y.size(3), y.scalar_type());
    Tensor grad_bn_y = call.empty({GRAD_ROWS, y.size(1)}, acc_type(y.scalar_type()));
    args.relu = relu;
    args.pool = pool;
    args.batch_stats = batch_stats;
    args.grad = data(grad);
    args.h = h.mutable_data_ptr();
    args.grad_bn_y = grad_bn_y.mutable_data_ptr();
    call.backend.normalise_backward(args);
    return {h, grad_bn_y};
  }

  static Tensor bn_relu_forward(const Tensor& y, const Tensor& bn_y, bool relu) {
    return normalise_forward(y, bn_y, relu, false);
  }

  static std::tuple<Tensor, Tensor> bn_relu_backward(const Tensor& grad, const Tensor& y, const Tensor& bn_y,
                                                     bool batch_stats, bool relu) {
    return normalise_backward(grad, y, bn_y, batch_stats, relu, false);
  }

  static Tensor bn_relu_pool_forward(const Tensor& y, const Tensor& bn_y) {
    return normalise_forward(y, bn_y, true, true);
  }

  static std::tuple<Tensor, Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& y, const Tensor& bn_y,
                                                          bool batch_stats) {
    return normalise_backward(grad, y, bn_y, batch_stats, true, true);
  }

  // --- running statistics
  // ---------------------------------------------------------------------------------------------

  static VectorArg vector_arg(const Call<Backend>& call, const OptionalTensor& t, const char* name, int64_t c) {
    if (!t) return VectorArg{nullptr, Dtype::f32};
    call.check_dense(*t, name, t->scalar_type(), {c});
    return VectorArg{data(t), dtype_of<Backend>(*t, name)};
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
};

}  // namespace mx

// Registers every kernel op of the library m for a Backend.
// clang-format off
#define MX_IMPLEMENT_OPS(m, Backend)                                                                                   \
  m.impl("depthwise_forward", TORCH_BOX(&mx::Bindings<Backend>::depthwise_forward));                                   \
  m.impl("depthwise_backward", TORCH_BOX(&mx::Bindings<Backend>::depthwise_backward));                                 \
  m.impl("pointwise_forward", TORCH_BOX(&mx::Bindings<Backend>::pointwise_forward));                                   \
  m.impl("pointwise_backward", TORCH_BOX(&mx::Bindings<Backend>::pointwise_backward));                                 \
  m.impl("stem_forward", TORCH_BOX(&mx::Bindings<Backend>::stem_forward));                                             \
  m.impl("stem_backward", TORCH_BOX(&mx::Bindings<Backend>::stem_backward));                                           \
  m.impl("bn_relu_forward", TORCH_BOX(&mx::Bindings<Backend>::bn_relu_forward));                                       \
  m.impl("bn_relu_backward", TORCH_BOX(&mx::Bindings<Backend>::bn_relu_backward));                                     \
  m.impl("bn_relu_pool_forward", TORCH_BOX(&mx::Bindings<Backend>::bn_relu_pool_forward));                             \
  m.impl("bn_relu_pool_backward", TORCH_BOX(&mx::Bindings<Backend>::bn_relu_pool_backward));                           \
  m.impl("bn_from_running", TORCH_BOX(&mx::Bindings<Backend>::bn_from_running));                                       \
  m.impl("depthwise_inference", TORCH_BOX(&mx::Bindings<Backend>::depthwise_inference));                               \
  m.impl("pointwise_inference", TORCH_BOX(&mx::Bindings<Backend>::pointwise_inference));                               \
  m.impl("stem_inference", TORCH_BOX(&mx::Bindings<Backend>::stem_inference));                                         \
  m.impl("block_inference", TORCH_BOX(&mx::Bindings<Backend>::block_inference));
// clang-format on
