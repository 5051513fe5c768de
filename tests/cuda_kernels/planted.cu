// Kernels with faults for the emulated device to find, and one without for each.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/device.h"
#include "cuda/packs.h"

using namespace mx::cuda;

namespace {

constexpr int kThreads = 64;

// Neighbours' values through shared memory; without the barrier, a race.
__global__ void neighbour(float* out, bool barrier) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void copies(const float* in, float* out, bool wait) {
  float* shared = shared_memory<float>();
  if (threadIdx.x < kThreads / 4) copy_async_16(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void divergent(float*) {
  if (threadIdx.x % 2 == 0) __syncthreads();
}

__global__ void different(float*) {
  if (threadIdx.x % 2 == 0)
    __syncwarp();
  else
    __shfl_xor_sync(0xffffffff, 1.0f, 1);
}

__global__ void beyond(float*) { shared_memory<float>()[kThreads + threadIdx.x] = 1.0f; }

__global__ void unaligned(float*) {
  uint32_t r[4];
  load_matrices(r, shared_memory<char>() + 8 * threadIdx.x);
}

// D = A @ B for A [16][16], B [16][8] row by row, by the fragments that device.h states.
template <class T>
__global__ void product(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto pack = [](T low, T high) {
    uint16_t bits[2];
    memcpy(&bits[0], &low, 2);
    memcpy(&bits[1], &high, 2);
    return bits[0] | uint32_t(bits[1]) << 16;
  };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const T* p = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fa[i] = pack(p[0], p[1]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = pack(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  float fd[4] = {};
  mma<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

// The same through shared memory and load_matrices.
__global__ void product_from_shared(const half* a, const half* b, float* d) {
  half* shared = shared_memory<half>();
  for (int i = threadIdx.x; i < 256; i += 32) shared[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) shared[256 + i] = b[i];
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  load_matrices(fa, shared + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices_transposed(fb, shared + 256 + (lane % 16) * 8);
  const uint32_t two[2] = {fb[0], fb[1]};
  float fd[4] = {};
  mma<half>(fd, fa, two);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = fd[i];
}

__global__ void product_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
  float fd[4] = {};
  mma<tf32>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

}  // namespace

// Runs a kernel by its name on an array of kThreads floats (products: on a, b and d).
extern "C" __attribute__((visibility("default"))) void run(const char* name, const void* a, const void* b, float* out) {
  const size_t shared = kThreads * sizeof(float);
  auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  auto start = [&](auto kernel, size_t bytes, auto... args) { launch(kernel, 1, kThreads, bytes, nullptr, args...); };
  const float* in = static_cast<const float*>(a);
  if (is("barrier")) start(neighbour, shared, out, true);
  if (is("race")) start(neighbour, shared, out, false);
  if (is("copied")) start(copies, shared, in, out, true);
  if (is("copy not waited for")) start(copies, shared, in, out, false);
  if (is("divergent barrier")) start(divergent, 0, out);
  if (is("different operations")) start(different, 0, out);
  if (is("beyond shared memory")) start(beyond, shared, out);
  if (is("unaligned")) start(unaligned, 8 * 1024, out);
  if (is("large block")) launch(divergent, 1, 1056, 0, nullptr, out);
  if (is("large grid")) launch(divergent, dim3(1, 65536), 32, 0, nullptr, out);
  auto mma = [&](auto kernel, auto* type) {
    launch(kernel, 1, 32, 1024, nullptr, static_cast<decltype(type)>(a), static_cast<decltype(type)>(b), out);
  };
  if (is("float16")) mma(product<half>, static_cast<const half*>(nullptr));
  if (is("bfloat16")) mma(product<bfloat16>, static_cast<const bfloat16*>(nullptr));
  if (is("shared")) mma(product_from_shared, static_cast<const half*>(nullptr));
  if (is("tf32")) mma(product_tf32, static_cast<const float*>(nullptr));
}
