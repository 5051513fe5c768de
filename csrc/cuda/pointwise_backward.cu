// Pointwise convolution, backward; dy[rows, N] is rebuilt on load from dz and y, a[rows, K] from u:
//
//   da = dy weight[N, K], dz_u = da act'(z_u), with its sums    tiled product
//   dW = dy^T a                                                 tiled product of weights
#include "merge.h"
#include "operands.h"
#include "weight_product.h"

namespace mx::cuda {
namespace {

// Stores dz_u, and leaves its sums.
template <class S>
struct InputGradient {
  using T = typename S::T;
  struct Arguments {
    const T* u;
    NormActParameters norm_act;  // of u; without a bn, u is a plain input
    T* dz_u;
    float* sums;  // null: not wanted
    Tiling tiling;
  };
  struct Extra {
    PackedWords<T> u;
  };
  const Arguments& args;
  int column;
  float sum_dz[S::kWidth] = {}, sum_dz_centred[S::kWidth] = {};

  using Vector = SharedSpill<S, S::kWidth>;
  static constexpr int kSum = S::kSharedBytes, kSumCentred = kSum + Vector::kBytes;
  static constexpr int kSharedBytes = kSumCentred + Vector::kBytes;
  static constexpr int kBlocks = S::kColumns > 64 ? 1 : 2;

  __device__ __forceinline__ explicit InputGradient(const Arguments& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {
    end_tile();
  }

  __device__ __forceinline__ void begin_tile() {
    Vector::load(kSum, sum_dz);
    Vector::load(kSumCentred, sum_dz_centred);
  }
  __device__ __forceinline__ void end_tile() {
    Vector::store(kSum, sum_dz);
    Vector::store(kSumCentred, sum_dz_centred);
  }
  __device__ __forceinline__ Extra load(int64_t row, bool inside) {
    if (args.norm_act.bn == nullptr || !inside) return {PackedWords<T>::zero()};
    return {PackedWords<T>::of(
        load_channels<S::kAligned, S::kWidth>(args.u + row * args.tiling.columns, column, args.tiling.columns))};
  }

  __device__ __forceinline__ void store(int, int64_t row, bool inside, float (&da)[S::kWidth], const Extra& extra) {
    if (!inside) return;
    if (args.norm_act.bn != nullptr) {
      const auto norm =
          ChannelNorm<S::kWidth>::template load<S::kAligned>(args.norm_act.bn, column, args.tiling.columns);
      float u[S::kWidth], z[S::kWidth];
      to_floats(extra.u.pack(), u);
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) z[i] = norm.z(u[i], i);
      activate_backward(z, da, args.norm_act.act);
      to_floats(round_pack<T>(da), da);  // as stored
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) {
        sum_dz[i] += da[i];
        sum_dz_centred[i] = fmaf(da[i], u[i] - norm.mean[i], sum_dz_centred[i]);
      }
    }
    store_channels<S::kAligned>(args.dz_u + row * args.tiling.columns, column, args.tiling.columns, round_pack<T>(da));
  }

  // The program's row of partial sums.
  __device__ __forceinline__ void end() {
    if (args.sums == nullptr) return;
    constexpr int warps = S::kRows / S::kWarpRows;
    float* const shared = shared_memory<float>();
    const unsigned thread = reread_thread();
    begin_tile();
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float sum = S::add_lanes(sum_dz[i]), sum_centred = S::add_lanes(sum_dz_centred[i]);
      if (thread % 32 < S::kLanes) {
        float* const to =
            shared + S::warp_row(thread) / S::kWarpRows * SUM_ROWS * S::kColumns + S::thread_column(thread) + i;
        to[SUM_DZ * S::kColumns] = sum, to[SUM_DZ_CENTRED * S::kColumns] = sum_centred;
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

// Queues the kernel of dz_u, which leaves `sums`.
struct StartInput {
  const BackwardArgs& args;
  const Launch& on;
  Partial& sums;

  template <class S>
  cudaError_t run() const {
    using T = typename S::T;
    const Geometry& g = args.g;
    const Tiling tiling = tiling_of<S>(g.n * g.h * g.w, g.c_out, g.c_in, on);
    sums.programs = tiling.programs;
    if (args.grad_bn_u != nullptr) sums.data = on.temporary<float>(size_t(tiling.programs) * SUM_ROWS * g.c_in);
    const typename InputGradient<S>::Arguments arguments{static_cast<const T*>(args.u), parameters_of(args.input),
                                                         static_cast<T*>(args.dz_u), sums.data, tiling};
    return start_product<S, true, InputGradient<S>>(output_gradient_of<T, S::kAligned>(args), args.weight, arguments,
                                                    on);
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
    return start_weight_product<S>(output_gradient_of<T, kWide>(args), norm_act_input_of<T, kWide>(args),
                                   g.n * g.h * g.w, int(g.c_out), int(g.c_in), sums, on);
  }
};

}  // namespace

cudaError_t pointwise_backward(const BackwardArgs& args, const Launch& on) {
  const int64_t rows = args.g.n * args.g.h * args.g.w, channels = args.g.c_in, outputs = args.g.c_out;
  const void* const pointers[] = {args.dz, args.y, args.grad_bn_y, args.u, args.input.bn, args.weight, args.dz_u};
  SumsToMerge sums{{}, int(channels), args.input.bn, args.batch_stats_u, rows, args.grad_bn_u};
  WeightToMerge weight{{}, outputs * channels, args.grad_weight};
  if (args.dz_u != nullptr) {
    const cudaError_t error =
        choose_shape(args.dtype, rows, outputs, channels, pointers, on, StartInput{args, on, sums.sums});
    if (error != cudaSuccess) return error;
  }
  if (args.grad_weight != nullptr) {
    const cudaError_t error =
        choose_weight_shape(args.dtype, outputs, channels, pointers, on, StartWeight{args, on, weight.sums});
    if (error != cudaSuccess) return error;
  }
  return merge_gradients(sums, weight, on);
}

}  // namespace mx::cuda
