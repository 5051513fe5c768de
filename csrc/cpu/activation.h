// Activations, their derivatives, and the normalisation in front of them: on the CPU nothing else spells one.
//
// A convolution applies them to its input on load, and norm_act and the inference ops to their output on store. To add
// an activation, add it to with_act, activate and activate_backward.
//
// Loops over elements that do little else have an instantiation for each (with_act). Code that is large, or whose
// registers are taken, has one for linear and relu (with_simple_act), and hands whole blocks or rows to loops for the
// others (activate_block, or what says so).
#pragma once

#include "../args.h"
#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Calls f(Constant<act>).
template <class F>
MX_INLINE void with_act(Act act, const F& f) {
  switch (act) {
    case Act::linear:
      return f(Constant<Act::linear>{});
    case Act::relu:
      return f(Constant<Act::relu>{});
    case Act::relu6:
      return f(Constant<Act::relu6>{});
    case Act::hardswish:
      return f(Constant<Act::hardswish>{});
    case Act::silu:
      return f(Constant<Act::silu>{});
    case Act::leaky_relu:
      return f(Constant<Act::leaky_relu>{});
  }
}

MX_INLINE bool is_simple(Act act) { return act == Act::linear || act == Act::relu; }

// The same for a simple one.
template <class F>
MX_INLINE void with_simple_act(Act act, const F& f) {
  if (act == Act::relu)
    f(Constant<Act::relu>{});
  else
    f(Constant<Act::linear>{});
}

// v, or the bound where v is beyond it, up to the sign of 0. A NaN must stay a NaN, as in PyTorch: x86's maximum and
// minimum give their second operand where either is one.
template <class V>
MX_INLINE V at_least(V bound, V v) {
#if defined(MX_ISA_AVX512)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm512_max_ps((__m512)bound, (__m512)v);
#elif defined(MX_ISA_AVX2)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm256_max_ps((__m256)bound, (__m256)v);
#endif
  return v <= bound ? bound : v;
}
template <class V>
MX_INLINE V at_most(V bound, V v) {
#if defined(MX_ISA_AVX512)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm512_min_ps((__m512)bound, (__m512)v);
#elif defined(MX_ISA_AVX2)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm256_min_ps((__m256)bound, (__m256)v);
#endif
  return v >= bound ? bound : v;
}

// What exp is made of: exp(x) = 2^n * exp(r), with r = x - n*ln2 between -ln2/2 and ln2/2.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // exp(most) is infinite, and 1 + exp(least) is 1.
  static constexpr float least = -87, most = 89, log2_e = 1.44269504f;
  // ln2 in two parts; n times the first is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // A float of this size has no fraction, and n + 126 in its last bits once n is added.
  static constexpr float rounder = 12582912.0f + 126;
  static constexpr int mantissa_bits = 23;
  // 2*exp(r), to a relative error of 1e-8: that of interpolation at Chebyshev's points.
  static constexpr float twice_exp[] = {2, 2, 1, 0.333331537f, 0.0833331089f, 0.0167264059f, 0.00278524269f};
};
template <>
struct ExpConstants<double> {
  static constexpr double least = -708, most = 710, log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double rounder = 6755399441055744.0 + 1022;
  static constexpr int mantissa_bits = 52;
  static constexpr double twice_exp[] = {2,
                                         2,
                                         1,
                                         0.33333333333333335,
                                         0.08333333333324798,
                                         0.016666666666660103,
                                         0.0027777777834563587,
                                         0.00039682539726211937,
                                         4.9603042380435455e-05,
                                         5.5114536757368386e-06,
                                         5.524027743946799e-07,
                                         5.0200848314010134e-08};  // to 2e-17
};

// 1 + exp(x), within two units in the last place. A NaN stays a NaN.
template <class A>
MX_INLINE Vec<A> one_plus_exp(Vec<A> x) {
  using C = ExpConstants<A>;
  x = at_most(broadcast<A>(C::most), at_least(broadcast<A>(C::least), x));
  const Vec<A> rounded = fma(x, broadcast<A>(C::log2_e), broadcast<A>(C::rounder));
  const Vec<A> n = rounded - C::rounder;
  const Vec<A> r = fma(n, broadcast<A>(-C::ln2_low), fma(n, broadcast<A>(-C::ln2_high), x));
  constexpr int degree = sizeof(C::twice_exp) / sizeof(A) - 1;
  Vec<A> p = broadcast<A>(C::twice_exp[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = fma(p, r, broadcast<A>(C::twice_exp[i]));
  // Of 2^(n-1) the bits: n + 126 as the exponent, whose place the other bits of `rounded` are shifted out of.
  const Vec<A> scale = (Vec<A>)((Mask<A>)rounded << C::mantissa_bits);
  return fma(p, scale, broadcast<A>(1));
}

template <class V>
using Element = decltype(V{}[0] + 0);

// `slope` is leaky_relu's.
template <Act act, class V>
MX_INLINE V activate(V z, Element<V> slope) {
  using A = Element<V>;
  if constexpr (act == Act::relu) return at_least(V{}, z);
  if constexpr (act == Act::relu6) return at_most(broadcast(A(6)), at_least(V{}, z));
  // Six times the rounded sixth is 1.
  if constexpr (act == Act::hardswish) return z * (activate<Act::relu6>(z + A(3), A()) * (A(1) / 6));
  if constexpr (act == Act::silu) return z / one_plus_exp<A>(-z);
  if constexpr (act == Act::leaky_relu) return select(z > V{}, z, z * slope);
  return z;
}

// Whether the derivative is 0 or 1 everywhere: da is passed or stopped, and of a storage type's values is one again.
constexpr bool passes_or_stops(Act act) { return act == Act::linear || act == Act::relu || act == Act::relu6; }

// da times the activation's derivative at z, which at the corners is PyTorch's.
template <Act act, class V>
MX_INLINE V activate_backward(V z, V da, Element<V> slope) {
  using A = Element<V>;
  if constexpr (act == Act::relu) return select(z <= V{}, V{}, da);
  if constexpr (act == Act::relu6) return select((z <= V{}) | (z >= broadcast(A(6))), V{}, da);
  if constexpr (act == Act::hardswish) {
    const V slope = fma(z, broadcast(A(1) / 3), broadcast(A(0.5)));
    return select(z <= broadcast(A(-3)), V{}, select(z < broadcast(A(3)), da * slope, da));
  }
  if constexpr (act == Act::silu) {
    const V sigmoid = A(1) / one_plus_exp<A>(-z);
    return da * (sigmoid * fma(z, A(1) - sigmoid, broadcast(A(1))));
  }
  if constexpr (act == Act::leaky_relu) return select(z > V{}, da, da * slope);
  return da;
}

// Not inlined, so that it takes no registers where it is called and exists once.
template <class V>
__attribute__((noinline)) void activate_values(Act act, Element<V> slope, V* values, int count) {
  with_act(act, [&](auto constant_act) {
    for (int i = 0; i < count; ++i) values[i] = activate<constant_act.value>(values[i], slope);
  });
}

// A block in registers.
template <int rows, int vectors, class V>
MX_INLINE void activate_block(Act act, Element<V> slope, V (&values)[rows][vectors]) {
  if (act == Act::linear) return;
  const auto activate_all = [&](auto constant_act) {
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) values[i][v] = activate<constant_act.value>(values[i][v], slope);
  };
  if (act == Act::relu) return activate_all(Constant<Act::relu>{});
  if (act == Act::relu6) return activate_all(Constant<Act::relu6>{});
  V copy[rows][vectors];  // has an address, and so does not stay in registers
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) copy[i][v] = values[i][v];
  activate_values(act, slope, &copy[0][0], rows * vectors);
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) values[i][v] = copy[i][v];
}

// z = (y - mean)*scale + shift for one vector of channels. Centred first: a large mean would cancel in y*scale +
// constant.
template <class A>
struct ChannelNorm {
  Vec<A> mean, scale, shift;

  MX_INLINE Vec<A> z(Vec<A> y) const { return of_centred(y - mean); }
  MX_INLINE Vec<A> of_centred(Vec<A> centred) const { return fma(centred, scale, shift); }
};

// A NormAct (csrc/args.h) with its vectors in the accumulation type.
template <class A>
struct ChannelNormAct {
  const A* bn;       // [BN_ROWS][channels], or that from a channel on; null: z = y
  int64_t channels;  // of a row
  Act act;
  A slope;  // of leaky_relu

  ChannelNormAct(const NormAct& norm_act, int64_t channels)
      : bn(static_cast<const A*>(norm_act.bn)), channels(channels), act(norm_act.act), slope(A(norm_act.slope)) {}

  static ChannelNormAct identity(int64_t channels) { return {{nullptr, Act::linear, 0}, channels}; }

  // The same from channel c on.
  ChannelNormAct from(int64_t c) const {
    ChannelNormAct part = *this;
    if (bn) part.bn += c;
    return part;
  }

  bool normalises() const { return bn != nullptr; }

  template <bool partial>
  MX_INLINE ChannelNorm<A> norm(int64_t c, int count) const {
    return {load_lanes<partial, A>(bn + BN_MEAN * channels + c, count),
            load_lanes<partial, A>(bn + BN_SCALE * channels + c, count),
            load_lanes<partial, A>(bn + BN_SHIFT * channels + c, count)};
  }
};

// Calls f(Constant<normalises>, Constant<act>) for an input, which has an activation after a normalisation only.
template <class A, class F>
MX_INLINE void with_norm_act(const ChannelNormAct<A>& input, const F& f) {
  if (!input.normalises()) return f(Constant<false>{}, Constant<Act::linear>{});
  with_act(input.act, [&](auto act) { f(Constant<true>{}, act); });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
