// The kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define MX_ISA_NAMESPACE baseline
#define MX_VECTOR_BYTES 16
#define MX_KERNEL_TABLE baseline_kernels
#include "table.h"
