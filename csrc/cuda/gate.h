// The gate of a pointwise convolution (squeeze-excite): a factor of its input's activation for each image and channel.
#pragma once
#include "operands.h"

namespace mx::cuda {

// Which image a row belongs to, of images of so many pixels.
struct Images {
  uint64_t pixels, reciprocal;  // (2^64 - 1)/pixels, rounded down

  MX_HOST_DEVICE int64_t of(int64_t row) const {
    // reciprocal/2^64 is 1/pixels or up to 2^-64 less, and so the quotient right or one too small.
    const uint64_t image = uint64_t((unsigned __int128)uint64_t(row) * reciprocal >> 64);
    return int64_t(image + (uint64_t(row) - image * pixels >= pixels));
  }
};

template <class T>
struct Gate {
  const T* data;  // [images][channels]
  Images images;
  int channels;

  __device__ __forceinline__ const T* of_image(int64_t image) const { return data + image * channels; }
};

template <class T, class Args>
Gate<T> gate_of(const Args& args) {
  const uint64_t pixels = args.g.h * args.g.w;
  return {static_cast<const T*>(args.gate), {pixels, ~uint64_t(0) / pixels}, int(args.g.c_in)};
}

// Whether the number of an image fits GatedInput's.
inline bool can_number(const Geometry& g) { return g.n <= INT32_MAX; }

// a*gate [rows, channels], with a = act(norm(u)), as a Source (product.h).
template <class T, bool kWide>
struct GatedInput {
  static constexpr int kWidth = kPack<T>;
  using Ungated = NormActInput<T, kWide>;
  struct Raw {
    typename Ungated::Raw u;
    int image;  // its gate is loaded when it is needed, from the cache: packs would take too many registers
    static __device__ __forceinline__ Raw zero() { return {Ungated::Raw::zero(), -1}; }
  };
  using Vectors = typename Ungated::Vectors;
  Ungated ungated;
  Gate<T> gate;

  __device__ __forceinline__ Raw load(int64_t row, int c) const {
    return {ungated.load(row, c), int(gate.images.of(row))};
  }
  __device__ __forceinline__ Vectors vectors(int c) const { return ungated.vectors(c); }
  __device__ __forceinline__ void convert(const Raw& raw, int c, const Vectors& norm, float (&a)[kWidth]) const {
    if (raw.image < 0) return;
    const auto factor = load_channels<kWide, kWidth>(gate.of_image(raw.image), c, ungated.channels);
    ungated.convert(raw.u, c, norm, a);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] *= to_float(factor.v[i]);
  }
};

template <class T, bool kWide, class Args>
GatedInput<T, kWide> gated_input_of(const Args& args) {
  return {norm_act_input_of<T, kWide>(args), gate_of<T>(args)};
}

}  // namespace mx::cuda
