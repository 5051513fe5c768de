// Stores that go past the cache, for outputs larger than a cache keeps until the next kernel reads them: a plain store
// first reads the line that it overwrites, which is a third of the traffic of a kernel that reads as much as it writes.
#pragma once

#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

constexpr int kCacheLine = 64;

// Whether so many vectors of this type are whole cache lines, the only thing worth writing past the cache.
#if defined(MX_ISA_AVX512)
template <class T, int vectors>
constexpr bool kCanStream = vectors * kLanes<Acc<T>> * int(sizeof(T)) % kCacheLine == 0;
#else
template <class T, int vectors>
constexpr bool kCanStream = false;
#endif

// Stores neighbours, past the cache if streaming and kCanStream; p is then 64-byte aligned.
template <class T, int vectors>
MX_INLINE void store_vectors(T* p, bool streaming, const Vec<Acc<T>> (&v)[vectors]) {
#if defined(MX_ISA_AVX512)
  if constexpr (kCanStream<T, vectors>) {
#pragma GCC unroll 2
    for (int i = 0; i < vectors; i += kCacheLine / (kLanes<Acc<T>> * int(sizeof(T)))) {
      __m512i line;
      if constexpr (sizeof(T) == 2)
        line = to_storage(v[i], v[i + 1], p);
      else
        line = (__m512i)v[i];
      if (streaming)
        _mm512_stream_si512((__m512i*)(p + i * kLanes<Acc<T>>), line);
      else
        _mm512_storeu_si512(p + i * kLanes<Acc<T>>, line);
    }
    return;
  }
#endif
#pragma GCC unroll 2
  for (int i = 0; i < vectors; ++i) store<T>(p + i * kLanes<Acc<T>>, v[i]);
}
template <class T>
MX_INLINE void store_streaming(T* p, Vec<Acc<T>> v) {
  const Vec<Acc<T>> vectors[1] = {v};
  store_vectors<T, 1>(p, true, vectors);
}

// Orders the streaming stores of this thread before whatever tells another that they are done.
MX_INLINE void finish_streaming() {
#if defined(MX_ISA_AVX512)
  _mm_sfence();
#endif
}

// Whether an output of `pixels` pixels is worth it, written `vectors` vectors at a time, and each of them aligned.
template <class T, int vectors = 1>
inline bool streams(const void* output, int64_t pixels, int64_t channels) {
  constexpr int64_t kStreamBytes = 8 << 20;
  return kCanStream<T, vectors> && pixels * channels * int64_t(sizeof(T)) >= kStreamBytes &&
         channels * int64_t(sizeof(T)) % kCacheLine == 0 && reinterpret_cast<uintptr_t>(output) % kCacheLine == 0;
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
