// Pointwise convolution of a gated input, backward; dy[rows, N] is rebuilt on load from dz and y, a[rows, K] from u:
//
//   d = dy weight[N, K], da = d gate, grad_gate = the sums of d a over each image    tiled product
//   dW = dy^T (a gate)                                                              tiled product of weights
#include "gate.h"
#include "merge.h"
#include "weight_product.h"

namespace mx::cuda {
namespace {

// Stores da, and leaves partial sums of the gate's gradient: of the rows of a warp's part of a tile, those of each of
// their images. Both the parts and the images count up with the rows, and so does their sum, by which the partial sums
// are kept.
template <class S>
struct GatedInputGradient {
  using T = typename S::T;
  struct Arguments {
    const T* u;
    NormActParameters norm_act;  // of u; without a bn, u is a plain input
    Gate<T> gate;
    T* da;
    float* partial;  // [parts + images][columns]
    Tiling tiling;
  };
  struct Extra {
    PackedWords<T> u, gate;
  };
  static constexpr int kSharedBytes = S::kSharedBytes;
  static constexpr int kBlocks = S::kColumns > 64 ? 1 : 2;
  const Arguments& args;
  int column;
  // Of the image that the rows have come to: the thread's sums, where they go, and the first row of the next.
  float sum[S::kWidth] = {};
  float* to = nullptr;
  int64_t next = 0;

  __device__ __forceinline__ explicit GatedInputGradient(const Arguments& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {}

  __device__ __forceinline__ void begin_tile() {}
  __device__ __forceinline__ void begin_part(int64_t row) {
    const int64_t image = args.gate.images.of(row);
    to = args.partial + (row / S::kWarpRows + image) * args.tiling.columns;
    next = (image + 1) * int64_t(args.gate.images.pixels);
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) sum[i] = 0.0f;
  }

  __device__ __forceinline__ Extra load(int64_t row, bool inside) {
    if (!inside) return {PackedWords<T>::zero(), PackedWords<T>::zero()};
    const int columns = args.tiling.columns;
    const T* const gate = args.gate.of_image(args.gate.images.of(row));
    return {PackedWords<T>::of(load_channels<S::kAligned, S::kWidth>(args.u + row * columns, column, columns)),
            PackedWords<T>::of(load_channels<S::kAligned, S::kWidth>(gate, column, columns))};
  }

  __device__ __forceinline__ void store(int index, int64_t row, bool inside, float (&d)[S::kWidth],
                                        const Extra& extra) {
    const int columns = args.tiling.columns;
    const int64_t first = row - int(threadIdx.x) % 32 / S::kLanes;  // of the warp's
    if (index == 0) begin_part(first);
    float term[S::kWidth] = {};
    if (inside) {
      to_floats(extra.u.pack(), term);
      if (args.norm_act.bn != nullptr) {
        const auto norm = ChannelNorm<S::kWidth>::template load<S::kAligned>(args.norm_act.bn, column, columns);
#pragma unroll
        for (int i = 0; i < S::kWidth; ++i) term[i] = norm.z(term[i], i);
        activate(term, args.norm_act.act);
      }
      const auto gate = extra.gate.pack();
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) {
        term[i] *= d[i];
        d[i] *= to_float(gate.v[i]);
      }
      store_channels<S::kAligned>(args.da + row * columns, column, columns, round_pack<T>(d));
    }
    // All lanes go round together.
    while (first + 32 / S::kLanes > next && next <= args.tiling.rows) {
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) {
        if (row >= next) continue;
        sum[i] += term[i];
        term[i] = 0.0f;
      }
      end_image();
    }
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) sum[i] += term[i];
  }

  __device__ __forceinline__ void end_image() {
    const int columns = args.tiling.columns;
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) sum[i] = S::add_lanes(sum[i]);
    if (int(threadIdx.x) % 32 < S::kLanes && column < columns) {
#pragma unroll
      for (int i = 0; i < S::kWidth; i += 4) {
        Pack<float, 4> four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.v[j] = sum[i + j];
        store_channels<S::kAligned>(to, column + i, columns, four);
      }
    }
    to += columns;
    next += int64_t(args.gate.images.pixels);
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) sum[i] = 0.0f;
  }
  __device__ __forceinline__ void end_tile() {
    if (next <= args.tiling.rows) end_image();
  }
  __device__ __forceinline__ void end() {}
};

// Queues the kernel of da, and what merges the gate's gradient.
struct StartInput {
  const BackwardArgs& args;
  const Launch& on;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    const Geometry& g = args.g;
    const int64_t rows = g.n * g.h * g.w, parts = (rows + S::kWarpRows - 1) / S::kWarpRows;
    const Tiling tiling = tiling_of<S>(rows, g.c_out, g.c_in, on);
    float* const partial = on.temporary<float>(size_t(parts + g.n) * g.c_in);
    const typename GatedInputGradient<S>::Arguments arguments{static_cast<const T*>(args.u),
                                                              parameters_of(args.input),
                                                              gate_of<T>(args),
                                                              static_cast<T*>(args.dz_u),
                                                              partial,
                                                              tiling};
    const cudaError_t error = start_product<S, true, GatedInputGradient<S>>(output_gradient_of<T, S::kAligned>(args),
                                                                            args.weight, arguments, on);
    if (error != cudaSuccess) return error;
    return merge_images(partial, S::kWarpRows, g.n, g.h * g.w, int(g.c_in), static_cast<float*>(args.grad_gate), on);
  }
};

struct StartWeight {
  const BackwardArgs& args;
  const Launch& on;
  Partial& sums;

  template <class S, bool kWide>
  cudaError_t run() const {
    using T = typename S::T;
    const Geometry& g = args.g;
    return start_weight_product<S>(output_gradient_of<T, kWide>(args), gated_input_of<T, kWide>(args), g.n * g.h * g.w,
                                   int(g.c_out), int(g.c_in), sums, on);
  }
};

}  // namespace

cudaError_t gated_pointwise_backward(const BackwardArgs& args, const Launch& on) {
  if (!can_number(args.g)) return cudaErrorInvalidValue;
  const int64_t rows = args.g.n * args.g.h * args.g.w, channels = args.g.c_in, outputs = args.g.c_out;
  const void* const pointers[] = {args.dz,       args.y,    args.grad_bn_y, args.u,
                                  args.input.bn, args.gate, args.weight,    args.dz_u};
  if (args.dz_u != nullptr) {
    const cudaError_t error = choose_shape(args.dtype, rows, outputs, channels, pointers, on, StartInput{args, on});
    if (error != cudaSuccess) return error;
  }
  if (args.grad_weight == nullptr) return cudaSuccess;
  WeightToMerge weight{{}, outputs * channels, args.grad_weight};
  const cudaError_t error =
      choose_weight_shape(args.dtype, outputs, channels, pointers, on, StartWeight{args, on, weight.sums});
  if (error != cudaSuccess) return error;
  return merge_gradients({}, weight, on);
}

}  // namespace mx::cuda
