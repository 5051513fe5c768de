#include "host/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mx::host {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the CPU does not know the leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(uint64_t word, int index) { return (word >> index) & 1; }

// The register states that the operating system saves (XCR0); an instruction on any other state faults. Written as an
// instruction because the intrinsic asks for a compiler flag.
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

bool request_amx_permission() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;  // asm/prctl.h, from Linux 5.16 on
  constexpr int kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

// Bit numbers: Intel's manual, volume 2, CPUID; volume 1, chapter 13 (XCR0).
CpuFeatures cpu_features() {
  CpuFeatures f = {};
  const Registers basic = cpuid(1, 0);
  if (!bit(basic.ecx, 27)) return f;  // OSXSAVE: without it xgetbv faults
  const uint64_t states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6;
  const bool zmm = (states & 0xe6) == 0xe6;
  const bool tiles = (states & 0x60000) == 0x60000;
  const Registers extended = cpuid(7, 0);
  const Registers extended_1 = cpuid(7, 1);
  f.avx2 = ymm && bit(extended.ebx, 5);
  f.fma = ymm && bit(basic.ecx, 12);
  f.f16c = ymm && bit(basic.ecx, 29);
  f.avx512f = zmm && bit(extended.ebx, 16);
  f.avx512bw = zmm && bit(extended.ebx, 30);
  f.avx512vl = zmm && bit(extended.ebx, 31);
  f.avx512dq = zmm && bit(extended.ebx, 17);
  f.avx512_bf16 = zmm && bit(extended_1.eax, 5);
  f.amx_bf16 = tiles && bit(extended.edx, 24) && bit(extended.edx, 22) && request_amx_permission();
  return f;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

}  // namespace mx::host
