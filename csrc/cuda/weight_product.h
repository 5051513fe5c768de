// The tiled product of a weight's gradient: dW[outputs, depth] = dy[rows, outputs]^T a[rows, depth].
//
// A block of 256 threads owns a square of dW, which stays in the tensor cores' registers while the block walks over its
// share of the rows; it leaves the sum over them as a partial result. Both operands are read by Sources (product.h)
// into registers, one step ahead, converted in float32 and stored, rounded to T, in shared memory, rows of memory as
// rows: the products want both of them transposed.
#pragma once
#include "merge.h"
#include "product.h"

namespace mx::cuda {

// T, Math and kAvailable as in Shape.
template <class T_, class Math_, int kSide_>
struct WeightShape {
  using T = T_;
  using Math = Math_;
  static constexpr bool kAvailable = kCompiled<T, Math>;
  static constexpr int kThreads = 256;
  static constexpr int kSide = kSide_, kRows = (kSide > 64 ? 32 : 64) / int(sizeof(T));  // of a step
  static constexpr int kWidth = kPack<T>;

  // Four warps down, two across; a warp's part is kFragmentsM by kFragmentsN of the tensor cores' 16x8.
  static constexpr int kWarpRows = kSide / 4, kWarpColumns = kSide / 2;
  static constexpr int kFragmentsM = kWarpRows / 16, kFragmentsN = kWarpColumns / 8;

  // Padded so that neither eight rows of 16 bytes nor four rows of eight float32 share a bank.
  static constexpr int kStride = kSide + 8;
  static constexpr int kElements = kRows * kStride;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = kStages * 2 * kElements * int(sizeof(T));

  static __device__ __forceinline__ int warp_row(unsigned thread) { return int(thread / 64 * kWarpRows); }
  static __device__ __forceinline__ int warp_column(unsigned thread) { return int(thread / 32 % 2 * kWarpColumns); }
};

// d += dy^T a of one step.
template <class S>
__device__ __forceinline__ void multiply_transposed(const typename S::T* dy, const typename S::T* a,
                                                    float (&d)[S::kFragmentsM][S::kFragmentsN][4]) {
  using T = typename S::T;
  const int lane = int(threadIdx.x) % 32;
  dy += S::warp_row(threadIdx.x);
  a += S::warp_column(threadIdx.x);
  if constexpr (kSame<typename S::Math, float>) {
    // Exact products of float32, by the thread that tensor cores would leave the sum with.
#pragma unroll 2
    for (int row = 0; row < S::kRows; ++row, dy += S::kStride, a += S::kStride) {
      float left[2 * S::kFragmentsM];
#pragma unroll
      for (int i = 0; i < 2 * S::kFragmentsM; ++i) left[i] = to_float(dy[8 * i + lane / 4]);
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; ++n) {
        float right[2];
        to_floats(Pack<T, 2>::load(a + 8 * n + lane % 4 * 2), right);
#pragma unroll
        for (int m = 0; m < S::kFragmentsM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][n][i] = fmaf(left[2 * m + i / 2], right[i % 2], d[m][n][i]);
      }
    }
  } else {
    constexpr int slice = 2 * S::kWidth;  // the rows of one instruction
#pragma unroll
    for (int row = 0; row < S::kRows; row += slice, dy += slice * S::kStride, a += slice * S::kStride) {
      uint32_t left[S::kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < S::kFragmentsM; ++m) {
        if constexpr (sizeof(T) == 2) {
          load_matrices_transposed(left[m], dy + (lane % 8 + lane / 16 * 8) * S::kStride + 16 * m + lane / 8 % 2 * 8);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            left[m][i] = __float_as_uint(dy[(lane % 4 + i / 2 * 4) * S::kStride + 16 * m + i % 2 * 8 + lane / 4]);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; n += 2) {
        uint32_t right[4];
        if constexpr (sizeof(T) == 2) {
          load_matrices_transposed(right, a + lane % 16 * S::kStride + 8 * n + lane / 16 * 8);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            right[i] = __float_as_uint(a[(lane % 4 + i % 2 * 4) * S::kStride + 8 * n + i / 2 * 8 + lane / 4]);
        }
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int m = 0; m < S::kFragmentsM; ++m) {
          mma<typename S::Math>(d[m][n], left[m], first);
          mma<typename S::Math>(d[m][n + 1], left[m], second);
        }
      }
    }
  }
}

// How blocks share a weight's gradient: kSide by kSide of it each, and every `programs`-th step of kRows rows.
struct WeightTiling {
  int64_t rows;
  int outputs, depth;
  int steps, column_blocks, programs;
};

// All of a block's work: the sum over its rows goes to partial [programs][outputs][depth]. Shared memory:
// S::kSharedBytes.
template <class S, class SourceDy, class SourceA>
__device__ __forceinline__ void weight_product(const SourceDy& source_dy, const SourceA& source_a,
                                               const WeightTiling& tiling, float* partial) {
  using T = typename S::T;
  constexpr int packs = S::kSide / S::kWidth, rows_per_pass = S::kThreads / packs, passes = S::kRows / rows_per_pass;
  T* const shared = shared_memory<T>();
  int my_row = int(threadIdx.x / packs), my_column = int(threadIdx.x % packs * S::kWidth);
  const int outputs = tiling.outputs, depth = tiling.depth;
  const int block = int(blockIdx.x), program = int(blockIdx.y);
  const int output0 = block / tiling.column_blocks * S::kSide, column0 = block % tiling.column_blocks * S::kSide;

  typename SourceDy::Raw raw_dy[passes];
  typename SourceA::Raw raw_a[passes];
  const auto rows_of = [&](int step) {
    const int64_t left = tiling.rows - int64_t(step) * S::kRows;
    return int(left < S::kRows ? left : S::kRows);
  };
  const auto fetch = [&](int step) {
    const int64_t row0 = int64_t(step) * S::kRows;
    const int rows = rows_of(step);
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      const int row = my_row + i * rows_per_pass;
      raw_dy[i] = row < rows && output0 + my_column < outputs ? source_dy.load(row0 + row, output0 + my_column)
                                                              : SourceDy::Raw::zero();
      raw_a[i] = row < rows && column0 + my_column < depth ? source_a.load(row0 + row, column0 + my_column)
                                                           : SourceA::Raw::zero();
    }
  };
  const auto put = [&](T* to, const auto& source, const auto& raw, int column, int columns, int rows) {
    float v[passes][S::kWidth] = {};
    if (column < columns) {
      const auto vectors = source.vectors(column);
#pragma unroll
      for (int i = 0; i < passes; ++i)
        if (my_row + i * rows_per_pass < rows) source.convert(raw[i], column, vectors, v[i]);
    }
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      if constexpr (kSame<typename S::Math, tf32>) {
#pragma unroll
        for (int j = 0; j < S::kWidth; ++j) v[i][j] = __uint_as_float(to_tf32(v[i][j]));
      }
      round_pack<T>(v[i]).store(to + (my_row + i * rows_per_pass) * S::kStride + my_column);
    }
  };

  float d[S::kFragmentsM][S::kFragmentsN][4] = {};
  fetch(program);
  int stage = 0;
#pragma unroll 1
  for (int step = program; step < tiling.steps; step += tiling.programs) {
    // One barrier per step: what is written before it was last read two steps ago.
    make_opaque(my_row), make_opaque(my_column);
    T* const dy = shared + stage * 2 * S::kElements;
    T* const a = dy + S::kElements;
    const int rows = rows_of(step);
    put(dy, source_dy, raw_dy, output0 + my_column, outputs, rows);
    put(a, source_a, raw_a, column0 + my_column, depth, rows);
    if (step + tiling.programs < tiling.steps) fetch(step + tiling.programs);
    __syncthreads();
    multiply_transposed<S>(dy, a, d);
    stage ^= 1;
  }

  const unsigned thread = reread_thread();
  const int lane = int(thread % 32);
#pragma unroll
  for (int m = 0; m < S::kFragmentsM; ++m)
#pragma unroll
    for (int n = 0; n < S::kFragmentsN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = output0 + S::warp_row(thread) + 16 * m + i / 2 * 8 + lane / 4;
        const int column = column0 + S::warp_column(thread) + 8 * n + lane % 4 * 2 + i % 2;
        if (output < outputs && column < depth)
          partial[(int64_t(program) * outputs + output) * depth + column] = d[m][n][i];
      }
}

template <class S, class SourceDy, class SourceA>
__global__ void __launch_bounds__(S::kThreads, 2)
    weight_kernel(const SourceDy dy, const SourceA a, const WeightTiling tiling, float* partial) {
  if constexpr (S::kAvailable) {
    weight_product<S>(dy, a, tiling, partial);
  } else {
    not_compiled();
  }
}

// Launches it.
template <class S, class SourceDy, class SourceA>
cudaError_t start_weight_product(const SourceDy& dy, const SourceA& a, int64_t rows, int outputs, int depth,
                                 Partial& partial, const Launch& on) {
  WeightTiling tiling{};
  tiling.rows = rows, tiling.outputs = outputs, tiling.depth = depth;
  tiling.steps = int((rows + S::kRows - 1) / S::kRows);
  tiling.column_blocks = (depth + S::kSide - 1) / S::kSide;
  const int blocks = (outputs + S::kSide - 1) / S::kSide * tiling.column_blocks;
  const int enough = 2 * on.gpu.multiprocessors / blocks;  // two blocks fit a multiprocessor
  tiling.programs = tiling.steps == 0 ? 0 : enough < 1 ? 1 : min_of(tiling.steps, enough);
  partial.programs = tiling.programs;
  partial.data = on.temporary<float>(size_t(tiling.programs) * outputs * depth);
  if (tiling.programs == 0) return cudaSuccess;
  return launch(weight_kernel<S, SourceDy, SourceA>, dim3(blocks, tiling.programs), dim3(S::kThreads), S::kSharedBytes,
                on.stream, dy, a, tiling, partial.data);
}

// start.run<WeightShape<...>, kWide>() of the shape for a gradient [outputs, depth]; kWide: `pointers`, all that rows
// are read from, and both channel counts fit packs.
template <int n, class Start>
cudaError_t choose_weight_shape(Dtype dtype, int64_t outputs, int64_t depth, const void* const (&pointers)[n],
                                const Launch& launch, const Start& start) {
  return with_kind(dtype, launch, [&](auto kind) {
    using T = typename decltype(kind)::T;
    using Math = typename decltype(kind)::Math;
    if (!all_packs<T>(outputs, depth, pointers)) return start.template run<WeightShape<T, Math, 64>, false>();
    // A narrow side would leave most of a wide square empty.
    return outputs > 64 && depth > 64 ? start.template run<WeightShape<T, Math, 128>, true>()
                                      : start.template run<WeightShape<T, Math, 64>, true>();
  });
}

}  // namespace mx::cuda
