// The kernels for AVX2 with FMA and F16C (Haswell, Zen, and newer).
#if defined(__x86_64__)
// Not undone at the end of the file: templates are instantiated there, and need it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MX_ISA_NAMESPACE avx2
#define MX_ISA_AVX2
#define MX_VECTOR_BYTES 32
#include "table.h"

const mx::cpu::Kernels mx::cpu::avx2_kernels[kDtypes] = MX_ALL_KERNELS;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
