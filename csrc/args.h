// What the torch bindings (csrc/bindings.h) hand to the kernels of a backend: raw pointers and sizes, after all checks.
// Layouts and dtypes: csrc/ops.h. No torch header and no STL.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "ops.h"

namespace mx {

enum class Dtype { f32, f64, bf16, f16 };

enum class Conv { depthwise, pointwise, dense };
constexpr int kConvs = 3;

// Images are NHWC and dense. Pointwise convolutions use stride 1, padding 0 and a kernel of one tap. The padding on the
// right and at the bottom is in out_w and out_h.
struct Geometry {
  int64_t n, h, w, c_in, c_out, out_h, out_w;
  int kernel, stride, pad_left, pad_top;
};

// z = (y - MEAN)*SCALE + SHIFT, then act(z): of an input on load, of an output on store.
struct NormAct {
  const void* bn;  // null: z = y
  Act act;
  double slope;  // of leaky_relu
};

// The batch statistics of an output as stored, and the normalisation made of them.
struct Statistics {
  void* bn;           // null: not wanted
  const void* gamma;  // null: 1
  const void* beta;   // null: 0
  double eps;

  bool wanted() const { return bn != nullptr; }
};

// y = conv(a*gate, weight) + bias, with a = act(norm(u)). In training the statistics of y may be wanted, in inference
// what is stored is act(norm(y)) + residual.
struct ForwardArgs {
  Dtype dtype;
  Geometry g;
  const void* u;
  NormAct input;
  const void* gate;  // [n][c_in]; null: 1; with a pointwise convolution only
  const void* weight;
  const void* packed;  // the weight, packed by the backend; null: not given
  const void* bias;    // null: 0
  void* y;
  Statistics statistics;  // of y, with an output that is linear and not normalised
  NormAct output;
  const void* residual;  // like y; null: 0
};

struct BackwardArgs {
  Dtype dtype;
  Geometry g;
  const void* dz;
  const void* y;          // null: dy = DZ_COEFFICIENT*dz, or dz
  const void* grad_bn_y;  // null: dy = dz
  const void* u;
  NormAct input;       // without a bn, u is a plain input and dz_u its gradient
  bool batch_stats_u;  // false: input.bn holds running statistics, so Y_COEFFICIENT = CONSTANT = 0
  const void* gate;    // [n][c_in]; null: 1; with a pointwise convolution only
  const void* weight;
  void* dz_u;         // null: not wanted. With a gate: da, the gradient at a
  void* grad_weight;  // null: not wanted
  void* grad_bn_u;    // null: not wanted
  void* grad_gate;    // [n][c_in], of the accumulation type; where there are a gate and a dz_u
};

// out = act(norm(y)) + residual, or the mean of act(norm(y)) over each image when pooled. Backward: da = grad and the
// gradient of each image's mean, spread over its pixels; when pooled, grad is the latter.
struct NormActArgs {
  Dtype dtype;
  int64_t n, hw, c;
  const void* y;
  NormAct norm_act;  // with a bn
  bool pool, batch_stats;
  const void* residual;  // forward; null: 0, also when pooled
  void* out;
  const void* grad;         // backward
  const void* grad_pooled;  // [n][c]; null: 0, also when pooled
  void* dz;                 // null: not wanted
  void* grad_bn_y;
};

// act(norm(pointwise(act(norm(depthwise(x)))))) + residual; the depthwise result is never stored.
struct BlockArgs {
  Dtype dtype;
  Geometry g;  // of the depthwise convolution, with c_out the block's output channels
  const void* x;
  NormAct depthwise, pointwise;  // each with a bn
  const void* depthwise_weight;
  const void* pointwise_weight;
  const void* packed;    // what depends on the block alone, packed by the backend; null: not given
  const void* residual;  // like y; null: 0
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
