// Depthwise 3x3 convolution, forward: y = conv(relu(normalise(u)), weight), with the statistics of y or with the
// inference epilogue in the same pass.
//
// A tile walks down its band of output rows. Each input row is loaded, widened, normalised and rectified once, into a
// ring of three rows that stays in L1; outputs are made from registers, four pixels at a time; the statistics are taken
// from rows just stored. Taps outside the image are left out rather than multiplied by zero, so that an infinite
// weight gives what nn.Conv2d gives.
#pragma once

#include "depthwise_tiles.h"
#include "statistics.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// The optional normalisation and ReLU behind the convolution, for the vector of channels in hand.
template <class A>
struct Epilogue {
  bool bn, relu;
  Vec<A> mean, scale, shift;
};

template <class A, bool partial>
MX_INLINE Epilogue<A> load_epilogue(const A* bn, bool relu, int64_t channels, int64_t c, int count) {
  Epilogue<A> e{bn != nullptr, relu, {}, {}, {}};
  if (bn) {
    e.mean = load_lanes<partial, A>(bn + BN_MEAN * channels + c, count);
    e.scale = load_lanes<partial, A>(bn + BN_SCALE * channels + c, count);
    e.shift = load_lanes<partial, A>(bn + BN_SHIFT * channels + c, count);
  }
  return e;
}

template <class A>
MX_INLINE Vec<A> apply(const Epilogue<A>& e, Vec<A> v) {
  if (e.bn) v = fma(v - e.mean, e.scale, e.shift);
  if (e.relu) v = relu(v);
  return v;
}

// One output row of a tile, for one vector of channels. row[ky] is the input row under weight row ky, kChannelBlock
// elements a pixel, so placed that row[ky][0] would be column 0; null outside the image. `zeros` is a row of zeros as
// long. weight is [9][channels].
template <class T, int stride, bool partial>
inline void depthwise_forward_row(const Acc<T>* const (&rows)[3], const Geometry& g, const Acc<T>* weight, int count,
                                  int64_t x_begin, int64_t x_end, const Epilogue<Acc<T>>& epilogue,
                                  const Acc<T>* zeros, T* out) {
  using A = Acc<T>;
  constexpr int kStep = kChannelBlock<A>;
  const int64_t channels = g.c_in;
  // A row outside the image is read as zeros, with zeros for weights, so that the loops below have one form.
  const A* row[3];
  Vec<A> w[3][3];
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
    row[ky] = rows[ky] ? rows[ky] : zeros;
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx)
      w[ky][kx] = rows[ky] ? load_lanes<partial, A>(weight + (ky * 3 + kx) * channels, count) : zero<A>();
  }

  auto put = [&](int64_t x, Vec<A> v) {
    store_lanes<partial, T>(out + x * channels, apply(epilogue, v), count);
  };
  auto border_pixel = [&](int64_t x) {
    Vec<A> acc = zero<A>();
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      const int64_t ix = x * stride + kx - g.padding;
      if (ix < 0 || ix >= g.w) continue;
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) acc = fma(load<A>(row[ky] + ix * kStep), w[ky][kx], acc);
    }
    put(x, acc);
  };

  // Interior pixels have all three columns inside the image.
  const int64_t interior_begin = min_of(max_of(x_begin, g.padding), x_end);
  const int64_t interior_end = max_of(min_of(x_end, (g.w - 3 + g.padding + stride) / stride), interior_begin);
  constexpr int kPixels = 4;
  constexpr int kInputs = (kPixels - 1) * stride + 3;
  int64_t x = x_begin;
  for (; x < interior_begin; ++x) border_pixel(x);
  for (; x + kPixels <= interior_end; x += kPixels) {
    Vec<A> acc[kPixels] = {};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      const A* p = row[ky] + (x * stride - g.padding) * kStep;
#pragma GCC unroll 16
      for (int i = 0; i < kInputs; ++i) {
        const Vec<A> a = load<A>(p + i * kStep);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const int offset = i - kx;
          if (offset >= 0 && offset % stride == 0 && offset / stride < kPixels)
            acc[offset / stride] = fma(a, w[ky][kx], acc[offset / stride]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) put(x + i, acc[i]);
  }
  for (; x < x_end; ++x) border_pixel(x);
}

// Loads `columns` pixels of an input row into `out`, kChannelBlock elements a pixel, normalised and rectified.
template <class T, bool partial>
inline void load_input_row(const T* u, int64_t columns, int64_t channels, const Acc<T>* bn, int count, Acc<T>* out) {
  using A = Acc<T>;
  if (bn) {
    const Vec<A> mean = load_lanes<partial, A>(bn + BN_MEAN * channels, count);
    const Vec<A> scale = load_lanes<partial, A>(bn + BN_SCALE * channels, count);
    const Vec<A> shift = load_lanes<partial, A>(bn + BN_SHIFT * channels, count);
    for (int64_t x = 0; x < columns; ++x) {
      const Vec<A> z = fma(load_lanes<partial, T>(u + x * channels, count) - mean, scale, shift);
      store<A>(out + x * kChannelBlock<A>, relu(z));
    }
  } else {
    for (int64_t x = 0; x < columns; ++x)
      store<A>(out + x * kChannelBlock<A>, load_lanes<partial, T>(u + x * channels, count));
  }
}

template <class T, int stride>
inline void depthwise_forward_tile(const ForwardArgs& args, const Tile& t, const Acc<T>* weight, Acc<T>* partials) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int kBlock = kChannelBlock<A>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in;
  const T* u = static_cast<const T*>(args.u) + t.image * g.h * g.w * channels + t.channel_begin;
  T* y = static_cast<T*>(args.y) + t.image * g.out_h * g.out_w * channels + t.channel_begin;
  const A* bn_u = args.bn_u ? static_cast<const A*>(args.bn_u) + t.channel_begin : nullptr;
  const A* epilogue_bn = args.epilogue_bn ? static_cast<const A*>(args.epilogue_bn) + t.channel_begin : nullptr;
  weight += t.channel_begin;

  const int64_t in_begin = max_of(t.column_begin * stride - g.padding, 0);
  const int64_t in_end = min_of((t.column_end - 1) * stride - g.padding + 3, g.w);
  const int64_t ring_row = (in_end - in_begin) * kBlock;
  A* const ring = static_cast<A*>(scratch(1, sizeof(A) * (4 * ring_row + 3 * kBlock)));
  A* const zeros = ring + 3 * ring_row;
  for (int64_t i = 0; i < ring_row; ++i) zeros[i] = 0;
  A *const shift = zeros + ring_row, *const sum = shift + kBlock, *const sum_squares = sum + kBlock;
  for (int i = 0; i < kBlock; ++i) sum[i] = sum_squares[i] = 0;

  // Statistics are taken a few rows at a time where the tile spans the image, so that its rows follow each other.
  const int64_t width = t.column_end - t.column_begin;
  const int64_t rows_at_once = width == g.out_w ? ceil_div(kTileColumns, width) : 1;
  int64_t rows_counted = t.row_begin;

  int64_t next_row = max_of(t.row_begin * stride - g.padding, 0);
  for (int64_t oy = t.row_begin; oy < t.row_end; ++oy) {
    const int64_t top = oy * stride - g.padding;
    next_row = max_of(next_row, top);
    for (; next_row < min_of(top + 3, g.h); ++next_row) {
      const T* from = u + (next_row * g.w + in_begin) * channels;
      A* to = ring + next_row % 3 * ring_row;
      for (int c = 0; c < t.channels; c += L) {
        const int count = int(min_of(t.channels - c, L));
        const A* bn = bn_u ? bn_u + c : nullptr;
        if (count == L)
          load_input_row<T, false>(from + c, in_end - in_begin, channels, bn, count, to + c);
        else
          load_input_row<T, true>(from + c, in_end - in_begin, channels, bn, count, to + c);
      }
    }
    for (int c = 0; c < t.channels; c += L) {
      const int count = int(min_of(t.channels - c, L));
      const A* rows[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t iy = top + ky;
        rows[ky] = iy >= 0 && iy < g.h ? ring + iy % 3 * ring_row + c - in_begin * kBlock : nullptr;
      }
      T* out = y + oy * g.out_w * channels + c;
      if (count == L) {
        const auto epilogue = load_epilogue<A, false>(epilogue_bn, args.epilogue_relu, channels, c, count);
        depthwise_forward_row<T, stride, false>(rows, g, weight + c, count, t.column_begin, t.column_end, epilogue,
                                                zeros - in_begin * kBlock, out);
      } else {
        const auto epilogue = load_epilogue<A, true>(epilogue_bn, args.epilogue_relu, channels, c, count);
        depthwise_forward_row<T, stride, true>(rows, g, weight + c, count, t.column_begin, t.column_end, epilogue,
                                               zeros - in_begin * kBlock, out);
      }
    }
    const int64_t uncounted = oy + 1 - rows_counted;
    if (partials && (uncounted == rows_at_once || oy + 1 == t.row_end)) {
      const T* rows = y + (rows_counted * g.out_w + t.column_begin) * channels;
      if (rows_counted == t.row_begin) mean_of_rows<T>(rows, uncounted * width, channels, t.channels, shift);
      add_moments<T>(rows, uncounted * width, channels, t.channels, shift, sum, sum_squares);
      rows_counted = oy + 1;
    }
  }
  if (partials) {
    A* mean = partials + t.place * 2 * channels + t.channel_begin;
    finish_tile_moments<A>(t.pixels(), t.channels, shift, sum, sum_squares, mean, mean + channels);
  }
}

template <class T>
inline void depthwise_forward_typed(const ForwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in;
  const int64_t tile_columns = kTileColumns / g.stride;  // in both cases about kTileColumns of input
  const TileGrid grid(g.n, g.out_h, g.out_w, channels, kChannelBlock<A>, tile_columns);
  const bool stats = args.bn_y != nullptr;
  A* const weight =
      static_cast<A*>(scratch(0, sizeof(A) * channels * (kTaps + (stats ? 2 * grid.places() : 0))));
  A* const partials = stats ? weight + channels * kTaps : nullptr;
  transpose_weight<T>(static_cast<const T*>(args.weight), channels, weight);
  parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (g.stride == 1)
        depthwise_forward_tile<T, 1>(args, grid.tile(i), weight, partials);
      else
        depthwise_forward_tile<T, 2>(args, grid.tile(i), weight, partials);
    }
  });
  if (stats)
    merge_statistics<A>(
        grid.places(), channels, partials, [&](int64_t place) { return grid.at_place(place).pixels(); },
        static_cast<const A*>(args.gamma), static_cast<const A*>(args.beta), args.eps, static_cast<A*>(args.bn_y));
}

inline void depthwise_forward(const ForwardArgs& args) { MX_DISPATCH(depthwise_forward_typed, args) }

}  // namespace mx::cpu::MX_ISA_NAMESPACE
