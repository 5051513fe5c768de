// Dense 3x3 convolution, backward: the weight's gradient is the product dy^T [N, output pixels] patches [output pixels,
// 9*C] (the patches gathered as in forward). The input's, which training on images never asks for, is a plain kernel.
#include "operands.h"
#include "weight_product.h"

namespace mx::cuda {
namespace {

template <class S, bool kWide>
cudaError_t start_weight(const BackwardArgs& args, Partial& partial, const Launch& on) {
  using T = typename S::T;
  const Geometry& g = args.g;
  return start_weight_product<S>(output_gradient_of<T, kWide>(args), patches_of<T>(args.u, g), g.n * g.out_h * g.out_w,
                                 int(g.c_out), int(9 * g.c_in), partial, on);
}

constexpr int kInputThreads = 128;

// A thread makes the gradient of one element of x, of all outputs whose filters see it.
template <class T>
__global__ void __launch_bounds__(kInputThreads, 4)
    input_kernel(const Geometry g, const OutputGradient<T, false> dy, const T* weight, T* grad_x) {
  const int64_t elements = g.n * g.h * g.w * g.c_in;
  for (int64_t e = int64_t(blockIdx.x) * kInputThreads + threadIdx.x; e < elements;
       e += int64_t(gridDim.x) * kInputThreads) {
    const int64_t pixel = e / g.c_in, line = pixel / g.w, image = line / g.h;
    const int64_t c = e - pixel * g.c_in;
    const int column = int(pixel - line * g.w) + g.pad_left, row = int(line - image * g.h) + g.pad_top;
    float sum = 0.0f;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        // Of the output whose filter has its tap i, j here.
        const int out_row = (row - i) / g.stride, out_column = (column - j) / g.stride;
        if (row < i || out_row * g.stride != row - i || out_row >= g.out_h) continue;
        if (column < j || out_column * g.stride != column - j || out_column >= g.out_w) continue;
        const int64_t out_pixel = (image * g.out_h + out_row) * g.out_w + out_column;
        for (int n = 0; n < int(g.c_out); n += kPack<T>) {
          float v[kPack<T>] = {};
          dy.convert(dy.load(out_pixel, n), n, dy.vectors(n), v);
#pragma unroll
          for (int k = 0; k < kPack<T>; ++k)
            if (n + k < g.c_out) sum += v[k] * to_float(weight[((n + k) * g.c_in + c) * 9 + 3 * i + j]);
        }
      }
    }
    grad_x[e] = rounded<T>(sum);
  }
}

template <class T>
cudaError_t start_input(const BackwardArgs& args, const Launch& on) {
  const int64_t elements = args.g.n * args.g.h * args.g.w * args.g.c_in;
  if (elements == 0) return cudaSuccess;
  const int64_t blocks = (elements + kInputThreads - 1) / kInputThreads, most = 64 * on.gpu.multiprocessors;
  return launch(input_kernel<T>, dim3(unsigned(blocks < most ? blocks : most)), dim3(kInputThreads), 0, on.stream,
                args.g, output_gradient_of<T, false>(args), static_cast<const T*>(args.weight),
                static_cast<T*>(args.dz_u));
}

}  // namespace

cudaError_t dense_backward(const BackwardArgs& args, const Launch& on) {
  if (!is_identity(args.input)) return cudaErrorInvalidValue;  // patches are of a plain input
  if (args.dz_u != nullptr) {
    const cudaError_t error = with_dtype(args.dtype, [&](auto zero) { return start_input<decltype(zero)>(args, on); });
    if (error != cudaSuccess) return error;
  }
  if (args.grad_weight == nullptr) return cudaSuccess;
  WeightToMerge weight{{}, 9 * args.g.c_in * args.g.c_out, args.grad_weight};
  const cudaError_t error = with_kind(args.dtype, on, [&](auto kind) {
    using T = typename decltype(kind)::T;
    using S = WeightShape<T, typename decltype(kind)::Math, 64>;
    const bool wide = args.g.c_out % kPack<T> == 0 && aligned(args.dz) && aligned(args.y) && aligned(args.grad_bn_y);
    return wide ? start_weight<S, true>(args, weight.sums, on) : start_weight<S, false>(args, weight.sums, on);
  });
  if (error != cudaSuccess) return error;
  return merge_gradients({}, weight, on);
}

}  // namespace mx::cuda
