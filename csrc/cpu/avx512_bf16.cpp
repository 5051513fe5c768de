// The bfloat16 kernels for AVX-512 with bfloat16 products (Zen 4, Cooper Lake, Sapphire Rapids and newer).
#if defined(__x86_64__)
// Not undone at the end of the file: templates are instantiated there, and need it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define MX_ISA_NAMESPACE avx512_bf16
#define MX_ISA_AVX512
#define MX_ISA_AVX512_BF16
#define MX_VECTOR_BYTES 64
#include "table.h"

const mx::cpu::Kernels mx::cpu::avx512_bf16_kernels = avx512_bf16::kKernels<avx512_bf16::bf16>;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
