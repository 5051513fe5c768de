// Dense 3x3 convolution, forward and inference: the tiled product of the patches that its filters see
// [output pixels, 9*C], gathered from the image (in the L1: neighbours share most of theirs), with the weight [N, 9*C].
#include "convolution_product.h"
#include "operands.h"

namespace mx::cuda {
namespace {

// kWide is about y: a patch is never wide, and so neither is the weight.
template <class S, bool kWide>
cudaError_t start(const ForwardArgs& args, const Launch& on) {
  const auto patches = patches_of<typename S::T>(args.u, args.g);
  return start_convolution<S, kWide>(patches, 9 * patches.channels, args, on);
}

}  // namespace

cudaError_t dense_forward(const ForwardArgs& args, const Launch& on) {
  if (!is_identity(args.input)) return cudaErrorInvalidValue;  // patches are of a plain input
  return with_kind(args.dtype, on, [&](auto kind) {
    using T = typename decltype(kind)::T;
    using S = Shape<T, typename decltype(kind)::Math, false, 64>;
    const bool wide = args.g.c_out % kPack<T> == 0 && aligned(args.y) && aligned(args.bias) &&
                      aligned(args.output.bn) && aligned(args.residual);
    return wide ? start<S, true>(args, on) : start<S, false>(args, on);
  });
}

}  // namespace mx::cuda
