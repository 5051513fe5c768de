// What the kernels use of the hardware, beyond plain CUDA C++: launches, dynamic shared memory, asynchronous copies and
// tensor cores.
//
// Compiled by a C++ compiler instead of nvcc, the same kernels run on the CPU, thread by thread, through an emulated
// device with these names (tests/cuda_kernels/emulator). For that they keep to: what stands here; threadIdx, blockIdx,
// blockDim, gridDim; __syncthreads, __syncwarp, __shfl_xor_sync, __shfl_down_sync and __shfl_sync with all lanes; the
// conversions of cuda_fp16.h and cuda_bf16.h; __uint_as_float and __float_as_uint; no static __shared__ variable;
// launch() for <<< >>>. Every thread of a block must reach every barrier, also those past the end of the data.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace mx::cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

// Operands that float32 products see rounded to TF32 (10 bits of mantissa); in memory a float.
struct tf32 {};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

}  // namespace mx::cuda

#if !defined(__CUDACC__)
#include <emulated_device.h>
#else
#include "launch.h"

namespace mx::cuda {

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

// In place of a kernel that this architecture does not have: an error of the launch, for outputs would stay as they
// are.
__device__ __forceinline__ void not_compiled() { asm volatile("trap;"); }

// threadIdx.x, read again instead of kept in a register from before a loop.
__device__ __forceinline__ unsigned reread_thread() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// `lower` where x <= lower, else x: NaN stays NaN. `lower` is not NaN.
__device__ __forceinline__ float at_least(float x, float lower) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(lower));
  return y;
#else
  return x <= lower ? lower : x;
#endif
}

// `upper` where x >= upper, else x: NaN stays NaN. `upper` is not NaN.
__device__ __forceinline__ float at_most(float x, float upper) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(upper));
  return y;
#else
  return x >= upper ? upper : x;
#endif
}

// x from 0 to 1; of NaN 0.
__device__ __forceinline__ float saturate(float x) { return __saturatef(x); }

// To two units in the last place. Subnormal results are 0, and so is the exponential of a subnormal 1.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- asynchronous copies from global to shared memory (plain copies before sm_80)

// 16 bytes, both addresses aligned; zeros where not valid (`global` is then not read).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are under way. Other threads' copies: __syncthreads() after it.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// --- tensor cores

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l%8 of matrix l/8 (16-byte
// aligned) and gets, of matrix i, elements (lane/4, 2*(lane%4)) and the one to its right in r[i], low half first.
// Transposed: elements (2*(lane%4), lane/4) and the one below.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a @ b on the fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of lane 4*g + t,
//   d[0], d[1] = D[g][2t], D[g][2t+1];  d[2], d[3] = those of row g+8
//   a[0] = A[g][2t..2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
//   b[0] = B[2t..2t+1][g], b[1] = B[2t+8..2t+9][g]
// bfloat16 needs sm_80.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

template <>
__device__ __forceinline__ void mma<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // never chosen by a launcher
#endif
}

// The same of mma.m16n8k8 with TF32 operands: of lane 4*g + t,
//   a[0] = A[g][t], a[1] = A[g+8][t], a[2] = A[g][t+4], a[3] = A[g+8][t+4];  b[0] = B[t][g], b[1] = B[t+4][g]
// as to_tf32 rounds them. Needs sm_80.
template <>
__device__ __forceinline__ void mma<tf32>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // never chosen by a launcher
#endif
}

// x rounded to TF32, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return __float_as_uint(x);
#endif
}

}  // namespace mx::cuda
#endif

namespace mx::cuda {

// Hides from the compiler where x comes from: what is computed from x after this is not kept in registers from before.
__device__ __forceinline__ void make_opaque(int& x) { asm volatile("" : "+r"(x)); }

// Whether a launcher may ask this architecture for products of T by tensor cores of kind Math (float: by plain exact
// products). Kernels that it never asks for are compiled to a fault (not_compiled). The architecture is that of the
// code, which Gpu::architecture is too, and not the GPU's.
// kLargeShared: whether it may ask for more than 64 KiB of shared memory.
#if !defined(__CUDA_ARCH__)
template <class T, class Math>
constexpr bool kCompiled = true;
constexpr bool kLargeShared = true;
#elif __CUDA_ARCH__ >= 800
template <class T, class Math>
constexpr bool kCompiled = !(kSame<T, bfloat16> && kSame<Math, float>);
constexpr bool kLargeShared = true;
#else
template <class T, class Math>
constexpr bool kCompiled = kSame<Math, half> || kSame<Math, float>;
constexpr bool kLargeShared = false;
#endif

}  // namespace mx::cuda
