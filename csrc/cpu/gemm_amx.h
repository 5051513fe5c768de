// The matrix product of gemm.h on AMX: eight tile registers of 16 rows x 64 bytes, four of which hold the sums of a
// block of 32 rows x 32 columns, two the rows' pairs and two the panel's. (Intel's Software Developer's Manual, volume
// 1, chapter 18.)
//
// One instruction multiplies 16 rows x 32 numbers x 16 columns in 16 cycles, so everything else has to happen beside
// it: the sums of a block are stored and taken by the epilogue, in vectors, while the next block is multiplied.
#pragma once

#include "gemm.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

constexpr int kTileRows = 16;   // of a tile register
constexpr int kTilePairs = 16;  // in one of its rows
static_assert(kDepthStep<Pair> == kTilePairs * kGroup<Pair>);
static_assert(kBlockRows == 2 * kTileRows && kPanel<float> == 2 * kTileRows);

// The tile registers exist for this thread while one of these does.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTileRows;
    }
    asm volatile("" ::"m"(config));  // compilers know of the next instruction that it reads 8 bytes
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// The product of a block, on its way from the tile registers to the epilogue, a few rows at a time.
template <int vectors, class Epilogue>
class Finish {
 public:
  Finish(const float* product, int64_t row, int64_t count, Epilogue& epilogue)
      : product_(product), row_(row), count_(count), epilogue_(epilogue) {}

  // All rows before `end` of the block, but for those of an unfinished step.
  MX_INLINE void until(int64_t end) {
    for (; done_ + kRows <= min_of(end, count_); done_ += kRows) rows(kRows);
    if (end >= count_ && done_ < count_) {
      rows(int(count_ - done_));
      done_ = count_;
    }
  }

 private:
  static constexpr int kRows = 8;

  MX_INLINE void rows(int count) {
    Vec<float> sums[kRows][vectors];
    if constexpr (Epilogue::kAdds) epilogue_.begin(row_ + done_, count, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const Vec<float> added = load<float>(product_ + (done_ + i) * kPanel<float> + v * kLanes<float>);
        sums[i][v] = Epilogue::kAdds ? sums[i][v] + added : added;
      }
    epilogue_.end(row_ + done_, count, sums);
  }

  const float* product_;
  int64_t row_, count_, done_ = 0;
  Epilogue& epilogue_;
};

// The product of row_tiles x vectors tile registers into `sums`, rows of kPanel; meanwhile the block before is
// finished.
template <int row_tiles, int vectors, class Before>
MX_INLINE void multiply_block(const Pair* tile, int64_t pitch, const Pair* panel, int64_t groups, Prefetcher& ahead,
                              float* sums, Before& before) {
  const int64_t row_bytes = pitch * int64_t(sizeof(Pair)), panel_bytes = kPanel<float> * int64_t(sizeof(Pair));
  _tile_zero(0);
  if constexpr (vectors > 1) _tile_zero(1);
  if constexpr (row_tiles > 1) _tile_zero(2);
  if constexpr (row_tiles > 1 && vectors > 1) _tile_zero(3);
  Prefetcher::Share share = ahead.take(groups / kTilePairs);
  const char* asked = share.next;
  const int64_t rows_per_step = (kBlockRows << 16) * kTilePairs / groups;  // in 1/65536
  int64_t before_end = 0;
  for (int64_t d = 0; d < groups; d += kTilePairs) {
    for (asked += share.bytes_per_step; share.next < asked; share.next += 64) __builtin_prefetch(share.next, 0, 2);
    _tile_loadd(6, panel + d * kPanel<float>, panel_bytes);
    _tile_loadd(4, tile + d, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (vectors > 1) {
      _tile_loadd(7, panel + d * kPanel<float> + kTileRows, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (row_tiles > 1) {
      _tile_loadd(5, tile + kTileRows * pitch + d, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (vectors > 1) _tile_dpbf16ps(3, 5, 7);
    }
    before.until((before_end += rows_per_step) >> 16);
  }
  before.until(kBlockRows);
  constexpr int sums_pitch = kPanel<float>, sums_bytes = sums_pitch * int(sizeof(float));
  _tile_stored(0, sums, sums_bytes);
  if constexpr (vectors > 1) _tile_stored(1, sums + kTileRows, sums_bytes);
  if constexpr (row_tiles > 1) _tile_stored(2, sums + kTileRows * sums_pitch, sums_bytes);
  if constexpr (row_tiles > 1 && vectors > 1) _tile_stored(3, sums + kTileRows * sums_pitch + kTileRows, sums_bytes);
}

template <int vectors, class Epilogue>
inline void multiply_panel(const Pair* tile, int64_t pitch, int64_t rows, const Pair* panel, int64_t groups,
                           Prefetcher& ahead, Epilogue& epilogue) {
  asm volatile("" ::: "memory");  // loads of tile registers do not tell the compiler that they read
  alignas(64) float sums[2][kBlockRows * kPanel<float>];
  Epilogue own = epilogue;  // a copy that nobody else knows can stay in registers
  int64_t last = 0;
  for (int64_t row = 0; row < rows; last = row, row += kBlockRows) {
    float* const product = sums[row / kBlockRows % 2];
    Finish<vectors, Epilogue> before(sums[(row / kBlockRows + 1) % 2], last, row - last, own);
    if (rows - row > kTileRows)
      multiply_block<2, vectors>(tile + row * pitch, pitch, panel, groups, ahead, product, before);
    else
      multiply_block<1, vectors>(tile + row * pitch, pitch, panel, groups, ahead, product, before);
  }
  if (rows > 0) Finish<vectors, Epilogue>(sums[last / kBlockRows % 2], last, rows - last, own).until(rows - last);
  epilogue = own;
}

// As gemm.h's, whose `by_column` AMX does not have.
template <bool by_column, class Epilogue>
inline void multiply_tile(const Pair* tile, int64_t pitch, int64_t rows, const Pair* panel, int64_t columns,
                          int64_t groups, Prefetcher& ahead, Epilogue& epilogue) {
  static_assert(!by_column);
  if (columns > kLanes<float>)
    multiply_panel<2>(tile, pitch, rows, panel, groups, ahead, epilogue);
  else
    multiply_panel<1>(tile, pitch, rows, panel, groups, ahead, epilogue);
}

// From rows of pairs along the columns (a tile of `rows` rows) to a row of pairs along the rows for each column, filled
// up with 0 to whole tile registers.
inline void transpose_pairs(const Pair* tile, int64_t pitch, int64_t rows, int64_t columns, Pair* out,
                            int64_t out_pitch) {
  const auto half = [&](int64_t row, int64_t column, auto upper) {
    const Pair* const from = tile + row * pitch + column / 2;
    Vec<float> block[kTilePairs];
#pragma GCC unroll 16
    for (int i = 0; i < kTilePairs; ++i) {
      const bool first_exists = row + 2 * i < rows, second_exists = row + 2 * i + 1 < rows;
      const __m512i first = first_exists ? _mm512_loadu_si512(from + 2 * i * pitch) : _mm512_setzero_si512();
      const __m512i second = second_exists ? _mm512_loadu_si512(from + (2 * i + 1) * pitch) : _mm512_setzero_si512();
      block[i] =
          (Vec<float>)(upper.value ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second));
    }
    transpose<float>(block);
    // Of each eight columns the lower halves are the first four.
#pragma GCC unroll 16
    for (int i = 0; i < kTilePairs; ++i) {
      const int64_t c = column + i / 4 * 8 + upper.value * 4 + i % 4;
      if (c < columns) store<float>(reinterpret_cast<float*>(out + c * out_pitch + row / 2), block[i]);
    }
  };
  for (int64_t column = 0; column < columns; column += 2 * kTilePairs)
    for (int64_t row = 0; row < rows; row += 2 * kTilePairs) {
      half(row, column, Constant<0>{});
      half(row, column, Constant<1>{});
    }
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
