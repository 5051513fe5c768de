// The interface between the torch bindings (csrc/cpu/bindings.cpp) and the kernels, which are compiled once per
// instruction set. No torch header and no STL: an inline function instantiated under AVX-512 must never be the one the
// linker keeps for everybody (one-definition rule).
#pragma once
#include "../args.h"

namespace mx::cpu {

// Runs fn(context, begin, end) over disjoint ranges that cover [0, n), on several threads. What fn throws ends the
// call, and is thrown on the calling thread. Results must not depend on how [0, n) is cut.
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t n, void* context, RangeFunction fn);
int max_threads();

// 64-byte aligned memory that lives until the calling thread ends or asks for more from the same slot; contents are
// undefined. Throws if there is none. Slot 0: a kernel's shared workspace, taken by the calling thread; slots 1 and up:
// per worker.
void* scratch(int slot, size_t bytes);

// The kernels of one instruction set for activations of one dtype.
struct Kernels {
  void (*forward[kConvs])(const ForwardArgs&);  // by Conv
  void (*backward[kConvs])(const BackwardArgs&);
  void (*norm_act_forward)(const NormActArgs&);
  void (*norm_act_backward)(const NormActArgs&);
  void (*block_inference)(const BlockArgs&);
  // Of the packed form of a block, or of its pointwise weight alone; and packs one to an address on a cache line (x,
  // packed and y of the arguments are not used, and without a depthwise weight it is the pointwise one alone).
  int64_t (*packed_bytes)(int64_t c_in, int64_t c_out, bool block);
  void (*pack)(const BlockArgs&, void* packed);
  // Likewise of a depthwise weight alone, [c][1][kernel][kernel].
  int64_t (*depthwise_packed_bytes)(int64_t c, int64_t kernel);
  void (*pack_depthwise)(const void* weight, int64_t c, int64_t kernel, void* packed);
};

constexpr int kDtypes = 4;
extern const Kernels baseline_kernels[kDtypes];  // by Dtype
#if defined(__x86_64__)
extern const Kernels avx2_kernels[kDtypes];
extern const Kernels avx512_kernels[kDtypes];
// For bfloat16, the only dtype that these instructions know.
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_bf16_kernels;
#endif

}  // namespace mx::cpu
