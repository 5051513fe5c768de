// Packs of neighbouring channels: their conversion to float32 and back, their loads and stores.
#pragma once
#include <string.h>

#include "../args.h"
#include "device.h"

#define MX_HOST_DEVICE __host__ __device__ __forceinline__

namespace mx::cuda {

MX_HOST_DEVICE float to_float(float x) { return x; }
MX_HOST_DEVICE float to_float(half x) { return __half2float(x); }
MX_HOST_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest, as activations are stored.
template <class T>
MX_HOST_DEVICE T rounded(float x);
template <>
MX_HOST_DEVICE float rounded<float>(float x) {
  return x;
}
template <>
MX_HOST_DEVICE half rounded<half>(float x) {
  return __float2half_rn(x);
}
template <>
MX_HOST_DEVICE bfloat16 rounded<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N neighbouring channels, loaded and stored by one access of N*sizeof(T) bytes, at most 16, aligned to its size.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];

  static MX_HOST_DEVICE Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  static MX_HOST_DEVICE Pack zero() {
    Pack x;
    for (int i = 0; i < N; ++i) x.v[i] = rounded<T>(0.0f);
    return x;
  }
  MX_HOST_DEVICE void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> round_pack(const float (&v)[N]) {
  Pack<T, N> p;
  if constexpr (kSame<T, half> && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const __half2 two = __floats2half2_rn(v[i], v[i + 1]);
      p.v[i] = __low2half(two), p.v[i + 1] = __high2half(two);
    }
  } else if constexpr (kSame<T, bfloat16> && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(v[i], v[i + 1]);
      p.v[i] = __low2bfloat16(two), p.v[i + 1] = __high2bfloat16(two);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p.v[i] = rounded<T>(v[i]);
  }
  return p;
}

template <class T, int N>
__device__ __forceinline__ void to_floats(const Pack<T, N>& p, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(p.v[i]);
}

// A pack between its load and its use, as 32-bit words: nvcc would take a Pack<half, 8> apart into eight registers as
// soon as it is loaded, and so wait for it there.
template <class T, int N = 16 / sizeof(T)>
struct PackedWords {
  uint32_t word[(N * sizeof(T) + 3) / 4];

  static MX_HOST_DEVICE PackedWords zero() { return {}; }
  static MX_HOST_DEVICE PackedWords of(const Pack<T, N>& p) {
    PackedWords w = zero();
    memcpy(w.word, &p, sizeof(p));
    return w;
  }
  MX_HOST_DEVICE Pack<T, N> pack() const {
    Pack<T, N> p;
    memcpy(&p, word, sizeof(p));
    return p;
  }
};

// Channels c .. c+N-1 of the `channels` at p: by one access where aligned (then channels is a multiple of N), else one
// by one, zeros past the last.
template <bool aligned, int N, class T>
__device__ __forceinline__ Pack<T, N> load_channels(const T* p, int c, int channels) {
  if constexpr (aligned) {
    return Pack<T, N>::load(p + c);
  } else {
    Pack<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.v[i] = c + i < channels ? p[c + i] : rounded<T>(0.0f);
    return v;
  }
}

template <bool aligned, int N, class T>
__device__ __forceinline__ void store_channels(T* p, int c, int channels, const Pack<T, N>& v) {
  if constexpr (aligned) {
    v.store(p + c);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (c + i < channels) p[c + i] = v.v[i];
  }
}

// The same of a float32 vector: a row of bn or grad_bn.
template <bool aligned, int N>
__device__ __forceinline__ void load_vector(const float* p, int c, int channels, float (&v)[N]) {
  constexpr int width = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += width) {
    const auto four = load_channels<aligned, width>(p, c + i, channels);
#pragma unroll
    for (int j = 0; j < width; ++j) v[i + j] = four.v[j];
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

MX_HOST_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// f of a value of the C++ type that a dtype names.
template <class F>
cudaError_t with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float());
    case Dtype::f16:
      return f(half());
    case Dtype::bf16:
      return f(bfloat16());
    default:
      return cudaErrorInvalidValue;
  }
}

// The widest access for a dtype: 16 bytes, where the channel count is a multiple of it.
template <class T>
constexpr int kPack = 16 / sizeof(T);

}  // namespace mx::cuda
