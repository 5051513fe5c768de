// Normalisation and activation of a tensor, and the add where a residual comes in, or the mean over each image; and the
// gradients.
#include "activation.h"
#include "lanes.h"

namespace mx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 4;  // loads under way per thread

struct Problem {
  int64_t rows;  // of y: images times pixels
  int pixels, channels;
  const void *y, *residual, *grad, *grad_pooled;
  NormActParameters norm_act;
  void *out, *dz;  // dz null: not wanted
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

  __device__ __forceinline__ void make_z(float (&z)[P], const Pack<T, P>& y) const {
    for (int i = 0; i < P; ++i) z[i] = norm.z(to_float(y.v[i]), i);
  }
  __device__ __forceinline__ void make_activation(float (&a)[P], const Pack<T, P>& y) const {
    make_z(a, y);
    activate(a, act);
  }
};

// A program takes kRowsAtOnce*lanes rows at a time.
template <class T, int P, bool kResidual>
__global__ void __launch_bounds__(kThreads) forward(const Problem p) {
  const Channels<T, P> channels(p);
  if (!channels.inside) return;
  const T* y = static_cast<const T*>(p.y) + channels.c;
  const T* residual = static_cast<const T*>(p.residual) + channels.c;
  T* out = static_cast<T*>(p.out) + channels.c;
  const int64_t step = int64_t(kRowsAtOnce) * blockDim.y;
  for (int64_t first = blockIdx.y * step + threadIdx.y; first < p.rows; first += gridDim.y * step) {
    PackedWords<T, P> packs[kRowsAtOnce], residuals[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row < p.rows) packs[k] = PackedWords<T, P>::of(Pack<T, P>::load(y + row * p.channels));
      if (kResidual && row < p.rows)
        residuals[k] = PackedWords<T, P>::of(Pack<T, P>::load(residual + row * p.channels));
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      float a[P];
      channels.make_activation(a, packs[k].pack());
      if (kResidual) {
        const Pack<T, P> more = residuals[k].pack();
        for (int i = 0; i < P; ++i) a[i] += to_float(more.v[i]);
      }
      round_pack<T>(a).store(out + row * p.channels);
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
      float a[P];
      channels.make_activation(a, pack);
      for (int i = 0; i < P; ++i) sum[i] += a[i];
    }
    sum_lanes(sum);
    if (channels.inside && threadIdx.y == 0) {
      Pack<T, P> pack;
      for (int i = 0; i < P; ++i) pack.v[i] = rounded<T>(sum[i] / float(p.pixels));
      pack.store(static_cast<T*>(p.out) + image * p.channels + channels.c);
    }
  }
}

// dz, and the program's sums of dz and dz*(y - mean). The gradient of an image's mean is that of all its pixels: kPool,
// alone, or kAndPooled, on top of that of each pixel.
template <class T, int P, bool kPool, bool kAndPooled>
__global__ void __launch_bounds__(kThreads) backward(const Problem p) {
  const Channels<T, P> channels(p);
  const T* y = static_cast<const T*>(p.y) + channels.c;
  const T* grad = static_cast<const T*>(p.grad) + channels.c;
  const T* grad_pooled = static_cast<const T*>(p.grad_pooled) + channels.c;
  T* dz = static_cast<T*>(p.dz) + channels.c;
  float sum_dz[P] = {}, sum_dz_centred[P] = {};
  const int64_t step = int64_t(kRowsAtOnce) * blockDim.y;
  for (int64_t first = blockIdx.y * step + threadIdx.y; channels.inside && first < p.rows; first += gridDim.y * step) {
    PackedWords<T, P> ys[kRowsAtOnce], grads[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      ys[k] = PackedWords<T, P>::of(Pack<T, P>::load(y + row * p.channels));
      grads[k] = PackedWords<T, P>::of(Pack<T, P>::load(grad + (kPool ? row / p.pixels : row) * p.channels));
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = first + k * blockDim.y;
      if (row >= p.rows) continue;
      const Pack<T, P> y_pack = ys[k].pack();
      float z[P], da[P];
      channels.make_z(z, y_pack);
      to_floats(grads[k].pack(), da);
      for (int i = 0; i < P && kPool; ++i) da[i] /= float(p.pixels);
      if (kAndPooled) {  // from the cache: registers are taken
        const Pack<T, P> pooled = Pack<T, P>::load(grad_pooled + row / p.pixels * p.channels);
        for (int i = 0; i < P; ++i) da[i] += to_float(pooled.v[i]) / float(p.pixels);
      }
      activate_backward(z, da, channels.act);
      const Pack<T, P> stored = round_pack<T>(da);
      if (p.dz != nullptr) stored.store(dz + row * p.channels);
      for (int i = 0; i < P; ++i) {
        const float value = to_float(stored.v[i]);
        sum_dz[i] += value;
        sum_dz_centred[i] += value * (to_float(y_pack.v[i]) - channels.norm.mean[i]);
      }
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
  p.residual = args.residual;
  p.grad = args.grad;
  p.grad_pooled = args.grad_pooled;
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
  const auto kernel = args.residual ? forward<T, P, true> : forward<T, P, false>;
  return launch(kernel, grid.blocks, grid.threads, 0, on.stream, p);
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
    const auto kernel = args.pool          ? backward<T, P, true, false>
                        : args.grad_pooled ? backward<T, P, false, true>
                                           : backward<T, P, false, false>;
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
    const bool wide = args.c % kPack<T> == 0 && aligned(args.y) && aligned(args.out) && aligned(args.residual);
    return wide ? start_forward<T, kPack<T>>(args, on) : start_forward<T, 1>(args, on);
  });
}

cudaError_t norm_act_backward(const NormActArgs& args, const Launch& on) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = args.c % kPack<T> == 0 && aligned(args.y) && aligned(args.grad) && aligned(args.grad_pooled) &&
                      aligned(args.dz);
    return wide ? start_backward<T, kPack<T>>(args, on) : start_backward<T, 1>(args, on);
  });
}

}  // namespace mx::cuda
