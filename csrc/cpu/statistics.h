// Per-channel reductions of BatchNorm, forward and backward.
//
// Every kernel cuts its work into tiles by a grid that depends on the shape alone, writes one partial result per tile,
// and the partials are merged here in tile order: the same bits on every run and for every number of threads.
//
// Forward, per tile: (shift, offset, M2); the tile's mean is shift + offset, M2 the sum of squared distances from it.
// The mean stays in two parts until the merge adds them up in double: rounded to float32, the means of tiles around 1e4
// are off by up to 5e-4, which the merge would take for distances between the tiles. M2 comes from sums of y - shift,
// where shift is the mean of some of the tile's own rows: whatever those rows are, sum((y - shift)^2) exceeds M2 by at
// most the factor (rows in the tile) / (rows in the shift), so the cancellation in M2 is bounded, at any mean of the
// channel. Where squares overflow, the variance is infinite and rstd 0, as in PyTorch; the mean is exact.
#pragma once

#include "../ops.h"
#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Channels handled together by a merge: the double accumulators live on the stack.
constexpr int kMergeChannels = 128;

// What to shift a tile by: shift[c] = the mean of `rows` rows of `channels` values, `row_stride` elements apart. 0
// where that is not finite: an infinite shift would turn a mean that is infinite into a NaN.
template <class T>
inline void shift_from_rows(const T* y, int64_t rows, int64_t row_stride, int64_t channels, Acc<T>* shift) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = int(min_of(channels - c, L));
    Vec<A> sum = zero<A>();
    if (count == L) {
      for (int64_t i = 0; i < rows; ++i) sum += load<T>(y + i * row_stride + c);
    } else {
      for (int64_t i = 0; i < rows; ++i) sum += load_partial<T>(y + i * row_stride + c, count);
    }
    store_partial<A>(shift + c, finite_or_zero(sum / A(rows)), count);
  }
}

// sum[c] += sum of (y - shift[c]), sum_squares[c] += sum of (y - shift[c])^2, over the rows. The rows of one call are
// added up apart first; callers keep them to a few hundred, so that long float32 sums stay accurate.
template <class T>
inline void add_moments(const T* y, int64_t rows, int64_t row_stride, int64_t channels, const Acc<T>* shift,
                        Acc<T>* sum, Acc<T>* sum_squares) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 2 * L <= channels; c += 2 * L) {
    const Vec<A> shift0 = load<A>(shift + c), shift1 = load<A>(shift + c + L);
    Vec<A> s0 = zero<A>(), s1 = zero<A>(), q0 = zero<A>(), q1 = zero<A>();
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<A> d0 = load<T>(y + i * row_stride + c) - shift0;
      const Vec<A> d1 = load<T>(y + i * row_stride + c + L) - shift1;
      s0 += d0;
      s1 += d1;
      q0 = fma(d0, d0, q0);
      q1 = fma(d1, d1, q1);
    }
    store<A>(sum + c, load<A>(sum + c) + s0);
    store<A>(sum + c + L, load<A>(sum + c + L) + s1);
    store<A>(sum_squares + c, load<A>(sum_squares + c) + q0);
    store<A>(sum_squares + c + L, load<A>(sum_squares + c + L) + q1);
  }
  for (; c < channels; c += L) {
    const int count = int(min_of(channels - c, L));
    const Vec<A> shift0 = load_partial<A>(shift + c, count);
    Vec<A> s = zero<A>(), q = zero<A>();
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<A> d = load_partial<T>(y + i * row_stride + c, count) - shift0;
      s += d;
      q = fma(d, d, q);
    }
    store_partial<A>(sum + c, load_partial<A>(sum + c, count) + s, count);
    store_partial<A>(sum_squares + c, load_partial<A>(sum_squares + c, count) + q, count);
  }
}

// Numbers per tile and channel: shift, offset, M2.
constexpr int kMoments = 3;

// A tile's stored values: `lines` stretches of `pixels` pixels each.
template <class T>
struct StoredTile {
  const T* y;
  int64_t lines, line_pitch, pixels, pitch;
};

// One channel's numbers from the values themselves, in double: what is infinite then is so in the accumulation type.
template <class T>
__attribute__((noinline)) void exact_tile_moments(const StoredTile<T>& t, int64_t channel, int64_t apart,
                                                  Acc<T>* tile) {
  using A = Acc<T>;
  const auto sum = [&](const auto& f) {
    double total = 0;
    for (int64_t line = 0; line < t.lines; ++line)
      for (int64_t i = 0; i < t.pixels; ++i)
        total += f(double(load_partial<T>(t.y + line * t.line_pitch + i * t.pitch + channel, 1)[0]));
    return total;
  };
  const double rows = double(t.lines * t.pixels), first = double(load_partial<T>(t.y + channel, 1)[0]);
  const double origin = first - first == 0 ? first : 0;  // the mean of a constant is that constant
  const double mean = origin + sum([&](double y) { return y / rows - origin / rows; });
  const double m2 = sum([&](double y) { return (y - mean) * (y - mean); });
  const A shift = A(mean), offset = A(mean - double(shift));
  tile[0] = shift;
  tile[apart] = offset - offset == 0 ? offset : A(0);  // of an infinite mean it would be a NaN
  tile[2 * apart] = A(m2);
}

// From the moments about `shift` to the tile's numbers, `apart` elements apart. Squares that overflowed have nothing
// to take the square of the mean from: Inf - Inf is a NaN (and with a fused multiply-add it is not).
template <class T>
inline void finish_tile_moments(const StoredTile<T>& t, int64_t channels, const Acc<T>* shift, const Acc<T>* sum,
                                const Acc<T>* sum_squares, int64_t apart, Acc<T>* tile) {
  using A = Acc<T>;
  const A rows = A(t.lines * t.pixels);
  bool finite = true;
  for (int64_t c = 0; c < channels; ++c) {
    const A offset = sum[c] / rows;
    const A squares = sum_squares[c] - sum[c] * offset;
    tile[c] = shift[c];
    tile[apart + c] = offset;
    tile[2 * apart + c] = squares < 0 ? A(0) : squares;
    finite &= sum_squares[c] - sum_squares[c] == 0;
  }
  if (finite) return;
  for (int64_t c = 0; c < channels; ++c)
    if (!(sum_squares[c] - sum_squares[c] == 0)) exact_tile_moments(t, c, apart, tile + c);
}

// partials: [tiles][kMoments][channels]; tile t has count(t) elements per channel. Writes statistics.bn.
template <class A, class Count>
inline void merge_statistics(int64_t tiles, int64_t channels, const A* partials, const Count& count,
                             const Statistics& statistics) {
  const A *const gamma = static_cast<const A*>(statistics.gamma), *const beta = static_cast<const A*>(statistics.beta);
  const double eps = statistics.eps;
  A* const bn = static_cast<A*>(statistics.bn);
  parallel(ceil_div(channels, kMergeChannels), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t c0 = run * kMergeChannels;
      const int size = int(min_of(channels - c0, kMergeChannels));
      double mean[kMergeChannels] = {}, m2[kMergeChannels] = {};
      double total = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const double n = double(count(t));
        const A* tile = partials + t * kMoments * channels + c0;
        for (int i = 0; i < size; ++i) mean[i] += n * (double(tile[i]) + double(tile[channels + i]));
        total += n;
      }
      for (int i = 0; i < size; ++i) mean[i] = total > 0 ? mean[i] / total : 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const double n = double(count(t));
        const A* tile = partials + t * kMoments * channels + c0;
        for (int i = 0; i < size; ++i) {
          const double distance = double(tile[i]) + double(tile[channels + i]) - mean[i];
          m2[i] += double(tile[2 * channels + i]) + n * distance * distance;
        }
      }
      for (int i = 0; i < size; ++i) {
        const int64_t c = c0 + i;
        const double var = total > 0 ? m2[i] / total : 0;
        const double rstd = 1 / __builtin_sqrt(var + eps);
        bn[BN_MEAN * channels + c] = A(mean[i]);
        bn[BN_SCALE * channels + c] = A(gamma ? double(gamma[c]) * rstd : rstd);
        bn[BN_SHIFT * channels + c] = beta ? beta[c] : A(0);
        bn[BN_RSTD * channels + c] = A(rstd);
        bn[BN_VAR * channels + c] = A(var);
      }
    }
  });
}

// partials: tiles of `tile_stride` elements, each starting with [2][channels]: sum of dz_u, sum of dz_u*(u - MEAN).
// `count` is n*h*w. Writes grad_bn [GRAD_ROWS][channels]; bn is that of u.
template <class A>
inline void merge_grad_bn(int64_t tiles, int64_t channels, int64_t tile_stride, const A* partials, int64_t count,
                          const A* bn, bool batch_stats, A* grad_bn) {
  parallel(ceil_div(channels, kMergeChannels), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t c0 = run * kMergeChannels;
      const int size = int(min_of(channels - c0, kMergeChannels));
      double sum[kMergeChannels] = {}, centred[kMergeChannels] = {};
      for (int64_t t = 0; t < tiles; ++t) {
        const A* tile = partials + t * tile_stride + c0;
        for (int i = 0; i < size; ++i) {
          sum[i] += double(tile[i]);
          centred[i] += double(tile[channels + i]);
        }
      }
      const double per_element = count > 0 ? 1.0 / double(count) : 0;
      for (int i = 0; i < size; ++i) {
        const int64_t c = c0 + i;
        const double scale = double(bn[BN_SCALE * channels + c]), rstd = double(bn[BN_RSTD * channels + c]);
        const double grad_gamma = rstd * centred[i];
        grad_bn[GRAD_DZ_COEFFICIENT * channels + c] = A(scale);
        grad_bn[GRAD_Y_COEFFICIENT * channels + c] = batch_stats ? A(-scale * rstd * grad_gamma * per_element) : A(0);
        grad_bn[GRAD_MEAN * channels + c] = bn[BN_MEAN * channels + c];
        grad_bn[GRAD_CONSTANT * channels + c] = batch_stats ? A(-scale * sum[i] * per_element) : A(0);
        grad_bn[GRAD_GAMMA * channels + c] = A(grad_gamma);
        grad_bn[GRAD_BETA * channels + c] = A(sum[i]);
      }
    }
  });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
