// The matrix product that the pointwise, dense and block kernels share: tiles of rows in cache times packed panels of
// columns, with the sums in registers from the first product to the caller's epilogue.
//
// One operand (the tile) is broadcast element by element, the other (the panel) is read a few vectors at a time. The
// depth is never cut: channel counts are at most a few thousand, so a panel stays in L2, each output is written once,
// and its sum has one order whatever the tile or the thread.
#pragma once

#include "operands.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// The register block is kBlockRows rows by kPanelVectors vectors: 14x2 sums, 2 vectors of the panel and a broadcast
// fill 31 of the 32 registers of AVX-512 and NEON, 6x2 15 of AVX2's 16. Fourteen also divides the pixels of the feature
// maps of 224x224 images. The last block of a tile is the smallest that has room for what is left: each size is code of
// its own. AMX's (gemm_amx.h) have all rows or half of them.
#if defined(MX_ISA_AMX_BF16)
constexpr int kBlockSizes[] = {32, 16};
#elif defined(MX_ISA_AVX512) || defined(__aarch64__)
constexpr int kBlockSizes[] = {14, 11, 8, 4};
#else
constexpr int kBlockSizes[] = {6, 4, 2};
#endif
constexpr int kBlockRows = kBlockSizes[0];
constexpr int kPanelVectors = 2;
template <class A>
constexpr int kPanel = kPanelVectors * kLanes<A>;  // columns of a panel

MX_INLINE int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// The pitch of rows of `elements` elements: whole vectors, and an odd number of cache lines, because rows a multiple of
// 4 KiB apart would share one set of the L1 cache.
template <class E>
MX_INLINE int64_t row_pitch(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(E);
  return (ceil_div(elements, line) | 1) * line;
}

// The pitch of a tile whose rows lie along the depth of the product.
template <class E>
MX_INLINE int64_t tile_pitch(int64_t depth) {
  return row_pitch<E>(groups_of<E>(depth));
}

template <int rows, int vectors, class A>
MX_INLINE void clear(Vec<A> (&sums)[rows][vectors]) {
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[i][v] = zero<A>();
}

// Memory to ask for while products run, so that it is in the L2 cache when the next tile is built from it: products
// leave the way to memory idle, and building a tile waits for little else.
class Prefetcher {
 public:
  static constexpr int kMostRanges = 3;

  Prefetcher() = default;
  // To be spread over products of so many steps along the depth, all register blocks taken together.
  explicit Prefetcher(double steps) : steps_(steps + 1) {}
  // The steps of a product with elements E.
  template <class E>
  static double steps(int64_t rows, double panels, int64_t depth) {
    return double(ceil_div(rows, kBlockRows)) * panels * double(ceil_div(depth, kDepthStep<E>));
  }

  void add(const void* begin, const void* end) {
    if (begin >= end) return;
    ranges_[count_++] = {static_cast<const char*>(begin), static_cast<const char*>(end)};
    bytes_ += double(static_cast<const char*>(end) - static_cast<const char*>(begin));
    bytes_per_step_ = int64_t(bytes_ / steps_) + 1;
  }

  // What a register block of so many steps asks for: `bytes_per_step` bytes from `next` on at each step.
  struct Share {
    const char* next;
    int64_t bytes_per_step;
  };
  MX_INLINE Share take(int64_t steps) {
    if (next_ >= end_) {
      if (count_ == 0) return {reinterpret_cast<const char*>(this), 0};
      --count_;
      next_ = ranges_[count_].begin;
      end_ = ranges_[count_].end;
    }
    const Share share = {next_, bytes_per_step_};
    next_ += steps * bytes_per_step_;
    return share;
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  Range ranges_[kMostRanges];
  int count_ = 0;
  double steps_ = 1, bytes_ = 0;
  int64_t bytes_per_step_ = 0;
  const char *next_ = nullptr, *end_ = nullptr;
};

// sums[i][v] += sum over d < groups of tile(i, d) * panel[d][v], where tile(i, d) is tile[i*pitch + d], or
// tile[d*pitch + i] if by_column.
template <bool by_column, int rows, int vectors, class E>
MX_INLINE void multiply(const E* tile, int64_t pitch, const E* panel, int64_t groups, Prefetcher& ahead,
                        Vec<Acc<E>> (&sums)[rows][vectors]) {
  using A = Acc<E>;
  // The addresses of the rows, in a form that needs few registers: compilers else keep one for each row, and fetch them
  // back from vector registers or the stack, by instructions that take the place of multiplications.
  constexpr int kApart = 4, kPointers = by_column ? 1 : (rows + kApart - 1) / kApart;
  const int64_t row_bytes = pitch * int64_t(sizeof(E)), step = by_column ? row_bytes : int64_t(sizeof(E));
  const char* base = reinterpret_cast<const char*>(tile);
  Prefetcher::Share share = ahead.take(groups);
  for (int64_t d = 0; d < groups; ++d, panel += kPanel<A>) {
    __builtin_prefetch(share.next, 0, 2);
    share.next += share.bytes_per_step;
    // The panel comes from the L2 cache.
    constexpr int kGroupsAhead = 8;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(panel + kGroupsAhead * kPanel<A> + v * kLanes<A>);
    // Rows of a tile read by column are too far apart for the machine to see where they lead.
    constexpr int kRowsAhead = 16;
    if constexpr (by_column) {
      __builtin_prefetch(base + kRowsAhead * row_bytes);
      __builtin_prefetch(base + kRowsAhead * row_bytes + (rows - 1) * sizeof(E));
    }
    Vec<A> b[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) b[v] = load_elements<E>(panel + v * kLanes<A>);
    const char* at[kPointers];
#pragma GCC unroll 4
    for (int k = 0; k < kPointers; ++k) at[k] = k == 0 ? base : at[k - 1] + kApart * row_bytes;
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const char* const from = by_column ? at[0] + i * sizeof(E) : at[i / kApart] + i % kApart * row_bytes;
      const Vec<A> a = broadcast_element<E>(*reinterpret_cast<const E*>(from));
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[i][v] = multiply_add<E>(a, b[v], sums[i][v]);
    }
    base += step;
    asm("" : "+r"(base));
  }
}

// One register block. The epilogue's member functions, with count = the rows that exist (the block's others hold
// nothing of meaning):
//   begin(row, count, sums)   only if it kAdds: sets the sums to start from
//   end(row, count, sums)     takes the result
template <bool by_column, int rows, int vectors, class E, class Epilogue>
__attribute__((noinline)) void multiply_block(const E* tile, int64_t pitch, const E* panel, int64_t groups, int64_t row,
                                              int count, Prefetcher& ahead, Epilogue& epilogue) {
  Vec<Acc<E>> sums[rows][vectors];
  if constexpr (Epilogue::kAdds)
    epilogue.begin(row, count, sums);
  else
    clear<rows, vectors, Acc<E>>(sums);
  multiply<by_column>(tile + row * (by_column ? 1 : pitch), pitch, panel, groups, ahead, sums);
  epilogue.end(row, count, sums);
}

// The smallest block with room for `count` rows.
template <bool by_column, int vectors, int size = 0, class E, class Epilogue>
MX_INLINE void multiply_rows(const E* tile, int64_t pitch, const E* panel, int64_t groups, int64_t row, int count,
                             Prefetcher& ahead, Epilogue& epilogue) {
  if constexpr (size + 1 < int(sizeof(kBlockSizes) / sizeof(int)))
    if (count <= kBlockSizes[size + 1])
      return multiply_rows<by_column, vectors, size + 1>(tile, pitch, panel, groups, row, count, ahead, epilogue);
  multiply_block<by_column, kBlockSizes[size], vectors>(tile, pitch, panel, groups, row, count, ahead, epilogue);
}

template <bool by_column, int vectors, class E, class Epilogue>
inline void multiply_panel(const E* tile, int64_t pitch, int64_t rows, const E* panel, int64_t groups,
                           Prefetcher& ahead, Epilogue& epilogue) {
  for (int64_t row = 0; row < rows; row += kBlockRows)
    multiply_rows<by_column, vectors>(tile, pitch, panel, groups, row, int(min_of(rows - row, kBlockRows)), ahead,
                                      epilogue);
}

// All rows of a tile times one panel of `columns` columns. The tile must be readable, not meaningful, up to the next
// multiple of kBlockRows rows.
template <bool by_column, class E, class Epilogue>
inline void multiply_tile(const E* tile, int64_t pitch, int64_t rows, const E* panel, int64_t columns, int64_t groups,
                          Prefetcher& ahead, Epilogue& epilogue) {
  if (columns > kLanes<Acc<E>>)
    multiply_panel<by_column, 2>(tile, pitch, rows, panel, groups, ahead, epilogue);
  else
    multiply_panel<by_column, 1>(tile, pitch, rows, panel, groups, ahead, epilogue);
}

// --- panels of a weight [columns, depth] ----------------------------------------------------------------------------

// Lane indices into two vectors a, b laid end to end: blocks of `step` lanes change places across the diagonal.
template <class A, int step>
struct SwapBlocks {
  using Index = decltype(Mask<A>{}[0] + 0);
  Index first[kLanes<A>] = {}, second[kLanes<A>] = {};
  constexpr SwapBlocks() {
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      first[lane] = lane & step ? kLanes<A> + lane - step : lane;
      second[lane] = lane & step ? kLanes<A> + lane : lane + step;
    }
  }
};

// Lane i is lane index[i] of a and b laid end to end.
template <class A>
MX_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, Mask<A> index) {
#if defined(__clang__)  // has only a built-in that takes the indices as arguments, and recognises this loop
  Vec<A> out;
  for (int i = 0; i < kLanes<A>; ++i) out[i] = index[i] < kLanes<A> ? a[index[i]] : b[index[i] - kLanes<A>];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Swaps rows and columns of kLanes vectors.
template <class A, int step = 1>
MX_INLINE void transpose(Vec<A> (&rows)[kLanes<A>]) {
  if constexpr (step < kLanes<A>) {
    static constexpr SwapBlocks<A, step> lanes;
    const auto first = load_bits<Mask<A>>(lanes.first), second = load_bits<Mask<A>>(lanes.second);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & step) continue;
      const Vec<A> a = rows[i], b = rows[i + step];
      rows[i] = shuffle<A>(a, b, first);
      rows[i + step] = shuffle<A>(a, b, second);
    }
    transpose<A, 2 * step>(rows);
  }
}

// One block of lanes x lanes elements, in registers throughout; `rows` x `count` numbers of it exist in the weight, the
// rest is 0.
template <bool partial, class T>
MX_INLINE void pack_block(const T* weight, int64_t pitch, int rows, int count, Operand<T>* out) {
  using A = Acc<T>;
  Vec<A> block[kLanes<A>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    block[i] = partial && i >= rows ? zero<A>() : load_row_elements<partial, T>(weight + i * pitch, count);
  transpose<A>(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    if (!partial || i < groups_of<Operand<T>>(count)) __builtin_memcpy(out + i * kPanel<A>, &block[i], sizeof block[i]);
}

// The panel for a product over the weight's second dimension: with elements of one number, out[d][j] =
// weight[j*depth + d]. Columns from `columns` on are 0.
template <class T>
inline void pack_transposed(const T* weight, int64_t columns, int64_t depth, Operand<T>* out) {
  using E = Operand<T>;
  constexpr int lanes = kLanes<Acc<T>>, numbers = lanes * kGroup<E>;
  for (int64_t j = 0; j < kPanel<Acc<T>>; j += lanes) {
    const int rows = int(min_of(max_of(columns - j, 0), lanes));
    for (int64_t d = 0; d < depth; d += numbers) {
      const int count = int(min_of(depth - d, numbers));
      const T* block = weight + j * depth + d;
      E* to = out + d / kGroup<E> * kPanel<Acc<T>> + j;
      if (rows == lanes && count == numbers)
        pack_block<false>(block, depth, lanes, numbers, to);
      else
        pack_block<true>(block, depth, rows, count, to);
    }
  }
}

// All panels of a weight, one after the other.
template <class T>
MX_INLINE int64_t panel_size(int64_t depth) {
  return groups_of<Operand<T>>(depth) * kPanel<Acc<T>>;
}
template <class T>
MX_INLINE int64_t panels_size(int64_t columns, int64_t depth) {
  return ceil_div(columns, kPanel<Acc<T>>) * panel_size<T>(depth);
}
template <class T>
MX_INLINE void pack_panel(const T* weight, int64_t columns, int64_t depth, int64_t panel, Operand<T>* panels) {
  const int64_t column = panel * kPanel<Acc<T>>;
  pack_transposed<T>(weight + column * depth, columns - column, depth, panels + panel * panel_size<T>(depth));
}

// The panel for a product over the weight's first dimension: with elements of one number, out[d][j] =
// weight[d*pitch + j].
template <class T>
inline void pack_rows(const T* weight, int64_t pitch, int64_t columns, int64_t depth, Operand<T>* out) {
  using A = Acc<T>;
  constexpr int group = kGroup<Operand<T>>;
  const int64_t filled = groups_of<Operand<T>>(depth) * group;
  for (int64_t d = 0; d < filled; d += group, out += kPanel<A>)
    for (int v = 0; v < kPanelVectors; ++v) {
      const int count = int(min_of(max_of(columns - v * kLanes<A>, 0), kLanes<A>));
      Vec<A> values[group];
      for (int i = 0; i < group; ++i) {
        const T* row = weight + (d + i) * pitch + v * kLanes<A>;
        values[i] = d + i < depth ? load_partial<T>(row, count) : zero<A>();
      }
      store_group<T>(out + v * kLanes<A>, values);
    }
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE

#if defined(MX_ISA_AMX_BF16)
#include "gemm_amx.h"
#else
namespace mx::cpu::MX_ISA_NAMESPACE {

// What products need from the thread that multiplies: nothing.
struct MatrixUnit {
  MatrixUnit() {}
};

}  // namespace mx::cpu::MX_ISA_NAMESPACE
#endif
