// The kernels for AVX-512 (F, BW, VL, DQ: every server CPU with AVX-512 since Skylake, and Zen 4).
#if defined(__x86_64__)
// Not undone at the end of the file: templates are instantiated there, and need it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define MX_ISA_NAMESPACE avx512
#define MX_ISA_AVX512
#define MX_VECTOR_BYTES 64
#include "table.h"

const mx::cpu::Kernels mx::cpu::avx512_kernels[kDtypes] = MX_ALL_KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
