// What all kernels use: parallel_for over any callable, constants as types, small integer functions.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// f(begin, end) over disjoint ranges that cover [0, n), on several threads.
template <class F>
inline void parallel(int64_t n, const F& f) {
  parallel_for(n, const_cast<F*>(&f),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); });
}

// A constant that can be handed to a generic lambda.
template <auto v>
struct Constant {
  static constexpr auto value = v;
};

constexpr int kTaps = 9;  // of a 3x3 convolution

MX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MX_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MX_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace mx::cpu::MX_ISA_NAMESPACE
