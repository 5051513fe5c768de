// Pointwise convolution of a gated input, forward and inference: y[rows, N] = (act(norm(u))*gate)[rows, K] weight[N,
// K]^T on the tiled product.
#include "convolution_product.h"
#include "gate.h"

namespace mx::cuda {
namespace {

struct Start {
  const ForwardArgs& args;
  const Launch& on;

  template <class S>
  cudaError_t run() const {
    const auto input = gated_input_of<typename S::T, S::kAligned>(args);
    return start_convolution<S, S::kAligned>(input, input.ungated.channels, args, on);
  }
};

}  // namespace

cudaError_t gated_pointwise_forward(const ForwardArgs& args, const Launch& on) {
  if (!can_number(args.g)) return cudaErrorInvalidValue;
  const void* const pointers[] = {args.u,    args.input.bn, args.gate,      args.weight,
                                  args.bias, args.y,        args.output.bn, args.residual};
  return choose_shape(args.dtype, args.g.n * args.g.h * args.g.w, args.g.c_in, args.g.c_out, pointers, on,
                      Start{args, on});
}

}  // namespace mx::cuda
