// What the CPU and the operating system allow this process to run.
#pragma once

namespace mx::host {

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16, amx_bf16;
};

// Asks the kernel for permission to use AMX's tile data, without which the first AMX instruction would kill the
// process; amx_bf16 is usable only if that was granted.
CpuFeatures cpu_features();

}  // namespace mx::host
