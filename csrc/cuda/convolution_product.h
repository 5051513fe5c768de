// A forward convolution as a tiled product (product.h) D = A weight^T + bias: what becomes of D, and the launch.
//
// y is written once: as it is, with its statistics, or normalised and activated. Its channels are the product's
// columns.
#pragma once
#include "activation.h"
#include "merge.h"
#include "product.h"

namespace mx::cuda {

// Adds the biases of a thread's channels; null: 0. kWide: the bias is aligned.
template <bool kWide, int kWidth>
__device__ __forceinline__ void add_bias(const float* bias, int column, int columns, float (&d)[kWidth]) {
  if (bias == nullptr || column >= columns) return;
  constexpr int kFew = kWidth < 4 ? kWidth : 4;  // at a time: registers are taken
#pragma unroll 1
  for (int part = 0; part < kWidth / kFew; ++part) {
    float b[kFew];
    load_vector<kWide>(bias, column + part * kFew, columns, b);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i / kFew == part) d[i] += b[i % kFew];
  }
}

// Stores act(norm(y)) + residual. kWide: rows of y are multiples of 16 bytes, and y, bias, bn and residual aligned.
template <class S, bool kWide>
struct NormActOutput {
  using T = typename S::T;
  struct Arguments {
    T* y;
    const float* bias;
    NormActParameters norm_act;
    const T* residual;  // null: 0
    Tiling tiling;
  };
  struct Extra {};
  static constexpr int kSharedBytes = S::kSharedBytes;
  static constexpr int kBlocks = 2;
  using Norm = ChannelNorm<S::kWidth>;
  const Arguments& args;
  int column;
  Norm norm;

  __device__ __forceinline__ explicit NormActOutput(const Arguments& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {}

  // Loaded for each tile, and set in any case: the product needs the registers.
  __device__ __forceinline__ void begin_tile() {
    const bool given = args.norm_act.bn != nullptr && column < args.tiling.columns;
    norm = given ? Norm::template load<kWide>(args.norm_act.bn, column, args.tiling.columns) : Norm::identity();
  }
  __device__ __forceinline__ void end_tile() {}
  __device__ __forceinline__ void end() {}
  __device__ __forceinline__ Extra load(int64_t, bool) { return {}; }

  __device__ __forceinline__ void store(int, int64_t row, bool inside, float (&d)[S::kWidth], const Extra&) {
    if (!inside) return;
    add_bias<kWide>(args.bias, column, args.tiling.columns, d);
    if (args.norm_act.bn != nullptr) {
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) d[i] = norm.z(d[i], i);
    }
    activate(d, args.norm_act.act);
    if (args.residual != nullptr) {  // not earlier: registers are taken
      const auto residual =
          load_channels<kWide, S::kWidth>(args.residual + row * args.tiling.columns, column, args.tiling.columns);
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) d[i] += to_float(residual.v[i]);
    }
    store_channels<kWide>(args.y + row * args.tiling.columns, column, args.tiling.columns, round_pack<T>(d));
  }
};

// Stores y, and leaves the statistics of the values as stored. kWide: rows of y are multiples of 16 bytes, and y
// aligned.
//
// The sums are of differences from an origin, which is the warp's first row, and after 1, 2, 4, 8, ... tiles the mean
// of its rows so far: neither a large mean nor an outlier at the start cancels in M2.
template <class S, bool kWide>
struct StatisticsOutput {
  using T = typename S::T;
  struct Arguments {
    T* y;
    const float* bias;
    float* partial;
    Tiling tiling;
  };
  struct Extra {};
  const Arguments& args;
  int column;
  float total[S::kWidth] = {}, squares[S::kWidth] = {}, origin[S::kWidth] = {};
  int tiles = 0;  // done

  using Vector = SharedSpill<S, S::kWidth>;
  static constexpr int kTotal = S::kSharedBytes, kSquares = kTotal + Vector::kBytes,
                       kOrigin = kSquares + Vector::kBytes;
  static constexpr int kSharedBytes = kOrigin + Vector::kBytes;
  static constexpr int kBlocks = 2;

  __device__ __forceinline__ explicit StatisticsOutput(const Arguments& arguments)
      : args(arguments), column(arguments.tiling.template first_column<S>() + S::thread_column()) {
    Vector::store(kOrigin, origin);
    store_sums();
  }

  __device__ __forceinline__ void begin_tile() {
    Vector::load(kTotal, total);
    Vector::load(kSquares, squares);
    Vector::load(kOrigin, origin);
  }
  __device__ __forceinline__ void end_tile() {
    ++tiles;
    // Only the last of all tiles is not full, and no tile comes after it.
    const bool more = args.tiling.program() + int64_t(tiles) * args.tiling.programs < args.tiling.tiles;
    if (more && (tiles & (tiles - 1)) == 0) recentre();
    store_sums();
  }
  __device__ __forceinline__ void recentre() {
    const float rows = float(tiles * S::kWarpRows), mine = float(tiles * S::kWarpRows * S::kLanes / 32);
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float nearer = origin[i] + S::add_lanes(total[i]) / rows;
      const float moved = nearer - origin[i];  // not the quotient, but what rounding left of it
      squares[i] = moved_squares(squares[i], moved * (mine * moved - 2.0f * total[i]));
      total[i] -= mine * moved;
      origin[i] = nearer;
    }
    Vector::store(kOrigin, origin);
  }
  __device__ __forceinline__ void store_sums() {
    Vector::store(kTotal, total);
    Vector::store(kSquares, squares);
  }
  __device__ __forceinline__ Extra load(int64_t, bool) { return {}; }

  __device__ __forceinline__ void store(int index, int64_t row, bool inside, float (&d)[S::kWidth], const Extra&) {
    add_bias<kWide>(args.bias, column, args.tiling.columns, d);
    const auto y = round_pack<T>(d);
    if (inside) store_channels<kWide>(args.y + row * args.tiling.columns, column, args.tiling.columns, y);
    to_floats(y, d);
    if (index == 0 && tiles == 0) {
#pragma unroll
      for (int i = 0; i < S::kWidth; ++i) {
        const float value = __shfl_sync(0xffffffffu, d[i], int(threadIdx.x) % S::kLanes);
        origin[i] = value - value == 0.0f ? value : 0.0f;  // finite
      }
      Vector::store(kOrigin, origin);
    }
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float difference = d[i] - origin[i];
      total[i] += difference;
      squares[i] = fmaf(difference, difference, squares[i]);
    }
  }

  // The program's row of partial statistics.
  __device__ __forceinline__ void end() {
    constexpr int warps = S::kRows / S::kWarpRows;
    const unsigned thread = reread_thread();
    const int warp_row = S::warp_row(thread);
    float* const shared = shared_memory<float>() + warp_row / S::kWarpRows * 4 * S::kColumns;
    const int program = args.tiling.program(), programs = args.tiling.programs, all = args.tiling.tiles;
    const int last = int(args.tiling.rows - int64_t(all - 1) * S::kRows);
    const int mine_of_last = last < warp_row ? 0 : min_of(last - warp_row, S::kWarpRows);
    const int my_tiles = (all - 1 - program) / programs + 1;
    const bool has_last = (all - 1 - program) % programs == 0;
    const float rows = float(my_tiles * S::kWarpRows - (has_last ? S::kWarpRows - mine_of_last : 0));
    begin_tile();
#pragma unroll
    for (int i = 0; i < S::kWidth; ++i) {
      const float sum = S::add_lanes(total[i]), sum_squares = S::add_lanes(squares[i]);
      if (thread % 32 < S::kLanes) {
        float* const to = shared + S::thread_column(thread) + i;
        to[0] = rows, to[S::kColumns] = origin[i], to[2 * S::kColumns] = sum, to[3 * S::kColumns] = sum_squares;
      }
    }
    __syncthreads();
    const int mine = int(thread), at = args.tiling.template first_column<S>() + mine;
    if (mine >= S::kColumns || at >= args.tiling.columns) return;
    // The first warp has a row, the program's first. Means are differences from its origin.
    const float* const parts = shared_memory<float>() + mine;
    const float base = parts[S::kColumns];
    float n = 0.0f, mean = 0.0f, m2 = 0.0f;
    for (int w = 0; w < warps; ++w) {
      const float* const part = parts + w * 4 * S::kColumns;
      n += part[0];
      if (part[0] > 0.0f) mean += (part[S::kColumns] - base) * part[0] + part[2 * S::kColumns];
    }
    mean /= n;
    for (int w = 0; w < warps; ++w) {
      const float* const part = parts + w * 4 * S::kColumns;
      if (!(part[0] > 0.0f)) continue;
      const float offset = part[2 * S::kColumns] / part[0];
      const float distance = (part[S::kColumns] - base) + offset - mean;
      m2 += moved_squares(part[3 * S::kColumns], -offset * part[2 * S::kColumns]) + distance * distance * part[0];
    }
    const int64_t columns = args.tiling.columns;
    float* const to = args.partial + program * STATISTICS_ROWS * columns + at;
    to[STATISTICS_COUNT * columns] = n;
    to[STATISTICS_MEAN * columns] = base;
    to[STATISTICS_MEAN_REST * columns] = mean;
    to[STATISTICS_M2 * columns] = m2;
  }
};

// Launches the product of `source`, which reads A[rows, depth], and what merges the statistics where they are wanted.
template <class S, bool kWide, class Source>
cudaError_t start_convolution(const Source& source, int depth, const ForwardArgs& f, const Launch& on) {
  using T = typename S::T;
  using Statistics = StatisticsOutput<S, kWide>;
  using NormAct = NormActOutput<S, kWide>;
  const Tiling tiling = tiling_of<S>(f.g.n * f.g.out_h * f.g.out_w, depth, f.g.c_out, on);
  const float* const bias = static_cast<const float*>(f.bias);
  T* const y = static_cast<T*>(f.y);
  if (!f.statistics.wanted())
    return start_product<S, false, NormAct>(
        source, f.weight, {y, bias, parameters_of(f.output), static_cast<const T*>(f.residual), tiling}, on);
  float* const partial = on.temporary<float>(size_t(tiling.programs) * STATISTICS_ROWS * tiling.columns);
  const cudaError_t error = start_product<S, false, Statistics>(source, f.weight, {y, bias, partial, tiling}, on);
  if (error != cudaSuccess) return error;
  return merge_statistics(partial, tiling.programs, tiling.columns, f.statistics, on);
}

}  // namespace mx::cuda
