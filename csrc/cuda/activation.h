// Normalisation and activation: all that this backend knows of either.
//
//     z = (y - mean)*scale + shift,   a = activate(z)
//
// They are applied to a tensor on load and on store, and the derivative is taken from z.
//
// A kernel has the code of every activation and is told which to run, instead of being compiled once for each: nearly
// every kernel has one, and several would be as many libraries. All threads go the same way, and ask once for a pack
// of channels, which costs a pack an instruction or two. Those that rectify come first, as one: they are an
// instruction a value, whose number is a parameter of the kernel.
#pragma once
#include "packs.h"

namespace mx::cuda {

struct Activation {
  Act act;
  // linear and relu
  float lower;   // a = z, but at least this
  float corner;  // up to this z the derivative is 0; NaN: nowhere, not even at -Inf
  // leaky_relu
  float slope;
};

inline Activation activation_of(const NormAct& norm_act) {
  const bool linear = norm_act.act == Act::linear;
  return {norm_act.act, linear ? -INFINITY : 0.0f, linear ? NAN : 0.0f, float(norm_act.slope)};
}

__device__ __forceinline__ float sigmoid(float z) {
  return fast_reciprocal(1.0f + fast_exp2(z * -1.4426950408889634f));  // log2(e)
}

// z becomes a. NaN stays NaN.
template <int N>
__device__ __forceinline__ void activate(float (&z)[N], const Activation& act) {
  if (act.act <= Act::relu) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = at_least(z[i], act.lower);
  } else if (act.act == Act::relu6) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = at_most(at_least(z[i], 0.0f), 6.0f);
  } else if (act.act == Act::hardswish) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] *= saturate((z[i] + 3.0f) * (1.0f / 6.0f));
  } else if (act.act == Act::leaky_relu) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = z[i] > 0.0f ? z[i] : z[i] * act.slope;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] *= sigmoid(z[i]);
  }
}

// da becomes da times the derivative at z, as PyTorch has it: 0 at a clamp's corners and before hardswish's, and da
// where z is NaN, but of silu and leaky_relu.
template <int N>
__device__ __forceinline__ void activate_backward(const float (&z)[N], float (&da)[N], const Activation& act) {
  if (act.act <= Act::relu) {
#pragma unroll
    for (int i = 0; i < N; ++i) da[i] = z[i] <= act.corner ? 0.0f : da[i];
  } else if (act.act == Act::relu6) {
#pragma unroll
    for (int i = 0; i < N; ++i) da[i] = z[i] <= 0.0f || z[i] >= 6.0f ? 0.0f : da[i];
  } else if (act.act == Act::hardswish) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float slope = z[i] < 3.0f ? fmaf(z[i], 1.0f / 3.0f, 0.5f) : 1.0f;
      da[i] = z[i] <= -3.0f ? 0.0f : da[i] * slope;
    }
  } else if (act.act == Act::leaky_relu) {
#pragma unroll
    for (int i = 0; i < N; ++i) da[i] = z[i] > 0.0f ? da[i] : da[i] * act.slope;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float s = sigmoid(z[i]);
      da[i] *= s * fmaf(z[i], 1.0f - s, 1.0f);
    }
  }
}

// mx::NormAct among a kernel's parameters.
struct NormActParameters {
  const float* bn;  // null: z = y
  Activation act;
};

inline NormActParameters parameters_of(const NormAct& norm_act) {
  return {static_cast<const float*>(norm_act.bn), activation_of(norm_act)};
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
