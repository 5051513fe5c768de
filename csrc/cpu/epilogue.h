// What happens to a register block of a matrix product (gemm.h) before it is stored.
#pragma once

#include "activation.h"
#include "gemm.h"
#include "statistics.h"
#include "streaming.h"
#include "tile.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// An epilogue serves one panel of `columns` columns (at most kPanel) of one tile. kAdds: its sums do not start from 0.

// How many columns vector v of the panel holds.
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

// Adds the first `count` rows of `from`, pitch apart, to a register block.
template <int rows, int vectors, class T>
MX_INLINE void add_rows(const T* from, int64_t pitch, int64_t columns, int count,
                        Vec<Acc<T>> (&values)[rows][vectors]) {
  using A = Acc<T>;
  with_lanes<vectors, A>(columns, [&](auto is_partial) {
    constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        if (i < count)
          values[i][v] += load_lanes<partial, T>(from + i * pitch + v * kLanes<A>, lanes_in<partial, A>(columns, v));
  });
}

// Adds the panel's biases to a register block; null: none.
template <int rows, int vectors, class A>
MX_INLINE void add_bias(const A* bias, int64_t columns, Vec<A> (&sums)[rows][vectors]) {
  if (bias == nullptr) return;
  with_lanes<vectors, A>(columns, [&](auto is_partial) {
    constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const Vec<A> of_vector = load_lanes<partial, A>(bias + v * kLanes<A>, lanes_in<partial, A>(columns, v));
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i) sums[i][v] += of_vector;
    }
  });
}

// y = the product and the bias, and the moments of y as stored about the mean of the tile's first rows (see
// statistics.h).
template <class T>
struct StoreWithMoments {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* y;  // the tile's first row, the panel's first column
  int64_t pitch, columns;
  const A* bias;  // the panel's; null: 0
  bool streaming;
  Vec<A> shift[kPanelVectors], sum[kPanelVectors], squares[kPanelVectors];

  StoreWithMoments(T* y, int64_t pitch, int64_t columns, const A* bias, bool streaming)
      : y(y), pitch(pitch), columns(columns), bias(bias), streaming(streaming) {
    for (int v = 0; v < kPanelVectors; ++v) shift[v] = sum[v] = squares[v] = zero<A>();
  }

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    add_bias<rows, vectors, A>(bias, columns, sums);
    store_rows<rows, vectors, T>(y + row * pitch, pitch, columns, count, streaming, sums);
    add_moments(row, count, sums);
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
      // The few rows are added up apart first, which keeps long float32 sums accurate.
      Vec<A> few_sum = zero<A>(), few_squares = zero<A>();
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i)
        if (i < count) {
          const Vec<A> distance = sums[i][v] - shift[v];
          few_sum += distance;
          few_squares = fma(distance, distance, few_squares);
        }
      sum[v] += few_sum;
      squares[v] += few_squares;
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

// y = act(norm(product + bias)) + residual.
template <class T>
struct StoreNormAct {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* y;
  int64_t pitch, columns;
  const A* bias;             // the panel's; null: 0
  ChannelNormAct<A> output;  // from the panel's first channel on
  const T* residual;         // like y; null: 0
  bool streaming;

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    add_bias<rows, vectors, A>(bias, columns, sums);
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        if (output.normalises()) {
          const ChannelNorm<A> norm = output.template norm<partial>(v * kLanes<A>, lanes_in<partial, A>(columns, v));
#pragma GCC unroll 14
          for (int i = 0; i < rows; ++i) sums[i][v] = norm.z(sums[i][v]);
        }
      }
    });
    activate_block(output.act, output.slope, sums);
    if (residual) add_rows<rows, vectors, T>(residual + row * pitch, pitch, columns, count, sums);
    store_rows<rows, vectors, T>(y + row * pitch, pitch, columns, count, streaming, sums);
  }
};

// da, [rows][vectors], times the derivative of the input's activation, for one that is not simple. `input` is from the
// panel's first column on, u its first row there.
template <int vectors, class T>
__attribute__((noinline)) void activate_rows_backward(const T* u, const ChannelNormAct<Acc<T>>& input, int64_t columns,
                                                      int rows, Vec<Acc<T>>* da) {
  using A = Acc<T>;
  with_act(input.act, [&](auto act) {
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_in<partial, A>(columns, v);
        const ChannelNorm<A> norm = input.template norm<partial>(v * kLanes<A>, lanes);
        for (int i = 0; i < rows; ++i) {
          const Vec<A> z = norm.z(load_lanes<partial, T>(u + i * input.channels + v * kLanes<A>, lanes));
          da[i * vectors + v] = activate_backward<act.value>(z, da[i * vectors + v], input.slope);
        }
      }
    });
  });
}

// dz_u = the product times the derivative of the input's activation, and the sums of dz_u as stored and of
// dz_u*(u - MEAN). With a plain input, dz_u is the product.
template <class T>
struct StoreInputGradient {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* dz_u;                  // the tile's first row, the panel's first column
  const T* u;               // likewise
  ChannelNormAct<A> input;  // from the panel's first column on
  int64_t columns;          // the panel's
  bool streaming;
  Vec<A> sum[kPanelVectors] = {}, centred[kPanelVectors] = {};

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    const int64_t pitch = input.channels;
    if (input.normalises()) {
      const bool simple = is_simple(input.act);
      if (!simple) activate_block_backward(row, count, sums);
      with_simple_act(simple ? input.act : Act::linear, [&](auto act) {
        with_lanes<vectors, A>(columns, [&](auto is_partial) {
          constexpr bool partial = decltype(is_partial)::value;
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) {
            const int lanes = lanes_in<partial, A>(columns, v);
            const int64_t offset = row * pitch + v * kLanes<A>;
            const ChannelNorm<A> norm = input.template norm<partial>(v * kLanes<A>, lanes);
            // The few rows are added up apart first, which keeps long float32 sums accurate.
            Vec<A> few_sum = zero<A>(), few_centred = zero<A>();
#pragma GCC unroll 14
            for (int i = 0; i < rows; ++i)
              if (i < count) {
                const Vec<A> distance = load_lanes<partial, T>(u + offset + i * pitch, lanes) - norm.mean;
                sums[i][v] = activate_backward<act.value>(norm.of_centred(distance), sums[i][v], input.slope);
                const Vec<A> stored = round_to_storage<T>(sums[i][v]);
                few_sum += stored;
                few_centred = fma(stored, distance, few_centred);
              }
            sum[v] += few_sum;
            centred[v] += few_centred;
          }
        });
      });
    }
    store_rows<rows, vectors, T>(dz_u + row * pitch, pitch, columns, count, streaming, sums);
  }

  template <int rows, int vectors>
  MX_INLINE void activate_block_backward(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    Vec<A> copy[rows][vectors];  // has an address, and so does not stay in registers
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) copy[i][v] = sums[i][v];
    activate_rows_backward<vectors>(u + row * input.channels, input, columns, count, &copy[0][0]);
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[i][v] = copy[i][v];
  }

  void finish(A* sums_out, A* centred_out) const {
    for (int v = 0; v < kPanelVectors; ++v) {
      const int count = lanes_in<true, A>(columns, v);
      store_partial<A>(sums_out + v * kLanes<A>, sum[v], count);
      store_partial<A>(centred_out + v * kLanes<A>, centred[v], count);
    }
  }
};

// Of da*gate, [rows][vectors], makes da, and adds the rows' parts to the gradient of the gate. `input` is from the
// panel's first column on, u its first row there; the gate's rows and columns likewise. grad_gate has a row of
// `input.channels` an image.
template <int vectors, class T>
__attribute__((noinline)) void gate_rows_backward(const T* u, const ChannelNormAct<Acc<T>>& input, const Gate<T>& gate,
                                                  int64_t columns, int rows, Acc<T>* grad_gate, Vec<Acc<T>>* da) {
  using A = Acc<T>;
  with_norm_act(input, [&](auto normalises, auto act) {
    with_lanes<vectors, A>(columns, [&](auto is_partial) {
      constexpr bool partial = decltype(is_partial)::value;
      for (int first = 0; first < rows;) {
        const int64_t image = gate.image(first);
        const int end = int(min_of((image + 1) * gate.pixels - gate.begin, rows));
        for (int v = 0; v < vectors; ++v) {
          const int lanes = lanes_in<partial, A>(columns, v);
          const int64_t at = v * kLanes<A>;
          const Vec<A> factor = load_lanes<partial, T>(gate.row(first) + at, lanes);
          ChannelNorm<A> norm{};
          if constexpr (normalises.value) norm = input.template norm<partial>(at, lanes);
          Vec<A> sum = zero<A>();
          for (int i = first; i < end; ++i) {
            Vec<A> a = load_lanes<partial, T>(u + i * input.channels + at, lanes);
            if constexpr (normalises.value) a = activate<act.value>(norm.z(a), input.slope);
            Vec<A>& gated = da[i * vectors + v];
            sum = fma(gated, a, sum);
            gated *= factor;
          }
          A* const to = grad_gate + image * input.channels + at;
          store_lanes<partial, A>(to, load_lanes<partial, A>(to, lanes) + sum, lanes);
        }
        first = end;
      }
    });
  });
}

// da = the product times the gate, and the gradient of the gate: sums of the product times a.
template <class T>
struct StoreGatedGradient {
  using A = Acc<T>;
  static constexpr bool kAdds = false;
  T* da;                    // the tile's first row, the panel's first column
  const T* u;               // likewise
  ChannelNormAct<A> input;  // from the panel's first column on
  Gate<T> gate;             // likewise, from the tile's first row on
  A* grad_gate;             // likewise, of the image of row 0 of all tiles
  int64_t columns;          // the panel's
  bool streaming;

  template <int rows, int vectors>
  MX_INLINE void end(int64_t row, int count, Vec<A> (&sums)[rows][vectors]) {
    const int64_t pitch = input.channels;
    Vec<A> copy[rows][vectors];  // has an address, and so does not stay in registers
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) copy[i][v] = sums[i][v];
    gate_rows_backward<vectors>(u + row * pitch, input, gate.from(row), columns, count, grad_gate, &copy[0][0]);
    store_rows<rows, vectors, T>(da + row * pitch, pitch, columns, count, streaming, copy);
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
