// The normalisation and activation (and global average pooling) of a raw convolution output, and their backward: one
// pass each.
//
// Tiles are (image, run of pixels); within one, the constants of four vectors of channels stay in registers while the
// pixels go by.
#pragma once

#include "activation.h"
#include "channels.h"
#include "statistics.h"
#include "streaming.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

constexpr int64_t kTilePixels = 256;

struct PixelTile {
  int64_t image, pixel_begin, pixel_end;
};

// The tiles of one image follow each other. They depend on the shape only.
struct PixelGrid {
  int64_t images, pixels, per_image;

  PixelGrid(int64_t images, int64_t pixels)
      : images(images), pixels(pixels), per_image(ceil_div(pixels, kTilePixels)) {}
  int64_t tiles() const { return images * per_image; }
  PixelTile tile(int64_t index) const {
    const int64_t begin = index % per_image * kTilePixels;
    return {index / per_image, begin, min_of(begin + kTilePixels, pixels)};
  }
};

template <class T, Act act>
inline void norm_act_rows(const NormActArgs& args, const PixelTile& t) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t first = (t.image * args.hw + t.pixel_begin) * args.c, pixels = t.pixel_end - t.pixel_begin;
  const T* y = static_cast<const T*>(args.y) + first;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + first : nullptr;
  T* out = static_cast<T*>(args.out) + first;
  const bool streaming = streams<T>(args.out, args.n * args.hw, args.c);
  const ChannelNormAct<A> norm_act(args.norm_act, args.c);
  for_channel_vectors<A>(args.c, [&](int64_t c, int count, auto run) {
    constexpr int V = run.vectors;
    constexpr bool partial = run.partial;
    ChannelNorm<A> norm[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) norm[v] = norm_act.template norm<partial>(c + v * L, count);
    for (int64_t i = 0; i < pixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = i * args.c + c + v * L;
        Vec<A> a = activate<act>(norm[v].z(load_lanes<partial, T>(y + at, count)), norm_act.slope);
        if (residual) a += load_lanes<partial, T>(residual + at, count);
        if (!partial && streaming)
          store_streaming<T>(out + at, a);
        else
          store_lanes<partial, T>(out + at, a, count);
      }
    }
  });
  if (streaming) finish_streaming();
}

// sums[c] = sum over the tile's pixels of act(norm(y)).
template <class T, Act act>
inline void pool_rows(const NormActArgs& args, const PixelTile& t, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t first = (t.image * args.hw + t.pixel_begin) * args.c, pixels = t.pixel_end - t.pixel_begin;
  const T* y = static_cast<const T*>(args.y) + first;
  const ChannelNormAct<A> norm_act(args.norm_act, args.c);
  for_channel_vectors<A>(args.c, [&](int64_t c, int count, auto run) {
    constexpr int V = run.vectors;
    constexpr bool partial = run.partial;
    ChannelNorm<A> norm[V];
    Vec<A> sum[V] = {};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) norm[v] = norm_act.template norm<partial>(c + v * L, count);
    for (int64_t i = 0; i < pixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<A> x = load_lanes<partial, T>(y + i * args.c + c + v * L, count);
        sum[v] += activate<act>(norm[v].z(x), norm_act.slope);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_lanes<partial, A>(sums + c + v * L, sum[v], count);
  });
}

template <class T>
inline void norm_act_forward(const NormActArgs& args) {
  using A = Acc<T>;
  const PixelGrid grid(args.n, args.hw);
  if (!args.pool) {
    return with_act(args.norm_act.act, [&](auto act) {
      parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) norm_act_rows<T, act.value>(args, grid.tile(i));
      });
    });
  }
  A* const partials = static_cast<A*>(scratch(0, sizeof(A) * grid.tiles() * args.c));
  with_act(args.norm_act.act, [&](auto act) {
    parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pool_rows<T, act.value>(args, grid.tile(i), partials + i * args.c);
    });
  });
  constexpr int L = kLanes<A>;
  parallel(args.n, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = 0; c < args.c; c += L) {
        const int count = int(min_of(args.c - c, L));
        Vec<A> sum = zero<A>();
        for (int64_t i = 0; i < grid.per_image; ++i)
          sum += load_partial<A>(partials + (n * grid.per_image + i) * args.c + c, count);
        // Of no pixels the mean is 0/0, as PyTorch has it.
        store_partial<T>(static_cast<T*>(args.out) + n * args.c + c, sum / A(args.hw), count);
      }
  });
}

// What the gradient at the activation is made of.
enum class GradientOf { pixels, pooled, both };

// dz of the tile's pixels, and its sums: [2][c], sum of dz and of dz*(y - MEAN).
template <class T, Act act, GradientOf of>
inline void norm_act_backward_rows(const NormActArgs& args, const PixelTile& t, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t first = (t.image * args.hw + t.pixel_begin) * args.c, pixels = t.pixel_end - t.pixel_begin;
  const T* y = static_cast<const T*>(args.y) + first;
  constexpr bool has_pixels = of != GradientOf::pooled, has_pooled = of != GradientOf::pixels;
  const bool wanted = args.dz != nullptr;
  T* dz = wanted ? static_cast<T*>(args.dz) + first : nullptr;
  const T* grad = has_pixels ? static_cast<const T*>(args.grad) + first : nullptr;
  const T* grad_pooled = static_cast<const T*>(has_pixels ? args.grad_pooled : args.grad) + t.image * args.c;
  const bool streaming = wanted && streams<T>(args.dz, args.n * args.hw, args.c);
  const ChannelNormAct<A> norm_act(args.norm_act, args.c);
  for_channel_vectors<A>(args.c, [&](int64_t c, int count, auto run) {
    constexpr int V = run.vectors;
    constexpr bool partial = run.partial;
    ChannelNorm<A> norm[V];
    Vec<A> sum[V] = {}, centred_sum[V] = {}, pooled[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      norm[v] = norm_act.template norm<partial>(c + v * L, count);
      if constexpr (has_pooled) pooled[v] = load_lanes<partial, T>(grad_pooled + c + v * L, count) / A(args.hw);
    }
    for (int64_t i = 0; i < pixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = i * args.c + c + v * L;
        const Vec<A> centred = load_lanes<partial, T>(y + at, count) - norm[v].mean;
        Vec<A> g;
        if constexpr (of == GradientOf::pixels) g = load_lanes<partial, T>(grad + at, count);
        if constexpr (of == GradientOf::pooled) g = pooled[v];
        if constexpr (of == GradientOf::both) g = load_lanes<partial, T>(grad + at, count) + pooled[v];
        g = activate_backward<act>(norm[v].of_centred(centred), g, norm_act.slope);
        if (!partial && streaming)
          store_streaming<T>(dz + at, g);
        else if (wanted)
          store_lanes<partial, T>(dz + at, g, count);
        const Vec<A> stored = has_pooled || !passes_or_stops(act) ? round_to_storage<T>(g) : g;
        sum[v] += stored;
        centred_sum[v] = fma(stored, centred, centred_sum[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_lanes<partial, A>(sums + c + v * L, sum[v], count);
      store_lanes<partial, A>(sums + args.c + c + v * L, centred_sum[v], count);
    }
  });
  if (streaming) finish_streaming();
}

template <class T>
inline void norm_act_backward(const NormActArgs& args) {
  using A = Acc<T>;
  const PixelGrid grid(args.n, args.hw);
  A* const partials = static_cast<A*>(scratch(0, sizeof(A) * grid.tiles() * 2 * args.c));
  with_act(args.norm_act.act, [&](auto act) {
    parallel(grid.tiles(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        A* const sums = partials + i * 2 * args.c;
        if (args.pool)
          norm_act_backward_rows<T, act.value, GradientOf::pooled>(args, grid.tile(i), sums);
        else if (args.grad_pooled)
          norm_act_backward_rows<T, act.value, GradientOf::both>(args, grid.tile(i), sums);
        else
          norm_act_backward_rows<T, act.value, GradientOf::pixels>(args, grid.tile(i), sums);
      }
    });
  });
  merge_grad_bn<A>(grid.tiles(), args.c, 2 * args.c, partials, args.n * args.hw,
                   static_cast<const A*>(args.norm_act.bn), args.batch_stats, static_cast<A*>(args.grad_bn_y));
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
