// An emulated CUDA device: the kernels of csrc/cuda, compiled by a C++ compiler, run on the CPU thread by thread.
//
// It stands in for what csrc/cuda/device.h takes from nvcc. Every thread of a block is a fiber (emulator.cpp) that runs
// until it meets a barrier or an operation of its warp, so that a kernel's indexing, its synchronisation and its tensor
// core fragments are all exercised. What it makes visible, because it chooses the worst that CUDA allows:
//   - shared memory starts as NaN bits, and a copy_async arrives only when it is waited for;
//   - threads run one after the other, in either order (order(-1) for the last one first): a race gives two results;
//   - threads at different barriers, a thread that returned while others wait for it, an address that is not aligned or
//     not in the block's shared memory, a launch beyond CUDA's limits, tensor cores or shared memory that the
//     architecture which the code was compiled for does not have: the process aborts with a message.
// It says nothing about speed, nor about accesses of global memory out of bounds.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>

// CUDA's headers define these as attributes that only nvcc knows.
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace mx::cuda::emulator {

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane;
};

// The thread that runs; changes at every operation below that waits.
extern thread_local Thread* current;

// Of the code: what it was compiled for, and not the GPU, says which instructions there are.
void require_architecture(int needed, const char* operation);

[[noreturn]] void fail(const std::string& what);
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void* shared_bytes();
void block_barrier();

// Waits until all 32 lanes of the warp are at the same kind of operation; gives what each of them handed in.
constexpr size_t kOperandBytes = 32;
struct Operands {
  alignas(8) unsigned char bytes[kOperandBytes];
};
const Operands* exchange(const char* operation, const void* operand, size_t bytes);

void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);
void check_shared(const void* address, size_t bytes, const char* operation);

template <class T>
T operand(const Operands* lanes, int lane) {
  T value;
  memcpy(&value, lanes[lane].bytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* operation, T value, int from) {
  static_assert(sizeof(T) <= kOperandBytes, "a shuffle moves one value");
  const Operands* lanes = exchange(operation, &value, sizeof(T));
  return from >= 0 && from < 32 ? operand<T>(lanes, from) : value;
}

}  // namespace mx::cuda::emulator

#define threadIdx (::mx::cuda::emulator::current->thread)
#define blockIdx (::mx::cuda::emulator::current->block)
#define blockDim (::mx::cuda::emulator::current->block_size)
#define gridDim (::mx::cuda::emulator::current->grid_size)

inline void __syncthreads() { mx::cuda::emulator::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffff) { mx::cuda::emulator::exchange("__syncwarp", nullptr, 0); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return mx::cuda::emulator::shuffle("__shfl_sync", value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return mx::cuda::emulator::shuffle("__shfl_xor_sync", value, mx::cuda::emulator::current->lane ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return mx::cuda::emulator::shuffle("__shfl_down_sync", value, mx::cuda::emulator::current->lane + delta);
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

namespace mx::cuda {

inline void not_compiled() { emulator::fail("a kernel that is not compiled"); }
inline unsigned reread_thread() { return threadIdx.x; }

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_bytes());
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Args... args) {
  emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(args)...); });
  return cudaSuccess;
}

inline float at_least(float x, float lower) { return x <= lower ? lower : x; }
inline float at_most(float x, float upper) { return x >= upper ? upper : x; }
inline float saturate(float x) { return x > 0.0f ? at_most(x, 1.0f) : 0.0f; }

// Nearer to the exact value than the instructions, but subnormal results are 0 here too.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float fast_exp2(float x) { return flushed(exp2f(x)); }
inline float fast_reciprocal(float x) { return flushed(1.0f / x); }

inline void copy_async_16(void* shared, const void* global, bool valid) { emulator::copy_async(shared, global, valid); }
inline void copy_async_commit() { emulator::copy_commit(); }
template <int pending>
void copy_async_wait() {
  emulator::copy_wait(pending);
}

// --- tensor cores

struct MatrixRow {
  uint16_t v[8];
};

// The eight rows of each of four matrices, as the lanes hand them in: ldmatrix reads them at once.
inline const emulator::Operands* exchange_rows(const char* operation, const void* row) {
  emulator::check_shared(row, 16, operation);
  return emulator::exchange(operation, row, 16);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const int lane = emulator::current->lane;
  const emulator::Operands* rows = exchange_rows("load_matrices", row);
  for (int i = 0; i < 4; ++i) {
    const MatrixRow m = emulator::operand<MatrixRow>(rows, 8 * i + lane / 4);
    r[i] = m.v[2 * (lane % 4)] | uint32_t(m.v[2 * (lane % 4) + 1]) << 16;
  }
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const int lane = emulator::current->lane;
  const emulator::Operands* rows = exchange_rows("load_matrices_transposed", row);
  for (int i = 0; i < 4; ++i) {
    const int first = 8 * i + 2 * (lane % 4);
    r[i] = emulator::operand<MatrixRow>(rows, first).v[lane / 4] |
           uint32_t(emulator::operand<MatrixRow>(rows, first + 1).v[lane / 4]) << 16;
  }
}

inline uint32_t to_tf32(float x) {
  uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;
  return bits & 0xffffe000;
}

template <class T>
float mma_element(uint32_t packed, int half_index) {
  const uint16_t bits = uint16_t(packed >> (16 * half_index));
  T value;
  memcpy(static_cast<void*>(&value), &bits, 2);
  return float(value);
}

struct Fragments {
  uint32_t a[4], b[2];
};

// d += a @ b. The products of two 16-bit or TF32 values are exact in float64, and so, nearly, is their sum.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_tf32 = sizeof(T) == 1;
  if (!kSame<T, half>) emulator::require_architecture(80, "mma");
  constexpr int kDepth = is_tf32 ? 8 : 16;
  constexpr int kHalf = kDepth / 2;          // A's columns 0..kHalf-1 are in registers 0 and 1
  constexpr int kPerLane = is_tf32 ? 1 : 2;  // neighbours in one register
  Fragments mine;
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  const emulator::Operands* lanes = emulator::exchange("mma", &mine, sizeof(mine));
  const int g = emulator::current->lane / 4, t = emulator::current->lane % 4;
  auto element = [](uint32_t packed, int k) {
    if constexpr (is_tf32) {
      float value;
      packed &= 0xffffe000;
      memcpy(&value, &packed, 4);
      return value;
    } else {
      return mma_element<T>(packed, k % 2);
    }
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < kDepth; ++k) {
      const int holder = k % kHalf / kPerLane, upper = k >= kHalf;
      const Fragments of_a = emulator::operand<Fragments>(lanes, 4 * (row % 8) + holder);
      const Fragments of_b = emulator::operand<Fragments>(lanes, 4 * column + holder);
      sum += double(element(of_a.a[(row >= 8) + 2 * upper], k)) * double(element(of_b.b[upper], k));
    }
    d[i] = float(sum);
  }
}

}  // namespace mx::cuda
