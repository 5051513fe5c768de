// What the torch bindings of a backend written in C++ check before a kernel starts: that a wrong call neither reads nor
// writes outside a tensor. Messages for users, which name the arguments of the public functions, come from Python
// before a kernel op is called.
//
// Backend is what csrc/bindings.h says.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

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

// What a convolution is called with beside its tensors.
struct ConvSettings {
  int64_t kernel, stride;
  int64_t left, right, top, bottom;  // padding
};

inline ConvSettings check_settings(Conv conv, int64_t kernel, int64_t stride, const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(padding.size() == 4, "padding: expected 4 sides, got ", padding.size());
  const bool pointwise = conv == Conv::pointwise;
  STD_TORCH_CHECK(stride == 1 || (stride == 2 && !pointwise), "stride: expected 1", pointwise ? "" : " or 2", ", got ",
                  stride);
  for (const int64_t side : padding)
    STD_TORCH_CHECK(side >= 0 && side <= (pointwise ? 0 : 2), "padding: expected 0", pointwise ? "" : ", 1 or 2",
                    ", got ", side);
  return {kernel, stride, padding[0], padding[1], padding[2], padding[3]};
}

// The depthwise half of a block.
inline void check_block(int64_t kernel, const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(kernel == 3, "depthwise_weight: expected a kernel of 3x3 in a block, got ", kernel, "x", kernel);
  for (const int64_t side : padding) STD_TORCH_CHECK(side <= 1, "padding: expected 0 or 1 in a block, got ", side);
}

inline Act act_of(int64_t act, const char* name) {
  STD_TORCH_CHECK(act >= int(Act::linear) && act <= int(kLastAct), name, ": expected an Act of csrc/ops.h, got ", act);
  return Act(act);
}

inline Geometry conv_geometry(const ConvSettings& s, int64_t n, int64_t h, int64_t w, int64_t c_in, int64_t c_out) {
  const int64_t rows = h + s.top + s.bottom - s.kernel, columns = w + s.left + s.right - s.kernel;
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "input: the padded image is smaller than the kernel of ", s.kernel, "x",
                  s.kernel, "; shape ", shape_text(std::array{n, c_in, h, w}), ", padding ",
                  shape_text(std::array{s.left, s.right, s.top, s.bottom}));
  Geometry g{};
  g.n = n;
  g.h = h;
  g.w = w;
  g.c_in = c_in;
  g.c_out = c_out;
  g.out_h = rows / s.stride + 1;
  g.out_w = columns / s.stride + 1;
  g.kernel = int(s.kernel);
  g.stride = int(s.stride);
  g.pad_left = int(s.left);
  g.pad_top = int(s.top);
  return g;
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

  // A normalisation of c channels and the activation after it, for activations of this type.
  NormAct check_norm_act(const OptionalTensor& bn, const char* bn_name, int64_t act, const char* act_name, double slope,
                         ScalarType type, int64_t c) const {
    if (bn) check_dense(*bn, bn_name, acc_type(type), {BN_ROWS, c});
    return {data(bn), act_of(act, act_name), slope};
  }

  // What a convolution makes of its input on load: an activation there comes after a normalisation only.
  NormAct check_input(Conv conv, const OptionalTensor& bn_u, int64_t act_u, double slope, ScalarType type,
                      int64_t c) const {
    STD_TORCH_CHECK(!bn_u || conv != Conv::dense, "bn_u: expected none of a dense convolution, whose input is plain");
    const NormAct input = check_norm_act(bn_u, "bn_u", act_u, "act_u", slope, type, c);
    STD_TORCH_CHECK(bn_u || input.act == Act::linear, "act_u: expected linear without bn_u, got ", act_u);
    return input;
  }

  void check_packed(const Tensor& packed, Dtype dtype, int64_t c_in, int64_t c_out, bool block) const {
    check_dense(packed, "packed", ScalarType::Byte, {backend.packed_bytes(dtype, c_in, c_out, block)});
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const { return backend.empty(shape, type); }

  Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType type) const {
    return backend.empty_activation(n, c, h, w, type);
  }

  // Checks a weight for activations of c_in channels; returns the kernel's size.
  int64_t check_weight(Conv conv, const Tensor& weight, ScalarType type, int64_t c_in) const {
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions, got ", weight.dim());
    STD_TORCH_CHECK(weight.size(0) > 0, "weight: expected at least one output channel");
    if (conv == Conv::depthwise) {
      const int64_t kernel = weight.size(2) == 5 ? 5 : 3;
      check_dense(weight, "weight", type, {c_in, 1, kernel, kernel});
      return kernel;
    }
    const int64_t kernel = conv == Conv::pointwise ? 1 : 3;
    check_dense(weight, "weight", type, {weight.size(0), c_in, kernel, kernel});
    return kernel;
  }

  // Checks u and weight against each other.
  ConvShape check_conv(Conv conv, const Tensor& u, const Tensor& weight, int64_t stride,
                       const std::vector<int64_t>& padding) const {
    check_activation(u, "input");
    const int64_t kernel = check_weight(conv, weight, u.scalar_type(), u.size(1));
    const ConvSettings settings = check_settings(conv, kernel, stride, padding);
    const Geometry g = conv_geometry(settings, u.size(0), u.size(2), u.size(3), u.size(1), weight.size(0));
    return {g, dtype_of<Backend>(u, "input"), u.scalar_type()};
  }
};

}  // namespace mx
