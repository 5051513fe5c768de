// A depthwise-separable block in inference: the depthwise rows, normalised and activated, are made where the pointwise
// product wants its tile, and never leave the cache.
#pragma once

#include "product.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// The depthwise half. Channels are taken in runs of Neighbours<T>::kChannels, in its order (operands.h); vectors of
// the channels are laid out likewise.
template <class T>
struct DepthwiseRows {
  using A = Acc<T>;
  using N = Neighbours<T>;
  const T* x;
  Geometry g;
  const A* channels;  // [kChannelRows][pitch]: weights by tap, then MEAN, SCALE, SHIFT
  int64_t pitch;      // whole runs
  Act act;
  A slope;

  static constexpr int kChannelRows = kTaps + 3;
  static int64_t pitch_of(int64_t channels) { return round_up(channels, N::kChannels); }

  // `pixels` neighbours in one output row, for one run of channels; the first has its left column at ix, and all
  // columns exist unless check_columns. Taps outside the image are left out.
  template <int stride, int pixels, bool check_columns, bool partial>
  MX_INLINE void compute(const T* (&lines)[3], int64_t ix, int64_t channel, int count,
                         const Vec<A> (&w)[kTaps][N::kVectors], Operand<T>* out, int64_t out_pitch) const {
    Vec<A> sums[pixels][N::kVectors] = {};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      if (lines[ky] == nullptr) continue;
      const T* from = lines[ky] + ix * g.c_in + channel;
#pragma GCC unroll 9
      for (int column = 0; column < (pixels - 1) * stride + 3; ++column, from += g.c_in) {
        if (check_columns && (ix + column < 0 || ix + column >= g.w)) continue;
        Vec<A> value[N::kVectors];
        N::template load<partial>(from, count, value);
#pragma GCC unroll 4
        for (int p = 0; p < pixels; ++p) {
          const int kx = column - p * stride;
          if (kx < 0 || kx > 2) continue;
#pragma GCC unroll 2
          for (int v = 0; v < N::kVectors; ++v) sums[p][v] = fma(value[v], w[ky * 3 + kx][v], sums[p][v]);
        }
      }
    }
    const A* const bn = channels + kTaps * pitch + channel;
#pragma GCC unroll 2
    for (int v = 0; v < N::kVectors; ++v) {
      const A* const of_vector = bn + v * kLanes<A>;
      const ChannelNorm<A> norm{load<A>(of_vector), load<A>(of_vector + pitch), load<A>(of_vector + 2 * pitch)};
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) sums[p][v] = norm.z(sums[p][v]);
    }
    activate_block(act, slope, sums);
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) N::store_in_row(out + p * out_pitch, channel, sums[p]);
  }

  // Output pixels [begin, end) of one output row, for one run of channels.
  template <int stride, bool partial>
  inline void run(const T* (&lines)[3], int64_t begin, int64_t end, int64_t channel, int count, Operand<T>* out,
                  int64_t out_pitch) const {
    Vec<A> w[kTaps][N::kVectors];
#pragma GCC unroll 9
    for (int tap = 0; tap < kTaps; ++tap)
#pragma GCC unroll 2
      for (int v = 0; v < N::kVectors; ++v) w[tap][v] = load<A>(channels + tap * pitch + channel + v * kLanes<A>);
    int64_t ox = begin;
    while (ox < end) {
      const int64_t ix = ox * stride - g.pad_left;
      Operand<T>* const to = out + (ox - begin) * out_pitch;
      if (ox + 4 <= end && ix >= 0 && ix + 3 * stride + 3 <= g.w) {
        compute<stride, 4, false, partial>(lines, ix, channel, count, w, to, out_pitch);
        ox += 4;
      } else {
        compute<stride, 1, true, partial>(lines, ix, channel, count, w, to, out_pitch);
        ox += 1;
      }
    }
  }

  // Output pixels [begin, begin + pixels) of all images, a row of the tile each.
  template <int stride>
  inline void build(int64_t begin, int64_t pixels, Operand<T>* tile, int64_t out_pitch) const {
    for (int64_t done = 0; done < pixels;) {
      const int64_t pixel = begin + done, ox = pixel % g.out_w, oy = pixel / g.out_w % g.out_h;
      const int64_t image = pixel / (g.out_w * g.out_h), length = min_of(pixels - done, g.out_w - ox);
      const T* lines[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t iy = oy * stride - g.pad_top + ky;
        lines[ky] = iy < 0 || iy >= g.h ? nullptr : x + (image * g.h + iy) * g.w * g.c_in;
      }
      for (int64_t channel = 0; channel < g.c_in; channel += N::kChannels) {
        Operand<T>* const out = tile + done * out_pitch;
        const int64_t count = g.c_in - channel;
        if (count >= N::kChannels)
          run<stride, false>(lines, ox, ox + length, channel, N::kChannels, out, out_pitch);
        else
          run<stride, true>(lines, ox, ox + length, channel, int(count), out, out_pitch);
      }
      done += length;
    }
  }
};

// Of one block alone: the rows of DepthwiseRows::channels.
template <class T>
inline void pack_channels(const BlockArgs& args, Acc<T>* channels) {
  using A = Acc<T>;
  const int64_t c_in = args.g.c_in, pitch = DepthwiseRows<T>::pitch_of(c_in);
  __builtin_memset(channels, 0, DepthwiseRows<T>::kChannelRows * pitch * sizeof(A));
  const T* const taps = static_cast<const T*>(args.depthwise_weight);
  const A* const bn = static_cast<const A*>(args.depthwise.bn);
  for (int64_t c = 0; c < c_in; ++c) {
    A* const of_channel = channels + Neighbours<T>::place(c);
    for (int tap = 0; tap < kTaps; ++tap)
      store_partial<A>(of_channel + tap * pitch, load_partial<T>(taps + c * kTaps + tap, 1), 1);
    for (int row = BN_MEAN; row <= BN_SHIFT; ++row) of_channel[(kTaps + row) * pitch] = bn[row * c_in + c];
  }
}

template <class T>
inline int64_t channels_bytes(int64_t c_in) {
  return Workspace::bytes<Acc<T>>(DepthwiseRows<T>::kChannelRows * DepthwiseRows<T>::pitch_of(c_in));
}

// A packed block: the channels, and after them the panels of the pointwise weight.
template <class T>
inline int64_t packed_bytes(int64_t c_in, int64_t c_out, bool block) {
  return (block ? channels_bytes<T>(c_in) : 0) + Workspace::bytes<Operand<T>>(panels_size<T>(c_out, c_in));
}

template <class T>
inline void pack(const BlockArgs& args, void* packed) {
  const int64_t c_in = args.g.c_in, c_out = args.g.c_out;
  char* panels = static_cast<char*>(packed);
  if (args.depthwise_weight) {
    pack_channels<T>(args, static_cast<Acc<T>*>(packed));
    panels += channels_bytes<T>(c_in);
  }
  for (int64_t i = 0; i < ceil_div(c_out, kPanel<Acc<T>>); ++i)
    pack_panel<T>(static_cast<const T*>(args.pointwise_weight), c_out, c_in, i, reinterpret_cast<Operand<T>*>(panels));
}

template <class T>
inline void block_inference(const BlockArgs& args) {
  using A = Acc<T>;
  using Rows = DepthwiseRows<T>;
  const Geometry& g = args.g;
  const int64_t tile_row = tile_pitch<Operand<T>>(g.c_in);
  const char* const packed = static_cast<const char*>(args.packed);
  const A* channels = reinterpret_cast<const A*>(packed);
  if (packed == nullptr) {
    A* const own = static_cast<A*>(scratch(kWeightSlot, channels_bytes<T>(g.c_in)));
    pack_channels<T>(args, own);
    channels = own;
  }

  const Rows depthwise{static_cast<const T*>(args.x), g, channels, Rows::pitch_of(g.c_in), args.depthwise.act,
                       A(args.depthwise.slope)};
  ForwardProduct<T> product{};
  product.rows = g.n * g.out_h * g.out_w;
  product.depth = g.c_in;
  product.columns = g.c_out;
  product.weight = static_cast<const T*>(args.pointwise_weight);
  if (packed) product.packed = reinterpret_cast<const Operand<T>*>(packed + channels_bytes<T>(g.c_in));
  product.y = static_cast<T*>(args.y);
  product.output = args.pointwise;
  product.residual = static_cast<const T*>(args.residual);
  forward_product(
      product,
      [&](int64_t begin, int64_t rows, Operand<T>* tile) {
        if (g.stride == 1)
          depthwise.template build<1>(begin, rows, tile, tile_row);
        else
          depthwise.template build<2>(begin, rows, tile, tile_row);
      },
      [&](int64_t row) { return reach_of_taps(depthwise.x, g, row); });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
