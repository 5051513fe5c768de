// What happens to a register block of a matrix product (gemm.h) before it is stored.
#pragma once

#include "../ops.h"
#include "gemm.h"
#include "statistics.h"
#include "streaming.h"
#include "tile.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// An epilogue serves one panel of `columns` columns (at most kPanel) of one tile. kAdds: its sums do not start from 0.
// Vector v of the panel holds this many columns:
template <bool partial, class A>
MX_INLINE int lanes_in(int64_t columns, int v) {
  return partial ? int(min_of(max_of(columns - v * kLanes<A>, 0), kLanes<A>)) : kLanes<A>;
}

// Calls f(Constant<partial>) with partial = some vector of the panel is not full.
template <int vectors, class A, class F>
MX_INLINE void with_lanes(int64_t columns, const F& f) {
  if (columns >= vectors * kLanes<A>)
    f(Constant<0>{});
  else
    f(Constant<1>{});
}

// The rows of a register block, pitch apart; past the cache if streaming, and then every vector is full.
template <int rows, int vectors, class T>
MX_INLINE void store_rows(T* to, int64_t pitch, int64_t columns, int count, bool streaming,
                          const Vec<Acc<T>> (&values)[rows][vectors]) {
  using A = Acc<T>;
  with_lanes<vectors, A>(columns, [&](auto partial) {
    if constexpr (!partial.value) {
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
        if (i < count) store_vectors<T, vectors>(to + i * pitch, streaming, values[i]);
    } else {
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          if (i < count) store_partial<T>(to + i * pitch + v * kLanes<A>, values[i][v], lanes_in<true, A>(columns, v));
    }
  });
}

// y = the product, and the moments of y as stored about the mean of the tile's first block (see statistics.h).
template <class T>
struct StoreWithMoments {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* y;  // the tile's first row, the panel's first column
  int64_t pitch, columns;
  bool moments, streaming;
  Vec<A> shift[kPanelVectors], sum[kPanelVectors], squares[kPanelVectors];

  StoreWithMoments(T* y, int64_t pitch, int64_t columns, bool moments, bool streaming)
      : y(y), pitch(pitch), columns(columns), moments(moments), streaming(streaming) {
    for (int v = 0; v < kPanelVectors; ++v) shift[v] = sum[v] = squares[v] = zero<A>();
  }

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    store_rows<rows, vectors, T>(y + row * pitch, pitch, columns, count, streaming, sums);
    if (moments) add_moments(row, count, sums);
  }

  template <int rows, int vectors>
  MX_INLINE void add_moments(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i) sums[i][v] = round_to_storage<T>(sums[i][v]);
      if (row == 0) {
        Vec<A> total = zero<A>();
#pragma GCC unroll 14
        for (int i = 0; i < rows; ++i)
          if (i < count) total += sums[i][v];
        shift[v] = finite_or_zero(total / A(count));
      }
      // A block's few rows are added up apart first, which keeps long float32 sums accurate.
      Vec<A> block_sum = zero<A>(), block_squares = zero<A>();
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
        if (i < count) {
          const Vec<A> distance = sums[i][v] - shift[v];
          block_sum += distance;
          block_squares = fma(distance, distance, block_squares);
        }
      sum[v] += block_sum;
      squares[v] += block_squares;
    }
  }

  // The tile's numbers of the panel's columns, `apart` elements apart (statistics.h).
  void finish(int64_t rows, int64_t apart, A* tile) const {
    A moments[kMoments][kPanel<A>];
    for (int v = 0; v < kPanelVectors; ++v) {
      store<A>(moments[0] + v * kLanes<A>, shift[v]);
      store<A>(moments[1] + v * kLanes<A>, sum[v]);
      store<A>(moments[2] + v * kLanes<A>, squares[v]);
    }
    finish_tile_moments<T>({y, 1, 0, rows, pitch}, min_of(columns, kPanel<A>), moments[0], moments[1], moments[2],
                           apart, tile);
  }
};

// y = relu?(normalise(product)).
template <class T>
struct StoreNormalised {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* y;
  int64_t pitch, columns;
  Activation<A> activation;  // plain: no normalisation
  int64_t channel;           // the panel's first
  bool rectify, streaming;

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_in<partial, A>(columns, v);
        if (!activation.plain()) {
          const A* const bn = activation.bn + channel + v * kLanes<A>;
          const Vec<A> mean = load_lanes<partial, A>(bn + BN_MEAN * activation.channels, lanes);
          const Vec<A> scale = load_lanes<partial, A>(bn + BN_SCALE * activation.channels, lanes);
          const Vec<A> shift = load_lanes<partial, A>(bn + BN_SHIFT * activation.channels, lanes);
#pragma GCC unroll 14
          for (int i = 0; i < rows; ++i) sums[i][v] = normalise<A>(sums[i][v] - mean, scale, shift);
        }
        if (rectify) {
#pragma GCC unroll 14
          for (int i = 0; i < rows; ++i) sums[i][v] = relu(sums[i][v]);
        }
      }
    });
    store_rows<rows, vectors, T>(y + row * pitch, pitch, columns, count, streaming, sums);
  }
};

// h_u = the product, masked where the input's ReLU was 0, and the sums of h_u as stored and of h_u*(u - MEAN). With a
// plain input, h_u is the product.
template <class T>
struct StoreInputGradient {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* h_u;      // the tile's first row, the panel's first column
  const T* u;  // likewise
  Activation<A> activation;
  int64_t channel, columns;  // the panel's
  bool streaming;
  Vec<A> sum[kPanelVectors] = {}, centred[kPanelVectors] = {};

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
      const int64_t pitch = activation.channels;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_in<partial, A>(columns, v);
        const int64_t offset = row * pitch + v * kLanes<A>;
        if (!activation.plain()) {
          const A* const bn = activation.bn + channel + v * kLanes<A>;
          const Vec<A> mean = load_lanes<partial, A>(bn + BN_MEAN * pitch, lanes);
          const Vec<A> scale = load_lanes<partial, A>(bn + BN_SCALE * pitch, lanes);
          const Vec<A> shift = load_lanes<partial, A>(bn + BN_SHIFT * pitch, lanes);
          Vec<A> block_sum = zero<A>(), block_centred = zero<A>();
#pragma GCC unroll 14
          for (int i = 0; i < rows; ++i)
            if (i < count) {
              const Vec<A> distance = load_lanes<partial, T>(u + offset + i * pitch, lanes) - mean;
              const Vec<A> z = normalise<A>(distance, scale, shift);
              sums[i][v] = z <= zero<A>() ? zero<A>() : sums[i][v];
              const Vec<A> stored = round_to_storage<T>(sums[i][v]);
              block_sum += stored;
              block_centred = fma(stored, distance, block_centred);
            }
          sum[v] += block_sum;
          centred[v] += block_centred;
        }
      }
    });
    store_rows<rows, vectors, T>(h_u + row * activation.channels, activation.channels, columns, count, streaming, sums);
  }

  void finish(A* sums_out, A* centred_out) const {
    for (int v = 0; v < kPanelVectors; ++v) {
      const int count = lanes_in<true, A>(columns, v);
      store_partial<A>(sums_out + v * kLanes<A>, sum[v], count);
      store_partial<A>(centred_out + v * kLanes<A>, centred[v], count);
    }
  }
};

// grad (rows of `pitch` elements) = or += the product.
template <class A>
struct AddToRows {
  static constexpr bool kAdds = true;
  A* grad;
  int64_t pitch, columns;
  bool add;

  template <int rows, int vectors>
  MX_INLINE void begin(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    if (!add) return clear<rows, vectors, A>(sums);
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sums[i][v] = i < count ? load_lanes<partial, A>(grad + (row + i) * pitch + v * kLanes<A>,
                                                          lanes_in<partial, A>(columns, v))
                                 : zero<A>();
    });
  }

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          if (i < count)
            store_lanes<partial, A>(grad + (row + i) * pitch + v * kLanes<A>, sums[i][v],
                                    lanes_in<partial, A>(columns, v));
    });
  }
};

}  // namespace mx::cpu::MX_ISA_NAMESPACE
