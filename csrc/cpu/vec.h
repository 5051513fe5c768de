// Vectors of the accumulation type, and loads and stores that convert between it and the storage types.
//
// Written with the compilers' vector extensions, so that one source serves every instruction set: the including file
// defines MX_ISA_NAMESPACE, MX_VECTOR_BYTES (16, 32 or 64) and, where they exist, MX_ISA_AVX2 or MX_ISA_AVX512, and
// switches the target on before it includes anything. Intrinsics appear only where the extensions have no word for it
// (masked loads) or compilers translate it badly (16-bit conversions, explicit fused multiply-add).
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(MX_ISA_AVX2) || defined(MX_ISA_AVX512)
#include <immintrin.h>
#endif

#define MX_INLINE inline __attribute__((always_inline))

namespace mx::cpu::MX_ISA_NAMESPACE {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The accumulation type of a storage type.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(MX_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(MX_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(MX_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(MX_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;  // A: float or double
template <class A>
using Mask = typename VecOf<A>::mask;  // what a comparison of two Vec<A> gives: all ones or zero, lane by lane
template <class A>
constexpr int kLanes = MX_VECTOR_BYTES / int(sizeof(A));

typedef uint32_t U32 __attribute__((vector_size(MX_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(MX_VECTOR_BYTES / 2)));  // as many lanes as U32

template <class A>
MX_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

template <class A>
MX_INLINE Vec<A> zero() {
  return Vec<A>{};
}

// Lane by lane: mask ? a : b.
template <class V, class M>
MX_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// v, or 0 where it is infinite or NaN.
template <class V>
MX_INLINE V finite_or_zero(V v) {
  return v - v == V{} ? v : V{};
}

MX_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(MX_ISA_AVX512)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MX_ISA_AVX2)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

MX_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(MX_ISA_AVX512)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(MX_ISA_AVX2)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, halves added first, so that the order is the same for every caller.
template <class V>
MX_INLINE auto reduce_add(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto lane = [&](int i) { return v[i]; };
  decltype(v[0] + v[0]) sums[lanes];
  for (int i = 0; i < lanes; ++i) sums[i] = lane(i);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// --- 16-bit formats, lanes of 32 bits -------------------------------------------------------------------------------

MX_INLINE U32 widen(U16 x) {
#if defined(MX_ISA_AVX512)
  return (U32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(MX_ISA_AVX2)
  return (U32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

MX_INLINE U16 narrow(U32 x) {  // x < 65536
#if defined(MX_ISA_AVX512)
  return (U16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(MX_ISA_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, U16);
#endif
}

MX_INLINE Vec<float> bf16_to_float(U16 x) { return (Vec<float>)(widen(x) << 16); }

// The float's bits rounded to bfloat16 (nearest, ties to even), still in the upper half of 32 bits, and alone. The
// instruction for it makes subnormal numbers 0.
#if defined(MX_ISA_AVX512_BF16)
MX_INLINE U16 float_to_bf16(Vec<float> v) { return (U16)_mm512_cvtneps_pbh((__m512)v); }
MX_INLINE U32 round_to_bf16(Vec<float> v) { return widen(float_to_bf16(v)) << 16; }
#else
MX_INLINE U32 round_to_bf16(Vec<float> v) {
  const U32 x = (U32)v;
  const U32 rounded = (x + 0x7fff + ((x >> 16) & 1)) & 0xffff0000u;
  return v != v ? U32{} + 0x7fc00000u : rounded;
}
MX_INLINE U16 float_to_bf16(Vec<float> v) { return narrow(round_to_bf16(v) >> 16); }
#endif

#if defined(MX_ISA_AVX512)
MX_INLINE Vec<float> f16_to_float(U16 x) { return (Vec<float>)_mm512_cvtph_ps((__m256i)x); }
MX_INLINE U16 float_to_f16(Vec<float> v) { return (U16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(MX_ISA_AVX2)
MX_INLINE Vec<float> f16_to_float(U16 x) { return (Vec<float>)_mm256_cvtph_ps((__m128i)x); }
MX_INLINE U16 float_to_f16(Vec<float> v) { return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
MX_INLINE Vec<float> f16_to_float(U16 half) {
  const U32 h = widen(half);
  const U32 sign = (h & 0x8000) << 16;
  const U32 exponent_and_mantissa = (h & 0x7fff) << 13;
  const U32 exponent = exponent_and_mantissa & (0x7c00u << 13);
  const U32 rebiased = exponent_and_mantissa + ((127u - 15u) << 23);
  // Subnormal: the mantissa on top of 2^-14, minus 2^-14, lets the subtraction do the normalisation.
  const U32 two_to_minus_14 = U32{} + (113u << 23);
  const U32 subnormal = (U32)((Vec<float>)(rebiased + (1u << 23)) - (Vec<float>)two_to_minus_14);
  const U32 inf_or_nan = rebiased + ((128u - 16u) << 23);
  U32 x = exponent == U32{} ? subnormal : rebiased;
  x = exponent == U32{} + (0x7c00u << 13) ? inf_or_nan : x;
  return (Vec<float>)(x | sign);
}

MX_INLINE U16 float_to_f16(Vec<float> v) {
  const U32 sign = (U32)v & 0x80000000u;
  const U32 x = (U32)v ^ sign;
  // Below 2^-14 the float addition itself rounds to a multiple of 2^-24, half's subnormal step.
  const U32 half = U32{} + (((127u - 15u) + (23u - 10u) + 1u) << 23);
  const U32 subnormal = (U32)((Vec<float>)x + (Vec<float>)half) - half;
  const U32 normal = (x - ((127u - 15u) << 23) + 0xfff + ((x >> 13) & 1)) >> 13;
  const U32 inf_or_nan = x > U32{} + 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
  U32 h = x < U32{} + 0x38800000u ? subnormal : normal;
  h = x >= U32{} + 0x47800000u ? inf_or_nan : h;
  return narrow(h | (sign >> 16));
}
#endif

// --- loads and stores, unaligned, of kLanes<Acc<T>> elements --------------------------------------------------------

template <class V>
MX_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
MX_INLINE Vec<Acc<T>> load(const T* p) {
  return load_bits<Vec<T>>(p);  // float, double
}
template <>
MX_INLINE Vec<float> load<bf16>(const bf16* p) {
  return bf16_to_float(load_bits<U16>(p));
}
template <>
MX_INLINE Vec<float> load<f16>(const f16* p) {
  return f16_to_float(load_bits<U16>(p));
}

// A vector in the storage format: what a store writes.
MX_INLINE Vec<float> to_storage(Vec<float> v, const float*) { return v; }
MX_INLINE Vec<double> to_storage(Vec<double> v, const double*) { return v; }
MX_INLINE U16 to_storage(Vec<float> v, const bf16*) { return float_to_bf16(v); }
MX_INLINE U16 to_storage(Vec<float> v, const f16*) { return float_to_f16(v); }

#if defined(MX_ISA_AVX512)
// Two vectors in a 16-bit format, one after the other.
template <class T>
MX_INLINE __m512i to_storage(Vec<float> first, Vec<float> second, const T* type) {
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)to_storage(first, type)), (__m256i)to_storage(second, type),
                            1);
}
#if defined(MX_ISA_AVX512_BF16)
MX_INLINE __m512i to_storage(Vec<float> first, Vec<float> second, const bf16*) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif
#endif

template <class T>
MX_INLINE void store(T* p, Vec<Acc<T>> v) {
  const auto stored = to_storage(v, (const T*)nullptr);
  __builtin_memcpy(p, &stored, sizeof stored);
}

// v as a later load of the stored value will see it.
template <class T>
MX_INLINE Vec<Acc<T>> round_to_storage(Vec<Acc<T>> v) {
  return v;
}
template <>
MX_INLINE Vec<float> round_to_storage<bf16>(Vec<float> v) {
  return (Vec<float>)round_to_bf16(v);
}
template <>
MX_INLINE Vec<float> round_to_storage<f16>(Vec<float> v) {
  return f16_to_float(float_to_f16(v));
}

// The first `count` elements (0 <= count <= lanes); the other lanes are 0. Nothing after them is touched.
template <class T>
MX_INLINE Vec<Acc<T>> load_partial(const T* p, int count) {
#if defined(MX_ISA_AVX512)
  if constexpr (sizeof(T) == 8) {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<Acc<T>>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
  } else {
    const U16 bits = (U16)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
    return load<T>((const T*)&bits);
  }
#else
  T elements[kLanes<Acc<T>>] = {};
  for (int i = 0; i < count; ++i) elements[i] = p[i];
  return load<T>(elements);
#endif
}

template <class T>
MX_INLINE void store_partial(T* p, Vec<Acc<T>> v, int count) {
#if defined(MX_ISA_AVX512)
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)to_storage(v, (const T*)nullptr));
  }
#else
  T elements[kLanes<Acc<T>>];
  store<T>(elements, v);
  for (int i = 0; i < count; ++i) p[i] = elements[i];
#endif
}

// Full vector or channel tail, chosen at compile time, so that one loop body serves both.
template <bool partial, class T>
MX_INLINE Vec<Acc<T>> load_lanes(const T* p, int count) {
  if constexpr (partial)
    return load_partial<T>(p, count);
  else
    return load<T>(p);
}

template <bool partial, class T>
MX_INLINE void store_lanes(T* p, Vec<Acc<T>> v, int count) {
  if constexpr (partial)
    store_partial<T>(p, v, count);
  else
    store<T>(p, v);
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
