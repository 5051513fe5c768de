// The op set: every kernel op's schema, once, for all backends.
//
// `mobilenet_ext::<op>` is what the library calls; Python registers on it, per dispatch key, a kernel that hands the
// call to the current backend. A backend written in C++ implements the same schemas in a namespace of its own
// (`mobilenet_ext_cpu::<op>`). Kernel ops are functional and have no autograd. What each op computes is written, and
// can be run, in mobilenet_ext/backends/reference.py.
//
// One alphabet, for a convolution after another one:
//
//     x | y_prev --norm--> z_prev --act--> a --conv--> y --norm--> z --act--> ...
//
//   u             what a convolution reads: the y of the convolution before, or x
//   y             its raw output with its bias, stored once, before the normalisation
//   z             (y - MEAN)*SCALE + SHIFT, never stored
//   a             act(z), never stored between convolutions; 0 outside the image, after the activation
//   dz            the gradient at z, already multiplied by the activation's derivative
//   dy            the gradient at y: DZ_COEFFICIENT*dz + Y_COEFFICIENT*(y - MEAN) + CONSTANT
//   dz_u          the gradient at the z that the convolution made of u; with a plain input (no bn_u) that at u
//
// Conventions
//   activations   4-D, channels_last dense (NHWC in memory); dtype float32, bfloat16, float16 or float64
//   acc           the accumulation dtype: float64 for float64 activations, otherwise float32
//   weight        the activations' dtype; depthwise [C,1,3,3] or [C,1,5,5], pointwise [N,K,1,1], dense [N,K,3,3];
//                 contiguous
//   stride        1 or 2; of a pointwise convolution 1
//   padding       zeros on the left, right, top and bottom (the order of torch.nn.functional.pad), 0 to 2 each; of a
//                 pointwise convolution 0; a block has a kernel of 3x3 and 0 or 1 on each side
//   bias          the convolution's, [C], acc; added before y is rounded and stored: it may cancel the mean of the rest
//   gamma, beta   BatchNorm's weight and bias, [C], acc
//   bn            a normalisation, acc [5,C], contiguous: rows BnRow below
//   act           an Act below; of an input without bn_u: linear
//   slope         of a leaky_relu: what it multiplies a z below 0 with; not used by the others
//   residual      added to an output after its activation; dtype and shape of the output
//   gate          a factor of a for each image and channel (squeeze-excite), [N,C,1,1], the activations' dtype
//   grad_bn       what a BatchNorm's backward needs, acc [6,C], contiguous: rows GradBnRow below
//   grad_weight   acc, the weight's shape
//   packed        what the backend made of the weights beforehand, uint8; only the CPU backend makes any
//
// mobilenet_ext/contract.py says the same to Python.
#pragma once

namespace mx {

enum BnRow { BN_MEAN, BN_SCALE, BN_SHIFT, BN_RSTD, BN_VAR, BN_ROWS };
enum GradBnRow { GRAD_DZ_COEFFICIENT, GRAD_Y_COEFFICIENT, GRAD_MEAN, GRAD_CONSTANT, GRAD_GAMMA, GRAD_BETA, GRAD_ROWS };
enum class Act : int { linear, relu, relu6, hardswish, silu, leaky_relu };
constexpr Act kLastAct = Act::leaky_relu;

}  // namespace mx

// clang-format off
// The three convolutions have the same signatures.
#define MX_CONV_OPS(X, conv)                                                                                           \
  X(conv##_forward, #conv "_forward(Tensor u, Tensor? bn_u, int act_u, Tensor weight, int stride, "                    \
    "int[4] padding, Tensor? gamma, Tensor? beta, float eps, bool stats, Tensor? bias=None, float slope_u=0.0) "       \
    "-> (Tensor y, Tensor bn_y)")                                                                                      \
  X(conv##_backward, #conv "_backward(Tensor dz, Tensor? y, Tensor? grad_bn_y, Tensor u, Tensor? bn_u, int act_u, "    \
    "bool batch_stats_u, Tensor weight, int stride, int[4] padding, bool need_input, bool need_weight, "               \
    "float slope_u=0.0) -> (Tensor dz_u, Tensor grad_weight, Tensor grad_bn_u)")                                       \
  X(conv##_inference, #conv "_inference(Tensor x, Tensor? bn_y, int act_y, Tensor weight, int stride, "                \
    "int[4] padding, Tensor? packed=None, Tensor? residual=None, float slope_y=0.0) -> Tensor")

#define MX_KERNEL_OPS(X)                                                                                               \
  MX_CONV_OPS(X, depthwise)                                                                                            \
  MX_CONV_OPS(X, pointwise)                                                                                            \
  MX_CONV_OPS(X, dense)                                                                                                \
  X(gated_pointwise_forward, "gated_pointwise_forward(Tensor u, Tensor? bn_u, int act_u, Tensor gate, Tensor weight, " \
    "Tensor? gamma, Tensor? beta, float eps, bool stats, Tensor? bias=None, float slope_u=0.0) "                       \
    "-> (Tensor y, Tensor bn_y)")                                                                                      \
  X(gated_pointwise_backward, "gated_pointwise_backward(Tensor dz, Tensor? y, Tensor? grad_bn_y, Tensor u, "           \
    "Tensor? bn_u, int act_u, Tensor gate, Tensor weight, bool need_input, bool need_weight, float slope_u=0.0) "      \
    "-> (Tensor da, Tensor grad_weight, Tensor grad_gate)")                                                            \
  X(gated_pointwise_inference, "gated_pointwise_inference(Tensor x, Tensor gate, Tensor? bn_y, int act_y, "            \
    "Tensor weight, Tensor? packed=None, Tensor? residual=None, float slope_y=0.0) -> Tensor")                         \
  X(norm_act_forward, "norm_act_forward(Tensor y, Tensor bn_y, int act, bool pool, Tensor? residual=None, "            \
    "float slope=0.0) -> Tensor")                                                                                      \
  X(norm_act_backward, "norm_act_backward(Tensor grad, Tensor y, Tensor bn_y, int act, bool batch_stats, bool pool, "  \
    "Tensor? grad_pooled=None, bool need_dz=True, float slope=0.0) -> (Tensor dz, Tensor grad_bn_y)")                  \
  X(bn_from_running, "bn_from_running(Tensor running_mean, Tensor running_var, Tensor? gamma, Tensor? beta, "          \
    "Tensor? conv_bias, float eps) -> Tensor")                                                                         \
  X(block_inference, "block_inference(Tensor x, Tensor depthwise_bn, int depthwise_act, Tensor depthwise_weight, "     \
    "int stride, int[4] padding, Tensor pointwise_bn, int pointwise_act, Tensor pointwise_weight, "                    \
    "Tensor? packed=None, Tensor? residual=None, float depthwise_slope=0.0, float pointwise_slope=0.0) -> Tensor")

// Ops that are written once, in Python: the differentiable layers over the kernel ops (mobilenet_ext/layers.py), whose
// autograd edges all carry the true derivative, and the one op that mutates (mobilenet_ext/running_stats.py).
#define MX_LAYER_OPS(X)                                                                                                \
  X("depthwise(Tensor u, Tensor? mean, Tensor? scale, Tensor? shift, Tensor weight, int stride, int[4] padding) "      \
    "-> (Tensor y, Tensor mean_y, Tensor var_y)")                                                                      \
  X("pointwise(Tensor u, Tensor? mean, Tensor? scale, Tensor? shift, Tensor weight) "                                  \
    "-> (Tensor y, Tensor mean_y, Tensor var_y)")                                                                      \
  X("norm_act(Tensor y, Tensor mean, Tensor scale, Tensor shift, int act, float slope=0.0) -> Tensor")                 \
  X("depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, int stride, int[4] padding) -> Tensor")               \
  X("pointwise_conv2d(Tensor input, Tensor weight, Tensor? bias) -> Tensor")                                           \
  X("update_running_stats_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] mean, Tensor[] var, "         \
    "SymInt[] count, float[] momentum) -> ()")
// clang-format on
