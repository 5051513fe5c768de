// dy, the gradient at a convolution's output, rebuilt on load from dz and y (csrc/ops.h).
#pragma once
#include "packs.h"

namespace mx::cuda {

// The coefficients of N neighbouring channels.
template <int N>
struct ChannelGradient {
  float dz_coefficient[N], y_coefficient[N], mean[N], constant[N];

  __device__ __forceinline__ float dy(float dz, float y, int i) const {
    return dz_coefficient[i] * dz + (y_coefficient[i] * (y - mean[i]) + constant[i]);
  }

  // Of channels c .. c+N-1; kAligned as in load_channels. grad_bn null: dy = dz; no y: dy = DZ_COEFFICIENT*dz.
  template <bool kAligned>
  static __device__ __forceinline__ ChannelGradient load(const float* grad_bn, bool with_y, int c, int channels) {
    ChannelGradient gradient;
    if (with_y) {
      load_vector<kAligned>(grad_bn + int64_t(GRAD_DZ_COEFFICIENT) * channels, c, channels, gradient.dz_coefficient);
      load_vector<kAligned>(grad_bn + int64_t(GRAD_Y_COEFFICIENT) * channels, c, channels, gradient.y_coefficient);
      load_vector<kAligned>(grad_bn + int64_t(GRAD_MEAN) * channels, c, channels, gradient.mean);
      load_vector<kAligned>(grad_bn + int64_t(GRAD_CONSTANT) * channels, c, channels, gradient.constant);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        gradient.dz_coefficient[i] = 1.0f;
        gradient.y_coefficient[i] = gradient.mean[i] = gradient.constant[i] = 0.0f;
      }
      if (grad_bn != nullptr)
        load_vector<kAligned>(grad_bn + int64_t(GRAD_DZ_COEFFICIENT) * channels, c, channels, gradient.dz_coefficient);
    }
    return gradient;
  }

  // Once in a kernel, whatever grad_bn's alignment; where the channels are not `inside`, dy = dz.
  static __device__ __forceinline__ ChannelGradient load_each(const float* grad_bn, bool with_y, int c, int channels,
                                                              bool inside) {
    ChannelGradient gradient;
    const auto row = [&](int r, int i, bool given, float otherwise) {
      return grad_bn != nullptr && given && inside ? grad_bn[r * channels + c + i] : otherwise;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gradient.dz_coefficient[i] = row(GRAD_DZ_COEFFICIENT, i, true, 1.0f);
      gradient.y_coefficient[i] = row(GRAD_Y_COEFFICIENT, i, with_y, 0.0f);
      gradient.mean[i] = row(GRAD_MEAN, i, with_y, 0.0f);
      gradient.constant[i] = row(GRAD_CONSTANT, i, with_y, 0.0f);
    }
    return gradient;
  }
};

}  // namespace mx::cuda
