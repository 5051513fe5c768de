// What the CPU and the operating system allow this process to run.
#pragma once
#include <cstddef>

namespace mx::host {

struct CpuFeature {
  const char* name;
  bool usable;
};

inline constexpr std::size_t kCpuFeatures = 9;

// Fills all of `features`. Asks the kernel for permission to use AMX's tile data, without which the first AMX
// instruction would kill the process; amx_bf16 is usable only if that was granted.
void cpu_features(CpuFeature (&features)[kCpuFeatures]);

}  // namespace mx::host
