// What the tiled products read, as Sources (product.h): an activation that is normalised on load, the gradient of a
// convolution's output that is rebuilt on load, and the patches that a dense 3x3 convolution sees.
//
// T: what is in memory. kWide: channel counts are multiples of kPack<T> and pointers 16-byte aligned.
#pragma once
#include "formulas.h"

namespace mx::cuda {

// a [rows, channels]: relu(normalise(u)), or a plain input.
template <class T, bool kWide>
struct Activation {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    Waiting<T> u;
    static __device__ __forceinline__ Raw zero() { return {Waiting<T>::zero()}; }
  };
  struct Vectors {
    float mean[kWidth], scale[kWidth], shift[kWidth], lower;
  };
  const T* u;
  const float* bn;  // null: u is a plain input
  int channels;

  __device__ __forceinline__ Raw load(int64_t row, int c) const {
    return {Waiting<T>::of(load_channels<kWide, kWidth>(u + row * channels, c, channels))};
  }
  __device__ __forceinline__ Vectors vectors(int c) const {
    Vectors v;
    if (bn != nullptr) {
      load_vector<kWide>(bn + int64_t(BN_MEAN) * channels, c, channels, v.mean);
      load_vector<kWide>(bn + int64_t(BN_SCALE) * channels, c, channels, v.scale);
      load_vector<kWide>(bn + int64_t(BN_SHIFT) * channels, c, channels, v.shift);
      v.lower = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v.mean[i] = v.shift[i] = 0.0f, v.scale[i] = 1.0f;
      v.lower = -INFINITY;
    }
    return v;
  }
  __device__ __forceinline__ void finish(const Raw& raw, int, const Vectors& v, float (&a)[kWidth]) const {
    to_floats(raw.u.pack(), a);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = at_least(normalise(a[i], v.mean[i], v.scale[i], v.shift[i]), v.lower);
  }
};

// dy [rows, channels], of h and y.
template <class T, bool kWide>
struct Gradient {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    Waiting<T> h, y;
    static __device__ __forceinline__ Raw zero() { return {Waiting<T>::zero(), Waiting<T>::zero()}; }
  };
  struct Vectors {
    float p[kWidth], q[kWidth], mean[kWidth], o[kWidth];
  };
  const T* h;
  const T* y;            // null: dy = P*h; else there is a grad_bn
  const float* grad_bn;  // null: dy = h
  int channels;

  __device__ __forceinline__ Raw load(int64_t row, int c) const {
    Raw raw = Raw::zero();
    raw.h = Waiting<T>::of(load_channels<kWide, kWidth>(h + row * channels, c, channels));
    if (y != nullptr) raw.y = Waiting<T>::of(load_channels<kWide, kWidth>(y + row * channels, c, channels));
    return raw;
  }
  __device__ __forceinline__ Vectors vectors(int c) const {
    Vectors v;
    if (y != nullptr) {
      load_vector<kWide>(grad_bn + int64_t(GRAD_DZ_COEFFICIENT) * channels, c, channels, v.p);
      load_vector<kWide>(grad_bn + int64_t(GRAD_Y_COEFFICIENT) * channels, c, channels, v.q);
      load_vector<kWide>(grad_bn + int64_t(GRAD_MEAN) * channels, c, channels, v.mean);
      load_vector<kWide>(grad_bn + int64_t(GRAD_CONSTANT) * channels, c, channels, v.o);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v.p[i] = 1.0f, v.q[i] = v.mean[i] = v.o[i] = 0.0f;
      if (grad_bn != nullptr) load_vector<kWide>(grad_bn + int64_t(GRAD_DZ_COEFFICIENT) * channels, c, channels, v.p);
    }
    return v;
  }
  __device__ __forceinline__ void finish(const Raw& raw, int, const Vectors& v, float (&dy)[kWidth]) const {
    const auto of_h = raw.h.pack(), of_y = raw.y.pack();
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      dy[i] = output_gradient(to_float(of_h.v[i]), to_float(of_y.v[i]), v.p[i], v.q[i], v.mean[i], v.o[i]);
  }
};

// [output pixels, 9*channels]: what a 3x3 filter sees of the image x, in the order of its weight: channel, filter row,
// filter column. Zeros outside the image.
template <class T>
struct Patches {
  static constexpr int kWidth = kPack<T>;
  struct Raw {
    Waiting<T> x;
    static __device__ __forceinline__ Raw zero() { return {Waiting<T>::zero()}; }
  };
  struct Vectors {};
  const T* x;
  int channels, height, width, out_height, out_width, stride, padding;

  __device__ __forceinline__ Raw load(int64_t pixel, int k) const {
    auto seen = Pack<T, kWidth>::zero();
    const int64_t line = pixel / out_width, image = line / out_height;
    const int column = int(pixel - line * out_width) * stride - padding;
    const int row = int(line - image * out_height) * stride - padding;
    const T* const corner = x + ((image * height + row) * width + column) * channels;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const int c = (k + e) / 9, tap = (k + e) % 9, i = tap / 3, j = tap % 3;
      if (c < channels && unsigned(row + i) < unsigned(height) && unsigned(column + j) < unsigned(width))
        seen.v[e] = corner[int64_t(i * width + j) * channels + c];
    }
    return {Waiting<T>::of(seen)};
  }
  __device__ __forceinline__ Vectors vectors(int) const { return {}; }
  __device__ __forceinline__ void finish(const Raw& raw, int, const Vectors&, float (&a)[kWidth]) const {
    to_floats(raw.x.pack(), a);
  }
};

template <class T>
Patches<T> patches_of(const void* x, const Geometry& g) {
  return {static_cast<const T*>(x), int(g.c_in), int(g.h), int(g.w), int(g.out_h), int(g.out_w), g.stride, g.padding};
}

}  // namespace mx::cuda
