// A depthwise-separable block for inference in one kernel: y = relu(bn(weight a)), a = relu(bn(depthwise 3x3(x))).
//
// The depthwise result is never stored: a thread computes it, a pack of channels of a pixel at a time, straight into
// shared memory as the left operand of the tiled product. Its nine inputs come from the L1 and L2, where the pixels
// beside and below find them again. Programs for other columns of the same pixels compute it anew: blocks with many
// outputs run as two kernels, and so do those whose taps would take too much shared memory.
#include "kernels.h"
#include "product.h"

namespace mx::cuda {
namespace {

constexpr int kMaxChannels = 384;
constexpr int kTaps = 9;

template <class T>
struct Arguments {
  const T* x;
  const float* depthwise_bn;
  const T* depthwise_weight;
  const float* pointwise_bn;
  const T* pointwise_weight;
  T* y;
  Tiling tiling;  // rows: output pixels, fewer than 2^31
  int channels;
  int height, width, out_height, out_width, stride;
};

// A row of taps in shared memory: [kTaps][padded channels] as float32.
MX_HOST_DEVICE int padded_channels(int channels) { return (channels + 7) / 8 * 8; }

template <class S>
struct Depthwise {
  using T = typename S::T;
  struct Raw {
    int pixel;  // of the output; its inputs are loaded when they are needed, nine packs are too many to wait with
    static __device__ __forceinline__ Raw zero() { return {-1}; }
  };
  struct Vectors {};
  const Arguments<T>& args;

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

  __device__ __forceinline__ void finish(const Raw& raw, int k, const Vectors&, float (&a)[S::kWidth]) const {
    if (raw.pixel < 0) return;
    const unsigned pixel = unsigned(raw.pixel), line = pixel / unsigned(args.out_width);
    const int column = int(pixel - line * unsigned(args.out_width)) * args.stride - 1;
    const unsigned image = line / unsigned(args.out_height);
    const int row = int(line - image * unsigned(args.out_height)) * args.stride - 1;
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
      float mean[4], scale[4], shift[4];
      load_vector<S::kAligned>(args.depthwise.bn + int64_t(BN_MEAN) * args.channels, k + i, args.channels, mean);
      load_vector<S::kAligned>(args.depthwise.bn + int64_t(BN_SCALE) * args.channels, k + i, args.channels, scale);
      load_vector<S::kAligned>(args.depthwise.bn + int64_t(BN_SHIFT) * args.channels, k + i, args.channels, shift);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i + j] = relu(normalise(a[i + j], mean[j], scale[j], shift[j]));
    }
  }
};

template <class S>
struct Output {
  using T = typename S::T;
  struct Extra {};
  const Arguments<T>& args;
  int column;
  float mean[S::kWidth], scale[S::kWidth], shift[S::kWidth];

  explicit __device__ __forceinline__ Output(const Arguments<T>& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {}

  // Loaded for each tile: the product needs the registers.
  __device__ __forceinline__ void begin_tile() {
    if (column >= args.tiling.columns) return;
    load_vector<S::kAligned>(args.pointwise.bn + int64_t(BN_MEAN) * args.tiling.columns, column, args.tiling.columns,
                             mean);
    load_vector<S::kAligned>(args.pointwise.bn + int64_t(BN_SCALE) * args.tiling.columns, column, args.tiling.columns,
                             scale);
    load_vector<S::kAligned>(args.pointwise.bn + int64_t(BN_SHIFT) * args.tiling.columns, column, args.tiling.columns,
                             shift);
  }
  __device__ __forceinline__ void end_tile() {}
  __device__ __forceinline__ Extra load(int64_t, bool) { return {}; }

  __device__ __forceinline__ void store(int, int64_t row, bool inside, float (&d)[S::kWidth], const Extra&) {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) d[i] = relu(normalise(d[i], mean[i], scale[i], shift[i]));
    store_channels<S::kAligned>(args.y + row * args.tiling.columns, column, args.tiling.columns, round_pack<T>(d));
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kColumns > 64 || !S::kAligned ? 1 : 2)
    kernel(const Arguments<typename S::T> args) {
  if constexpr (S::kAvailable) {
    const Depthwise<S> depthwise{args};
    depthwise.load_taps();
    Output<S> output(args);
    product<S, false>(depthwise, args.pointwise_weight, args.tiling, output);
  }
}

struct Start {
  const BlockArgs& args;
  const Launch& launch;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    const Geometry& g = args.g;
    const Arguments<T> arguments = {static_cast<const T*>(args.x),
                                    static_cast<const float*>(args.depthwise.bn),
                                    static_cast<const T*>(args.depthwise_weight),
                                    static_cast<const float*>(args.pointwise.bn),
                                    static_cast<const T*>(args.pointwise_weight),
                                    static_cast<T*>(args.y),
                                    tiling_of<S>(g.n * g.out_h * g.out_w, g.c_in, g.c_out, launch),
                                    int(g.c_in),
                                    int(g.h),
                                    int(g.w),
                                    int(g.out_h),
                                    int(g.out_w),
                                    g.stride};
    const size_t taps = size_t(padded_channels(arguments.channels)) * kTaps * sizeof(float);
    return launch_product<S>(kernel<S>, arguments.tiling, int(S::kSharedBytes + taps), launch, arguments);
  }
};

cudaError_t two_kernels(const BlockArgs& args, const Launch& launch) {
  const Geometry& g = args.g;
  const int64_t rows = g.n * g.out_h * g.out_w;
  ForwardArgs first = {};
  first.dtype = args.dtype;
  first.g = {g.n, g.h, g.w, g.c_in, g.c_in, g.out_h, g.out_w, g.stride, g.padding};
  first.u = args.x;
  first.weight = args.depthwise_weight;
  first.y = launch.temporary<char>(size_t(rows) * size_t(g.c_in) * (args.dtype == Dtype::f32 ? 4 : 2));
  first.epilogue_bn = args.depthwise.bn;
  first.epilogue_relu = true;
  const cudaError_t error = depthwise_forward(first, launch);
  if (error != cudaSuccess) return error;
  ForwardArgs second = {};
  second.dtype = args.dtype;
  second.g = {g.n, g.out_h, g.out_w, g.c_in, g.c_out, g.out_h, g.out_w, 1, 0};
  second.u = first.y;
  second.weight = args.pointwise_weight;
  second.y = args.y;
  second.epilogue_bn = args.pointwise.bn;
  second.epilogue_relu = true;
  return pointwise_forward(second, launch);
}

}  // namespace

cudaError_t block_inference(const BlockArgs& args, const Launch& launch) {
  const Geometry& g = args.g;
  if (args.dtype == Dtype::f64) return cudaErrorInvalidValue;
  const int64_t rows = g.n * g.out_h * g.out_w;
  if (rows == 0) return cudaSuccess;
  if (g.c_in > kMaxChannels || g.c_out > 256 || rows >= int64_t(1) << 31) return two_kernels(args, launch);
  const void* const pointers[] = {args.x, args.depthwise.bn, args.pointwise.bn, args.pointwise_weight, args.y};
  return choose_shape(args.dtype, rows, g.c_in, g.c_out, pointers, launch, Start{args, launch});
}

}  // namespace mx::cuda
