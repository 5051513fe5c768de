// Depthwise convolution of K x K taps, 3x3 or 5x5, forward: y = conv(act(norm(u)), weight) + bias, with the statistics
// of y, or in inference with the output's normalisation and activation, in the same pass.
//
// A tile walks down its band of output rows. Each input row is loaded, widened, normalised and activated once, into a
// ring of K rows that stays in L1; outputs are made from registers, four pixels at a time; the statistics are taken
// from rows just stored. Taps outside the image are left out rather than multiplied by zero, so that an infinite
// weight gives what nn.Conv2d gives.
#pragma once

#include "activation.h"
#include "channels.h"
#include "depthwise_tiles.h"
#include "statistics.h"
#include "streaming.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// What one output row of a tile needs, for one vector of channels.
template <class T, int K>
struct ForwardRow {
  using A = Acc<T>;
  // The input row under tap row ky, a vector a pixel, so placed that row[ky][0] would be column 0 of the image, and the
  // taps, [K][lanes]. For a row outside the image both are zeros, so that the loops over pixels have one form.
  const A* row[K];
  const A* weight[K];
  const A* bias;      // null: 0
  T* y;               // column 0
  const T* residual;  // likewise; null: 0
  int64_t x_begin, x_end;
  int count;
  bool streaming;  // y goes past the cache
  const A* shift;  // the moments of the stored y about it are added to sum and sum_squares
  A *sum, *sum_squares;
};

// What else is done with a row: its moments are taken, of an output that is linear and not normalised; or it is
// normalised and activated, which is simple without a residual and with linear or ReLU, which need no registers. The
// other activations are called, from a copy that would cost those two a tenth of the time.
enum class RowOutput { moments, simple, any };

template <class T, int K, int stride, bool partial, RowOutput kind>
inline void depthwise_forward_row(const ForwardRow<T, K>& r, const Geometry& g, const ChannelNormAct<Acc<T>>& output) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = g.c_in, x_begin = r.x_begin, x_end = r.x_end;
  const int count = r.count;
  // Nine weights stay in registers. Of twenty-five, those of one tap row are loaded where they are used.
  constexpr bool kKeepsWeights = K == 3;
  Vec<A> kept[kKeepsWeights ? K : 1][K];
  if constexpr (kKeepsWeights) {
#pragma GCC unroll 3
    for (int ky = 0; ky < K; ++ky)
#pragma GCC unroll 3
      for (int kx = 0; kx < K; ++kx) kept[ky][kx] = load<A>(r.weight[ky] + kx * L);
  }
  const auto weight = [&](int ky, int kx) {
    if constexpr (kKeepsWeights)
      return kept[ky][kx];
    else
      return load<A>(r.weight[ky] + kx * L);
  };
  const bool normalises = kind != RowOutput::moments && output.normalises();
  const ChannelNorm<A> norm = normalises ? output.template norm<partial>(0, count) : ChannelNorm<A>{};
  const Vec<A> bias = r.bias ? load_lanes<partial, A>(r.bias, count) : zero<A>(), shift = load<A>(r.shift);
  Vec<A> sum = zero<A>(), sum_squares = zero<A>();

  auto norm_act = [&](auto& values) {
    constexpr int pixels = sizeof(values) / sizeof(values[0]);
    if (normalises) {
#pragma GCC unroll 4
      for (int i = 0; i < pixels; ++i) values[i][0] = norm.z(values[i][0]);
    }
    if constexpr (kind == RowOutput::simple) {
      if (output.act == Act::relu) {
#pragma GCC unroll 4
        for (int i = 0; i < pixels; ++i) values[i][0] = activate<Act::relu>(values[i][0], output.slope);
      }
    } else if constexpr (kind == RowOutput::any) {
      activate_block(output.act, output.slope, values);
    }
  };
  auto put = [&](int64_t x, Vec<A> v) {
    if constexpr (kind == RowOutput::any) {
      if (r.residual) v += load_lanes<partial, T>(r.residual + x * channels, count);
    }
    if (!partial && r.streaming)
      store_streaming<T>(r.y + x * channels, v);
    else
      store_lanes<partial, T>(r.y + x * channels, v, count);
    if constexpr (kind == RowOutput::moments) {
      const Vec<A> distance = round_to_storage<T>(v) - shift;
      sum += distance;
      sum_squares = fma(distance, distance, sum_squares);
    }
  };
  auto border_pixel = [&](int64_t x) {
    Vec<A> acc[1][1] = {{bias}};
    // In the order of the loop over interior pixels: a constant image stays one.
#pragma GCC unroll 5
    for (int ky = 0; ky < K; ++ky) {
#pragma GCC unroll 5
      for (int kx = 0; kx < K; ++kx) {
        const int64_t ix = x * stride + kx - g.pad_left;
        if (ix >= 0 && ix < g.w) acc[0][0] = fma(load<A>(r.row[ky] + ix * L), weight(ky, kx), acc[0][0]);
      }
    }
    norm_act(acc);
    put(x, acc[0][0]);
  };

  // Interior pixels have all K columns inside the image.
  const int64_t interior_begin = min_of(max_of(x_begin, ceil_div(g.pad_left, stride)), x_end);
  const int64_t interior_end = max_of(min_of(x_end, (g.w - K + g.pad_left + stride) / stride), interior_begin);
  constexpr int kPixels = 4;
  constexpr int kInputs = (kPixels - 1) * stride + K;
  int64_t x = x_begin;
  for (; x < interior_begin; ++x) border_pixel(x);
  for (; x + kPixels <= interior_end; x += kPixels) {
    Vec<A> acc[kPixels][1];
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) acc[i][0] = bias;
#pragma GCC unroll 5
    for (int ky = 0; ky < K; ++ky) {
      const A* p = r.row[ky] + (x * stride - g.pad_left) * L;
#pragma GCC unroll 16
      for (int i = 0; i < kInputs; ++i) {
        const Vec<A> a = load<A>(p + i * L);
#pragma GCC unroll 5
        for (int kx = 0; kx < K; ++kx) {
          const int offset = i - kx;
          if (offset >= 0 && offset % stride == 0 && offset / stride < kPixels)
            acc[offset / stride][0] = fma(a, weight(ky, kx), acc[offset / stride][0]);
        }
      }
    }
    norm_act(acc);
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) put(x + i, acc[i][0]);
  }
  for (; x < x_end; ++x) border_pixel(x);
  if constexpr (kind == RowOutput::moments) {
    store<A>(r.sum, load<A>(r.sum) + sum);
    store<A>(r.sum_squares, load<A>(r.sum_squares) + sum_squares);
  }
}

// Loads `columns` pixels of an input row, normalised and activated, into `out`, [vectors][columns][lanes], and asks for
// the row `ahead` elements further on.
template <class T, bool normalises, Act act>
inline void load_input_row(const T* u, int64_t columns, const ChannelNormAct<Acc<T>>& input, int channels,
                           int64_t ahead, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  for_channel_vectors<A>(channels, [&](int64_t c, int count, auto run) {
    constexpr int V = run.vectors;
    constexpr bool partial = run.partial;
    ChannelNorm<A> norm[V] = {};
    if constexpr (normalises) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) norm[v] = input.template norm<partial>(c + v * L, count);
    }
    const T* from = u + c;
    A* to = out + c * columns;
    for (int64_t x = 0; x < columns; ++x, from += input.channels, to += L) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (v * L * sizeof(T) % kCacheLine == 0) __builtin_prefetch(from + v * L + ahead);
        const Vec<A> value = load_lanes<partial, T>(from + v * L, count);
        store<A>(to + v * L * columns, normalises ? activate<act>(norm[v].z(value), input.slope) : value);
      }
    }
  });
}

template <class T, int K, int stride>
inline void depthwise_forward_tile(const ForwardArgs& args, const Tile& t, const Acc<T>* weight, Acc<T>* partials) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in;
  const T* u = static_cast<const T*>(args.u) + t.image * g.h * g.w * channels + t.channel_begin;
  const int64_t output_offset = t.image * g.out_h * g.out_w * channels + t.channel_begin;
  T* y = static_cast<T*>(args.y) + output_offset;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + output_offset : nullptr;
  const auto input = ChannelNormAct<A>(args.input, channels).from(t.channel_begin);
  const auto output = ChannelNormAct<A>(args.output, channels).from(t.channel_begin);
  weight += t.channel_begin * (K * K);
  const A* bias = args.bias ? static_cast<const A*>(args.bias) + t.channel_begin : nullptr;
  const bool streaming = streams<T>(args.y, g.n * g.out_h * g.out_w, channels);

  const int64_t in_begin = max_of(t.column_begin * stride - g.pad_left, 0);
  const int64_t in_end = min_of((t.column_end - 1) * stride - g.pad_left + K, g.w);
  const int64_t in_columns = in_end - in_begin, width = t.column_end - t.column_begin;
  const int64_t lanes = ceil_div(t.channels, L) * L;     // whole vectors
  const int64_t zero_count = max_of(in_columns, K) * L;  // a row of pixels, or of taps
  A* const ring = static_cast<A*>(scratch(1, sizeof(A) * (K * lanes * in_columns + zero_count + 3 * lanes)));
  A* const zeros = ring + K * lanes * in_columns;
  A *const shift = zeros + zero_count, *const sum = shift + lanes, *const sum_squares = sum + lanes;
  for (A* p = zeros; p < sum_squares + lanes; ++p) *p = 0;

  int64_t next_row = max_of(t.row_begin * stride - g.pad_top, 0);
  for (int64_t oy = t.row_begin; oy < t.row_end; ++oy) {
    const int64_t top = oy * stride - g.pad_top;
    next_row = max_of(next_row, top);
    for (; next_row < min_of(top + K, g.h); ++next_row) {
      const auto load_row = [&](auto normalises, auto act) {
        load_input_row<T, normalises.value, act.value>(u + (next_row * g.w + in_begin) * channels, in_columns, input,
                                                       t.channels, stride * g.w * channels,
                                                       ring + next_row % K * lanes * in_columns);
      };
      with_norm_act(input, load_row);
    }
    for (int c = 0; c < t.channels; c += L) {
      ForwardRow<T, K> r{};
      for (int ky = 0; ky < K; ++ky) {
        const int64_t iy = top + ky;
        const bool inside = iy >= 0 && iy < g.h;
        r.row[ky] = (inside ? ring + (iy % K * lanes + c) * in_columns : zeros) - in_begin * L;
        r.weight[ky] = inside ? weight + c * (K * K) + ky * K * L : zeros;
      }
      r.bias = bias ? bias + c : nullptr;
      r.y = y + oy * g.out_w * channels + c;
      r.residual = residual ? residual + oy * g.out_w * channels + c : nullptr;
      r.x_begin = t.column_begin;
      r.x_end = t.column_end;
      r.count = int(min_of(t.channels - c, L));
      r.streaming = streaming && oy != t.row_begin;  // the first row is read again at once
      r.shift = shift + c;
      r.sum = sum + c;
      r.sum_squares = sum_squares + c;
      const auto run = [&](auto kind) {
        if (r.count == L)
          depthwise_forward_row<T, K, stride, false, kind.value>(r, g, output.from(c));
        else
          depthwise_forward_row<T, K, stride, true, kind.value>(r, g, output.from(c));
      };
      if (partials)
        run(Constant<RowOutput::moments>{});
      else if (is_simple(output.act) && residual == nullptr)
        run(Constant<RowOutput::simple>{});
      else
        run(Constant<RowOutput::any>{});
    }
    if (partials && oy == t.row_begin) {
      // The first row was taken about 0; its mean is the shift from here on.
      const T* row = y + (oy * g.out_w + t.column_begin) * channels;
      for (int c = 0; c < lanes; ++c) sum[c] = sum_squares[c] = 0;
      shift_from_rows<T>(row, width, channels, t.channels, shift);
      add_moments<T>(row, width, channels, t.channels, shift, sum, sum_squares);
    }
  }
  if (streaming) finish_streaming();
  if (partials) {
    A* tile = partials + t.place * kMoments * channels + t.channel_begin;
    const T* const first = y + (t.row_begin * g.out_w + t.column_begin) * channels;
    finish_tile_moments<T>({first, t.row_end - t.row_begin, g.out_w * channels, width, channels}, t.channels, shift,
                           sum, sum_squares, channels, tile);
  }
}

template <class T, int K, int stride>
inline void depthwise_forward_of(const ForwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in, weight_size = args.packed ? 0 : arranged_size<A, K>(channels);
  const TileGrid grid(g.n, g.out_h, g.out_w, channels, sizeof(A), stride, K);
  const bool stats = args.statistics.wanted();
  const int64_t partials_size = stats ? kMoments * grid.places() * channels : 0;
  A* const own_weight = static_cast<A*>(scratch(0, sizeof(A) * (weight_size + partials_size)));
  A* const partials = stats ? own_weight + weight_size : nullptr;
  if (!args.packed) arrange_weight<T, K>(static_cast<const T*>(args.weight), channels, own_weight);
  const A* const weight = args.packed ? static_cast<const A*>(args.packed) : own_weight;
  parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) depthwise_forward_tile<T, K, stride>(args, grid.tile(i), weight, partials);
  });
  if (stats)
    merge_statistics<A>(
        grid.places(), channels, partials, [&](int64_t place) { return grid.at_place(place).pixels(); },
        args.statistics);
}

template <class T>
inline void depthwise_forward(const ForwardArgs& args) {
  with_kernel_and_stride(args.g,
                         [&](auto kernel, auto stride) { depthwise_forward_of<T, kernel.value, stride.value>(args); });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
