// The tiled matrix product of the pointwise kernels: D[rows, columns] = A[rows, depth] B, of a tall thin A.
//
// A block of 256 threads owns kColumns columns and walks over tiles of 128 rows. A is made on the way in: a Source
// reads it from global memory into registers, one step of the depth ahead of the tensor cores, converts it in float32
// (the normalisation of the layer before), and it goes, rounded to T, to shared memory. B, the weight, is copied to
// shared memory asynchronously. D leaves through shared memory, so that an Epilogue gets whole packs of neighbouring
// columns, and a thread the same columns in all tiles: it can keep their sums in registers.
//
// clang-format off
//   struct Source {
//     struct Raw { ...; static Raw zero(); };  // a pack of kPack<T> channels of a row, as loaded
//     Raw load(int64_t row, int k) const;      // row < rows, k < depth, a multiple of kPack<T>
//     Vectors vectors(int k) const;            // what convert needs to know of the channels, for several rows
//     // a comes as zeros; zeros for channels past `depth`.
//     void convert(const Raw&, int k, const Vectors&, float (&a)[kPack<T>]) const;
//   };
//   struct Epilogue {
//     struct Extra { ... };                    // what it reads itself of the same place; may be empty
//     void begin_tile();                       // before a tile's first pack
//     Extra load(int64_t row, bool inside);
//     // Columns Shape::thread_column().. of the block; index: 0 for the thread's first pack of a tile, 1 for the next.
//     void store(int index, int64_t row, bool inside, float (&d)[kPack<T>], const Extra&);
//     void end_tile();
//     void end();                              // after the last tile
//   };
// clang-format on
// All threads of a block call begin_tile, end_tile and end, all lanes of a warp call load and store together, rows
// ascending; `inside` says whether the row and the first column exist: elsewhere d is rubbish.
#pragma once
#include "kernels.h"
#include "packs.h"

namespace mx::cuda {

// T: what is in memory. Math: half, bfloat16 or tf32 for tensor cores, float for exact products of float32 (of T =
// float or bfloat16). Aligned: channel counts are multiples of kPack<T> and all pointers 16-byte aligned.
template <class T_, class Math_, bool kAligned_, int kColumns_>
struct Shape {
  using T = T_;
  using Math = Math_;
  static constexpr bool kAligned = kAligned_;
  static constexpr bool kAvailable = kCompiled<T, Math> && (kColumns_ <= 64 || kLargeShared);
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128, kColumns = kColumns_, kDepth = 64 / int(sizeof(T));
  static constexpr int kWidth = kPack<T>;  // channels per pack

  // Four warps down, two across; a warp's part is two by kFragmentsN of the tensor cores' 16x8.
  static constexpr int kWarpRows = 32, kWarpColumns = kColumns / 2, kFragmentsN = kWarpColumns / 8;

  // Rows of A and B are 64 bytes and 16 of padding, so that eight rows lie in different banks; rows of a transposed B
  // are padded by 8 elements (of float32, for the fragments of TF32: loaded one by one).
  static constexpr int kStride = kDepth + kWidth;
  static constexpr int kStrideTransposed = kColumns + 8;
  static constexpr int kStagesA = 2, kStagesB = 3;
  static constexpr int kElementsA = kRows * kStride, kElementsB = kColumns * kStride;

  // D, eight rows per warp at a time, lies where A was.
  static constexpr int kLanes = kWarpColumns / kWidth;  // lanes that share a row of D
  static constexpr int kPasses = 8 * kLanes / 32;       // packs per lane of eight rows
  static constexpr int kStrideD = kWarpColumns + 8;
  static constexpr int kSharedBytes = (kStagesA * kElementsA + kStagesB * kElementsB) * int(sizeof(T));
  static_assert(8 * 8 * kStrideD * 4 <= kStagesA * kElementsA * int(sizeof(T)));
  static_assert(kDepth * kStrideTransposed <= kElementsB);

  static __device__ __forceinline__ int warp_row(unsigned thread = threadIdx.x) { return int(thread / 64 * kWarpRows); }
  static __device__ __forceinline__ int warp_column(unsigned thread = threadIdx.x) {
    return int(thread / 32 % 2 * kWarpColumns);
  }
  // The first of the thread's kWidth columns in the epilogue, within the block's.
  static __device__ __forceinline__ int thread_column(unsigned thread = threadIdx.x) {
    return warp_column(thread) + int(thread % kLanes * kWidth);
  }
  // v added over the lanes of the warp that own the same columns; all of them get the sum.
  static __device__ __forceinline__ float add_lanes(float v) {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
  }
};

// A thread's values of its columns, kept in shared memory after `offset` bytes while the product needs the registers.
template <class S, int N>
struct SharedSpill {
  static constexpr int kBytes = N * S::kThreads * int(sizeof(float));
  static_assert(N % 4 == 0);

  static __device__ __forceinline__ float* slot(int offset, int i) {
    return shared_memory<float>() + offset / 4 + (i / 4 * S::kThreads + int(threadIdx.x)) * 4;
  }
  static __device__ __forceinline__ void store(int offset, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      Pack<float, 4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.v[j] = v[i + j];
      four.store(slot(offset, i));
    }
  }
  static __device__ __forceinline__ void load(int offset, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const auto four = Pack<float, 4>::load(slot(offset, i));
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = four.v[j];
    }
  }
};

// Where, among the float32 of a row of D in shared memory, the quad `four` of columns lies: so that lanes of
// different halves of a row, or of neighbouring rows, find theirs in different banks.
MX_HOST_DEVICE int staged_column(int four, int row) { return 4 * (four ^ (four >> 3 & 1) ^ (row & 1)); }

// d += A B of one step, by tensor cores. B in shared memory is [column][depth], or [depth][column] if transposed.
template <class S, bool transposed>
__device__ __forceinline__ void multiply(const typename S::T* a, const typename S::T* b,
                                         float (&d)[2][S::kFragmentsN][4]) {
  using T = typename S::T;
  const int lane = int(threadIdx.x) % 32;
  if constexpr (!kSame<typename S::Math, float>) {
    constexpr int slice = 2 * S::kWidth;  // the depth of one instruction: 32 bytes of A
    const T* a_rows = a + (S::warp_row() + lane % 16) * S::kStride + lane / 16 * S::kWidth;
#pragma unroll
    for (int k = 0; k < S::kDepth; k += slice) {
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(left[m], a_rows + m * 16 * S::kStride + k);
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; n += 2) {
        uint32_t right[4];
        const int column = S::warp_column() + 8 * n;
        if constexpr (!transposed) {
          // Read as 16-bit pairs, an 8x8 matrix of 16-bit elements is an 8x4 one of float32, as TF32 wants it.
          const int row = column + lane / 16 * 8 + lane % 8;
          load_matrices(right, b + row * S::kStride + lane / 8 % 2 * S::kWidth + k);
        } else if constexpr (sizeof(T) == 2) {
          load_matrices_transposed(right, b + (k + lane % 16) * S::kStrideTransposed + column + lane / 16 * 8);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = k + lane % 4 + i % 2 * 4;
            right[i] = reinterpret_cast<const uint32_t*>(b)[row * S::kStrideTransposed + column + i / 2 * 8 + lane / 4];
          }
        }
        if constexpr (kSame<typename S::Math, tf32>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) right[i] = to_tf32(__uint_as_float(right[i]));
        }
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<typename S::Math>(d[m][n], left[m], first);
          mma<typename S::Math>(d[m][n + 1], left[m], second);
        }
      }
    }
  } else {
    // Exact products of float32, by the thread that tensor cores would leave the sum with.
    const T* a_rows = a + (S::warp_row() + lane / 4) * S::kStride;
    const int column = S::warp_column() + lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < S::kDepth; k += 4) {
      float left[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) to_floats(Pack<T, 4>::load(a_rows + 8 * r * S::kStride + k), left[r]);
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; ++n) {
        float right[2][4];
        if constexpr (!transposed) {
#pragma unroll
          for (int i = 0; i < 2; ++i) to_floats(Pack<T, 4>::load(b + (column + 8 * n + i) * S::kStride + k), right[i]);
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const auto two = Pack<T, 2>::load(b + (k + q) * S::kStrideTransposed + column + 8 * n);
            right[0][q] = to_float(two.v[0]), right[1][q] = to_float(two.v[1]);
          }
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& sum = d[i / 4][n][i % 4];
            sum = fmaf(left[i / 2][q], right[i % 2][q], sum);
          }
      }
    }
  }
}

// Queues the copy of a step of B, depth k0.., to shared memory.
template <class S, bool transposed>
__device__ __forceinline__ void copy_weight(typename S::T* shared, const typename S::T* weight, int depth, int columns,
                                            int k0, int column0) {
  // By rows of memory: [column][depth], or [depth][column].
  constexpr int rows = transposed ? S::kDepth : S::kColumns, length = transposed ? S::kColumns : S::kDepth;
  constexpr int stride = transposed ? S::kStrideTransposed : S::kStride;
  constexpr int packs = length / S::kWidth;
  const int row0 = transposed ? k0 : column0, start = transposed ? column0 : k0;
  const int all_rows = transposed ? depth : columns, all = transposed ? columns : depth;
#pragma unroll
  for (int i = 0; i < rows * packs / S::kThreads; ++i) {
    int index = int(threadIdx.x) + i * S::kThreads;
    make_opaque(index);
    const int row = index / packs, c = index % packs * S::kWidth;
    const bool inside = row0 + row < all_rows && start + c < all;
    typename S::T* to = shared + row * stride + c;
    const int offset = inside ? (row0 + row) * all : 0;  // a weight has fewer than 2^31 elements
    if constexpr (S::kAligned) {
      copy_async_16(to, weight + (inside ? offset + start + c : 0), inside);
    } else {
      load_channels<false, S::kWidth>(weight + offset, start + c, inside ? all : 0).store(to);
    }
  }
}

// The sizes of a product, and how blocks share it: kColumns columns each, and every `programs`-th tile of kRows rows.
// The blocks of the same rows lie side by side: they find A in the L2.
struct Tiling {
  int64_t rows;
  int depth, columns;
  int tiles, column_blocks, programs;

  __device__ __forceinline__ int program() const { return int(blockIdx.y); }
  template <class S>
  __device__ __forceinline__ int first_column() const {
    return int(blockIdx.x) * S::kColumns;
  }
};

// All of a block's work. `weight` is B as [columns][depth], or [depth][columns] if transposed. Shared memory:
// S::kSharedBytes, and what the epilogue has after them.
template <class S, bool transposed, class Source, class Epilogue>
__device__ __forceinline__ void product(const Source& source, const typename S::T* weight, const Tiling& tiling,
                                        Epilogue& epilogue) {
  using T = typename S::T;
  constexpr int packs = S::kDepth / S::kWidth, rows_per_pass = S::kThreads / packs, passes = S::kRows / rows_per_pass;
  T* const a = shared_memory<T>();
  T* const b = a + S::kStagesA * S::kElementsA;
  int lane = int(threadIdx.x % 32);
  int my_row = int(threadIdx.x / packs), my_k = int(threadIdx.x % packs * S::kWidth);
  const int64_t rows = tiling.rows;
  const int depth = tiling.depth, columns = tiling.columns, column0 = tiling.first_column<S>();
  int tile = tiling.program();

  typename Source::Raw raw[passes];
  const auto fetch = [&](int tile, int k0) {
    const int64_t row0 = int64_t(tile) * S::kRows;
    const int left = k0 + my_k < depth ? int(rows - row0 < S::kRows ? rows - row0 : S::kRows) : 0;
#pragma unroll
    for (int i = 0; i < passes; ++i) {
      const int row = my_row + i * rows_per_pass;
      raw[i] = row < left ? source.load(row0 + row, k0 + my_k) : Source::Raw::zero();
    }
  };
  int stage_a = 0, stage_b = 0;
  fetch(tile, 0);
  copy_weight<S, transposed>(b, weight, depth, columns, 0, column0);
  copy_async_commit();

  for (; tile < tiling.tiles; tile += tiling.programs) {
    float d[2][S::kFragmentsN][4];
#pragma unroll
    for (int i = 0; i < 8 * S::kFragmentsN; ++i) d[i / 4 / S::kFragmentsN][i / 4 % S::kFragmentsN][i % 4] = 0.0f;

#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += S::kDepth) {
      // One barrier per step: what is written before it was last read two steps (A) or three (B) ago.
      make_opaque(my_row), make_opaque(my_k);
      T* const to = a + stage_a * S::kElementsA + my_row * S::kStride + my_k;
      float v[passes][S::kWidth] = {};
      if (k0 + my_k < depth) {
        const auto vectors = source.vectors(k0 + my_k);
#pragma unroll
        for (int i = 0; i < passes; ++i) source.convert(raw[i], k0 + my_k, vectors, v[i]);
      }
#pragma unroll
      for (int i = 0; i < passes; ++i) {
        if constexpr (kSame<typename S::Math, tf32>) {
#pragma unroll
          for (int j = 0; j < S::kWidth; ++j) v[i][j] = __uint_as_float(to_tf32(v[i][j]));
        }
        round_pack<T>(v[i]).store(to + i * rows_per_pass * S::kStride);
      }
      const bool last = k0 + S::kDepth >= depth;
      const int next_tile = last ? tile + tiling.programs : tile, next_k = last ? 0 : k0 + S::kDepth;
      const int next_b = stage_b == S::kStagesB - 1 ? 0 : stage_b + 1;
      if (!last) fetch(tile, next_k);
      if (next_tile < tiling.tiles) {
        copy_weight<S, transposed>(b + next_b * S::kElementsB, weight, depth, columns, next_k, column0);
      }
      copy_async_commit();
      copy_async_wait<1>();
      __syncthreads();
      multiply<S, transposed>(a + stage_a * S::kElementsA, b + stage_b * S::kElementsB, d);
      stage_a ^= 1;
      stage_b = next_b;
    }

    __syncthreads();
    make_opaque(lane);
    float* const staged = reinterpret_cast<float*>(a) + threadIdx.x / 32 * 8 * S::kStrideD;
    const int64_t row0 = int64_t(tile) * S::kRows + (S::warp_row() + lane / S::kLanes);
    const bool column_inside = column0 + S::thread_column() < columns;
    const int rows_left = column_inside ? int(rows - row0 < S::kRows ? rows - row0 : S::kRows) : 0;
    // What the epilogue reads is on its way two packs ahead.
    typename Epilogue::Extra extra[2];
    const auto load_extra = [&](int index) {
      const int row = 8 * (index / S::kPasses) + index % S::kPasses * 32 / S::kLanes;
      extra[index % 2] = epilogue.load(row0 + row, row < rows_left);
    };
    epilogue.begin_tile();
    load_extra(0);
    load_extra(1);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      // The next tile's first step; from here on half of d's registers are free.
      if (part == 2 && tile + tiling.programs < tiling.tiles) fetch(tile + tiling.programs, 0);
      __syncwarp();
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; ++n) {
        const float (&two)[4] = d[part / 2][n];
        Pack<float, 2> values;
        values.v[0] = two[part % 2 * 2], values.v[1] = two[part % 2 * 2 + 1];
        const int row = lane / 4, four = 2 * n + lane % 4 / 2;
        values.store(staged + row * S::kStrideD + staged_column(four, row) + lane % 2 * 2);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < S::kPasses; ++i) {
        const int row = i * 32 / S::kLanes + lane / S::kLanes;
        float v[S::kWidth];
#pragma unroll
        for (int q = 0; q < S::kWidth / 4; ++q) {
          const int four = lane % S::kLanes * (S::kWidth / 4) + q;
          const auto values = Pack<float, 4>::load(staged + row * S::kStrideD + staged_column(four, row));
#pragma unroll
          for (int j = 0; j < 4; ++j) v[4 * q + j] = values.v[j];
        }
        const int at = 8 * part + i * 32 / S::kLanes, index = part * S::kPasses + i;
        epilogue.store(index, row0 + at, at < rows_left, v, extra[index % 2]);
        if (index + 2 < 4 * S::kPasses) load_extra(index + 2);
      }
    }
    epilogue.end_tile();
    __syncthreads();
  }
  epilogue.end();
}

// --- for the launchers

template <class S>
Tiling tiling_of(int64_t rows, int64_t depth, int64_t columns, const Launch& on) {
  Tiling tiling{};
  tiling.rows = rows, tiling.depth = int(depth), tiling.columns = int(columns);
  tiling.tiles = int((rows + S::kRows - 1) / S::kRows);
  tiling.column_blocks = int((columns + S::kColumns - 1) / S::kColumns);
  const int enough = 2 * on.gpu.multiprocessors / tiling.column_blocks;  // two blocks fit a multiprocessor
  tiling.programs = tiling.tiles == 0 ? 0 : enough < 1 ? 1 : min_of(tiling.tiles, enough);
  return tiling;
}

// The epilogue is made of its Arguments, which have the tiling; a multiprocessor is to hold kBlocks blocks, and each
// has kSharedBytes of shared memory.
template <class S, bool transposed, class Source, class Epilogue>
__global__ void __launch_bounds__(S::kThreads, Epilogue::kBlocks)
    product_kernel(const Source source, const typename S::T* weight, const typename Epilogue::Arguments args) {
  if constexpr (S::kAvailable) {
    Epilogue epilogue(args);
    product<S, transposed>(source, weight, args.tiling, epilogue);
  } else {
    not_compiled();
  }
}

// Launches a kernel that is a product of this tiling.
template <class S, class... Parameters, class... Args>
cudaError_t launch_product(void (*kernel)(Parameters...), const Tiling& tiling, int shared_bytes, const Launch& on,
                           const Args&... args) {
  if (tiling.programs == 0) return cudaSuccess;
  return launch(kernel, dim3(tiling.column_blocks, tiling.programs), dim3(S::kThreads), shared_bytes, on.stream,
                args...);
}

template <class S, bool transposed, class Epilogue, class Source>
cudaError_t start_product(const Source& source, const void* weight, const typename Epilogue::Arguments& args,
                          const Launch& on) {
  return launch_product<S>(product_kernel<S, transposed, Source, Epilogue>, args.tiling, Epilogue::kSharedBytes, on,
                           source, static_cast<const typename S::T*>(weight), args);
}

// f(Kind<T, Math>()) of a dtype on a device.
template <class T_, class Math_>
struct Kind {
  using T = T_;
  using Math = Math_;
};

template <class F>
cudaError_t with_kind(Dtype dtype, const Launch& launch, const F& f) {
  const bool sm_80 = launch.gpu.architecture >= 80;
  switch (dtype) {
    case Dtype::f16:
      return f(Kind<half, half>());
    case Dtype::bf16:
      return sm_80 ? f(Kind<bfloat16, bfloat16>()) : f(Kind<bfloat16, float>());
    case Dtype::f32:
      return sm_80 && launch.tf32 ? f(Kind<float, tf32>()) : f(Kind<float, float>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether rows of these channel counts can be read and written by packs; `pointers`: all that are.
template <class T, int n>
bool all_packs(int64_t depth, int64_t columns, const void* const (&pointers)[n]) {
  bool packs = depth % kPack<T> == 0 && columns % kPack<T> == 0;
  for (const void* pointer : pointers) packs = packs && aligned(pointer);
  return packs;
}

// start.run<Shape<...>>() of the shape for a product of these sizes.
template <int n, class Start>
cudaError_t choose_shape(Dtype dtype, int64_t rows, int64_t depth, int64_t columns, const void* const (&pointers)[n],
                         const Launch& launch, const Start& start) {
  return with_kind(dtype, launch, [&](auto kind) {
    using T = typename decltype(kind)::T;
    using Math = typename decltype(kind)::Math;
    if (!all_packs<T>(depth, columns, pointers)) return start.template run<Shape<T, Math, false, 64>>();
    // Few tiles: narrower ones keep more multiprocessors busy. Before sm_80 a block has 64 KiB of shared memory in
    // all.
    const bool wide = launch.gpu.architecture >= 80 && columns > 64 &&
                      (rows + 127) / 128 * ((columns + 127) / 128) >= launch.gpu.multiprocessors;
    return wide ? start.template run<Shape<T, Math, true, 128>>() : start.template run<Shape<T, Math, true, 64>>();
  });
}

}  // namespace mx::cuda
