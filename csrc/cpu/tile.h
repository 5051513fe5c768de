// Tiles: runs of rows of a convolution's operands, converted to the accumulation type and rebuilt on load (normalised
// and activated inputs, output gradients), in a worker's L2 cache.
#pragma once

#include "activation.h"
#include "dispatch.h"
#include "gemm.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Tiles have a multiple of this many rows, so that only the last has a ragged end.
constexpr int64_t kTileStep = kBlockRows < 12 ? 12 : kBlockRows;
static_assert(kTileStep % kBlockRows == 0);

// The grid of row tiles. It depends on the shape alone.
struct RowTiles {
  int64_t total, rows, count;

  int64_t begin(int64_t tile) const { return tile * rows; }
  int64_t size(int64_t tile) const { return min_of(rows, total - tile * rows); }
  int64_t of(int64_t row) const { return row / rows; }
};

// About `count` tiles of the same size.
inline RowTiles even_tiles(int64_t total, int64_t count) {
  const int64_t rows = round_up(ceil_div(total, count), kTileStep);
  return {total, rows, ceil_div(total, rows)};
}

// As many rows as fit in 256 KiB, a quarter to a half of an L2 cache, but small inputs still give 32 tiles of 48 rows.
inline RowTiles row_tiles(int64_t total, int64_t bytes_per_row) {
  if (total == 0) return {0, kTileStep, 0};
  const int64_t most = min_of(max_of(256 * 1024 / bytes_per_row, 60), 384);
  const int64_t wanted = min_of(most / kTileStep * kTileStep, max_of(ceil_div(total, 32), 48));
  const int64_t rows = round_up(ceil_div(total, ceil_div(total, wanted)), kTileStep);
  return {total, rows, ceil_div(total, rows)};
}

// The end of the input that output pixels [0, pixel) of a convolution read. Pixels are numbered across the whole
// batch.
template <class T>
MX_INLINE const T* reach_of_taps(const T* x, const Geometry& g, int64_t pixel) {
  const int64_t ox = pixel % g.out_w, oy = pixel / g.out_w % g.out_h, image = pixel / (g.out_w * g.out_h);
  const int64_t ix = min_of(ox * g.stride - g.pad_left + g.kernel, g.w);
  const int64_t iy = min_of(oy * g.stride - g.pad_top + g.kernel - 1, g.h - 1);
  return x + min_of((image * g.h + iy) * g.w + ix, g.n * g.h * g.w) * g.c_in;
}

// Hands out consecutive pieces of one scratch allocation, 64-byte aligned.
class Workspace {
 public:
  explicit Workspace(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class A>
  static int64_t bytes(int64_t elements) {
    return round_up(elements * int64_t(sizeof(A)), 64);
  }

  template <class A>
  A* take(int64_t elements) {
    A* piece = reinterpret_cast<A*>(next_);
    next_ += bytes<A>(elements);
    return piece;
  }

 private:
  char* next_;
};

// Factors of the activated input by image and channel, for the rows from `begin` on.
template <class T>
struct Gate {
  const T* factors;  // [images][channels]; null: 1
  int64_t channels, pixels, begin;

  static Gate none() { return {nullptr, 0, 1, 0}; }
  Gate from(int64_t row) const { return {factors, channels, pixels, begin + row}; }
  int64_t image(int64_t row) const { return (begin + row) / pixels; }
  const T* row(int64_t row) const { return factors + image(row) * channels; }
};

// The gate's rows for a run of rows: looked up once for all their channels.
template <class T>
struct GateRows {
  const Gate<T>& gate;
  const T* of_row[4];

  explicit GateRows(const Gate<T>& gate) : gate(gate) {}

  template <bool partial, int rows>
  MX_INLINE void multiply(int64_t i, int64_t channel, int count, Vec<Acc<T>> (&value)[rows]) {
    if (gate.factors == nullptr) return;
    if (channel == 0)
      for (int k = 0; k < rows; ++k) of_row[k] = gate.row(i + k);
#pragma GCC unroll 4
    for (int k = 0; k < rows; ++k) value[k] *= load_lanes<partial, T>(of_row[k] + channel, count);
  }
};

// The input's `count` channels of `rows` rows, made from u. Lanes after a partial vector are act(0), 0.
template <int rows, bool partial, bool normalises, Act act, class T>
MX_INLINE void activate_lanes(const T* u, int64_t u_pitch, int count, const ChannelNormAct<Acc<T>>& input,
                              int64_t channel, Vec<Acc<T>> (&value)[rows]) {
  using A = Acc<T>;
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) value[i] = load_lanes<partial, T>(u + i * u_pitch, count);
  if constexpr (normalises) {
    const ChannelNorm<A> norm = input.template norm<partial>(channel, count);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) value[i] = activate<act>(norm.z(value[i]), input.slope);
  }
}

// Calls body(Constant<rows>, i, channel, Constant<partial>, count) over rows in runs of four, then `rest`, and
// channels in vectors.
template <int rest, class A, class Body>
MX_INLINE void for_row_runs(int64_t rows, int64_t channels, const Body& body) {
  const auto vectors = [&](auto run, int64_t i) {
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) body(run, i, c, Constant<false>{}, kLanes<A>);
    if (c < channels) body(run, i, c, Constant<true>{}, int(channels - c));
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) vectors(Constant<4>{}, i);
  for (; i + rest <= rows; i += rest) vectors(Constant<rest>{}, i);
  for (; i < rows; ++i) vectors(Constant<1>{}, i);
}

// `rows` values of a column of vectors as elements across rows: `apart` elements from one group of rows to the next. A
// last row without a partner is joined by zeros.
template <int rows, class T>
MX_INLINE void store_groups(Operand<T>* to, int64_t apart, const Vec<Acc<T>> (&values)[rows]) {
  constexpr int group = kGroup<Operand<T>>;
#pragma GCC unroll 4
  for (int i = 0; i < rows; i += group) {
    Vec<Acc<T>> pair[group];
#pragma GCC unroll 2
    for (int k = 0; k < group; ++k) pair[k] = i + k < rows ? values[i + k] : zero<Acc<T>>();
    store_group<T>(to + i / group * apart, pair);
  }
}

// Rows of the input, tile_pitch apart: a tile to broadcast from. The tile has room for whole vectors.
template <class T>
inline void activate_rows(const T* u, int64_t rows, const ChannelNormAct<Acc<T>>& input, const Gate<T>& gate,
                          Operand<T>* tile) {
  const int64_t channels = input.channels, pitch = tile_pitch<Operand<T>>(channels);
  GateRows<T> gates(gate);
  with_norm_act(input, [&](auto normalises, auto act) {
    for_row_runs<1, Acc<T>>(rows, channels, [&](auto run, int64_t i, int64_t c, auto partial, int count) {
      Vec<Acc<T>> value[run.value];
      activate_lanes<run.value, partial.value, normalises.value, act.value>(u + i * channels + c, channels, count,
                                                                            input, c, value);
      gates.template multiply<partial.value>(i, c, count, value);
#pragma GCC unroll 4
      for (int k = 0; k < run.value; ++k) store_in_row<T>(tile + (i + k) * pitch, c, value[k]);
    });
  });
}

// The input in panels [ceil(channels / kPanel)][panel_rows / kGroup][kPanel], with rows along the depth: what a weight
// gradient multiplies with. Of a last panel only the vectors with channels in them are written.
template <class T>
inline void activate_panels(const T* u, int64_t rows, const ChannelNormAct<Acc<T>>& input, const Gate<T>& gate,
                            Operand<T>* panels, int64_t panel_rows) {
  using A = Acc<T>;
  constexpr int group = kGroup<Operand<T>>;
  const int64_t channels = input.channels, panel_size = panel_rows / group * kPanel<A>;
  GateRows<T> gates(gate);
  with_norm_act(input, [&](auto normalises, auto act) {
    for_row_runs<group, A>(rows, channels, [&](auto run, int64_t i, int64_t c, auto partial, int count) {
      Vec<A> value[run.value];
      activate_lanes<run.value, partial.value, normalises.value, act.value>(u + i * channels + c, channels, count,
                                                                            input, c, value);
      gates.template multiply<partial.value>(i, c, count, value);
      store_groups<run.value, T>(panels + c / kPanel<A> * panel_size + i / group * kPanel<A> + c % kPanel<A>, kPanel<A>,
                                 value);
    });
  });
}

// dy, the gradient at a convolution's output (csrc/ops.h): without y, DZ_COEFFICIENT*dz; without grad_bn, dz.
template <class T>
struct OutputGradient {
  const T* dz;
  const T* y;
  const Acc<T>* grad_bn;  // [GRAD_ROWS][channels]
  int64_t channels;

  const Acc<T>* row(int which) const { return grad_bn + which * channels; }
};

template <int rows, bool partial, class T>
MX_INLINE void gradient_lanes(const OutputGradient<T>& gradient, int64_t row, int64_t channel, int count,
                              Vec<Acc<T>> (&value)[rows]) {
  using A = Acc<T>;
  const int64_t offset = row * gradient.channels + channel;
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) value[i] = load_lanes<partial, T>(gradient.dz + offset + i * gradient.channels, count);
  if (gradient.grad_bn) {
    const Vec<A> dz_coefficient = load_lanes<partial, A>(gradient.row(GRAD_DZ_COEFFICIENT) + channel, count);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) value[i] *= dz_coefficient;
    if (gradient.y) {
      const Vec<A> mean = load_lanes<partial, A>(gradient.row(GRAD_MEAN) + channel, count);
      const Vec<A> y_coefficient = load_lanes<partial, A>(gradient.row(GRAD_Y_COEFFICIENT) + channel, count);
      const Vec<A> constant = load_lanes<partial, A>(gradient.row(GRAD_CONSTANT) + channel, count);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const Vec<A> y = load_lanes<partial, T>(gradient.y + offset + i * gradient.channels, count);
        value[i] = fma(y_coefficient, y - mean, value[i]) + constant;
      }
    }
  }
}

// Where the gradient of the weight finds an element of the output gradient's tile: a group of rows, of one column.
template <class E>
struct AcrossLayout {
  // How multiply_tile is to read it.
#if defined(MX_ISA_AMX_BF16)
  static constexpr bool kByColumn = false;
#else
  static constexpr bool kByColumn = true;
#endif

  int64_t pitch, size;  // with what multiply_tile reads after the last column

  AcrossLayout(int64_t groups, int64_t columns)
      : pitch(row_pitch<E>(kByColumn ? columns : groups)),
        size(kByColumn ? pitch * groups + kBlockRows : pitch * round_up(columns, kBlockRows)) {}
  int64_t at(int64_t group, int64_t column) const {
    return kByColumn ? group * pitch + column : column * pitch + group;
  }
};

// The output gradient's tile, for the two products of a backward pass. The same memory, where an element is one number.
template <class T>
struct GradientTile {
  using E = Operand<T>;
  static constexpr bool kApart = kGroup<E> > 1;
  static constexpr bool kTransposed = kApart && !AcrossLayout<E>::kByColumn;  // `across` is made from by_row

  E* by_row;  // for the input gradient: rows tile_pitch apart; null: not wanted, if `across` is not made of it
  E* across;  // for the weight gradient; null: not wanted
  int64_t across_pitch;
};

// Fills up a tile's rows, and panels with rows along the depth, with 0.
template <class E>
MX_INLINE void fill_up_rows(E* tile, int64_t rows, int64_t depth) {
  const int64_t written = round_up(depth, kLanes<Acc<E>>) / kGroup<E>, filled = groups_of<E>(depth);
  if (kDepthStep<E> == kGroup<E> || written >= filled) return;
  for (int64_t i = 0; i < rows; ++i)
    __builtin_memset(tile + i * tile_pitch<E>(depth) + written, 0, (filled - written) * sizeof(E));
}
template <class E>
MX_INLINE void fill_up_panels(E* panels, int64_t rows, int64_t count, int64_t panel_rows) {
  const int64_t written = ceil_div(rows, kGroup<E>), filled = groups_of<E>(rows);
  constexpr int64_t columns = kPanel<Acc<E>>;
  for (int64_t i = 0; written < filled && i < count; ++i)
    __builtin_memset(panels + (i * (panel_rows / kGroup<E>)+written) * columns, 0,
                     (filled - written) * columns * sizeof(E));
}

// Rows [begin, begin + rows) of the gradient.
template <class T>
inline void gradient_rows(const OutputGradient<T>& gradient, int64_t begin, int64_t rows, const GradientTile<T>& tile) {
  using A = Acc<T>;
  using E = Operand<T>;
  using G = GradientTile<T>;
  constexpr int group = kGroup<E>;
  const int64_t channels = gradient.channels, pitch = tile_pitch<E>(channels);
  for_row_runs<group, A>(rows, channels, [&](auto run, int64_t i, int64_t c, auto partial, int count) {
    Vec<A> value[run.value];
    gradient_lanes<run.value, partial.value>(gradient, begin + i, c, count, value);
    if (!G::kApart || G::kTransposed || tile.by_row) {
#pragma GCC unroll 4
      for (int k = 0; k < run.value; ++k) store_in_row<T>(tile.by_row + (i + k) * pitch, c, value[k]);
    }
    if (G::kApart && !G::kTransposed && tile.across)
      store_groups<run.value, T>(tile.across + i / group * tile.across_pitch + c, tile.across_pitch, value);
  });
  fill_up_rows(tile.by_row, rows, channels);
#if defined(MX_ISA_AMX_BF16)
  if (tile.across) transpose_pairs(tile.by_row, pitch, rows, channels, tile.across, tile.across_pitch);
#endif
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
