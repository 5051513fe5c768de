// A depthwise-separable block in inference: the depthwise rows, normalised and rectified, are made where the pointwise
// product wants its tile, and never leave the cache.
#pragma once

#include "product.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// The depthwise half, with its weight as [tap][pitch] in the accumulation type.
template <class T>
struct DepthwiseRows {
  using A = Acc<T>;
  const T* x;
  Geometry g;
  const A* weight;
  int64_t weight_pitch;
  Activation<A> activation;

  // `pixels` neighbours in one output row, for the channels of one vector; the first has its left column at ix, and all
  // columns exist unless check_columns. Taps outside the image are left out.
  template <int stride, int pixels, bool check_columns, bool partial>
  MX_INLINE void compute(const T* (&lines)[3], int64_t ix, int64_t channel, int count, const Vec<A> (&w)[9],
                         const Vec<A>& mean, const Vec<A>& scale, const Vec<A>& shift, Operand<T>* out,
                         int64_t pitch) const {
    Vec<A> sums[pixels] = {};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      if (lines[ky] == nullptr) continue;
#pragma GCC unroll 9
      for (int column = 0; column < (pixels - 1) * stride + 3; ++column) {
        if (check_columns && (ix + column < 0 || ix + column >= g.w)) continue;
        const Vec<A> value = load_lanes<partial, T>(lines[ky] + (ix + column) * g.c_in + channel, count);
#pragma GCC unroll 4
        for (int p = 0; p < pixels; ++p) {
          const int kx = column - p * stride;
          if (kx >= 0 && kx < 3) sums[p] = fma(value, w[ky * 3 + kx], sums[p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p)
      store_in_row<T>(out + p * pitch, channel, relu(normalise<A>(sums[p] - mean, scale, shift)));
  }

  // Output pixels [begin, end) of one output row, for the channels of one vector.
  template <int stride, bool partial>
  inline void run(const T* (&lines)[3], int64_t begin, int64_t end, int64_t channel, int count, Operand<T>* out,
                  int64_t pitch) const {
    Vec<A> w[9];
    for (int tap = 0; tap < 9; ++tap) w[tap] = load<A>(weight + tap * weight_pitch + channel);
    const Vec<A> mean = load_lanes<partial, A>(activation.row(BN_MEAN) + channel, count);
    const Vec<A> scale = load_lanes<partial, A>(activation.row(BN_SCALE) + channel, count);
    const Vec<A> shift = load_lanes<partial, A>(activation.row(BN_SHIFT) + channel, count);
    int64_t ox = begin;
    while (ox < end) {
      const int64_t ix = ox * stride - g.padding;
      Operand<T>* const to = out + (ox - begin) * pitch;
      if (ox + 4 <= end && ix >= 0 && ix + 3 * stride + 3 <= g.w) {
        compute<stride, 4, false, partial>(lines, ix, channel, count, w, mean, scale, shift, to, pitch);
        ox += 4;
      } else {
        compute<stride, 1, true, partial>(lines, ix, channel, count, w, mean, scale, shift, to, pitch);
        ox += 1;
      }
    }
  }

  // Output pixels [begin, begin + pixels) of all images, a row of the tile each.
  template <int stride>
  inline void build(int64_t begin, int64_t pixels, Operand<T>* tile, int64_t pitch) const {
    for (int64_t done = 0; done < pixels;) {
      const int64_t pixel = begin + done, ox = pixel % g.out_w, oy = pixel / g.out_w % g.out_h;
      const int64_t image = pixel / (g.out_w * g.out_h), length = min_of(pixels - done, g.out_w - ox);
      const T* lines[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t iy = oy * stride - g.padding + ky;
        lines[ky] = iy < 0 || iy >= g.h ? nullptr : x + (image * g.h + iy) * g.w * g.c_in;
      }
      for (int64_t channel = 0; channel < g.c_in; channel += kLanes<A>) {
        Operand<T>* const out = tile + done * pitch;
        const int64_t count = g.c_in - channel;
        if (count >= kLanes<A>)
          run<stride, false>(lines, ox, ox + length, channel, kLanes<A>, out, pitch);
        else
          run<stride, true>(lines, ox, ox + length, channel, int(count), out, pitch);
      }
      done += length;
    }
  }
};

template <class T>
inline void block_inference(const BlockArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t pitch = tile_pitch<Operand<T>>(g.c_in), weight_pitch = round_up(g.c_in, kLanes<A>);
  A* const weight = static_cast<A*>(scratch(kWeightSlot, 9 * weight_pitch * sizeof(A)));
  __builtin_memset(weight, 0, 9 * weight_pitch * sizeof(A));
  const T* const taps = static_cast<const T*>(args.depthwise_weight);
  for (int64_t c = 0; c < g.c_in; ++c)
    for (int tap = 0; tap < 9; ++tap)
      store_partial<A>(weight + tap * weight_pitch + c, load_partial<T>(taps + c * 9 + tap, 1), 1);

  const DepthwiseRows<T> depthwise{
      static_cast<const T*>(args.x), g, weight, weight_pitch, {static_cast<const A*>(args.depthwise_bn), g.c_in}};
  ForwardProduct<T> product{};
  product.rows = g.n * g.out_h * g.out_w;
  product.depth = g.c_in;
  product.columns = g.c_out;
  product.weight = static_cast<const T*>(args.pointwise_weight);
  product.packed = static_cast<const Operand<T>*>(args.packed);
  product.y = static_cast<T*>(args.y);
  product.epilogue_bn = static_cast<const A*>(args.pointwise_bn);
  product.epilogue_relu = true;
  forward_product(
      product,
      [&](int64_t begin, int64_t rows, Operand<T>* tile) {
        if (g.stride == 1)
          depthwise.template build<1>(begin, rows, tile, pitch);
        else
          depthwise.template build<2>(begin, rows, tile, pitch);
      },
      [&](int64_t row) { return reach_of_taps(depthwise.x, g, row); });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
