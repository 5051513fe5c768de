// What the tiled products read, as Sources (product.h): an activation that is normalised on load, the gradient of a
// convolution's output that is rebuilt on load, and the patches that a dense 3x3 convolution sees.
//
// T: what is in memory. kWide: channel counts are multiples of kPack<T> and pointers 16-byte aligned.
#pragma once
#include "activation.h"
#include "gradient.h"

namespace mx::cuda {

// a [rows, channels]: act(norm(u)).
template <class T, bool kWide>
struct NormActInput {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    PackedWords<T> u;
    static __device__ __forceinline__ Raw zero() { return {PackedWords<T>::zero()}; }
  };
  using Vectors = ChannelNorm<kWidth>;
  const T* u;
  NormActParameters norm_act;
  int channels;

  __device__ __forceinline__ Raw load(int64_t row, int c) const {
    return {PackedWords<T>::of(load_channels<kWide, kWidth>(u + row * channels, c, channels))};
  }
  __device__ __forceinline__ Vectors vectors(int c) const {
    if (norm_act.bn == nullptr) return Vectors::identity();
    return Vectors::template load<kWide>(norm_act.bn, c, channels);
  }
  __device__ __forceinline__ void convert(const Raw& raw, int, const Vectors& norm, float (&a)[kWidth]) const {
    to_floats(raw.u.pack(), a);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = norm.z(a[i], i);
    activate(a, norm_act.act);
  }
};

// Of a convolution's arguments, forward or backward.
template <class T, bool kWide, class Args>
NormActInput<T, kWide> norm_act_input_of(const Args& args) {
  return {static_cast<const T*>(args.u), parameters_of(args.input), int(args.g.c_in)};
}

// dy [rows, channels], of dz and y.
template <class T, bool kWide>
struct OutputGradient {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    PackedWords<T> dz, y;
    static __device__ __forceinline__ Raw zero() { return {PackedWords<T>::zero(), PackedWords<T>::zero()}; }
  };
  using Vectors = ChannelGradient<kWidth>;
  const T* dz;
  const T* y;            // null: dy = DZ_COEFFICIENT*dz; else there is a grad_bn
  const float* grad_bn;  // null: dy = dz
  int channels;

  __device__ __forceinline__ Raw load(int64_t row, int c) const {
    Raw raw = Raw::zero();
    raw.dz = PackedWords<T>::of(load_channels<kWide, kWidth>(dz + row * channels, c, channels));
    if (y != nullptr) raw.y = PackedWords<T>::of(load_channels<kWide, kWidth>(y + row * channels, c, channels));
    return raw;
  }
  __device__ __forceinline__ Vectors vectors(int c) const {
    return Vectors::template load<kWide>(grad_bn, y != nullptr, c, channels);
  }
  __device__ __forceinline__ void convert(const Raw& raw, int, const Vectors& gradient, float (&dy)[kWidth]) const {
    const auto of_dz = raw.dz.pack(), of_y = raw.y.pack();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dy[i] = gradient.dy(to_float(of_dz.v[i]), to_float(of_y.v[i]), i);
  }
};

template <class T, bool kWide>
OutputGradient<T, kWide> output_gradient_of(const BackwardArgs& args) {
  return {static_cast<const T*>(args.dz), static_cast<const T*>(args.y), static_cast<const float*>(args.grad_bn_y),
          int(args.g.c_out)};
}

// [output pixels, 9*channels]: what a 3x3 filter sees of the image x, in the order of its weight: channel, filter row,
// filter column. Zeros outside the image.
template <class T>
struct Patches {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    PackedWords<T> x;
    static __device__ __forceinline__ Raw zero() { return {PackedWords<T>::zero()}; }
  };
  struct Vectors {};
  const T* x;
  int channels, height, width, out_height, out_width, stride, pad_left, pad_top;

  __device__ __forceinline__ Raw load(int64_t pixel, int k) const {
    auto seen = Pack<T, kWidth>::zero();
    const int64_t line = pixel / out_width, image = line / out_height;
    const int column = int(pixel - line * out_width) * stride - pad_left;
    const int row = int(line - image * out_height) * stride - pad_top;
    const T* const corner = x + ((image * height + row) * width + column) * channels;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const int c = (k + e) / 9, tap = (k + e) % 9, i = tap / 3, j = tap % 3;
      if (c < channels && unsigned(row + i) < unsigned(height) && unsigned(column + j) < unsigned(width))
        seen.v[e] = corner[int64_t(i * width + j) * channels + c];
    }
    return {PackedWords<T>::of(seen)};
  }
  __device__ __forceinline__ Vectors vectors(int) const { return {}; }
  __device__ __forceinline__ void convert(const Raw& raw, int, const Vectors&, float (&a)[kWidth]) const {
    to_floats(raw.x.pack(), a);
  }
};

template <class T>
Patches<T> patches_of(const void* x, const Geometry& g) {
  return {static_cast<const T*>(x),
          int(g.c_in),
          int(g.h),
          int(g.w),
          int(g.out_h),
          int(g.out_w),
          g.stride,
          g.pad_left,
          g.pad_top};
}

}  // namespace mx::cuda
