// The emulated device's threads: fibers of one OS thread, switched at barriers and warp operations.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <string>
#include <vector>

#include "cuda/device.h"

namespace mx::cuda::emulator {

thread_local Thread* current = nullptr;
int capability = 90, architecture = 90, multiprocessors = 2;

void fail(const std::string& what) {
  fprintf(stderr, "emulated device: %s\n", what.c_str());
  fflush(stderr);
  abort();
}

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 1024;  // after the shared memory; written there, it is noticed
constexpr size_t kMaxShared = 227 * 1024;
constexpr unsigned char kGuard = 0xa5;

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

enum class State { ready, at_barrier, at_warp, done };

struct Fiber : Thread {
  State state;
  const char* operation;  // of the warp, when waiting at one
  int parity;             // of the warp's operations: a lane may be one ahead of another that still reads
  jmp_buf context;
  ucontext_t start;
  bool started;
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<Copy> open;
};

struct Warp {
  Operands operands[2][32];
};

struct Device {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* stacks = nullptr;
  size_t stack_count = 0;
  std::vector<uint4> shared;
  size_t shared_size = 0;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  int direction = 1;
  bool running = false;
};

Device device;

Fiber& fiber() { return *static_cast<Fiber*>(current); }

void wait_as(State state) {
  Fiber& f = fiber();
  f.state = state;
  if (_setjmp(f.context) == 0) _longjmp(device.scheduler, 1);
}

void entry() {
  (*device.kernel)();
  fiber().state = State::done;
  _longjmp(device.scheduler, 1);
}

// Runs a fiber until it waits or returns.
void resume(Fiber& f, char* stack) {
  current = &f;
  if (_setjmp(device.scheduler) == 0) {
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stack;
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
    setcontext(&f.start);
  }
  current = nullptr;
}

// Lets the warps go whose lanes are all at the same operation, or the block if all of it is at the barrier.
bool release() {
  const size_t n = device.fibers.size();
  bool any = false;
  for (size_t w = 0; w * 32 < n; ++w) {
    size_t waiting = 0;
    const char* operation = nullptr;
    for (size_t i = 32 * w; i < 32 * w + 32 && i < n; ++i) {
      const Fiber& f = device.fibers[i];
      if (f.state != State::at_warp) continue;
      if (operation != nullptr && strcmp(operation, f.operation) != 0)
        fail(std::string("lanes of a warp are at ") + operation + " and at " + f.operation);
      operation = f.operation;
      ++waiting;
    }
    if (waiting == 32) {
      for (size_t i = 32 * w; i < 32 * w + 32; ++i) device.fibers[i].state = State::ready;
      any = true;
    }
  }
  size_t at_barrier = 0;
  for (const Fiber& f : device.fibers) at_barrier += f.state == State::at_barrier;
  if (at_barrier == n) {
    for (Fiber& f : device.fibers) f.state = State::ready;
    any = true;
  }
  return any;
}

void run_block() {
  const int n = int(device.fibers.size());
  for (;;) {
    int done = 0;
    for (int k = 0; k < n; ++k) {
      const int i = device.direction > 0 ? k : n - 1 - k;
      Fiber& f = device.fibers[i];
      if (f.state == State::ready) resume(f, device.stacks + i * kStackBytes);
      done += f.state == State::done;
    }
    if (done == n) return;
    if (!release()) {
      int barrier = 0, warp = 0;
      const char* operation = "";
      for (const Fiber& f : device.fibers) {
        barrier += f.state == State::at_barrier;
        if (f.state == State::at_warp) ++warp, operation = f.operation;
      }
      fail("threads wait for each other: " + std::to_string(barrier) + " at __syncthreads, " + std::to_string(warp) +
           " at an operation of their warp " + operation + ", " + std::to_string(done) + " have returned, of " +
           std::to_string(n));
    }
  }
}

void prepare(size_t threads, size_t shared_size) {
  if (device.stack_count < threads) {
    if (device.stacks != nullptr) munmap(device.stacks, device.stack_count * kStackBytes);
    void* stacks = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for the threads' stacks");
    device.stacks = static_cast<char*>(stacks);
    device.stack_count = threads;
  }
  device.shared_size = shared_size;
  device.shared.resize((shared_size + kGuardBytes) / sizeof(uint4) + 1);
}

}  // namespace

void require_architecture(int needed, const char* operation) {
  if (architecture < needed)
    fail(std::string(operation) + " in code for " + std::to_string(architecture) + ", " + std::to_string(needed) +
         " is needed");
}

void run(dim3 grid, dim3 block, size_t shared_size, const std::function<void()>& kernel) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % 32 != 0) fail("a block of " + text(block) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff)
    fail("a grid of " + text(grid) + " blocks");
  const size_t most = architecture < 80 ? 64 * 1024 : kMaxShared;
  if (shared_size > most) fail(std::to_string(shared_size) + " bytes of shared memory");
  if (device.running) fail("a launch inside a kernel");
  device.running = true;
  prepare(threads, shared_size);
  device.kernel = &kernel;
  device.fibers.resize(threads);
  device.warps.resize(threads / 32);
  unsigned char* shared = reinterpret_cast<unsigned char*>(device.shared.data());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        memset(shared, 0xff, shared_size);
        memset(shared + shared_size, kGuard, kGuardBytes);
        for (size_t i = 0; i < threads; ++i) {
          Fiber& f = device.fibers[i];
          f.thread = {unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / (block.x * block.y)};
          f.block = {x, y, z};
          f.block_size = block;
          f.grid_size = grid;
          f.lane = int(i % 32);
          f.state = State::ready;
          f.parity = 0;
          f.started = false;
          f.groups.clear();
          f.open.clear();
        }
        run_block();
        for (size_t i = 0; i < kGuardBytes; ++i)
          if (shared[shared_size + i] != kGuard)
            fail("written " + std::to_string(i) + " bytes past the shared memory of " + std::to_string(shared_size));
      }
  device.running = false;
}

void* shared_bytes() { return device.shared.data(); }

void block_barrier() { wait_as(State::at_barrier); }

const Operands* exchange(const char* operation, const void* operand, size_t bytes) {
  Fiber& f = fiber();
  const size_t index = size_t(&f - device.fibers.data());
  Operands* lanes = device.warps[index / 32].operands[f.parity];
  f.parity ^= 1;
  if (bytes > 0) memcpy(lanes[f.lane].bytes, operand, bytes);
  f.operation = operation;
  wait_as(State::at_warp);
  return lanes;
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  const size_t offset = size_t(static_cast<const char*>(address) - reinterpret_cast<char*>(device.shared.data()));
  if (offset % 16 != 0) fail(std::string(operation) + ": the address in shared memory is not a multiple of 16");
  if (offset + bytes > device.shared_size)
    fail(std::string(operation) + ": " + std::to_string(bytes) + " bytes at " + std::to_string(int64_t(offset)) +
         " of a shared memory of " + std::to_string(device.shared_size));
}

void copy_async(void* shared, const void* global, bool valid) {
  check_shared(shared, 16, "copy_async_16");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("copy_async_16: the address in global memory is not a multiple of 16");
  fiber().open.push_back({shared, global, valid});
}

void copy_commit() {
  fiber().groups.push_back(std::move(fiber().open));
  fiber().open.clear();
}

void copy_wait(int pending) {
  auto& groups = fiber().groups;
  while (int(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid)
        memcpy(copy.shared, copy.global, 16);
      else
        memset(copy.shared, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace mx::cuda::emulator

// 1: a block's threads run in their order, -1: the last one first. A race shows as a different result.
extern "C" __attribute__((visibility("default"))) void mx_emulator_order(int direction) {
  mx::cuda::emulator::device.direction = direction;
}

// The GPU, and what its code was compiled for. Few multiprocessors make few programs, each with several tiles.
extern "C" __attribute__((visibility("default"))) void mx_emulator_device(int capability, int architecture,
                                                                          int multiprocessors) {
  mx::cuda::emulator::capability = capability;
  mx::cuda::emulator::architecture = architecture;
  mx::cuda::emulator::multiprocessors = multiprocessors;
}

// CUDA's runtime, as far as the launchers ask it.
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace mx::cuda::emulator;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = mx::cuda::emulator::architecture;
  attributes->binaryVersion = mx::cuda::emulator::capability;
  return cudaSuccess;
}
