// Normalisation and activation of a tensor, or the mean of that over each image (the network's end); and the gradients.
#include "activation.h"
#include "lanes.h"

namespace mx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 4;  // loads under way per thread

struct Problem {
  int64_t rows;  // of y: images times pixels
  int pixels, channels;
  const void *y, *grad;
  NormActParameters norm_act;
  void *out, *dz;
  float* sums;
};

// A thread's channels.
template <class T, int P>
struct Channels {
  int c;
  bool inside;
  Activation act;
  ChannelNorm<P> norm;

  __device__ explicit Channels(const Problem& p)
      : c((blockIdx.x * blockDim.x + threadIdx.x) * P),
        inside(c < p.channels),
        act(p.norm_act.act),
        norm(ChannelNorm<P>::load_each(p.norm_act.bn, c, p.channels, inside)) {}

  __device__ __forceinline__ float z(T y, int i) const { return norm.z(to_float(y), i); }
  __device__ float a(T y, int i) const { return activate(z(y, i), act); }
};

// A program takes kRowsAtOnce*lanes rows at a time.
template <class T, int P>
__global__ void __launch_bounds__(kThreads) forward(const Problem p) {
  const Channels<T, P> channels(p);
  if (!channels.inside) return;
  const T* y = static_cast<const T*>(p.y) + channels.c;
  T* out = static_cast<T*>(p.out) + channels.c;
  const int64_t step = int64_t(kRowsAtOnce) * blockDim.y;
  for (int64_t first = blockIdx.y * step + threadIdx.y; first < p.rows; first += gridDim.y * step) {
    Pack<T, P> packs[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row < p.rows) packs[k] = Pack<T, P>::load(y + row * p.channels);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      for (int i = 0; i < P; ++i) packs[k].v[i] = rounded<T>(channels.a(packs[k].v[i], i));
      packs[k].store(out + row * p.channels);
    }
  }
}

// A block makes the means of an image.
template <class T, int P>
__global__ void __launch_bounds__(kThreads) pool_forward(const Problem p) {
  const Channels<T, P> channels(p);
  float sum[P] = {};
  for (int64_t image = blockIdx.y; image < p.rows / p.pixels; image += gridDim.y) {
    for (int i = 0; i < P; ++i) sum[i] = 0.0f;
    const T* y = static_cast<const T*>(p.y) + image * p.pixels * p.channels + channels.c;
    for (int pixel = threadIdx.y; channels.inside && pixel < p.pixels; pixel += blockDim.y) {
      const Pack<T, P> pack = Pack<T, P>::load(y + int64_t(pixel) * p.channels);
      for (int i = 0; i < P; ++i) sum[i] += channels.a(pack.v[i], i);
    }
    sum_lanes(sum);
    if (channels.inside && threadIdx.y == 0) {
      Pack<T, P> pack;
      for (int i = 0; i < P; ++i) pack.v[i] = rounded<T>(sum[i] / float(p.pixels));
      pack.store(static_cast<T*>(p.out) + image * p.channels + channels.c);
    }
  }
}

// dz, and the program's sums of dz and dz*(y - mean). Pooled: the gradient of an image's mean is that of all its
// pixels.
template <class T, int P, bool kPool>
__global__ void __launch_bounds__(kThreads) backward(const Problem p) {
  const Channels<T, P> channels(p);
  const T* y = static_cast<const T*>(p.y) + channels.c;
  const T* grad = static_cast<const T*>(p.grad) + channels.c;
  T* dz = static_cast<T*>(p.dz) + channels.c;
  float sum_dz[P] = {}, sum_dz_centred[P] = {};
  const int64_t step = int64_t(kRowsAtOnce) * blockDim.y;
  for (int64_t first = blockIdx.y * step + threadIdx.y; channels.inside && first < p.rows; first += gridDim.y * step) {
    Pack<T, P> ys[kRowsAtOnce], grads[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      ys[k] = Pack<T, P>::load(y + row * p.channels);
      grads[k] = Pack<T, P>::load(grad + (kPool ? row / p.pixels : row) * p.channels);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      for (int i = 0; i < P; ++i) {
        const float z = channels.z(ys[k].v[i], i);
        const float da = kPool ? to_float(grads[k].v[i]) / float(p.pixels) : to_float(grads[k].v[i]);
        grads[k].v[i] = rounded<T>(activate_backward(z, da, channels.act));
        const float stored = to_float(grads[k].v[i]);
        sum_dz[i] += stored;
        sum_dz_centred[i] += stored * (to_float(ys[k].v[i]) - channels.norm.mean[i]);
      }
      grads[k].store(dz + row * p.channels);
    }
  }
  store_sums(p.sums + int64_t(blockIdx.y) * SUM_ROWS * p.channels + channels.c, p.channels, channels.inside, sum_dz,
             sum_dz_centred);
}

Problem problem_of(const NormActArgs& args) {
  Problem p{};
  p.rows = args.n * args.hw;
  p.pixels = int(args.hw);
  p.channels = int(args.c);
  p.y = args.y;
  p.grad = args.grad;
  p.norm_act = parameters_of(args.norm_act);
  p.out = args.out;
  p.dz = args.dz;
  return p;
}

struct Grid {
  dim3 blocks, threads;
  size_t shared;
};

// `rows_per_block` times the lanes is what a block takes at a time; at most `most` blocks for the same channels.
Grid grid_of(int packs, int64_t rows, int rows_per_block, int64_t most, int channels_per_thread) {
  int x = 1;
  while (x < 8 && x < packs) x *= 2;  // 8 packs of 16 bytes: a cache line
  const int lanes = kThreads / x;
  const int64_t wanted = (rows + int64_t(rows_per_block) * lanes - 1) / (int64_t(rows_per_block) * lanes);
  const int64_t y = wanted < most ? wanted : most;
  return {dim3((packs + x - 1) / x, unsigned(y)), dim3(x, lanes), lanes_bytes(kThreads, channels_per_thread)};
}

template <class T, int P>
cudaError_t start_forward(const NormActArgs& args, const Launch& on) {
  const Problem p = problem_of(args);
  if (p.rows == 0) return cudaSuccess;
  const int packs = p.channels / P;
  if (args.pool) {
    Grid grid = grid_of(packs, p.rows, kRowsAtOnce, 1, P);
    grid.blocks.y = unsigned(args.n < 65535 ? args.n : 65535);
    return launch(pool_forward<T, P>, grid.blocks, grid.threads, grid.shared, on.stream, p);
  }
  const Grid grid = grid_of(packs, p.rows, kRowsAtOnce, 65535, P);
  return launch(forward<T, P>, grid.blocks, grid.threads, 0, on.stream, p);
}

template <class T, int P>
cudaError_t start_backward(const NormActArgs& args, const Launch& on) {
  Problem p = problem_of(args);
  const int packs = p.channels / P;
  Grid grid = grid_of(packs, p.rows, kRowsAtOnce, 65535, P);
  const unsigned enough = 4u * on.gpu.multiprocessors / grid.blocks.x;
  if (grid.blocks.y > enough) grid.blocks.y = enough > 1 ? enough : 1;
  const int programs = p.rows == 0 ? 0 : int(grid.blocks.y);
  p.sums = on.temporary<float>(size_t(programs) * SUM_ROWS * p.channels);
  if (programs > 0) {
    const auto kernel = args.pool ? backward<T, P, true> : backward<T, P, false>;
    const cudaError_t error = launch(kernel, grid.blocks, grid.threads, grid.shared, on.stream, p);
    if (error != cudaSuccess) return error;
  }
  return merge_gradients({{p.sums, programs}, p.channels, args.norm_act.bn, args.batch_stats, p.rows, args.grad_bn_y},
                         {}, on);
}

}  // namespace

cudaError_t norm_act_forward(const NormActArgs& args, const Launch& on) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = args.c % kPack<T> == 0 && aligned(args.y) && aligned(args.out);
    return wide ? start_forward<T, kPack<T>>(args, on) : start_forward<T, 1>(args, on);
  });
}

cudaError_t norm_act_backward(const NormActArgs& args, const Launch& on) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = args.c % kPack<T> == 0 && aligned(args.y) && aligned(args.grad) && aligned(args.dz);
    return wide ? start_backward<T, kPack<T>>(args, on) : start_backward<T, 1>(args, on);
  });
}

}  // namespace mx::cuda
