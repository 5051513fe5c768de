// Channels in runs of vectors, so that a loop over pixels keeps the constants of a whole run in registers.
#pragma once

#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

template <int v, bool p>
struct ChannelVectors {
  static constexpr int vectors = v;
  static constexpr bool partial = p;
};

// body(c, count, ChannelVectors) for all channels: runs of four whole vectors, then of one, then the `count` that are
// left.
template <class A, class Body>
MX_INLINE void for_channel_vectors(int64_t channels, const Body& body) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) body(c, L, ChannelVectors<4, false>{});
  for (; c + L <= channels; c += L) body(c, L, ChannelVectors<1, false>{});
  if (c < channels) body(c, int(channels - c), ChannelVectors<1, true>{});
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
