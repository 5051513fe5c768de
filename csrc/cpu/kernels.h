// The raw-pointer interface between the torch bindings (csrc/cpu/bindings.cpp) and the kernels, which are compiled
// once per instruction set. No torch header and no STL: an inline function instantiated under AVX-512 must never be
// the one the linker keeps for everybody (one-definition rule).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mx::cpu {

enum class Dtype { f32, f64, bf16, f16 };

// Images are NHWC and dense. Pointwise convolutions use stride 1, padding 0 and a kernel of one tap.
struct Geometry {
  int64_t n, h, w, c_in, c_out, out_h, out_w;
  int stride, padding;
};

// y = conv(a, weight), a = bn_u ? relu(normalise(u)) : u. Layouts and dtypes: csrc/ops.h.
struct ForwardArgs {
  Dtype dtype;
  Geometry g;
  const void* u;
  const void* bn_u;  // null: u is a plain input
  const void* weight;
  void* y;
  // Training: batch statistics of y as stored, and the normalisation made of them.
  void* bn_y;         // null: no statistics wanted
  const void* gamma;  // null: 1
  const void* beta;   // null: 0
  double eps;
  // Inference: y = relu?(normalise(conv)) with epilogue_bn, in the same pass.
  const void* epilogue_bn;  // null: none
  bool epilogue_relu;
};

struct BackwardArgs {
  Dtype dtype;
  Geometry g;
  const void* h;
  const void* y;          // null: dy = P*h (or h)
  const void* grad_bn_y;  // null: dy = h
  const void* u;
  const void* bn_u;    // null: u is a plain input and h_u its gradient
  bool batch_stats_u;  // false: bn_u holds running statistics, so Q = O = 0
  const void* weight;
  void* h_u;          // null: not wanted
  void* grad_weight;  // null: not wanted
  void* grad_bn_u;    // null: not wanted
};

// out = relu?(normalise(y)), or its mean over each image when pooled.
struct NormaliseArgs {
  Dtype dtype;
  int64_t n, hw, c;
  const void* y;
  const void* bn_y;
  bool relu, pool, batch_stats;
  void* out;         // forward
  const void* grad;  // backward
  void* h;
  void* grad_bn_y;
};

// relu(pointwise_bn(pointwise(relu(depthwise_bn(depthwise(x)))))); the depthwise result never leaves the cache.
struct BlockArgs {
  Dtype dtype;
  Geometry g;  // of the depthwise convolution, with c_out the block's output channels
  const void* x;
  const void* depthwise_bn;
  const void* depthwise_weight;
  const void* pointwise_bn;
  const void* pointwise_weight;
  void* y;
};

// Runs fn(context, begin, end) over disjoint ranges that cover [0, n), on several threads. fn must not throw. Results
// must not depend on how [0, n) is cut.
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t n, void* context, RangeFunction fn);
int max_threads();

// 64-byte aligned memory that lives until the calling thread ends or asks for more from the same slot; contents are
// undefined. Slot 0: a kernel's shared workspace, taken by the calling thread; slots 1 and up: per worker.
void* scratch(int slot, size_t bytes);

struct Kernels {
  const char* isa;
  void (*depthwise_forward)(const ForwardArgs&);
  void (*depthwise_backward)(const BackwardArgs&);
  void (*pointwise_forward)(const ForwardArgs&);
  void (*pointwise_backward)(const BackwardArgs&);
  void (*stem_forward)(const ForwardArgs&);
  void (*stem_backward)(const BackwardArgs&);
  void (*normalise_forward)(const NormaliseArgs&);
  void (*normalise_backward)(const NormaliseArgs&);
  void (*block_inference)(const BlockArgs&);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace mx::cpu
