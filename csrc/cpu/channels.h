// Channels in groups of vectors, so that a loop over pixels keeps the constants of a whole group in registers.
#pragma once

#include "../ops.h"
#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// normalise(y) = (y - mean)*scale + shift, for one vector of channels.
template <class A>
struct Normalisation {
  Vec<A> mean, scale, shift;
};

template <class A, bool partial>
MX_INLINE Normalisation<A> load_normalisation(const A* bn, int64_t channels, int64_t c, int count) {
  return {load_lanes<partial, A>(bn + BN_MEAN * channels + c, count),
          load_lanes<partial, A>(bn + BN_SCALE * channels + c, count),
          load_lanes<partial, A>(bn + BN_SHIFT * channels + c, count)};
}

template <int v, bool p>
struct Group {
  static constexpr int vectors = v;
  static constexpr bool partial = p;
};

// body(c, count, Group) for all channels: groups of four whole vectors, then of one, then the `count` that are left.
template <class A, class Body>
MX_INLINE void for_channel_groups(int64_t channels, const Body& body) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) body(c, L, Group<4, false>{});
  for (; c + L <= channels; c += L) body(c, L, Group<1, false>{});
  if (c < channels) body(c, int(channels - c), Group<1, true>{});
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
