// The kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define MX_ISA_NAMESPACE baseline
#define MX_VECTOR_BYTES 16
#include "table.h"

const mx::cpu::Kernels mx::cpu::baseline_kernels[kDtypes] = MX_ALL_KERNELS;
