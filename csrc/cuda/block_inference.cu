// A depthwise-separable block for inference in one kernel: y = act(norm(weight a)) + residual, with a =
// act(norm(depthwise 3x3(x))).
//
// The depthwise result is never stored: a thread computes it, a pack of channels of a pixel at a time, straight into
// shared memory as the left operand of the tiled product. Its nine inputs come from the L1 and L2, where the pixels
// beside and below find them again. Programs for other columns of the same pixels compute it again: blocks with many
// outputs run as two kernels, and so do those whose taps would take too much shared memory.
#include "convolution_product.h"

namespace mx::cuda {
namespace {

constexpr int kMaxChannels = 384;
constexpr int kTaps = 9;

template <class S>
struct Arguments {
  using T = typename S::T;
  const T* x;
  NormActParameters norm_act;  // of the depthwise convolution
  const T* depthwise_weight;
  const T* pointwise_weight;
  typename NormActOutput<S, S::kAligned>::Arguments output;  // tiling.rows: output pixels, fewer than 2^31
  int channels;
  int height, width, out_height, out_width, stride, pad_left, pad_top;
};

// A row of taps in shared memory: [kTaps][padded channels] as float32.
MX_HOST_DEVICE int padded_channels(int channels) { return (channels + 7) / 8 * 8; }

template <class S>
struct Depthwise {
  using T = typename S::T;
  struct Raw {
    int pixel;  // of the output; its inputs are loaded when they are needed, nine packs would take too many registers
    static __device__ __forceinline__ Raw zero() { return {-1}; }
  };
  struct Vectors {};
  const Arguments<S>& args;

  // Rows of inputs on their way at a time: wide blocks have a multiprocessor, and its registers, to themselves.
  static constexpr int kUnroll = S::kColumns > 64 ? 3 : 1;

  static __device__ __forceinline__ float* taps() { return shared_memory<float>() + S::kSharedBytes / 4; }

  // Ends with a barrier.
  __device__ __forceinline__ void load_taps() const {
    const int padded = padded_channels(args.channels);
    for (int i = int(threadIdx.x); i < padded * kTaps; i += S::kThreads) {
      const int channel = i / kTaps, tap = i % kTaps;
      const bool inside = channel < args.channels;
      taps()[tap * padded + channel] = inside ? to_float(args.depthwise_weight[i]) : 0.0f;
    }
    __syncthreads();
  }

  __device__ __forceinline__ Raw load(int64_t row, int) const { return {int(row)}; }
  __device__ __forceinline__ Vectors vectors(int) const { return {}; }

  __device__ __forceinline__ void convert(const Raw& raw, int k, const Vectors&, float (&a)[S::kWidth]) const {
    if (raw.pixel < 0) return;
    const unsigned pixel = unsigned(raw.pixel), line = pixel / unsigned(args.out_width);
    const int column = int(pixel - line * unsigned(args.out_width)) * args.stride - args.pad_left;
    const unsigned image = line / unsigned(args.out_height);
    const int row = int(line - image * unsigned(args.out_height)) * args.stride - args.pad_top;
    const int padded = padded_channels(args.channels);
    const T* const base = args.x + int64_t(image) * args.height * args.width * args.channels;
#pragma unroll kUnroll
    for (int i = 0; i < 3; ++i) {
      const bool inside = row + i >= 0 && row + i < args.height;
      const T* const line_of_x = base + (int64_t(inside ? row + i : 0) * args.width + column) * args.channels;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        auto x = Pack<T, S::kWidth>::zero();
        if (inside && column + j >= 0 && column + j < args.width) {
          x = load_channels<S::kAligned, S::kWidth>(line_of_x + j * args.channels, k, args.channels);
        }
#pragma unroll
        for (int c = 0; c < S::kWidth; c += 4) {
          const auto four = Pack<float, 4>::load(taps() + (3 * i + j) * padded + k + c);
#pragma unroll
          for (int q = 0; q < 4; ++q) a[c + q] = fmaf(to_float(x.v[c + q]), four.v[q], a[c + q]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::kWidth; i += 4) {
      const auto norm = ChannelNorm<4>::template load<S::kAligned>(args.norm_act.bn, k + i, args.channels);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i + j] = norm.z(a[i + j], j);
    }
    activate(a, args.norm_act.act);
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kColumns > 64 || !S::kAligned ? 1 : 2)
    kernel(const Arguments<S> args) {
  if constexpr (S::kAvailable) {
    const Depthwise<S> depthwise{args};
    depthwise.load_taps();
    NormActOutput<S, S::kAligned> output(args.output);
    product<S, false>(depthwise, args.pointwise_weight, args.output.tiling, output);
  } else {
    not_compiled();
  }
}

struct Start {
  const BlockArgs& args;
  const Launch& launch;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    const Geometry& g = args.g;
    const Arguments<S> arguments = {
        static_cast<const T*>(args.x),
        parameters_of(args.depthwise),
        static_cast<const T*>(args.depthwise_weight),
        static_cast<const T*>(args.pointwise_weight),
        {static_cast<T*>(args.y), nullptr, parameters_of(args.pointwise), static_cast<const T*>(args.residual),
         tiling_of<S>(g.n * g.out_h * g.out_w, g.c_in, g.c_out, launch)},
        int(g.c_in),
        int(g.h),
        int(g.w),
        int(g.out_h),
        int(g.out_w),
        g.stride,
        g.pad_left,
        g.pad_top,
    };
    const size_t taps = size_t(padded_channels(arguments.channels)) * kTaps * sizeof(float);
    return launch_product<S>(kernel<S>, arguments.output.tiling, int(S::kSharedBytes + taps), launch, arguments);
  }
};

cudaError_t two_kernels(const BlockArgs& args, const Launch& launch) {
  const Geometry& g = args.g;
  const int64_t rows = g.n * g.out_h * g.out_w;
  ForwardArgs first = {};
  first.dtype = args.dtype;
  first.g = g;
  first.g.c_out = g.c_in;
  first.u = args.x;
  first.weight = args.depthwise_weight;
  first.y = launch.temporary<char>(size_t(rows) * size_t(g.c_in) * (args.dtype == Dtype::f32 ? 4 : 2));
  first.output = args.depthwise;
  const cudaError_t error = depthwise_forward(first, launch);
  if (error != cudaSuccess) return error;
  ForwardArgs second = {};
  second.dtype = args.dtype;
  second.g = {g.n, g.out_h, g.out_w, g.c_in, g.c_out, g.out_h, g.out_w, 1, 1, 0, 0};
  second.u = first.y;
  second.weight = args.pointwise_weight;
  second.y = args.y;
  second.output = args.pointwise;
  second.residual = args.residual;
  return pointwise_forward(second, launch);
}

}  // namespace

cudaError_t block_inference(const BlockArgs& args, const Launch& launch) {
  const Geometry& g = args.g;
  if (args.dtype == Dtype::f64) return cudaErrorInvalidValue;
  const int64_t rows = g.n * g.out_h * g.out_w;
  if (rows == 0) return cudaSuccess;
  if (g.c_in > kMaxChannels || g.c_out > 256 || rows >= int64_t(1) << 31) return two_kernels(args, launch);
  const void* const pointers[] = {args.x, args.depthwise.bn, args.pointwise.bn, args.pointwise_weight,
                                  args.y, args.residual};
  return choose_shape(args.dtype, rows, g.c_in, g.c_out, pointers, launch, Start{args, launch});
}

}  // namespace mx::cuda
