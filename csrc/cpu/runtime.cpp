// What the kernels need from the process: threads, scratch memory, and the choice of the instruction set.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <string>
#include <vector>

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
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t i = 0; i < workers; ++i) {
        Share& share = shares[(worker + i) % workers];
        for (int64_t begin; (begin = share.next.fetch_add(piece, std::memory_order_relaxed)) < share.end;)
          fn(context, begin, begin + piece < share.end ? begin + piece : share.end);
      }
  });
}

int max_threads() { return int(torch::stable::get_num_threads()); }

namespace {

constexpr size_t kAlignment = 64;  // a cache line, and AVX-512's vector

struct ScratchSlot {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchSlot() { free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  constexpr int kSlots = 8;
  static thread_local ScratchSlot slots[kSlots];
  ScratchSlot& s = slots[slot];
  if (s.bytes < bytes) {
    free(s.data);
    s.bytes = 0;
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    s.data = aligned_alloc(kAlignment, rounded);
    if (s.data == nullptr) {
      // Nothing may be thrown inside a parallel region; without memory a kernel has no result to give.
      if (slot != 0) abort();
      STD_TORCH_CHECK(false, "not enough memory for a workspace of ", rounded, " bytes");
    }
    s.bytes = rounded;
  }
  return s.data;
}

namespace {

const char* const kIsaVariable = "MOBILENET_EXT_CPU_ISA";

constexpr int kMostKernels = 4;

// From the narrowest to the widest that this machine runs.
int supported_kernels(const Kernels* (&tables)[kMostKernels]) {
  int count = 0;
  tables[count++] = &baseline_kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers. F16C, which Clang 14
  // cannot ask for, came before AVX2.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables[count++] = &avx2_kernels;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      tables[count++] = &avx512_kernels;
      if (__builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16_kernels;
    }
  }
#endif
  return count;
}

// Null when MOBILENET_EXT_CPU_ISA names something this machine cannot run.
const Kernels* choose_kernels() {
  const Kernels* tables[kMostKernels];
  const int count = supported_kernels(tables);
  const char* wanted = getenv(kIsaVariable);
  if (wanted == nullptr || *wanted == '\0') return tables[count - 1];
  for (int i = 0; i < count; ++i)
    if (strcmp(tables[i]->isa, wanted) == 0) return tables[i];
  return nullptr;
}

const Kernels* chosen_kernels() {
  static const Kernels* const chosen = choose_kernels();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = chosen_kernels();
  if (chosen == nullptr) {
    const Kernels* tables[kMostKernels];
    const int count = supported_kernels(tables);
    std::string names;
    for (int i = 0; i < count; ++i) names += (i ? ", " : "") + std::string(tables[i]->isa);
    STD_TORCH_CHECK(false, "environment variable ", kIsaVariable, "=", getenv(kIsaVariable),
                    ": this machine runs the instruction sets ", names);
  }
  return *chosen;
}

}  // namespace mx::cpu

extern "C" __attribute__((visibility("default"))) const char* mx_cpu_isa() {
  const mx::cpu::Kernels* chosen = mx::cpu::chosen_kernels();
  return chosen ? chosen->isa : nullptr;
}

extern "C" __attribute__((visibility("default"))) void mx_cpu_packed_layout(int dtype, int* columns, int* group) {
  const mx::cpu::PackedLayout layout = mx::cpu::kernels().packed_layout(mx::Dtype(dtype));
  *columns = layout.columns;
  *group = layout.group;
}
