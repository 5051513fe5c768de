// The stem, backward: the weight's gradient is the product dy^T [N, output pixels] patches [output pixels, 9*C] (the
// patches gathered as in forward). The input's, which training on images never asks for, is a plain kernel.
#include "operands.h"
#include "weight_product.h"

namespace mx::cuda {
namespace {

template <class S, bool kWide, class T = typename S::T>
__global__ void __launch_bounds__(S::kThreads, 2)
    weight_kernel(const Gradient<T, kWide> dy, const Patches<T> patches, const WeightTiling tiling, float* partial) {
  if constexpr (S::kAvailable) weight_product<S>(dy, patches, tiling, partial);
}

template <class S, bool kWide>
cudaError_t start_weight(const BackwardArgs& b, WeightPartial& partial, const Launch& on) {
  using T = typename S::T;
  const Gradient<T, kWide> dy{static_cast<const T*>(b.h), static_cast<const T*>(b.y),
                              static_cast<const float*>(b.grad_bn_y), int(b.g.c_out)};
  return start_weight_product<S>(weight_kernel<S, kWide>, dy, patches_of<T>(b.u, b.g), b.g.n * b.g.out_h * b.g.out_w,
                                 dy.channels, int(9 * b.g.c_in), partial, on);
}

struct InputProblem {
  Geometry g;
  const void *h, *y, *weight;
  const float* grad_bn;
  void* grad_x;
};

constexpr int kInputThreads = 128;

// A thread makes the gradient of one element of x, of all outputs whose filters see it.
template <class T>
__global__ void __launch_bounds__(kInputThreads, 4) input_kernel(const InputProblem p) {
  const Geometry& g = p.g;
  const Gradient<T, false> dy{static_cast<const T*>(p.h), static_cast<const T*>(p.y), p.grad_bn, int(g.c_out)};
  const T* const weight = static_cast<const T*>(p.weight);
  const int64_t elements = g.n * g.h * g.w * g.c_in;
  for (int64_t e = int64_t(blockIdx.x) * kInputThreads + threadIdx.x; e < elements;
       e += int64_t(gridDim.x) * kInputThreads) {
    const int64_t pixel = e / g.c_in, line = pixel / g.w, image = line / g.h;
    const int64_t c = e - pixel * g.c_in;
    const int column = int(pixel - line * g.w) + g.padding, row = int(line - image * g.h) + g.padding;
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
          dy.finish(dy.load(out_pixel, n), n, dy.vectors(n), v);
#pragma unroll
          for (int k = 0; k < kPack<T>; ++k)
            if (n + k < g.c_out) sum += v[k] * to_float(weight[((n + k) * g.c_in + c) * 9 + 3 * i + j]);
        }
      }
    }
    static_cast<T*>(p.grad_x)[e] = rounded<T>(sum);
  }
}

template <class T>
cudaError_t start_input(const BackwardArgs& b, const Launch& on) {
  const int64_t elements = b.g.n * b.g.h * b.g.w * b.g.c_in;
  if (elements == 0) return cudaSuccess;
  const InputProblem p{b.g, b.h, b.y, b.weight, static_cast<const float*>(b.grad_bn_y), b.h_u};
  const int64_t blocks = (elements + kInputThreads - 1) / kInputThreads;
  const int64_t most = 64 * on.multiprocessors;
  return launch(input_kernel<T>, dim3(unsigned(blocks < most ? blocks : most)), dim3(kInputThreads), 0, on.stream, p);
}

}  // namespace

cudaError_t dense_backward(const BackwardArgs& b, const Launch& on) {
  if (b.h_u != nullptr) {
    const cudaError_t error = with_dtype(b.dtype, [&](auto zero) { return start_input<decltype(zero)>(b, on); });
    if (error != cudaSuccess) return error;
  }
  if (b.grad_weight == nullptr) return cudaSuccess;
  WeightPartial weight;
  const cudaError_t error = with_kind(b.dtype, on, [&](auto kind) {
    using T = typename decltype(kind)::T;
    using S = WeightShape<T, typename decltype(kind)::Math, 64>;
    const bool wide = b.g.c_out % kPack<T> == 0 && aligned(b.h) && aligned(b.y) && aligned(b.grad_bn_y);
    return wide ? start_weight<S, true>(b, weight, on) : start_weight<S, false>(b, weight, on);
  });
  if (error != cudaSuccess) return error;
  return finish_gradients(nullptr, 0, 0, nullptr, false, 0, nullptr, weight.data, weight.programs,
                          9 * b.g.c_in * b.g.c_out, b.grad_weight, on);
}

}  // namespace mx::cuda
