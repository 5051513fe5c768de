// Stores that go past the cache, for outputs larger than a cache keeps until the next kernel reads them: a plain store
// first reads the line that it overwrites, which is a third of the traffic of a kernel that reads as much as it writes.
#pragma once

#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

constexpr int kCacheLine = 64;

// Whether a vector of this type is a whole cache line, the only thing worth writing past the cache.
template <class T>
constexpr bool kCanStream = false;
#if defined(MX_ISA_AVX512)
template <>
inline constexpr bool kCanStream<float> = true;
template <>
inline constexpr bool kCanStream<double> = true;
#endif

// As store, past the cache where the type allows; p is then 64-byte aligned.
template <class T>
MX_INLINE void store_streaming(T* p, Vec<Acc<T>> v) {
#if defined(MX_ISA_AVX512)
  if constexpr (kCanStream<T>) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
  store<T>(p, v);
}

// Orders the streaming stores of this thread before whatever tells another that they are done.
MX_INLINE void finish_streaming() {
#if defined(MX_ISA_AVX512)
  _mm_sfence();
#endif
}

// Whether an output of `pixels` pixels is worth it, and every vector in it aligned.
template <class T>
inline bool streams(const void* output, int64_t pixels, int64_t channels) {
  constexpr int64_t kStreamBytes = 16 << 20;
  return kCanStream<T> && pixels * channels * int64_t(sizeof(T)) >= kStreamBytes &&
         channels * int64_t(sizeof(T)) % kCacheLine == 0 && reinterpret_cast<uintptr_t>(output) % kCacheLine == 0;
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
