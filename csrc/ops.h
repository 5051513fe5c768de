// The op set: every kernel op's schema, once, for all backends.
//
// `mobilenet_ext::<op>` is what the library calls; Python registers on it, per dispatch key, a kernel that hands the
// call to the current backend. A backend written in C++ implements the same schemas in a namespace of its own
// (`mobilenet_ext_cpu::<op>`). Kernel ops are functional and have no autograd; mobilenet_ext/ops.py explains each of
// them, mobilenet_ext/backends/reference.py is their specification.
//
// Conventions
//   activations   4-D, channels_last dense (NHWC in memory); dtype float32, bfloat16, float16 or float64
//   acc           the accumulation dtype: float64 for float64 activations, otherwise float32
//   weight        the activations' dtype; depthwise [C,1,3,3], pointwise [N,K,1,1], stem [N,K,3,3]; contiguous
//   gamma, beta   BatchNorm's weight and bias, [C], acc
//   bn            a normalisation, acc [5,C], contiguous: rows BnRow below. normalise(y) = (y - MEAN)*SCALE + SHIFT
//   grad_bn       what a BatchNorm's backward needs, acc [6,C], contiguous: rows GradBnRow below.
//                 dy = P*h + Q*(y - MEAN) + O
//   h             the gradient at a BatchNorm's output, already masked by the ReLU that follows it; activation dtype
//   grad_weight   acc, the weight's shape
//   packed        what the backend made of the weights beforehand, uint8; only the CPU backend makes any
#pragma once

namespace mx {

enum BnRow { BN_MEAN, BN_SCALE, BN_SHIFT, BN_RSTD, BN_VAR, BN_ROWS };
enum GradBnRow { GRAD_P, GRAD_Q, GRAD_MEAN, GRAD_O, GRAD_GAMMA, GRAD_BETA, GRAD_ROWS };

}  // namespace mx

// clang-format off
#define MX_KERNEL_OPS(X)                                                                                               \
  X("depthwise_forward(Tensor u, Tensor? bn_u, Tensor weight, int stride, int padding, Tensor? gamma, Tensor? beta, "  \
    "float eps, bool stats) -> (Tensor y, Tensor bn_y)")                                                               \
  X("depthwise_backward(Tensor h, Tensor? y, Tensor? grad_bn_y, Tensor u, Tensor? bn_u, bool batch_stats_u, "          \
    "Tensor weight, int stride, int padding, bool need_input, bool need_weight) "                                      \
    "-> (Tensor h_u, Tensor grad_weight, Tensor grad_bn_u)")                                                           \
  X("pointwise_forward(Tensor u, Tensor? bn_u, Tensor weight, Tensor? gamma, Tensor? beta, float eps, bool stats) "    \
    "-> (Tensor y, Tensor bn_y)")                                                                                      \
  X("pointwise_backward(Tensor h, Tensor? y, Tensor? grad_bn_y, Tensor u, Tensor? bn_u, bool batch_stats_u, "          \
    "Tensor weight, bool need_input, bool need_weight) -> (Tensor h_u, Tensor grad_weight, Tensor grad_bn_u)")         \
  X("stem_forward(Tensor x, Tensor weight, int stride, int padding, Tensor? gamma, Tensor? beta, float eps, "          \
    "bool stats) -> (Tensor y, Tensor bn_y)")                                                                          \
  X("stem_backward(Tensor h, Tensor? y, Tensor? grad_bn_y, Tensor x, Tensor weight, int stride, int padding, "         \
    "bool need_input, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)")                                       \
  X("bn_relu_forward(Tensor y, Tensor bn_y, bool relu) -> Tensor")                                                     \
  X("bn_relu_backward(Tensor grad, Tensor y, Tensor bn_y, bool batch_stats, bool relu) "                               \
    "-> (Tensor h, Tensor grad_bn_y)")                                                                                 \
  X("bn_relu_pool_forward(Tensor y, Tensor bn_y) -> Tensor")                                                           \
  X("bn_relu_pool_backward(Tensor grad, Tensor y, Tensor bn_y, bool batch_stats) -> (Tensor h, Tensor grad_bn_y)")     \
  X("bn_from_running(Tensor running_mean, Tensor running_var, Tensor? gamma, Tensor? beta, Tensor? conv_bias, "        \
    "float eps) -> Tensor")                                                                                            \
  X("depthwise_inference(Tensor x, Tensor? bn_y, Tensor weight, int stride, int padding, bool relu) -> Tensor")        \
  X("pointwise_inference(Tensor x, Tensor? bn_y, Tensor weight, bool relu, Tensor? packed=None) -> Tensor")            \
  X("stem_inference(Tensor x, Tensor? bn_y, Tensor weight, int stride, int padding, bool relu) -> Tensor")             \
  X("block_inference(Tensor x, Tensor depthwise_bn, Tensor depthwise_weight, int stride, Tensor pointwise_bn, "        \
    "Tensor pointwise_weight, Tensor? packed=None) -> Tensor")

// Ops that are written once, in Python, over the kernel ops (mobilenet_ext/layers.py): the differentiable layers, whose
// autograd edges all carry the true derivative, and the one op that mutates.
#define MX_LAYER_OPS(X)                                                                                                \
  X("depthwise(Tensor u, Tensor? mean, Tensor? scale, Tensor? shift, Tensor weight, int stride, int padding) "         \
    "-> (Tensor y, Tensor mean_y, Tensor var_y)")                                                                      \
  X("pointwise(Tensor u, Tensor? mean, Tensor? scale, Tensor? shift, Tensor weight) "                                  \
    "-> (Tensor y, Tensor mean_y, Tensor var_y)")                                                                      \
  X("bn_relu(Tensor y, Tensor mean, Tensor scale, Tensor shift, bool relu) -> Tensor")                                 \
  X("depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor")                  \
  X("pointwise_conv2d(Tensor input, Tensor weight, Tensor? bias) -> Tensor")                                           \
  X("update_running_stats_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] mean, Tensor[] var, "         \
    "Tensor?[] conv_bias, SymInt[] count, float[] momentum) -> ()")
// clang-format on
