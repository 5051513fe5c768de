// What a matrix product (gemm.h) multiplies: elements of a tile and of a panel, as the machine's multiply-add takes
// them.
//
// An element is a number of the accumulation type, or, where the machine multiplies bfloat16 itself (AVX512-BF16,
// AMX), a pair of bfloat16 numbers that are neighbours along the depth of the product: one instruction multiplies both
// and adds both.
#pragma once

#include "dispatch.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

struct Pair {
  uint32_t bits;  // the first in the lower half
};

template <class T>
struct OperandOf {
  using type = Acc<T>;
};
#if defined(MX_ISA_AVX512_BF16)
template <>
struct OperandOf<bf16> {
  using type = Pair;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

// Whether a row of elements holds the bits of a row of the storage type.
template <class T>
constexpr bool kStoredOperands = false;
template <>
inline constexpr bool kStoredOperands<float> = true;
template <>
inline constexpr bool kStoredOperands<double> = true;
#if defined(MX_ISA_AVX512_BF16)
template <>
inline constexpr bool kStoredOperands<bf16> = true;
#endif

// Numbers in an element E.
template <class E>
constexpr int kGroup = 1;
template <>
inline constexpr int kGroup<Pair> = 2;

// The numbers that one step along the depth multiplies; depths are filled up with 0 on both sides.
template <class E>
constexpr int kDepthStep = kGroup<E>;
#if defined(MX_ISA_AMX_BF16)
template <>
inline constexpr int kDepthStep<Pair> = 32;
#endif

// In a filled up depth.
template <class E>
MX_INLINE int64_t groups_of(int64_t depth) {
  return ceil_div(depth, kDepthStep<E>) * (kDepthStep<E> / kGroup<E>);
}

// As many elements as a Vec<Acc<E>> has lanes; of a Pair, Vec<float> holds the bits.
template <class E>
MX_INLINE Vec<Acc<E>> load_elements(const E* p) {
  return load_bits<Vec<Acc<E>>>(p);
}

template <class E>
MX_INLINE Vec<Acc<E>> broadcast_element(const E& element) {
  return broadcast(element);
}

// sum + a*b, with all products of a group.
template <class E>
MX_INLINE Vec<Acc<E>> multiply_add(Vec<Acc<E>> a, Vec<Acc<E>> b, Vec<Acc<E>> sum) {
  return fma(a, b, sum);
}

// The elements of kLanes*kGroup neighbours of a row, of which `count` exist; the others are 0.
template <bool partial, class T>
MX_INLINE Vec<Acc<T>> load_row_elements(const T* p, int count) {
  return load_lanes<partial, T>(p, count);
}

// Neighbours along the depth, at `depth` of a row of elements.
template <class T>
MX_INLINE void store_in_row(Operand<T>* row, int64_t depth, Vec<Acc<T>> v) {
  store<Acc<T>>(row + depth, v);
}

// Neighbours across the depth: lane i of all values makes element i.
template <class T>
MX_INLINE void store_group(Operand<T>* to, const Vec<Acc<T>> (&values)[1]) {
  store<Acc<T>>(to, values[0]);
}

// A block of neighbouring channels in vectors, in an order in which loading and storing them is cheap.
template <class T>
struct Neighbours {
  static constexpr int kVectors = 1, kChannels = kLanes<Acc<T>>;

  // Of a channel, in arrays that are loaded as vectors.
  static int64_t place(int64_t channel) { return channel; }

  // The `count` channels that exist; the others are 0.
  template <bool partial>
  MX_INLINE static void load(const T* p, int count, Vec<Acc<T>> (&values)[1]) {
    values[0] = load_lanes<partial, T>(p, count);
  }
  MX_INLINE static void store_in_row(Operand<T>* row, int64_t channel, const Vec<Acc<T>> (&values)[1]) {
    mx::cpu::MX_ISA_NAMESPACE::store_in_row<T>(row, channel, values[0]);
  }
};

#if defined(MX_ISA_AVX512_BF16)
template <>
MX_INLINE Vec<float> broadcast_element<Pair>(const Pair& element) {
  return (Vec<float>)_mm512_set1_epi32(int(element.bits));
}

template <>
MX_INLINE Vec<float> multiply_add<Pair>(Vec<float> a, Vec<float> b, Vec<float> sum) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

template <>
MX_INLINE Vec<float> load_row_elements<false, bf16>(const bf16* p, int) {
  return load_bits<Vec<float>>(p);
}
template <>
MX_INLINE Vec<float> load_row_elements<true, bf16>(const bf16* p, int count) {
  return (Vec<float>)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t(1) << count) - 1), p);
}

template <>
MX_INLINE void store_in_row<bf16>(Pair* row, int64_t depth, Vec<float> v) {
  store<bf16>(reinterpret_cast<bf16*>(row) + depth, v);
}

template <class T>
MX_INLINE void store_group(Pair* to, const Vec<float> (&values)[2]) {
  static constexpr struct Zip {
    uint16_t lane[32] = {};
    constexpr Zip() {
      for (int i = 0; i < 32; ++i) lane[i] = uint16_t(i / 2 + i % 2 * 16);
    }
  } zip;
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(zip.lane), both));
}

// A 32-bit lane holds two channels. Shifted up, it is the even one as a float, and without its lower half the odd one:
// one instruction a vector, where widening takes two.
template <>
struct Neighbours<bf16> {
  static constexpr int kVectors = 2, kChannels = 2 * kLanes<float>;

  static int64_t place(int64_t channel) {
    return channel / kChannels * kChannels + channel % 2 * kLanes<float> + channel % kChannels / 2;
  }

  template <bool partial>
  MX_INLINE static void load(const bf16* p, int count, Vec<float> (&values)[2]) {
    const U32 pairs = (U32)load_row_elements<partial, bf16>(p, count);
    values[0] = (Vec<float>)(pairs << 16);
    values[1] = (Vec<float>)(pairs & 0xffff0000u);
  }
  MX_INLINE static void store_in_row(Pair* row, int64_t channel, const Vec<float> (&values)[2]) {
    store_group<bf16>(row + channel / 2, values);
  }
};
#endif

}  // namespace mx::cpu::MX_ISA_NAMESPACE
