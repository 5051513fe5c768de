// Activations, their derivatives, and the normalisation in front of them: on the CPU nothing else spells one.
//
// A convolution applies them to its input on load, and norm_act and the inference ops to their output on store. To add
// an activation, add it to with_act, activate and activate_backward.
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
  }
}

// z <= 0 ? 0 : z, up to the sign of 0. A NaN must stay a NaN, as in PyTorch: x86's maximum gives its second operand
// where either is one.
template <class V>
MX_INLINE V relu(V z) {
#if defined(MX_ISA_AVX512)
  if constexpr (sizeof(z[0]) == 4) return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)z);
#elif defined(MX_ISA_AVX2)
  if constexpr (sizeof(z[0]) == 4) return (V)_mm256_max_ps(_mm256_setzero_ps(), (__m256)z);
#endif
  return z <= V{} ? V{} : z;
}

template <Act act, class V>
MX_INLINE V activate(V z) {
  if constexpr (act == Act::relu) return relu(z);
  static_assert(act == Act::linear || act == Act::relu);
  return z;
}

// da times the activation's derivative at z, which at the corners is PyTorch's.
template <Act act, class V>
MX_INLINE V activate_backward(V z, V da) {
  if constexpr (act == Act::relu) return select(z <= V{}, V{}, da);
  static_assert(act == Act::linear || act == Act::relu);
  return da;
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

  ChannelNormAct(const NormAct& norm_act, int64_t channels)
      : bn(static_cast<const A*>(norm_act.bn)), channels(channels), act(norm_act.act) {}

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
