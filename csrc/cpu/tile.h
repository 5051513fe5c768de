// Tiles: blocks of rows of a convolution's operands, converted to the accumulation type and rebuilt on load
// (normalised and rectified activations, output gradients), in a worker's L2 cache.
#pragma once

#include "../ops.h"
#include "dispatch.h"
#include "gemm.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Tiles have a multiple of this many rows, whatever the instruction set, so that only the last has a ragged end.
constexpr int64_t kTileStep = 12;
static_assert(kTileStep % kBlockRows == 0);

// The grid of row tiles. It depends on the shape alone.
struct RowTiles {
  int64_t total, rows, count;

  int64_t begin(int64_t tile) const { return tile * rows; }
  int64_t size(int64_t tile) const { return min_of(rows, total - tile * rows); }
};

// As many rows as fit in 256 KiB, a quarter to a half of an L2 cache, but small inputs still give 16 tiles of 48 rows.
inline RowTiles row_tiles(int64_t total, int64_t bytes_per_row) {
  if (total == 0) return {0, kTileStep, 0};
  const int64_t most = min_of(max_of(256 * 1024 / bytes_per_row, 5 * kTileStep), 32 * kTileStep);
  const int64_t wanted = min_of(most / kTileStep * kTileStep, max_of(ceil_div(total, 16), 4 * kTileStep));
  const int64_t rows = round_up(ceil_div(total, ceil_div(total, wanted)), kTileStep);
  return {total, rows, ceil_div(total, rows)};
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

// The input of a convolution: relu(normalise(u)) by bn, or u itself if bn is null.
template <class A>
struct Activation {
  const A* bn;  // [BN_ROWS][channels] or null
  int64_t channels;

  bool plain() const { return bn == nullptr; }
  const A* row(int which) const { return bn + which * channels; }
};

// z of one vector; backward masks by the very same expression.
template <class A>
MX_INLINE Vec<A> normalise(Vec<A> centred, Vec<A> scale, Vec<A> shift) {
  return fma(centred, scale, shift);
}

// `count` channels of `rows` rows, into rows `out_pitch` apart. Lanes behind a partial vector are written as 0 after
// rectifying 0 - 0: the output must have room for whole vectors.
template <int rows, bool partial, class T>
MX_INLINE void activate_lanes(const T* u, int64_t u_pitch, int count, const Activation<Acc<T>>& activation,
                              int64_t channel, Acc<T>* out, int64_t out_pitch) {
  using A = Acc<T>;
  Vec<A> value[rows];
  for (int i = 0; i < rows; ++i) value[i] = load_lanes<partial, T>(u + i * u_pitch, count);
  if (!activation.plain()) {
    const Vec<A> mean = load_lanes<partial, A>(activation.row(BN_MEAN) + channel, count);
    const Vec<A> scale = load_lanes<partial, A>(activation.row(BN_SCALE) + channel, count);
    const Vec<A> shift = load_lanes<partial, A>(activation.row(BN_SHIFT) + channel, count);
    for (int i = 0; i < rows; ++i) value[i] = relu(normalise<A>(value[i] - mean, scale, shift));
  }
  for (int i = 0; i < rows; ++i) store<A>(out + i * out_pitch, value[i]);
}

template <int rows, class T>
inline void activate_row_block(const T* u, const Activation<Acc<T>>& activation, Acc<T>* out, int64_t out_pitch,
                               int64_t panel_stride) {
  constexpr int lanes = kLanes<Acc<T>>;
  const int64_t channels = activation.channels;
  for (int64_t c = 0; c < channels; c += lanes) {
    // Row-major output: panel_stride is 0. Panels: kPanel columns of all rows lie together.
    Acc<T>* to = panel_stride ? out + c / kPanel<Acc<T>> * panel_stride + c % kPanel<Acc<T>> : out + c;
    const int64_t count = channels - c;
    if (count >= lanes)
      activate_lanes<rows, false>(u + c, channels, lanes, activation, c, to, out_pitch);
    else
      activate_lanes<rows, true>(u + c, channels, int(count), activation, c, to, out_pitch);
  }
}

template <class T>
inline void activate(const T* u, int64_t rows, const Activation<Acc<T>>& activation, Acc<T>* out, int64_t out_pitch,
                     int64_t panel_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    activate_row_block<4>(u + i * activation.channels, activation, out + i * out_pitch, out_pitch, panel_stride);
  for (; i < rows; ++i)
    activate_row_block<1>(u + i * activation.channels, activation, out + i * out_pitch, out_pitch, panel_stride);
}

// Rows of the activation, tile_pitch apart: a tile to broadcast from.
template <class T>
inline void activate_rows(const T* u, int64_t rows, const Activation<Acc<T>>& activation, Acc<T>* tile) {
  activate(u, rows, activation, tile, tile_pitch<Acc<T>>(activation.channels), 0);
}

// Panels [ceil(channels / kPanel)][panel_rows][kPanel]: what a weight gradient multiplies with. Of a last panel only
// the vectors with channels in them are written.
template <class T>
inline void activate_panels(const T* u, int64_t rows, const Activation<Acc<T>>& activation, Acc<T>* panels,
                            int64_t panel_rows) {
  activate(u, rows, activation, panels, kPanel<Acc<T>>, panel_rows * kPanel<Acc<T>>);
}

// The gradient at a convolution's output: P*h + Q*(y - MEAN) + O; P*h without y; h without grad_bn.
template <class T>
struct OutputGradient {
  const T* h;
  const T* y;
  const Acc<T>* grad_bn;  // [GRAD_ROWS][channels]
  int64_t channels;

  const Acc<T>* row(int which) const { return grad_bn + which * channels; }
};

template <int rows, bool partial, class T>
MX_INLINE void gradient_lanes(const OutputGradient<T>& gradient, int64_t row, int64_t channel, int count, Acc<T>* out,
                              int64_t out_pitch) {
  using A = Acc<T>;
  const int64_t offset = row * gradient.channels + channel;
  Vec<A> value[rows];
  for (int i = 0; i < rows; ++i) value[i] = load_lanes<partial, T>(gradient.h + offset + i * gradient.channels, count);
  if (gradient.grad_bn) {
    const Vec<A> p = load_lanes<partial, A>(gradient.row(GRAD_P) + channel, count);
    for (int i = 0; i < rows; ++i) value[i] *= p;
    if (gradient.y) {
      const Vec<A> mean = load_lanes<partial, A>(gradient.row(GRAD_MEAN) + channel, count);
      const Vec<A> q = load_lanes<partial, A>(gradient.row(GRAD_Q) + channel, count);
      const Vec<A> o = load_lanes<partial, A>(gradient.row(GRAD_O) + channel, count);
      for (int i = 0; i < rows; ++i) {
        const Vec<A> y = load_lanes<partial, T>(gradient.y + offset + i * gradient.channels, count);
        value[i] = fma(q, y - mean, value[i]) + o;
      }
    }
  }
  for (int i = 0; i < rows; ++i) store<A>(out + i * out_pitch, value[i]);
}

// Rows [begin, begin + rows) of the gradient, tile_pitch apart.
template <class T>
inline void gradient_rows(const OutputGradient<T>& gradient, int64_t begin, int64_t rows, Acc<T>* tile) {
  using A = Acc<T>;
  const int64_t pitch = tile_pitch<A>(gradient.channels);
  const auto block = [&](auto size, int64_t i) {
    constexpr int block_rows = decltype(size)::value;
    for (int64_t c = 0; c < gradient.channels; c += kLanes<A>) {
      const int64_t count = gradient.channels - c;
      if (count >= kLanes<A>)
        gradient_lanes<block_rows, false>(gradient, begin + i, c, kLanes<A>, tile + i * pitch + c, pitch);
      else
        gradient_lanes<block_rows, true>(gradient, begin + i, c, int(count), tile + i * pitch + c, pitch);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) block(Constant<4>{}, i);
  for (; i < rows; ++i) block(Constant<1>{}, i);
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
