// Pointwise convolution, forward and inference: y[rows, N] = act(u[rows, K]) weight[N, K]^T on the tiled product.
#include "convolution_product.h"
#include "operands.h"

namespace mx::cuda {
namespace {

template <class S>
using Input = Activation<typename S::T, S::kAligned>;

template <class S, class T = typename S::T>
__global__ void __launch_bounds__(S::kThreads, 2)
    kernel(const Input<S> input, const T* weight, const OutputArguments<T> args) {
  if constexpr (S::kAvailable) convolve<S, S::kAligned>(input, weight, args);
}

struct Start {
  const ForwardArgs& args;
  const Launch& on;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    const int depth = int(args.g.c_in);
    const Input<S> input{static_cast<const T*>(args.u), static_cast<const float*>(args.input.bn), depth};
    return start_convolution<S, S::kAligned>(kernel<S>, input, depth, args, on);
  }
};

}  // namespace

cudaError_t pointwise_forward(const ForwardArgs& args, const Launch& on) {
  const void* const pointers[] = {args.u, args.input.bn, args.weight, args.y, args.output.bn};
  return choose_shape(args.dtype, args.g.n * args.g.h * args.g.w, args.g.c_in, args.g.c_out, pointers, on,
                      Start{args, on});
}

}  // namespace mx::cuda
