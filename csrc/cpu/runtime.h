// The kernels of the instruction set in use.
#pragma once

#include "kernels.h"

namespace mx::cpu {

// The kernels for a dtype of the widest instruction set that this machine runs, or of the one that the environment
// variable MOBILENET_EXT_CPU_ISA (baseline, avx2, avx512, avx512_bf16, amx_bf16) names; read once. Throws where it
// names one that the machine cannot run.
const Kernels& kernels(Dtype dtype);

}  // namespace mx::cpu

// The name of the instruction set in use, for Python by ctypes; null where MOBILENET_EXT_CPU_ISA is impossible.
extern "C" const char* mx_cpu_isa();

// Gives the memory that is kept for later calls back to the system: activations' memory that nobody uses, and the
// workspaces of the calling thread (its workers' are small). For Python by ctypes.
extern "C" void mx_cpu_empty_cache();
