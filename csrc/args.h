// What the torch bindings (csrc/bindings.h) hand to the kernels of a backend: raw pointers and sizes, after all checks.
// Layouts and dtypes: csrc/ops.h. No torch header and no STL.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mx {

enum class Dtype { f32, f64, bf16, f16 };

// Images are NHWC and dense. Pointwise convolutions use stride 1, padding 0 and a kernel of one tap.
struct Geometry {
  int64_t n, h, w, c_in, c_out, out_h, out_w;
  int stride, padding;
};

// y = conv(a, weight), a = bn_u ? relu(normalise(u)) : u. Layouts and dtypes: csrc/ops.h.
struct ForwardArgs {
  Dtype dtype;
  Geometry g;
  const void* u;
  const void* bn_u;  // null: u is a plain input
  const void* weight;
  void* y;
  // Training: batch statistics of y as stored, and the normalisation made of them.
  void* bn_y;         // null: no statistics wanted
  const void* gamma;  // null: 1
  const void* beta;   // null: 0
  double eps;
  // Inference: y = relu?(normalise(conv)) with epilogue_bn, in the same pass.
  const void* epilogue_bn;  // null: none
  bool epilogue_relu;
  const void* packed;  // of a pointwise convolution: the weight, packed by the backend; null: not given
};

struct BackwardArgs {
  Dtype dtype;
  Geometry g;
  const void* h;
  const void* y;          // null: dy = P*h (or h)
  const void* grad_bn_y;  // null: dy = h
  const void* u;
  const void* bn_u;    // null: u is a plain input and h_u its gradient
  bool batch_stats_u;  // false: bn_u holds running statistics, so Q = O = 0
  const void* weight;
  void* h_u;          // null: not wanted
  void* grad_weight;  // null: not wanted
  void* grad_bn_u;    // null: not wanted
};

// out = relu?(normalise(y)), or its mean over each image when pooled.
struct NormaliseArgs {
  Dtype dtype;
  int64_t n, hw, c;
  const void* y;
  const void* bn_y;
  bool relu, pool, batch_stats;
  void* out;         // forward
  const void* grad;  // backward
  void* h;
  void* grad_bn_y;
};

// relu(pointwise_bn(pointwise(relu(depthwise_bn(depthwise(x)))))); the depthwise result is never stored.
struct BlockArgs {
  Dtype dtype;
  Geometry g;  // of the depthwise convolution, with c_out the block's output channels
  const void* x;
  const void* depthwise_bn;
  const void* depthwise_weight;
  const void* pointwise_bn;
  const void* pointwise_weight;
  const void* packed;  // what depends on the block alone, packed by the backend; null: not given
  void* y;
};

// A vector of C elements of any floating dtype (a model in half precision has half buffers).
struct VectorArg {
  const void* data;  // null: not given
  Dtype dtype;
};

// bn from running statistics; bn is float64 where running_mean is, else float32.
struct RunningArgs {
  int64_t c;
  VectorArg running_mean, running_var;
  VectorArg gamma;      // null: 1
  VectorArg beta;       // null: 0
  VectorArg conv_bias;  // null: 0
  double eps;
  void* bn;
};

}  // namespace mx
