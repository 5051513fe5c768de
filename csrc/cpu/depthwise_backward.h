// Depthwise convolution of K x K taps, 3x3 or 5x5, backward, in one pass over the data: the gradient of the input
// (through the activation before the convolution, with the sums that the BatchNorm before it needs) and the gradient of
// the weight.
//
// A tile walks down a band of *input* rows. The output gradient dy is built from dz and y once per element, into a ring
// of rows in L1. At an input pixel the same few dy vectors serve both products: times the weights they make the input
// gradient, times the activation (rebuilt from u) they make the weight gradient. Taps that no output uses are left out.
#pragma once

#include "activation.h"
#include "channels.h"
#include "depthwise_tiles.h"
#include "statistics.h"
#include "streaming.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// A tile's sums, each [channels]: of dz_u, of dz_u*(u - MEAN), and of the weight gradient's taps.
template <int K>
constexpr int kBackwardSums = 2 + K * K;

// The tap rows whose weights and sums are in registers at once. Those of a 5x5 convolution take turns.
template <int K>
constexpr int kTapRows = K == 3 ? 3 : 1;

// What one input row of one vector of channels needs. Column 0 of the image is dy[k][0] (a vector a pixel), u[0] and
// dz_u[0] (`pitch` elements per pixel); tap row k belongs to dy[k].
template <class T, int K>
struct BackwardRow {
  const Acc<T>* dy[K];
  const Acc<T>* weight[K];  // of tap row k, a vector a tap
  Acc<T>* grad_weight[K];   // the sum of tap (k, kx) at grad_weight[k] + kx * lanes
  const T* u;
  T* dz_u;       // null: not wanted
  Acc<T>* sums;  // of dz_u, then `lanes` elements on of dz_u*(u - MEAN); only of a normalised input
  int64_t pitch, lanes, out_w, x_begin, x_end;
  int padding, count;  // padding: on the left
  bool streaming;      // dz_u goes past the cache
};

// `rows`: how many tap rows, the first ones of r, are done here. Where not all are done at once, da is not begun with 0
// but with what dz_u holds.
template <class T, int K, int stride, int rows, bool partial, Act act>
inline void depthwise_backward_row(const BackwardRow<T, K>& r, const ChannelNormAct<Acc<T>>& input) {
  using A = Acc<T>;
  constexpr int kStep = kLanes<A>;
  const int64_t pitch = r.pitch, lanes = r.lanes;
  const int count = r.count, padding = r.padding;
  const bool normalises = input.normalises(), need_input = r.dz_u != nullptr;
  const ChannelNorm<A> norm = normalises ? input.template norm<partial>(0, count) : ChannelNorm<A>{};
  Vec<A> w[rows][K], dw[rows][K];
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k) {
#pragma GCC unroll 5
    for (int kx = 0; kx < K; ++kx) {
      w[k][kx] = load<A>(r.weight[k] + kx * kStep);
      dw[k][kx] = zero<A>();
    }
  }
  Vec<A> sum = zero<A>(), centred_sum = zero<A>();

  struct Pixel {
    Vec<A> centred, z, a, da;
  };
  auto begin_pixel = [&](int64_t x) {
    Pixel p;
    const Vec<A> u = load_lanes<partial, T>(r.u + x * pitch, count);
    p.centred = u - norm.mean;
    p.z = norm.of_centred(p.centred);
    p.a = normalises ? activate<act>(p.z, input.slope) : u;
    p.da = kTapRows<K> < K && need_input ? load_lanes<partial, T>(r.dz_u + x * pitch, count) : zero<A>();
    return p;
  };
  auto end_pixel = [&](int64_t x, const Pixel& p) {
    if (!need_input) return;
    const Vec<A> dz = normalises ? activate_backward<act>(p.z, p.da, input.slope) : p.da;
    if (!partial && r.streaming)
      store_streaming<T>(r.dz_u + x * pitch, dz);
    else
      store_lanes<partial, T>(r.dz_u + x * pitch, dz, count);
    const Vec<A> stored = round_to_storage<T>(dz);
    sum += stored;
    centred_sum = fma(stored, p.centred, centred_sum);
  };
  auto border_pixel = [&](int64_t x) {
    Pixel p = begin_pixel(x);
    // In the order of the loops over interior pixels: of constant images the gradients stay constant.
#pragma GCC unroll 3
    for (int k = 0; k < rows; ++k) {
#pragma GCC unroll 5
      for (int kx = K - 1; kx >= 0; --kx) {
        const int64_t numerator = x + padding - kx;
        if (numerator < 0 || numerator % stride != 0 || numerator / stride >= r.out_w) continue;
        const Vec<A> dy = load<A>(r.dy[k] + numerator / stride * kStep);
        p.da = fma(dy, w[k][kx], p.da);
        dw[k][kx] = fma(dy, p.a, dw[k][kx]);
      }
    }
    end_pixel(x, p);
  };

  int64_t x = r.x_begin;
  if constexpr (stride == 1) {
    // Pixel x takes dy[x + padding - kx].
    constexpr int kPixels = 2;
    const int64_t interior_begin = min_of(max_of(r.x_begin, K - 1 - padding), r.x_end);
    const int64_t interior_end = min_of(r.x_end, r.out_w - padding);
    for (; x < interior_begin; ++x) border_pixel(x);
    for (; x + kPixels <= interior_end; x += kPixels) {
      Pixel p[kPixels];
#pragma GCC unroll 2
      for (int i = 0; i < kPixels; ++i) p[i] = begin_pixel(x + i);
#pragma GCC unroll 3
      for (int k = 0; k < rows; ++k) {
        const A* from = r.dy[k] + (x + padding - (K - 1)) * kStep;
#pragma GCC unroll 6
        for (int j = 0; j < kPixels + K - 1; ++j) {
          const Vec<A> dy = load<A>(from + j * kStep);
#pragma GCC unroll 2
          for (int i = 0; i < kPixels; ++i) {
            const int kx = i + K - 1 - j;
            if (kx < 0 || kx >= K) continue;
            p[i].da = fma(dy, w[k][kx], p[i].da);
            dw[k][kx] = fma(dy, p[i].a, dw[k][kx]);
          }
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < kPixels; ++i) end_pixel(x + i, p[i]);
    }
  } else {
    // The pixels 2m+1-padding and 2m+2-padding take dy[m+1] and those before it: of taps 0, 2 and 4 the second pixel,
    // of taps 1 and 3, which begin at dy[m], the first.
    constexpr int kBefore = (K - 1) / 2;
    int64_t interior_begin = max_of(r.x_begin, K - 2 - padding);
    interior_begin += (interior_begin + padding) % 2 == 0;
    for (; x < min_of(interior_begin, r.x_end); ++x) border_pixel(x);
    for (; x + 2 <= r.x_end; x += 2) {
      const int64_t last = (x + padding + 1) / 2;
      if (last >= r.out_w) break;
      Pixel first = begin_pixel(x), second = begin_pixel(x + 1);
#pragma GCC unroll 3
      for (int k = 0; k < rows; ++k) {
        const A* from = r.dy[k] + (last - kBefore) * kStep;
#pragma GCC unroll 3
        for (int j = 0; j <= kBefore; ++j) {
          const Vec<A> dy = load<A>(from + j * kStep);
          const int kx = K - 1 - 2 * j;
          if (kx > 0) {
            first.da = fma(dy, w[k][kx - 1], first.da);
            dw[k][kx - 1] = fma(dy, first.a, dw[k][kx - 1]);
          }
          second.da = fma(dy, w[k][kx], second.da);
          dw[k][kx] = fma(dy, second.a, dw[k][kx]);
        }
      }
      end_pixel(x, first);
      end_pixel(x + 1, second);
    }
  }
  for (; x < r.x_end; ++x) border_pixel(x);

#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k) {
#pragma GCC unroll 5
    for (int kx = 0; kx < K; ++kx) {
      A* to = r.grad_weight[k] + kx * lanes;
      store<A>(to, load<A>(to) + dw[k][kx]);
    }
  }
  if (!normalises) return;
  store<A>(r.sums, load<A>(r.sums) + sum);
  store<A>(r.sums + lanes, load<A>(r.sums + lanes) + centred_sum);
}

// a of a row of one vector of channels, a vector a pixel.
template <class T, int K, Act act, bool partial>
inline void activate_row(const BackwardRow<T, K>& r, const ChannelNorm<Acc<T>>& norm, Acc<T> slope, Acc<T>* a) {
  using A = Acc<T>;
  for (int64_t x = r.x_begin; x < r.x_end; ++x, a += kLanes<A>)
    store<A>(a, activate<act>(norm.z(load_lanes<partial, T>(r.u + x * r.pitch, r.count)), slope));
}

// dz_u and its sums from da, a vector a pixel.
template <class T, int K, Act act, bool partial>
inline void activate_row_backward(const BackwardRow<T, K>& r, const ChannelNorm<Acc<T>>& norm, Acc<T> slope,
                                  const Acc<T>* da) {
  using A = Acc<T>;
  Vec<A> sum = zero<A>(), centred_sum = zero<A>();
  for (int64_t x = r.x_begin; x < r.x_end; ++x, da += kLanes<A>) {
    const Vec<A> centred = load_lanes<partial, T>(r.u + x * r.pitch, r.count) - norm.mean;
    const Vec<A> dz = activate_backward<act>(norm.of_centred(centred), load<A>(da), slope);
    if (!partial && r.streaming)
      store_streaming<T>(r.dz_u + x * r.pitch, dz);
    else
      store_lanes<partial, T>(r.dz_u + x * r.pitch, dz, r.count);
    const Vec<A> stored = round_to_storage<T>(dz);
    sum += stored;
    centred_sum = fma(stored, centred, centred_sum);
  }
  store<A>(r.sums, load<A>(r.sums) + sum);
  store<A>(r.sums + r.lanes, load<A>(r.sums + r.lanes) + centred_sum);
}

template <class T, int K, int stride, bool partial, Act act>
inline void depthwise_backward_row_of(int rows, const BackwardRow<T, K>& r, const ChannelNormAct<Acc<T>>& input) {
  if constexpr (kTapRows<K> == 1) {
    BackwardRow<T, K> one = r;
    for (int k = 0; k < rows; ++k) {
      one.dy[0] = r.dy[k];
      one.weight[0] = r.weight[k];
      one.grad_weight[0] = r.grad_weight[k];
      depthwise_backward_row<T, K, stride, 1, partial, act>(one, input);
    }
  } else {
    if (rows == 1) return depthwise_backward_row<T, K, stride, 1, partial, act>(r, input);
    if (rows == 2) return depthwise_backward_row<T, K, stride, 2, partial, act>(r, input);
    if constexpr (stride == 1) {
      if (rows == 3) return depthwise_backward_row<T, K, stride, 3, partial, act>(r, input);
    }
    depthwise_backward_row<T, K, stride, 0, partial, act>(r, input);
  }
}

// The same with the normalisation and activation of the input, and its derivative, in passes of their own: the products
// take all registers, or themselves take several passes, which meet in da. a has room for two rows.
template <class T, int K, int stride, bool partial>
inline void depthwise_backward_row_in_passes(int rows, const BackwardRow<T, K>& r, const ChannelNormAct<Acc<T>>& input,
                                             Acc<T>* a) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t size = (r.x_end - r.x_begin) * L;
  A* const da = a + size;
  ChannelNorm<A> norm{zero<A>(), broadcast<A>(1), zero<A>()};
  if (input.normalises()) norm = input.template norm<partial>(0, r.count);
  with_act(input.act, [&](auto act) { activate_row<T, K, act.value, partial>(r, norm, input.slope, a); });
  if (kTapRows<K> < K && r.dz_u)
    for (int64_t i = 0; i < size; ++i) da[i] = 0;
  BackwardRow<A, K> products{};
  for (int k = 0; k < rows; ++k) {
    products.dy[k] = r.dy[k];
    products.weight[k] = r.weight[k];
    products.grad_weight[k] = r.grad_weight[k];
  }
  products.u = a - r.x_begin * L;
  products.dz_u = r.dz_u ? da - r.x_begin * L : nullptr;
  products.pitch = L;
  products.lanes = r.lanes;
  products.out_w = r.out_w;
  products.x_begin = r.x_begin;
  products.x_end = r.x_end;
  products.padding = r.padding;
  products.count = L;
  depthwise_backward_row_of<A, K, stride, false, Act::linear>(rows, products, ChannelNormAct<A>::identity(L));
  if (r.dz_u)
    with_act(input.act, [&](auto act) { activate_row_backward<T, K, act.value, partial>(r, norm, input.slope, da); });
}

// Loads `columns` pixels of the gradient at the convolution's output into `out`, [vectors][columns][lanes], and asks
// for the row `ahead` elements further on.
template <class T>
inline void load_gradient_row(const T* dz, const T* y, int64_t columns, const Acc<T>* grad_bn, int64_t row_channels,
                              int channels, int64_t ahead, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  for_channel_vectors<A>(channels, [&](int64_t c, int count, auto run) {
    constexpr int V = run.vectors;
    constexpr bool partial = run.partial;
    Vec<A> dz_coefficient[V], y_coefficient[V], mean[V], constant[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      auto row = [&](int index) {
        return grad_bn ? load_lanes<partial, A>(grad_bn + index * row_channels + c + v * L, count) : zero<A>();
      };
      dz_coefficient[v] = grad_bn ? row(GRAD_DZ_COEFFICIENT) : broadcast(A(1));
      y_coefficient[v] = row(GRAD_Y_COEFFICIENT);
      mean[v] = row(GRAD_MEAN);
      constant[v] = row(GRAD_CONSTANT);
    }
    A* to = out + c * columns;
    for (int64_t x = 0; x < columns; ++x, to += L) {
      const int64_t at = x * row_channels + c;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const bool new_line = v * L * sizeof(T) % kCacheLine == 0;
        if (new_line) __builtin_prefetch(dz + at + v * L + ahead);
        Vec<A> dy = dz_coefficient[v] * load_lanes<partial, T>(dz + at + v * L, count);
        if (y) {
          if (new_line) __builtin_prefetch(y + at + v * L + ahead);
          const Vec<A> centred = load_lanes<partial, T>(y + at + v * L, count) - mean[v];
          dy += fma(y_coefficient[v], centred, constant[v]);
        }
        store<A>(to + v * L * columns, dy);
      }
    }
  });
}

template <class T, int K, int stride>
inline void depthwise_backward_tile(const BackwardArgs& args, const Tile& t, const Acc<T>* weight, Acc<T>* partials) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in, top = g.pad_top, left = g.pad_left;
  const int64_t in_image = t.image * g.h * g.w * channels + t.channel_begin;
  const int64_t out_image = t.image * g.out_h * g.out_w * channels + t.channel_begin;
  const T* u = static_cast<const T*>(args.u) + in_image;
  T* dz_u = args.dz_u ? static_cast<T*>(args.dz_u) + in_image : nullptr;
  const T* dz = static_cast<const T*>(args.dz) + out_image;
  const T* y = args.y ? static_cast<const T*>(args.y) + out_image : nullptr;
  const auto input = ChannelNormAct<A>(args.input, channels).from(t.channel_begin);
  const A* grad_bn = args.grad_bn_y ? static_cast<const A*>(args.grad_bn_y) + t.channel_begin : nullptr;
  weight += t.channel_begin * (K * K);
  const bool streaming = dz_u && streams<T>(args.dz_u, g.n * g.h * g.w, channels);

  // The outputs that touch the tile's columns; output ox touches columns ox*stride - left to
  // ox*stride - left + K - 1.
  const int64_t out_begin = max_of(t.column_begin + left - (K - 1) + stride - 1, 0) / stride;
  const int64_t out_end = max_of(min_of((t.column_end - 1 + left) / stride + 1, g.out_w), out_begin);
  const int64_t out_columns = out_end - out_begin;
  const int64_t lanes = ceil_div(t.channels, L) * L;  // whole vectors
  const bool in_passes = kTapRows<K> < K || (input.normalises() && !is_simple(input.act));
  const int64_t pixels = in_passes ? 2 * (t.column_end - t.column_begin) * L : 0;
  constexpr int kSums = kBackwardSums<K>;
  A* const ring = static_cast<A*>(scratch(1, sizeof(A) * (K * lanes * out_columns + kSums * lanes + pixels)));
  A* const sums = ring + K * lanes * out_columns;
  A* const row_buffer = sums + kSums * lanes;
  for (int64_t i = 0; i < kSums * lanes; ++i) sums[i] = 0;

  int64_t next_row = max_of(t.row_begin + top - (K - 1) + stride - 1, 0) / stride;
  for (int64_t iy = t.row_begin; iy < t.row_end; ++iy) {
    for (; next_row <= min_of((iy + top) / stride, g.out_h - 1); ++next_row) {
      const int64_t from = (next_row * g.out_w + out_begin) * channels;
      load_gradient_row<T>(dz + from, y ? y + from : nullptr, out_columns, grad_bn, channels, t.channels,
                           g.out_w * channels, ring + next_row % K * lanes * out_columns);
    }
    if (iy + 1 < t.row_end) {
      for (int64_t x = t.column_begin; x < t.column_end; ++x)
        for (int c = 0; c < t.channels; c += kCacheLine / int(sizeof(T))) {
          __builtin_prefetch(u + ((iy + 1) * g.w + x) * channels + c);
          if (dz_u && !streaming) __builtin_prefetch(dz_u + ((iy + 1) * g.w + x) * channels + c, 1);
        }
    }
    for (int c = 0; c < t.channels; c += L) {
      BackwardRow<T, K> r{};
      int rows = 0;
      for (int ky = 0; ky < K; ++ky) {
        const int64_t numerator = iy + top - ky;
        if (numerator < 0 || numerator % stride != 0 || numerator / stride >= g.out_h) continue;
        r.dy[rows] = ring + (numerator / stride % K * lanes + c) * out_columns - out_begin * L;
        r.weight[rows] = weight + c * (K * K) + ky * K * L;
        r.grad_weight[rows] = sums + (2 + ky * K) * lanes + c;
        ++rows;
      }
      r.u = u + iy * g.w * channels + c;
      r.dz_u = dz_u ? dz_u + iy * g.w * channels + c : nullptr;
      r.sums = sums + c;
      r.pitch = channels;
      r.lanes = lanes;
      r.out_w = g.out_w;
      r.x_begin = t.column_begin;
      r.x_end = t.column_end;
      r.padding = g.pad_left;
      r.streaming = streaming;
      r.count = int(min_of(t.channels - c, L));
      const auto row = [&](auto partial) {
        if (in_passes)
          return depthwise_backward_row_in_passes<T, K, stride, partial.value>(rows, r, input.from(c), row_buffer);
        if constexpr (kTapRows<K> == K)
          with_simple_act(input.act, [&](auto act) {
            depthwise_backward_row_of<T, K, stride, partial.value, act.value>(rows, r, input.from(c));
          });
      };
      if (r.count == L)
        row(Constant<false>{});
      else
        row(Constant<true>{});
    }
  }
  if (streaming) finish_streaming();
  A* to = partials + t.place * kSums * channels + t.channel_begin;
  for (int i = 0; i < kSums; ++i)
    for (int c = 0; c < t.channels; ++c) to[i * channels + c] = sums[i * lanes + c];
}

// grad_weight [channels][K*K] from the tiles' sums, added in tile order.
template <class A, int K>
inline void merge_grad_weight(int64_t tiles, int64_t channels, const A* partials, A* grad_weight) {
  constexpr int kChannels = 32, kTaps = K * K;
  parallel(ceil_div(channels, kChannels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i * kChannels;
      const int size = int(min_of(channels - c0, kChannels));
      double sums[kTaps][kChannels] = {};
      for (int64_t t = 0; t < tiles; ++t)
        for (int tap = 0; tap < kTaps; ++tap) {
          const A* tile = partials + (t * kBackwardSums<K> + 2 + tap) * channels + c0;
          for (int i = 0; i < size; ++i) sums[tap][i] += double(tile[i]);
        }
      for (int c = 0; c < size; ++c)
        for (int tap = 0; tap < kTaps; ++tap) grad_weight[(c0 + c) * kTaps + tap] = A(sums[tap][c]);
    }
  });
}

template <class T, int K, int stride>
inline void depthwise_backward_of(const BackwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t channels = g.c_in, weight_size = arranged_size<A, K>(channels);
  const TileGrid grid(g.n, g.h, g.w, channels, sizeof(A), 1, K);
  const int64_t partials_size = kBackwardSums<K> * grid.places() * channels;
  A* const weight = static_cast<A*>(scratch(0, sizeof(A) * (weight_size + partials_size)));
  A* const partials = weight + weight_size;
  arrange_weight<T, K>(static_cast<const T*>(args.weight), channels, weight);
  parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) depthwise_backward_tile<T, K, stride>(args, grid.tile(i), weight, partials);
  });
  if (args.grad_weight) merge_grad_weight<A, K>(grid.places(), channels, partials, static_cast<A*>(args.grad_weight));
  if (args.grad_bn_u)
    merge_grad_bn<A>(grid.places(), channels, kBackwardSums<K> * channels, partials, g.n * g.h * g.w,
                     static_cast<const A*>(args.input.bn), args.batch_stats_u, static_cast<A*>(args.grad_bn_u));
}

template <class T>
inline void depthwise_backward(const BackwardArgs& args) {
  with_kernel_and_stride(args.g,
                         [&](auto kernel, auto stride) { depthwise_backward_of<T, kernel.value, stride.value>(args); });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
