// What the kernels need from the process: threads, scratch memory, and the choice of the instruction set.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "activation_memory.h"
#include "host/cpu_features.h"

namespace mx::cpu {

namespace {

// A worker's share of a range, which it takes in pieces, and the others too when they are done with theirs.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

void parallel_for(int64_t n, void* context, RangeFunction fn) {
  if (n <= 0) return;
  // Shares are stretches, so that a worker goes through memory in order. Cores that are busy with something else too
  // are slower than the others, so work moves from them.
  constexpr int64_t kPieces = 16;
  const int64_t workers = n < max_threads() ? n : max_threads();
  std::vector<Share> shares(workers);
  for (int64_t i = 0; i < workers; ++i) {
    shares[i].next.store(i * n / workers, std::memory_order_relaxed);
    shares[i].end = (i + 1) * n / workers;
  }
  const int64_t piece = n / (workers * kPieces) > 1 ? n / (workers * kPieces) : 1;
  // An exception must not leave the parallel region: it waits here, the first one, and the workers stop.
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    try {
      for (int64_t worker = first; worker < last; ++worker)
        for (int64_t i = 0; i < workers; ++i) {
          Share& share = shares[(worker + i) % workers];
          for (int64_t begin; !failed.load(std::memory_order_relaxed) &&
                              (begin = share.next.fetch_add(piece, std::memory_order_relaxed)) < share.end;)
            fn(context, begin, begin + piece < share.end ? begin + piece : share.end);
        }
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

int max_threads() { return int(torch::stable::get_num_threads()); }

namespace {

constexpr size_t kAlignment = 64;  // a cache line, and AVX-512's vector

struct ScratchSlot {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchSlot() { free(data); }

  void release() {
    free(data);
    data = nullptr;
    bytes = 0;
  }
};

constexpr int kSlots = 8;
thread_local ScratchSlot slots[kSlots];

}  // namespace

void* scratch(int slot, size_t bytes) {
  ScratchSlot& s = slots[slot];
  if (s.bytes < bytes) {
    s.release();
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    s.data = aligned_alloc(kAlignment, rounded);
    if (s.data == nullptr) {
      release_idle_memory();
      s.data = aligned_alloc(kAlignment, rounded);
    }
    STD_TORCH_CHECK(s.data != nullptr, "not enough memory for a workspace of ", rounded, " bytes");
    s.bytes = rounded;
  }
  return s.data;
}

namespace {

const char* const kIsaVariable = "MOBILENET_EXT_CPU_ISA";

struct InstructionSet {
  const char* name;
  const Kernels* kernels[kDtypes];  // by Dtype
};

constexpr int kMostSets = 5;

InstructionSet all_dtypes(const char* name, const Kernels (&kernels)[kDtypes]) {
  InstructionSet set{name, {}};
  for (int i = 0; i < kDtypes; ++i) set.kernels[i] = &kernels[i];
  return set;
}

// From the narrowest to the widest that this machine runs; the number of them.
int supported_sets(InstructionSet (&sets)[kMostSets]) {
  int count = 0;
  sets[count++] = all_dtypes("baseline", baseline_kernels);
#if defined(__x86_64__)
  const host::CpuFeatures cpu = host::cpu_features();
  if (!(cpu.avx2 && cpu.fma && cpu.f16c)) return count;
  sets[count++] = all_dtypes("avx2", avx2_kernels);
  if (!(cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq)) return count;
  InstructionSet avx512 = all_dtypes("avx512", avx512_kernels);
  sets[count++] = avx512;
  if (!cpu.avx512_bf16) return count;
  avx512.name = "avx512_bf16";
  avx512.kernels[int(Dtype::bf16)] = &avx512_bf16_kernels;
  sets[count++] = avx512;
  if (!cpu.amx_bf16) return count;
  avx512.name = "amx_bf16";
  avx512.kernels[int(Dtype::bf16)] = &amx_bf16_kernels;
  sets[count++] = avx512;
#endif
  return count;
}

// Without a name when MOBILENET_EXT_CPU_ISA names something this machine cannot run.
InstructionSet choose_set() {
  InstructionSet sets[kMostSets];
  const int count = supported_sets(sets);
  const char* wanted = getenv(kIsaVariable);
  if (wanted == nullptr || *wanted == '\0') return sets[count - 1];
  for (int i = 0; i < count; ++i)
    if (strcmp(sets[i].name, wanted) == 0) return sets[i];
  return {};
}

// Chosen at the first call, for it asks the system for permission to use AMX. Threads that are first together all
// choose, and the same: a static variable's guard would stay locked in the child of a fork (fork_safe_mutex.h).
const InstructionSet& chosen_set() {
  static std::atomic<const InstructionSet*> chosen{nullptr};
  const InstructionSet* set = chosen.load(std::memory_order_acquire);
  if (set != nullptr) return *set;
  auto made = std::make_unique<const InstructionSet>(choose_set());
  if (chosen.compare_exchange_strong(set, made.get(), std::memory_order_acq_rel)) set = made.release();
  return *set;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  const InstructionSet& chosen = chosen_set();
  if (chosen.name == nullptr) {
    InstructionSet sets[kMostSets];
    const int count = supported_sets(sets);
    std::string names;
    for (int i = 0; i < count; ++i) names += (i ? ", " : "") + std::string(sets[i].name);
    STD_TORCH_CHECK(false, "environment variable ", kIsaVariable, "=", getenv(kIsaVariable),
                    ": this machine runs the instruction sets ", names);
  }
  return *chosen.kernels[int(dtype)];
}

}  // namespace mx::cpu

extern "C" __attribute__((visibility("default"))) const char* mx_cpu_isa() { return mx::cpu::chosen_set().name; }

extern "C" __attribute__((visibility("default"))) void mx_cpu_empty_cache() {
  mx::cpu::release_idle_memory();
  for (mx::cpu::ScratchSlot& slot : mx::cpu::slots) slot.release();
}
