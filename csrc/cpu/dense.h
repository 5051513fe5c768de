// The dense 3x3 convolution, meant for a first layer's few input channels: rows of taps (im2col) are gathered into a
// tile in cache and multiplied. The order of a row's taps, and of the weights here, is (ky, kx, channel): the three
// pixels under one row of the kernel lie together in memory. Taps outside the image are zeros that are multiplied, as
// in PyTorch's float64 convolution: an infinite weight gives a NaN there. (In float32, nn.Conv2d does so for some
// shapes.)
#pragma once

#include "product.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Copies `count` values, zeros if from is null.
template <class T>
MX_INLINE void copy_taps(const T* from, int64_t count, T* to) {
#if defined(MX_ISA_AVX512)
  constexpr int lanes = MX_VECTOR_BYTES / int(sizeof(T));
  for (int64_t i = 0; i < count; i += lanes) {
    const uint32_t mask = count - i < lanes ? (uint32_t(1) << (count - i)) - 1 : ~uint32_t(0);
    const __m512i none = _mm512_setzero_si512();
    if constexpr (sizeof(T) == 2)
      _mm512_mask_storeu_epi16(to + i, mask, from ? _mm512_maskz_loadu_epi16(mask, from + i) : none);
    else if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_epi32(to + i, __mmask16(mask), from ? _mm512_maskz_loadu_epi32(mask, from + i) : none);
    else
      _mm512_mask_storeu_epi64(to + i, __mmask8(mask), from ? _mm512_maskz_loadu_epi64(mask, from + i) : none);
  }
#else
  for (int64_t i = 0; i < count; ++i) to[i] = from ? from[i] : T{};
#endif
}

// The taps of output pixels [begin, begin + pixels), a row each, filled up with 0 to `filled` values, `pitch` values
// apart. `channels` are those of the image, or 0 if they are not known beforehand.
template <int channels, class T>
inline void gather_taps_of(const T* x, const Geometry& g, int64_t begin, int64_t pixels, T* rows, int64_t filled,
                           int64_t pitch) {
  const int64_t c = channels ? channels : g.c_in, line_taps = 3 * c;
  for (int64_t done = 0; done < pixels;) {
    const int64_t pixel = begin + done, ox = pixel % g.out_w, oy = pixel / g.out_w % g.out_h;
    const int64_t image = pixel / (g.out_w * g.out_h), length = min_of(pixels - done, g.out_w - ox);
    const T* lines[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t iy = oy * g.stride - g.pad_top + ky;
      lines[ky] = iy < 0 || iy >= g.h ? nullptr : x + (image * g.h + iy) * g.w * c;
    }
    for (int64_t ix = ox * g.stride - g.pad_left, end = ix + length * g.stride; ix < end;
         ix += g.stride, rows += pitch) {
      const bool interior = ix >= 0 && ix + 3 <= g.w;
      if (interior) {
#pragma GCC unroll 3
        for (int ky = 0; ky < 3; ++ky)
          copy_taps<T>(lines[ky] ? lines[ky] + ix * c : nullptr, line_taps, rows + ky * line_taps);
      } else {
        const int64_t left = min_of(max_of(-ix, 0), 3), right = max_of(min_of(g.w - ix, 3), left);
        for (int ky = 0; ky < 3; ++ky) {
          T* const row = rows + ky * line_taps;
          copy_taps<T>(nullptr, line_taps, row);
          if (lines[ky]) copy_taps<T>(lines[ky] + (ix + left) * c, (right - left) * c, row + left * c);
        }
      }
      copy_taps<T>(nullptr, filled - kTaps * c, rows + kTaps * c);
    }
    done += length;
  }
}

template <class T>
inline void gather_taps(const T* x, const Geometry& g, int64_t begin, int64_t pixels, T* rows, int64_t filled,
                        int64_t pitch) {
  if (g.c_in == 3)
    gather_taps_of<3>(x, g, begin, pixels, rows, filled, pitch);
  else
    gather_taps_of<0>(x, g, begin, pixels, rows, filled, pitch);
}

// Calls use(taps, pixels, done) with the taps of a few pixels at a time of [begin, begin + pixels), rows without gaps,
// of which `done` came before: as many as stay in the L1 cache.
template <class T, class Use>
inline void for_taps(const T* x, const Geometry& g, int64_t begin, int64_t pixels, const Use& use) {
  const int64_t depth = kTaps * g.c_in;
  const int64_t most = max_of(8 * 1024 / (depth * int64_t(sizeof(T))) / 2 * 2, 2);
  T* const taps = static_cast<T*>(scratch(kTapsSlot, most * depth * sizeof(T)));
  for (int64_t done = 0; done < pixels; done += most) {
    const int64_t count = min_of(most, pixels - done);
    gather_taps<T>(x, g, begin + done, count, taps, depth, depth);
    use(taps, count, done);
  }
}

// [columns][channel][ky][kx] to [columns][ky][kx][channel], and back.
template <class T>
inline void taps_last_to_first(const T* from, int64_t columns, int64_t channels, T* to) {
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap)
        to[(n * kTaps + tap) * channels + c] = from[(n * channels + c) * kTaps + tap];
}

template <class A>
inline void taps_first_to_last(const A* from, int64_t columns, int64_t channels, A* to) {
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t tap = 0; tap < kTaps; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        to[(n * channels + c) * kTaps + tap] = from[(n * kTaps + tap) * channels + c];
}

template <class T>
inline void dense_forward(const ForwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t depth = kTaps * g.c_in, pitch = tile_pitch<Operand<T>>(depth);
  const auto plain = ChannelNormAct<A>::identity(depth);
  T* const weight = static_cast<T*>(scratch(kWeightSlot, g.c_out * depth * sizeof(T)));
  taps_last_to_first(static_cast<const T*>(args.weight), g.c_out, g.c_in, weight);
  const T* const x = static_cast<const T*>(args.u);
  forward_product(
      forward_product_of<T>(args, depth, weight),
      [&](int64_t begin, int64_t rows, Operand<T>* tile) {
        using E = Operand<T>;
        if constexpr (kStoredOperands<T>)
          return gather_taps<T>(x, g, begin, rows, reinterpret_cast<T*>(tile), groups_of<E>(depth) * kGroup<E>,
                                pitch * kGroup<E>);
        for_taps<T>(x, g, begin, rows, [&](const T* taps, int64_t pixels, int64_t done) {
          activate_rows<T>(taps, pixels, plain, Gate<T>::none(), tile + done * pitch);
        });
      },
      [&](int64_t row) { return reach_of_taps(x, g, row); });
}

// The input gradient. Each input row is one task, which adds up the output rows that reach it, in the order of ky.
template <class T>
inline void dense_input_gradient(const BackwardArgs& args, const OutputGradient<T>& gradient, const T* weight) {
  using A = Acc<T>;
  using E = Operand<T>;
  constexpr int64_t kPixels = 112 / kTileStep * kTileStep;
  const Geometry& g = args.g;
  const int64_t c = g.c_in, columns = 3 * c, pitch = tile_pitch<E>(g.c_out);
  const int64_t panels = ceil_div(columns, kPanel<A>), panel_size = groups_of<E>(g.c_out) * kPanel<A>;
  E* const packed = static_cast<E*>(scratch(kSharedSlot, 3 * panels * panel_size * sizeof(E)));
  for (int64_t ky = 0; ky < 3; ++ky)
    for (int64_t i = 0; i < panels; ++i)
      pack_rows<T>(weight + ky * columns + i * kPanel<A>, kTaps * c, columns - i * kPanel<A>, g.c_out,
                   packed + (ky * panels + i) * panel_size);

  parallel(g.n * g.h, [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t dy_size = kPixels * pitch, taps_size = kPixels * columns, line_size = g.w * c;
    Workspace own(scratch(
        kWorkerSlot, Workspace::bytes<E>(dy_size) + Workspace::bytes<A>(taps_size) + Workspace::bytes<A>(line_size)));
    E* const dy = own.take<E>(dy_size);
    A* const taps = own.take<A>(taps_size);
    A* const line = own.take<A>(line_size);
    Prefetcher ahead;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / g.h, iy = task % g.h;
      __builtin_memset(line, 0, line_size * sizeof(A));
      for (int64_t ky = 0; ky < 3; ++ky) {
        const int64_t oy = (iy + g.pad_top - ky) / g.stride;
        if (iy + g.pad_top < ky || oy >= g.out_h || (iy + g.pad_top - ky) % g.stride) continue;
        for (int64_t first = 0; first < g.out_w; first += kPixels) {
          const int64_t pixels = min_of(kPixels, g.out_w - first);
          gradient_rows<T>(gradient, (image * g.out_h + oy) * g.out_w + first, pixels, {dy, nullptr, 0});
          for (int64_t i = 0; i < panels; ++i) {
            AddToRows<A> epilogue{taps + i * kPanel<A>, columns, columns - i * kPanel<A>, false};
            multiply_tile<false>(dy, pitch, pixels, packed + (ky * panels + i) * panel_size, epilogue.columns,
                                 groups_of<E>(g.c_out), ahead, epilogue);
          }
          for (int64_t p = 0; p < pixels; ++p)
            for (int64_t kx = 0; kx < 3; ++kx) {
              const int64_t ix = (first + p) * g.stride - g.pad_left + kx;
              if (ix < 0 || ix >= g.w) continue;
              for (int64_t j = 0; j < c; ++j) line[ix * c + j] += taps[p * columns + kx * c + j];
            }
        }
      }
      T* const out = static_cast<T*>(args.dz_u) + task * line_size;
      for (int64_t i = 0; i < line_size; i += kLanes<A>) {
        const int count = int(min_of(line_size - i, kLanes<A>));
        store_partial<T>(out + i, load_partial<A>(line + i, count), count);
      }
    }
  });
}

template <class T>
inline void dense_backward(const BackwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const int64_t depth = kTaps * g.c_in, weight_size = g.c_out * depth;
  const auto plain = ChannelNormAct<A>::identity(depth);
  const OutputGradient<T> gradient{static_cast<const T*>(args.dz), static_cast<const T*>(args.y),
                                   static_cast<const A*>(args.grad_bn_y), g.c_out};
  Workspace own(scratch(kWeightSlot, Workspace::bytes<A>(weight_size) + Workspace::bytes<T>(weight_size)));
  if (args.grad_weight) {
    A* const grad_weight = own.take<A>(weight_size);
    const T* const x = static_cast<const T*>(args.u);
    BackwardProduct<T> product{};
    product.rows = g.n * g.out_h * g.out_w;
    product.depth = depth;
    product.columns = g.c_out;
    product.gradient = gradient;
    product.grad_weight = grad_weight;
    backward_product(
        product,
        [&](int64_t begin, int64_t rows, Operand<T>* panels, int64_t panel_rows) {
          for_taps<T>(x, g, begin, rows, [&](const T* taps, int64_t pixels, int64_t done) {
            activate_panels<T>(taps, pixels, plain, Gate<T>::none(), panels + done / kGroup<Operand<T>> * kPanel<A>,
                               panel_rows);
          });
        },
        [&](int64_t row) { return reach_of_taps(x, g, row); });
    taps_first_to_last(grad_weight, g.c_out, g.c_in, static_cast<A*>(args.grad_weight));
  }
  if (args.dz_u) {
    T* const weight = own.take<T>(weight_size);
    taps_last_to_first(static_cast<const T*>(args.weight), g.c_out, g.c_in, weight);
    dense_input_gradient<T>(args, gradient, weight);
  }
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
