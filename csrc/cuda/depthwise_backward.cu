// Depthwise 3x3 and 5x5 convolution, backward: the gradients of input and weight in one pass over the data.
//
// A thread owns input pixels and walks down the image. It rebuilds dy, the gradient of the outputs that see them, and
// each dy is multiplied with each of its inputs once, in a product for either gradient. Per channel, nine taps, nine
// sums of the weight's gradient and seven vectors are in registers, so a thread has four channels: 64-bit accesses in
// 16 bits. Of 5x5 it has two, with 25 sums each, and the taps are in shared memory.
//
// Everything is loaded a row before its use, all of a row together, and stays in flight while the row before is
// computed. (Of 5x5, all of a row together when its turn comes.)
//
// Rows and columns are counted in the padded image where marked ': input row i' = i + pad_top is seen by the output
// rows (i' - k)/stride, k = 0, 1, 2 (3, 4). What is outside an image, or belongs to another chunk of rows, is
// multiplied with nothing: there a product with 0 would make a NaN of another's infinity.
#include "activation.h"
#include "depthwise.h"
#include "gradient.h"
#include "lanes.h"

namespace mx::cuda {
namespace {

struct Problem {
  int height, width, channels, out_height, out_width, pad_left, pad_top;
  DepthwiseGrid grid;
  const void *dz, *y, *u, *weight;
  const float* grad_bn_y;
  NormActParameters norm_act;  // of u; without a bn, u is a plain input
  void* dz_u;                  // null: not wanted
  float *sums, *partial;       // null: not wanted
};

// The taps of a thread's channels.
template <int P, int kKernel>
struct Taps {
  float v[kKernel * kKernel][P];

  __device__ void set(int tap, int i, float value) { v[tap][i] = value; }
  __device__ float operator()(int tap, int i) const { return v[tap][i]; }
};

// Those of 5x5 are in shared memory, [packs][taps][P], after what sum_lanes needs; there to be read after a barrier.
template <int P>
struct Taps<P, 5> {
  static __device__ float* mine() { return shared_memory<float>() + (blockDim.x * blockDim.y + threadIdx.x * 25) * P; }
  __device__ void set(int tap, int i, float value) {
    if (threadIdx.y == 0) mine()[tap * P + i] = value;
  }
  __device__ float operator()(int tap, int i) const { return Pack<float, P>::load(mine() + tap * P).v[i]; }
};

// What a thread keeps of its channels, and what it adds up for them.
template <class T, int P, int kKernel>
struct Channels {
  static constexpr int kTaps = kKernel * kKernel;
  using Packed = Pack<T, P>;
  using Words = PackedWords<T, P>;
  struct RawGradient {
    Words dz, y;
  };
  const Problem& p;
  int c;
  bool inside;
  Taps<P, kKernel> taps;
  ChannelNorm<P> norm;
  ChannelGradient<P> gradient;
  float grad_taps[kTaps][P], sum_dz[P], sum_dz_centred[P];

  __device__ explicit Channels(const Problem& problem) : p(problem) {
    c = (blockIdx.x * p.grid.packs + threadIdx.x) * P;
    inside = c < p.channels;
    norm = ChannelNorm<P>::load_each(p.norm_act.bn, c, p.channels, p.norm_act.bn != nullptr && inside);
    gradient = ChannelGradient<P>::load_each(p.grad_bn_y, p.y != nullptr, c, p.channels, inside);
#pragma unroll
    for (int i = 0; i < P; ++i) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        taps.set(tap, i, inside ? to_float(static_cast<const T*>(p.weight)[(c + i) * kTaps + tap]) : 0.0f);
        grad_taps[tap][i] = 0.0f;
      }
      sum_dz[i] = sum_dz_centred[i] = 0.0f;
    }
    if (kKernel == 5) __syncthreads();
  }

  // What dy is made of, at an offset of dz and y.
  __device__ void load_gradient(RawGradient& raw, int64_t offset, bool wanted) const {
    if (wanted) raw.dz = Words::of(Packed::load(static_cast<const T*>(p.dz) + offset));
    if (wanted && p.y != nullptr) raw.y = Words::of(Packed::load(static_cast<const T*>(p.y) + offset));
  }
  __device__ void make_gradient(float (&dy)[P], const RawGradient& raw) const {
    const Packed dz = raw.dz.pack(), y = raw.y.pack();
    if (p.y != nullptr) {
      for (int i = 0; i < P; ++i) dy[i] = gradient.dy(to_float(dz.v[i]), to_float(y.v[i]), i);
    } else {
      for (int i = 0; i < P; ++i) dy[i] = gradient.dz_coefficient[i] * to_float(dz.v[i]);
    }
  }

  // What the convolution's input is made of, at an offset of u.
  __device__ void load_input(Words& raw, int64_t offset, bool wanted) const {
    if (wanted) raw = Words::of(Packed::load(static_cast<const T*>(p.u) + offset));
  }
  __device__ void make_activation(float (&a)[P], const Words& raw) const {
    const Packed u = raw.pack();
    for (int i = 0; i < P; ++i) a[i] = norm.z(to_float(u.v[i]), i);
    activate(a, p.norm_act.act);
  }

  // Adds the products of an input's tap: its input, and the dy of its output.
  __device__ void accumulate_tap(int tap, const float (&a)[P], float (&da)[P], const float (&dy)[P]) {
    for (int i = 0; i < P; ++i) {
      grad_taps[tap][i] += a[i] * dy[i];
      da[i] += taps(tap, i) * dy[i];
    }
  }

  // Stores dz_u of an input whose da is complete, and spent here.
  __device__ void store(int64_t offset, float (&da)[P], const Words& raw) {
    if (p.dz_u == nullptr) return;
    Packed stored;
    if (p.norm_act.bn == nullptr) {
      for (int i = 0; i < P; ++i) stored.v[i] = rounded<T>(da[i]);
      stored.store(static_cast<T*>(p.dz_u) + offset);
      return;
    }
    const Packed u = raw.pack();
    float z[P];
    for (int i = 0; i < P; ++i) z[i] = norm.z(to_float(u.v[i]), i);
    activate_backward(z, da, p.norm_act.act);
    for (int i = 0; i < P; ++i) stored.v[i] = rounded<T>(da[i]);
    stored.store(static_cast<T*>(p.dz_u) + offset);
    for (int i = 0; i < P; ++i) {
      const float dz = to_float(stored.v[i]);
      sum_dz[i] += dz;
      sum_dz_centred[i] += dz * (to_float(u.v[i]) - norm.mean[i]);
    }
  }

  // Stores the program's partial results: its lanes added up.
  __device__ void store_partial() {
    if (p.sums != nullptr)
      store_sums(p.sums + int64_t(blockIdx.y) * SUM_ROWS * p.channels + c, p.channels, inside, sum_dz, sum_dz_centred);
    if (p.partial != nullptr) {
      float* partial = p.partial + (int64_t(blockIdx.y) * p.channels + c) * kTaps;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        sum_lanes(grad_taps[tap]);
        for (int i = 0; i < P && inside && threadIdx.y == 0; ++i) partial[kTaps * i + tap] = grad_taps[tap][i];
      }
    }
  }
};

template <int P>
__device__ void clear(float (&x)[P]) {
  for (int i = 0; i < P; ++i) x[i] = 0.0f;
}
template <int P>
__device__ void copy(float (&to)[P], const float (&from)[P]) {
  for (int i = 0; i < P; ++i) to[i] = from[i];
}

// A thread owns two neighbouring input columns, which are seen by four output columns.
template <class T, int P>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) stride_1(const Problem p) {
  Channels<T, P, 3> channels(p);
  const DepthwiseGrid& grid = p.grid;
  const int chunks = (p.height + grid.rows - 1) / grid.rows;
  const int64_t strips = (grid.total_lanes + grid.lanes - 1) / grid.lanes;
  for (int64_t task = blockIdx.y; task < strips * chunks; task += gridDim.y) {
    const int64_t lane = task / chunks * grid.lanes + threadIdx.y;
    if (lane >= grid.total_lanes || !channels.inside) continue;
    const int64_t image = lane / grid.lanes_per_image;
    const int column = int(lane % grid.lanes_per_image) * 2;
    const int first_row = int(task % chunks) * grid.rows;
    const int row_end = min_of(first_row + grid.rows, p.height);
    const bool second = column + 1 < p.width;

    // Tap k of the first column is of the output column out_column - k, of the second one to the right of it.
    const int out_column = column + p.pad_left;
    bool seen[4];  // by the output columns out_column + 1 - q
    for (int q = 0; q < 4; ++q) seen[q] = out_column + 1 - q >= 0 && out_column + 1 - q < p.out_width;
    int out_row = first_row - 2 + p.pad_top;
    int64_t out = ((image * p.out_height + out_row) * p.out_width + out_column + 1) * p.channels + channels.c;
    int64_t in = ((image * p.height + first_row) * p.width + column) * p.channels + channels.c;
    const int64_t in_stride = int64_t(p.width) * p.channels, out_stride = int64_t(p.out_width) * p.channels;

    // [r]: the input rows row + r, which were multiplied with dy's rows up to row' - 1, where dy's row is row'.
    float a[3][2][P], da[3][2][P];
    // u of the same rows, to finish with; in float32 it is loaded again, for want of registers.
    constexpr bool kAgain = sizeof(typename Channels<T, P, 3>::Words) > 8;
    typename Channels<T, P, 3>::Words u[3][2];
    for (int r = 0; r < 3; ++r)
      for (int o = 0; o < 2; ++o) clear(a[r][o]), clear(da[r][o]);
    typename Channels<T, P, 3>::RawGradient raw[4];
    int row = first_row - 2;
    // What is new in this row.
    const auto load = [&] {
#pragma unroll
      for (int o = 0; o < 2; ++o)
        channels.load_input(u[2][o], in + o * p.channels, row + 2 < row_end && (o == 0 || second));
      const bool row_inside = row < row_end && out_row >= 0 && out_row < p.out_height;
#pragma unroll
      for (int q = 0; q < 4; ++q) channels.load_gradient(raw[q], out - q * p.channels, row_inside && seen[q]);
    };
    load();
    while (row < row_end) {
      float dy[4][P];
#pragma unroll
      for (int q = 0; q < 4; ++q) channels.make_gradient(dy[q], raw[q]);
      typename Channels<T, P, 3>::Words stored_u[2];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        channels.make_activation(a[2][o], u[2][o]);
        if (!kAgain) stored_u[o] = u[0][o], u[0][o] = u[1][o], u[1][o] = u[2][o];
      }
      const bool row_inside = out_row >= 0 && out_row < p.out_height;
      const int64_t finished = in - 2 * in_stride;
      const int done = row;
      ++row;
      ++out_row;
      out += out_stride;
      in += in_stride;
      load();
#pragma unroll
      for (int o = 0; o < 2 && kAgain; ++o)
        channels.load_input(stored_u[o], finished + o * p.channels, done >= first_row && (o == 0 || second));
      if (row_inside) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (!seen[q]) continue;
#pragma unroll
          for (int r = 0; r < 3; ++r) {
            if (done + r < first_row || done + r >= row_end) continue;
            if (q >= 1) channels.accumulate_tap(3 * r + q - 1, a[r][0], da[r][0], dy[q]);
            if (q <= 2 && second) channels.accumulate_tap(3 * r + q, a[r][1], da[r][1], dy[q]);
          }
        }
      }
      if (done >= first_row) {
        channels.store(finished, da[0][0], stored_u[0]);
        if (second) channels.store(finished + p.channels, da[0][1], stored_u[1]);
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        copy(a[0][o], a[1][o]), copy(a[1][o], a[2][o]);
        copy(da[0][o], da[1][o]), copy(da[1][o], da[2][o]);
        clear(da[2][o]);
      }
    }
  }
  channels.store_partial();
}

// A thread owns the four inputs i' = 2r, 2r + 1, j' = 2s, 2s + 1, which the outputs r - 1, r and s - 1, s see.
template <class T, int P>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) stride_2(const Problem p) {
  Channels<T, P, 3> channels(p);
  const DepthwiseGrid& grid = p.grid;
  const int quad_rows = (p.height - 1 + p.pad_top) / 2 + 1;
  const int chunks = (quad_rows + grid.rows - 1) / grid.rows;
  const int64_t strips = (grid.total_lanes + grid.lanes - 1) / grid.lanes;
  for (int64_t task = blockIdx.y; task < strips * chunks; task += gridDim.y) {
    const int64_t lane = task / chunks * grid.lanes + threadIdx.y;
    if (lane >= grid.total_lanes || !channels.inside) continue;
    const int64_t image = lane / grid.lanes_per_image;
    const int s = int(lane % grid.lanes_per_image);
    const int column = 2 * s - p.pad_left;
    const int first = int(task % chunks) * grid.rows;
    const int end = min_of(first + grid.rows, quad_rows);
    const bool left = column >= 0, right = column + 1 >= 0 && column + 1 < p.width;
    const bool seen[2] = {s < p.out_width, s >= 1 && s - 1 < p.out_width};  // by the output columns s and s - 1

    const int64_t out = (image * p.out_height * p.out_width + s) * p.channels + channels.c;
    const int64_t in = (image * p.height * p.width + column) * p.channels + channels.c;
    const int64_t in_stride = int64_t(p.width) * p.channels, out_stride = int64_t(p.out_width) * p.channels;
    float above[2][P], dy[2][P];
    typename Channels<T, P, 3>::RawGradient raw[2];
    typename Channels<T, P, 3>::Words u[2][2];
    // Of the outputs in row r.
    const auto load_gradients = [&](int r) {
#pragma unroll
      for (int q = 0; q < 2; ++q)
        channels.load_gradient(raw[q], out + r * out_stride - q * p.channels, r >= 0 && r < p.out_height && seen[q]);
    };
    // Of the inputs in row 2*r' + odd.
    const auto load_input = [&](int r, int odd, int o) {
      const int row = 2 * r - p.pad_top + odd;
      channels.load_input(u[odd][o], in + row * in_stride + o * p.channels,
                          r < end && row >= 0 && row < p.height && (o == 0 ? left : right));
    };
    load_gradients(first - 1);
#pragma unroll
    for (int q = 0; q < 2; ++q) channels.make_gradient(above[q], raw[q]);
    load_gradients(first);
#pragma unroll
    for (int i = 0; i < 4; ++i) load_input(first, i / 2, i % 2);
    for (int r = first; r < end; ++r) {
#pragma unroll
      for (int q = 0; q < 2; ++q) channels.make_gradient(dy[q], raw[q]);
      load_gradients(r + 1 < end ? r + 1 : -1);
      typename Channels<T, P, 3>::Words now[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        now[i / 2][i % 2] = u[i / 2][i % 2];
        load_input(r + 1, i / 2, i % 2);
      }
      const bool here = r < p.out_height, before = r >= 1 && r - 1 < p.out_height;
      const int row = 2 * r - p.pad_top;
      // Tap rows: of an even row 0 (with dy) and 2 (with the dy above), of an odd one 1; columns alike.
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (row + odd < 0 || row + odd >= p.height || !(o == 0 ? left : right)) continue;
          float a[P], da[P];
          clear(da);
          channels.make_activation(a, now[odd][o]);
#pragma unroll
          for (int q = 0; q < 2 - o; ++q) {
            if (!seen[q]) continue;
            const int k = o == 0 ? 2 * q : 1;
            if (here) channels.accumulate_tap(3 * odd + k, a, da, dy[q]);
            if (odd == 0 && before) channels.accumulate_tap(6 + k, a, da, above[q]);
          }
          channels.store(in + (row + odd) * in_stride + o * p.channels, da, now[odd][o]);
        }
      }
      for (int q = 0; q < 2; ++q) copy(above[q], dy[q]);
    }
  }
  channels.store_partial();
}

// Of 5x5: a thread owns the four inputs i' = 2r, 2r + 1, j' = 2s, 2s + 1. The outputs that see them come from the
// cache, a row at a time.
template <class T, int P, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) five_by_five(const Problem p) {
  // They are the rows 2r/kStride + kFirst ... + kLast, and columns alike.
  constexpr int kFirst = -4 / kStride, kLast = 1 / kStride, kOutputs = kLast - kFirst + 1;
  using Mine = Channels<T, P, 5>;
  Mine channels(p);
  const DepthwiseGrid& grid = p.grid;
  const int quad_rows = (p.height - 1 + p.pad_top) / 2 + 1;
  const int chunks = (quad_rows + grid.rows - 1) / grid.rows;
  const int64_t strips = (grid.total_lanes + grid.lanes - 1) / grid.lanes;
  for (int64_t task = blockIdx.y; task < strips * chunks; task += gridDim.y) {
    const int64_t lane = task / chunks * grid.lanes + threadIdx.y;
    if (lane >= grid.total_lanes || !channels.inside) continue;
    const int64_t image = lane / grid.lanes_per_image;
    const int s = int(lane % grid.lanes_per_image);
    const int column = 2 * s - p.pad_left, out_column = 2 * s / kStride + kFirst;
    const int first = int(task % chunks) * grid.rows;
    const int end = min_of(first + grid.rows, quad_rows);
    for (int r = first; r < end; ++r) {
      const int row = 2 * r - p.pad_top, out_row = 2 * r / kStride + kFirst;
      bool inside[2][2];
      typename Mine::Words u[2][2];
      float a[2][2][P], da[2][2][P];
      const auto offset = [&](int odd, int o) {
        return ((image * p.height + row + odd) * p.width + column + o) * p.channels + channels.c;
      };
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          inside[odd][o] = row + odd >= 0 && row + odd < p.height && column + o >= 0 && column + o < p.width;
          channels.load_input(u[odd][o], offset(odd, o), inside[odd][o]);
        }
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          channels.make_activation(a[odd][o], u[odd][o]);
          clear(da[odd][o]);
        }
      }
#pragma unroll
      for (int e = 0; e < kOutputs; ++e) {
        if (out_row + e < 0 || out_row + e >= p.out_height) continue;
        const int64_t out = ((image * p.out_height + out_row + e) * p.out_width + out_column) * p.channels + channels.c;
        typename Mine::RawGradient raw[kOutputs];
        bool seen[kOutputs];
#pragma unroll
        for (int f = 0; f < kOutputs; ++f) {
          seen[f] = out_column + f >= 0 && out_column + f < p.out_width;
          channels.load_gradient(raw[f], out + f * p.channels, seen[f]);
        }
#pragma unroll
        for (int f = 0; f < kOutputs; ++f) {
          if (!seen[f]) continue;
          float dy[P];
          channels.make_gradient(dy, raw[f]);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
            for (int o = 0; o < 2; ++o) {
              const int i = odd - kStride * (e + kFirst), j = o - kStride * (f + kFirst);
              if (i < 0 || i > 4 || j < 0 || j > 4 || !inside[odd][o]) continue;
              channels.accumulate_tap(5 * i + j, a[odd][o], da[odd][o], dy);
            }
          }
        }
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int o = 0; o < 2; ++o)
          if (inside[odd][o]) channels.store(offset(odd, o), da[odd][o], u[odd][o]);
      }
    }
  }
  channels.store_partial();
}

template <class T, int P, int kKernel>
cudaError_t start(const BackwardArgs& args, const Launch& on) {
  const Geometry& g = args.g;
  const bool first = g.stride == 1, quads = kKernel == 5 || !first;
  const int64_t lanes = quads ? (g.w - 1 + g.pad_left) / 2 + 1 : (g.w + 1) / 2;
  const int64_t rows = quads ? (g.h - 1 + g.pad_top) / 2 + 1 : g.h;
  Problem p{};
  if (g.n * g.h * g.w > 0) p.grid = depthwise_grid(int(g.c_in / P), g.n, int(rows), int(lanes), true, on);
  p.height = int(g.h);
  p.width = int(g.w);
  p.channels = int(g.c_in);
  p.out_height = int(g.out_h);
  p.out_width = int(g.out_w);
  p.pad_left = g.pad_left;
  p.pad_top = g.pad_top;
  p.dz = args.dz;
  p.y = args.y;
  p.u = args.u;
  p.weight = args.weight;
  p.grad_bn_y = static_cast<const float*>(args.grad_bn_y);
  p.norm_act = parameters_of(args.input);
  p.dz_u = args.dz_u;
  const int programs = p.grid.programs;
  const int64_t elements = kKernel * kKernel * g.c_in;
  if (args.grad_bn_u) p.sums = on.temporary<float>(size_t(programs) * SUM_ROWS * g.c_in);
  if (args.grad_weight) p.partial = on.temporary<float>(size_t(programs) * elements);
  if (programs > 0) {
    size_t shared = lanes_bytes(kDepthwiseThreads, P);
    void (*kernel)(Problem);
    if constexpr (kKernel == 5) {
      kernel = first ? five_by_five<T, P, 1> : five_by_five<T, P, 2>;
      shared += sizeof(float) * p.grid.packs * kKernel * kKernel * P;
    } else {
      kernel = first ? stride_1<T, P> : stride_2<T, P>;
    }
    const dim3 blocks(p.grid.channel_blocks, programs), threads(p.grid.packs, p.grid.lanes);
    const cudaError_t error = launch(kernel, blocks, threads, shared, on.stream, p);
    if (error != cudaSuccess) return error;
  }
  return merge_gradients(
      {{p.sums, programs}, p.channels, args.input.bn, args.batch_stats_u, g.n * g.h * g.w, args.grad_bn_u},
      {{p.partial, programs}, elements, args.grad_weight}, on);
}

}  // namespace

cudaError_t depthwise_backward(const BackwardArgs& args, const Launch& on) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool may_be_wide = aligned(args.dz) && aligned(args.y) && aligned(args.u) && aligned(args.dz_u);
    if (args.g.kernel == 5)
      return may_be_wide && args.g.c_in % 2 == 0 ? start<T, 2, 5>(args, on) : start<T, 1, 5>(args, on);
    return may_be_wide && args.g.c_in % 4 == 0 ? start<T, 4, 3>(args, on) : start<T, 1, 3>(args, on);
  });
}

}  // namespace mx::cuda
