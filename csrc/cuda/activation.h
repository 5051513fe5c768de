// Normalisation and activation: all that this backend knows of either.
//
//     z = (y - mean)*scale + shift,   a = activate(z)
//
// They are applied to a tensor on load and on store, and the derivative is taken from z. Every activation so far is a
// clamp from below, which costs a kernel one instruction and no register, whichever it is: the numbers are parameters
// of the kernel. Another clamp is another line of activation_of.
#pragma once
#include "packs.h"

namespace mx::cuda {

struct Activation {
  float lower;   // a = z, but at least this
  float corner;  // up to this z the derivative is 0; NaN: nowhere, not even at -Inf
};

inline Activation activation_of(Act act) {
  return act == Act::relu ? Activation{0.0f, 0.0f} : Activation{-INFINITY, NAN};
}

// NaN stays NaN.
__device__ __forceinline__ float activate(float z, const Activation& act) { return at_least(z, act.lower); }

// da times the derivative at z, as PyTorch has it: 0 at the corner, and da where z is NaN.
__device__ __forceinline__ float activate_backward(float z, float da, const Activation& act) {
  return z <= act.corner ? 0.0f : da;
}

// mx::NormAct among a kernel's parameters.
struct NormActParameters {
  const float* bn;  // null: z = y
  Activation act;
};

inline NormActParameters parameters_of(const NormAct& norm_act) {
  return {static_cast<const float*>(norm_act.bn), activation_of(norm_act.act)};
}

// Whether a tensor is loaded or stored as it is.
inline bool is_identity(const NormAct& norm_act) { return norm_act.bn == nullptr && norm_act.act == Act::linear; }

// The normalisation of N neighbouring channels.
template <int N>
struct ChannelNorm {
  float mean[N], scale[N], shift[N];

  static __device__ __forceinline__ ChannelNorm identity() {
    ChannelNorm norm;
#pragma unroll
    for (int i = 0; i < N; ++i) norm.mean[i] = norm.shift[i] = 0.0f, norm.scale[i] = 1.0f;
    return norm;
  }

  // Of channels c .. c+N-1; kAligned as in load_channels.
  template <bool kAligned>
  static __device__ __forceinline__ ChannelNorm load(const float* bn, int c, int channels) {
    ChannelNorm norm;
    load_vector<kAligned>(bn + int64_t(BN_MEAN) * channels, c, channels, norm.mean);
    load_vector<kAligned>(bn + int64_t(BN_SCALE) * channels, c, channels, norm.scale);
    load_vector<kAligned>(bn + int64_t(BN_SHIFT) * channels, c, channels, norm.shift);
    return norm;
  }

  // Once in a kernel, whatever bn's alignment; the identity where not `given`.
  static __device__ __forceinline__ ChannelNorm load_each(const float* bn, int c, int channels, bool given) {
    ChannelNorm norm;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      norm.mean[i] = given ? bn[BN_MEAN * channels + c + i] : 0.0f;
      norm.scale[i] = given ? bn[BN_SCALE * channels + c + i] : 1.0f;
      norm.shift[i] = given ? bn[BN_SHIFT * channels + c + i] : 0.0f;
    }
    return norm;
  }

  // Centred first: a large mean would cancel in y*scale + constant.
  __device__ __forceinline__ float z(float y, int i) const { return (y - mean[i]) * scale[i] + shift[i]; }
};

}  // namespace mx::cuda
