// Pointwise convolution, backward; dy[rows, N] is rebuilt on load from h and y, a[rows, K] from u:
//
//   da = dy weight[N, K]    h_u = 0 where the ReLU gave 0, else da; with its sums    tiled product
//   dW = dy^T a                                                                      tiled product of weights
#include "operands.h"
#include "weight_product.h"

namespace mx::cuda {
namespace {

template <class T>
struct InputArguments {
  const T* u;
  const float* bn_u;  // null: u is a plain input
  T* h_u;
  float* sums;  // null: not wanted
  Tiling tiling;
};

// h_u, and its sums.
template <class S>
struct MaskedGradient {
  using T = typename S::T;
  struct Extra {
    Waiting<T> u;
  };
  const InputArguments<T>& args;
  int column;
  float sum_h[S::kWidth] = {}, sum_h_centred[S::kWidth] = {};

  using Vector = Parked<S, S::kWidth>;
  static constexpr int kSum = S::kSharedBytes, kSumCentred = kSum + Vector::kBytes;
  static constexpr int kSharedBytes = kSumCentred + Vector::kBytes;

  __device__ __forceinline__ explicit MaskedGradient(const InputArguments<T>& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {
    end_tile();
  }

  __device__ __forceinline__ void begin_tile() {
    Vector::load(kSum, sum_h);
    Vector::load(kSumCentred, sum_h_centred);
  }
  __device__ __forceinline__ void end_tile() {
    Vector::store(kSum, sum_h);
    Vector::store(kSumCentred, sum_h_centred);
  }
  __device__ __forceinline__ Extra load(int64_t row, bool inside) {
    if (args.input.bn == nullptr || !inside) return {Waiting<T>::zero()};
    return {Waiting<T>::of(
        load_channels<S::kAligned, S::kWidth>(args.u + row * args.tiling.columns, column, args.tiling.columns))};
  }

  __device__ __forceinline__ void store(int, int64_t row, bool inside, float (&da)[S::kWidth], const Extra& extra) {
    if (!inside) return;
    if (args.input.bn != nullptr) {
      const auto u_pack = extra.u.pack();
#pragma unroll
      for (int i = 0; i < S::kWidth; i += 4) {
        float mean[4], scale[4], shift[4];
        load_vector<S::kAligned>(args.input.bn + int64_t(BN_MEAN) * args.tiling.columns, column + i, args.tiling.columns,
                                 mean);
        load_vector<S::kAligned>(args.input.bn + int64_t(BN_SCALE) * args.tiling.columns, column + i, args.tiling.columns,
                                 scale);
        load_vector<S::kAligned>(args.input.bn + int64_t(BN_SHIFT) * args.tiling.columns, column + i, args.tiling.columns,
                                 shift);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float u = to_float(u_pack.v[i + j]);
          // A NaN is not <= 0 and passes the gradient, as PyTorch's ReLU lets it.
          const float masked = normalise(u, mean[j], scale[j], shift[j]) <= 0.0f ? 0.0f : da[i + j];
          da[i + j] = to_float(rounded<T>(masked));  // as stored
          sum_h[i + j] += da[i + j];
          sum_h_centred[i + j] = fmaf(da[i + j], u - mean[j], sum_h_centred[i + j]);
        }
      }
    }
    store_channels<S::kAligned>(args.dz_u + row * args.tiling.columns, column, args.tiling.columns, round_pack<T>(da));
  }

  // The program's row of partial sums. All threads of the block.
  __device__ __forceinline__ void finish() {
    constexpr int warps = S::kRows / S::kWarpRows;
    float* const shared = shared_memory<float>();
    const unsigned thread = thread_again();
    Vector::load(kSum, sum_h);
    Vector::load(kSumCentred, sum_h_centred);
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float sum = S::add_lanes(sum_h[i]), sum_centred = S::add_lanes(sum_h_centred[i]);
      if (thread % 32 < S::kLanes) {
        float* const to =
            shared + S::warp_row(thread) / S::kWarpRows * SUM_ROWS * S::kColumns + S::thread_column(thread) + i;
        to[SUM_H * S::kColumns] = sum, to[SUM_H_CENTRED * S::kColumns] = sum_centred;
      }
    }
    __syncthreads();
    const int mine = int(thread % S::kColumns), row = int(thread / S::kColumns);
    const int at = args.tiling.template first_column<S>() + mine;
    if (row >= SUM_ROWS || at >= args.tiling.columns) return;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += shared[(w * SUM_ROWS + row) * S::kColumns + mine];
    args.sums[(int64_t(args.tiling.program()) * SUM_ROWS + row) * args.tiling.columns + at] = sum;
  }
};

template <class S>
using Dy = Gradient<typename S::T, S::kAligned>;

template <class S, class T = typename S::T>
__global__ void __launch_bounds__(S::kThreads, S::kColumns > 64 ? 1 : 2)
    input_kernel(const Dy<S> dy, const T* weight, const InputArguments<T> args) {
  if constexpr (S::kAvailable) {
    MaskedGradient<S> output(args);
    product<S, true>(dy, weight, args.tiling, output);
    if (args.sums != nullptr) output.finish();
  }
}

template <class S, bool kWide, class T = typename S::T>
__global__ void __launch_bounds__(S::kThreads, 2)
    weight_kernel(const Gradient<T, kWide> dy, const Activation<T, kWide> a, const WeightTiling tiling,
                  float* partial) {
  if constexpr (S::kAvailable) weight_product<S>(dy, a, tiling, partial);
}

template <class T, bool kWide>
Gradient<T, kWide> gradient_of(const BackwardArgs& b) {
  return {static_cast<const T*>(b.h), static_cast<const T*>(b.y), static_cast<const float*>(b.grad_bn_y),
          int(b.g.c_out)};
}

// Queues the kernel of h_u; `sums` and `programs` are what it leaves to be finished.
struct StartInput {
  const BackwardArgs& b;
  const Launch& on;
  float*& sums;
  int& programs;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    InputArguments<T> args{};
    args.u = static_cast<const T*>(b.u);
    args.input.bn = static_cast<const float*>(b.bn_u);
    args.dz_u = static_cast<T*>(b.h_u);
    args.tiling = tiling_of<S>(b.g.n * b.g.h * b.g.w, b.g.c_out, b.g.c_in, on);
    programs = args.tiling.programs;
    if (b.grad_bn_u != nullptr) args.sums = sums = on.temporary<float>(size_t(programs) * SUM_ROWS * b.g.c_in);
    return launch_product<S>(input_kernel<S>, args.tiling, MaskedGradient<S>::kSharedBytes, on,
                             gradient_of<T, S::kAligned>(b), static_cast<const T*>(b.weight), args);
  }
};

template <class S, bool kWide>
cudaError_t start_weight(const BackwardArgs& b, WeightPartial& partial, const Launch& on) {
  using T = typename S::T;
  const Activation<T, kWide> a{static_cast<const T*>(b.u), static_cast<const float*>(b.bn_u), int(b.g.c_in)};
  return start_weight_product<S>(weight_kernel<S, kWide>, gradient_of<T, kWide>(b), a, b.g.n * b.g.h * b.g.w,
                                 int(b.g.c_out), a.channels, partial, on);
}

}  // namespace

cudaError_t pointwise_backward(const BackwardArgs& b, const Launch& on) {
  const int64_t rows = b.g.n * b.g.h * b.g.w;
  const int channels = int(b.g.c_in), outputs = int(b.g.c_out);
  const void* const pointers[] = {b.h, b.y, b.grad_bn_y, b.u, b.bn_u, b.weight, b.h_u};
  float* sums = nullptr;
  int programs = 0;
  if (b.h_u != nullptr) {
    const cudaError_t error =
        choose_shape(b.dtype, rows, outputs, channels, pointers, on, StartInput{b, on, sums, programs});
    if (error != cudaSuccess) return error;
  }
  WeightPartial weight;
  if (b.grad_weight != nullptr) {
    const cudaError_t error = with_kind(b.dtype, on, [&](auto kind) {
      using T = typename decltype(kind)::T;
      using Math = typename decltype(kind)::Math;
      if (!all_packs<T>(outputs, channels, pointers))
        return start_weight<WeightShape<T, Math, 64>, false>(b, weight, on);
      // A narrow side would leave most of a wide square empty.
      return outputs > 64 && channels > 64 ? start_weight<WeightShape<T, Math, 128>, true>(b, weight, on)
                                           : start_weight<WeightShape<T, Math, 64>, true>(b, weight, on);
    });
    if (error != cudaSuccess) return error;
  }
  return finish_gradients(sums, programs, channels, b.bn_u, b.batch_stats_u, rows, b.grad_bn_u, weight.data,
                          weight.programs, int64_t(outputs) * channels, b.grad_weight, on);
}

}  // namespace mx::cuda
