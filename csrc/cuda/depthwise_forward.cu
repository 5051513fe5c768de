// Depthwise 3x3 and 5x5 convolution, forward (raw output and statistics) and inference (normalised and activated
// output).
//
// Each thread loads and normalises an input row once and adds it to all output rows that see it, whose sums stay in
// registers. Rows are loaded ahead and stay in flight while those before are computed. With stride 1 a thread owns two
// neighbouring output columns, which see four input columns instead of six; with stride 2 one, because a pair would
// save one load of six and need more registers. All taps are in registers: of 5x5, those of four channels.
#include "activation.h"
#include "depthwise.h"
#include "lanes.h"

namespace mx::cuda {
namespace {

struct Problem {
  int height, width, channels, out_height, out_width, pad_left, pad_top;
  DepthwiseGrid grid;
  const void* u;
  NormActParameters norm_act;  // of u, or of y
  const void* weight;
  const float* bias;     // null: 0
  const void* residual;  // null: 0
  void* y;
  float* partial;  // null: no statistics
};

// T: dtype; P: channels per thread. kOnLoad: the normalisation and activation are those of u, and statistics of y may
// be wanted; else they are those of y, and a residual may come after them.
template <class T, int P, int kKernel, int kStride, bool kOnLoad>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) forward(const Problem p) {
  constexpr int kTaps = kKernel * kKernel;
  constexpr int kColumns = kStride == 1 ? 2 : 1;               // of the output
  constexpr int kInputs = (kColumns - 1) * kStride + kKernel;  // columns that they see
  constexpr int kSums = (kKernel - 1) / kStride + 1;           // output rows that see an input row, at most
  using Packed = Pack<T, P>;
  const DepthwiseGrid& grid = p.grid;
  const int channels = p.channels;
  const int c = (blockIdx.x * grid.packs + threadIdx.x) * P;
  const bool channel_inside = c < channels;

  float taps[kTaps][P];
  for (int i = 0; i < P; ++i)
    for (int tap = 0; tap < kTaps; ++tap)
      taps[tap][i] = channel_inside ? to_float(static_cast<const T*>(p.weight)[(c + i) * kTaps + tap]) : 0.0f;
  const auto norm = ChannelNorm<P>::load_each(p.norm_act.bn, c, channels, p.norm_act.bn != nullptr && channel_inside);
  const auto norm_act = [&](float (&x)[P]) {
#pragma unroll
    for (int i = 0; i < P; ++i) x[i] = norm.z(x[i], i);
    activate(x, p.norm_act.act);
  };
  ThreadStatistics<P> statistics;
  if (kOnLoad) statistics.clear();

  const int chunks = (p.out_height + grid.rows - 1) / grid.rows;
  const int64_t strips = (grid.total_lanes + grid.lanes - 1) / grid.lanes;
  for (int64_t task = blockIdx.y; task < strips * chunks; task += gridDim.y) {
    const int64_t lane = task / chunks * grid.lanes + threadIdx.y;
    if (lane >= grid.total_lanes || !channel_inside) continue;
    const int64_t image = lane / grid.lanes_per_image;
    const int column = int(lane % grid.lanes_per_image) * kColumns;
    const int first_row = int(task % chunks) * grid.rows;
    const int row_end = min_of(first_row + grid.rows, p.out_height);

    int in_row = first_row * kStride - p.pad_top;
    const int in_column = column * kStride - p.pad_left;
    const T* in = static_cast<const T*>(p.u) + ((image * p.height + in_row) * p.width + in_column) * channels + c;
    T* out = static_cast<T*>(p.y) + ((image * p.out_height + first_row) * p.out_width + column) * channels + c;
    const int64_t in_stride = int64_t(p.width) * channels, out_stride = int64_t(p.out_width) * channels;
    bool inside[kInputs];
    for (int j = 0; j < kInputs; ++j) inside[j] = in_column + j >= 0 && in_column + j < p.width;
    const int last_row = min_of((row_end - 1) * kStride - p.pad_top + kKernel - 1, p.height - 1);

    // Packs are loaded kStride rows, a step of the loop below, before their use, each as soon as its place is free.
    PackedWords<T, P> next[kStride][kInputs];
    auto load = [&](PackedWords<T, P>(&to)[kInputs], int j, int ahead) {
      const int row = in_row + ahead;
      if (row >= 0 && row <= last_row && inside[j])
        to[j] = PackedWords<T, P>::of(Packed::load(in + ahead * in_stride + j * channels));
    };
    // What is outside the image adds nothing: the branches part threads only at its border.
    float sums[kSums][kColumns][P];  // of output rows, the first of which is complete next
    auto add_row = [&](int first_tap_row) {
      PackedWords<T, P>(&mine)[kInputs] = next[kStride == 1 ? 0 : first_tap_row % 2];
      const bool row_inside = in_row >= 0 && in_row < p.height;
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        const Packed now = mine[j].pack();
        load(mine, j, kStride);
        if (!row_inside || !inside[j]) continue;
        float a[P];
        to_floats(now, a);
        if (kOnLoad) norm_act(a);
#pragma unroll
        for (int i = 0; i < P; ++i) {
#pragma unroll
          for (int o = 0; o < kColumns; ++o) {
            const int k = j - o;
            if (k < 0 || k >= kKernel) continue;
#pragma unroll
            for (int r = 0; r < kSums; ++r) {
              const int tap_row = first_tap_row - kStride * r;
              if (tap_row >= 0) sums[r][o][i] += a[i] * taps[kKernel * tap_row + k][i];
            }
          }
        }
      }
      ++in_row;
      in += in_stride;
    };

    for (int r = 0; r < kSums; ++r)
      for (int o = 0; o < kColumns; ++o)
        for (int i = 0; i < P; ++i) sums[r][o][i] = 0.0f;
#pragma unroll
    for (int ahead = 0; ahead < kStride; ++ahead)
#pragma unroll
      for (int j = 0; j < kInputs; ++j) load(next[ahead], j, ahead);
    // The rows before, which only the chunk's first output rows see.
    add_row(0);
    if (kKernel - kStride > 1) add_row(1);
    if (kKernel - kStride > 2) add_row(2);
    if (kKernel - kStride > 3) add_row(3);

    for (int row = first_row; row < row_end; ++row) {
      if (kStride == 2) add_row(kKernel - 2);
      add_row(kKernel - 1);
#pragma unroll
      for (int o = 0; o < kColumns; ++o) {
        const bool column_inside = column + o < p.out_width;
        if (!kOnLoad) {
          if (column_inside) {
            norm_act(sums[0][o]);
            if (p.residual != nullptr) {  // from where y goes
              const int64_t offset = out + o * channels - static_cast<T*>(p.y);
              const Packed residual = Packed::load(static_cast<const T*>(p.residual) + offset);
#pragma unroll
              for (int i = 0; i < P; ++i) sums[0][o][i] += to_float(residual.v[i]);
            }
            round_pack<T>(sums[0][o]).store(out + o * channels);
          }
        } else {
          if (p.bias != nullptr) {  // from the cache: registers are taken
            float bias[P];
            load_vector<(P > 1)>(p.bias, c, channels, bias);
#pragma unroll
            for (int i = 0; i < P; ++i) sums[0][o][i] += bias[i];
          }
          const Packed stored = round_pack<T>(sums[0][o]);
          float value[P];
          to_floats(stored, value);
          const int step = row - first_row;
          if (o == 0 && (step & (step - 1)) == 0) statistics.recentre(value);
          if (column_inside) {
            stored.store(out + o * channels);
            statistics.add(value);
          }
        }
        for (int i = 0; i < P; ++i) {
          for (int r = 0; r + 1 < kSums; ++r) sums[r][o][i] = sums[r + 1][o][i];
          sums[kSums - 1][o][i] = 0.0f;
        }
      }
      out += out_stride;
    }
  }
  if (kOnLoad && p.partial != nullptr)
    statistics.store(p.partial + int64_t(blockIdx.y) * STATISTICS_ROWS * channels + c, channels, channel_inside);
}

template <class T, int P, int kKernel>
cudaError_t start(const ForwardArgs& args, const Launch& on) {
  const Geometry& g = args.g;
  const int packs = int(g.c_in / P);
  const int lanes = int(g.stride == 1 ? (g.out_w + 1) / 2 : g.out_w);
  const bool on_load = is_identity(args.output) && args.residual == nullptr;
  Problem p{};
  p.grid = depthwise_grid(packs, g.n, int(g.out_h), lanes, args.statistics.wanted(), on);
  p.height = int(g.h);
  p.width = int(g.w);
  p.channels = int(g.c_in);
  p.out_height = int(g.out_h);
  p.out_width = int(g.out_w);
  p.pad_left = g.pad_left;
  p.pad_top = g.pad_top;
  p.u = args.u;
  p.norm_act = parameters_of(on_load ? args.input : args.output);
  p.weight = args.weight;
  p.bias = static_cast<const float*>(args.bias);
  p.residual = args.residual;
  p.y = args.y;
  const int programs = g.n * g.out_h * g.out_w == 0 ? 0 : p.grid.programs;
  if (args.statistics.wanted()) p.partial = on.temporary<float>(size_t(programs) * STATISTICS_ROWS * g.c_in);
  if (programs > 0) {
    const dim3 blocks(p.grid.channel_blocks, programs), threads(p.grid.packs, p.grid.lanes);
    const size_t shared = args.statistics.wanted() ? lanes_bytes(kDepthwiseThreads, P) : 0;
    auto run = [&](auto kernel) { return launch(kernel, blocks, threads, shared, on.stream, p); };
    const cudaError_t error =
        on_load ? run(g.stride == 1 ? forward<T, P, kKernel, 1, true> : forward<T, P, kKernel, 2, true>)
                : run(g.stride == 1 ? forward<T, P, kKernel, 1, false> : forward<T, P, kKernel, 2, false>);
    if (error != cudaSuccess) return error;
  }
  if (!args.statistics.wanted()) return cudaSuccess;
  return merge_statistics(p.partial, programs, p.channels, args.statistics, on);
}

template <class T, int kKernel>
cudaError_t start_typed(const ForwardArgs& args, const Launch& on) {
  constexpr int kWide = kKernel == 3 ? kPack<T> : 4;
  const bool wide =
      args.g.c_in % kWide == 0 && aligned(args.u) && aligned(args.y) && aligned(args.bias) && aligned(args.residual);
  return wide ? start<T, kWide, kKernel>(args, on) : start<T, 1, kKernel>(args, on);
}

}  // namespace

cudaError_t depthwise_forward(const ForwardArgs& args, const Launch& on) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    return args.g.kernel == 3 ? start_typed<T, 3>(args, on) : start_typed<T, 5>(args, on);
  });
}

}  // namespace mx::cuda
