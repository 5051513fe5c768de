// Convolutions as matrix products over row tiles, for any source of the tile (normalised rows, im2col, depthwise rows).
//
//   forward    y[rows, columns] = a[rows, depth] * weight[columns, depth]^T + bias[columns]
//   backward   da = dy * weight,  grad_weight = dy^T * a
//
// The grids of tiles and chunks depend on the shape alone; partial results are merged in their order.
#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "kernels.h"
#include "statistics.h"
#include "tile.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Scratch slots (kernels.h): the shared one and the worker's are taken here, the others by callers.
constexpr int kSharedSlot = 0, kWorkerSlot = 1, kWeightSlot = 2, kTapsSlot = 3;

// Fewer row tiles than this, and the columns are divided too, for enough parallel tasks.
constexpr int64_t kWantedTasks = 16;

// Rows that take several times as long to multiply by a panel as the panel takes to come from memory. With so many in a
// tile of rows built together, workers divide the tiles, and multiply what they built themselves.
#if defined(MX_ISA_AMX_BF16)
constexpr int64_t kRowsWorthPanels = 504;
#else
constexpr int64_t kRowsWorthPanels = 84;
#endif

template <class T>
struct ForwardProduct {
  using A = Acc<T>;
  int64_t rows, depth, columns;
  const T* weight;           // [columns][depth]
  const Operand<T>* packed;  // the same in panels; null: packed here
  const A* bias;             // null: 0
  T* y;
  Statistics statistics;  // of y, with an output that is linear and not normalised
  NormAct output;
  const T* residual;  // like y; null: 0
};

template <class T>
inline ForwardProduct<T> forward_product_of(const ForwardArgs& args, int64_t depth, const T* weight) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  return {g.n * g.out_h * g.out_w,
          depth,
          g.c_out,
          weight,
          static_cast<const Operand<T>*>(args.packed),
          static_cast<const A*>(args.bias),
          static_cast<T*>(args.y),
          args.statistics,
          args.output,
          static_cast<const T*>(args.residual)};
}

// build(begin, rows, tile) fills a tile (rows tile_pitch(depth) apart) with rows [begin, begin + rows) of a, for which
// it reads memory up to reach(begin + rows), from about reach(begin) on for the first time.
template <class T, class Build, class Reach>
inline void forward_product(const ForwardProduct<T>& p, const Build& build, const Reach& reach) {
  using A = Acc<T>;
  using E = Operand<T>;
  const int64_t pitch = tile_pitch<E>(p.depth), panels = ceil_div(p.columns, kPanel<A>);
  const int64_t depth_groups = groups_of<E>(p.depth);
  // Rows that fit in the L2 all together are built once, for all workers, which then divide the columns: each panel is
  // read once. Otherwise each worker builds tiles of its own.
  constexpr int64_t kTogetherBytes = 512 << 10;
  const bool together = p.rows > 0 && p.rows * pitch * int64_t(sizeof(E)) <= kTogetherBytes;
  const RowTiles tiles = together
                             ? even_tiles(p.rows, max_of(ceil_div(kWantedTasks, panels), p.rows / kRowsWorthPanels))
                             : row_tiles(p.rows, pitch * sizeof(E));
  const ChannelNormAct<A> output(p.output, p.columns);
  const int64_t column_tasks = together ? panels : min_of(panels, ceil_div(kWantedTasks / 2, max_of(tiles.count, 1)));
  const int64_t rows_size = together ? round_up(p.rows, kTileStep) * pitch : 0;
  const bool statistics = p.statistics.wanted(), streaming = streams<T, kPanelVectors>(p.y, p.rows, p.columns);
  const int64_t moments_size = statistics ? tiles.count * kMoments * p.columns : 0;
  const int64_t packed_size = p.packed ? 0 : panels_size<T>(p.columns, p.depth);
  Workspace shared(scratch(kSharedSlot, Workspace::bytes<E>(packed_size) + Workspace::bytes<E>(rows_size) +
                                            Workspace::bytes<A>(moments_size)));
  E* const all_rows = shared.take<E>(rows_size);
  E* const own_panels = shared.take<E>(packed_size);
  const E* const packed = p.packed ? p.packed : own_panels;
  A* const moments = shared.take<A>(moments_size);

  const auto pack = [&](int64_t panel) { pack_panel<T>(p.weight, p.columns, p.depth, panel, own_panels); };
  const auto panel_at = [&](int64_t panel) { return packed + panel * panel_size<T>(p.depth); };
  // With one tile, a panel has one user, which packs it just before; it is still in that core's cache then.
  const bool pack_first = !p.packed && tiles.count > 1, pack_between = !p.packed && !pack_first;
  if (pack_first)
    parallel(panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack(panel);
    });

  if (together) {
    const int64_t pieces = min_of(kWantedTasks, p.rows);
    parallel(pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * p.rows / pieces, rows = (i + 1) * p.rows / pieces - row;
        build(row, rows, all_rows + row * pitch);
        fill_up_rows(all_rows + row * pitch, rows, p.depth);
      }
    });
  }

  parallel(tiles.count * column_tasks, [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    E* const own = static_cast<E*>(scratch(kWorkerSlot, together ? 0 : Workspace::bytes<E>(tiles.rows * pitch)));
    int64_t built = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / column_tasks, column_task = task % column_tasks, rows = tiles.size(t);
      if (!together && t != built) {
        build(tiles.begin(t), rows, own);
        fill_up_rows(own, rows, p.depth);
      }
      built = t;
      Prefetcher ahead(Prefetcher::steps<E>(rows, double(panels) / column_tasks, p.depth));
      if (!together && t + 1 < tiles.count) {
        const int64_t next = tiles.begin(t + 1);
        ahead.add(reach(next), reach(next + tiles.size(t + 1)));
      }
      if (together && p.packed && column_task + 1 < column_tasks)
        ahead.add(panel_at(column_task + 1), panel_at(column_task + 2));
      const E* const tile = together ? all_rows + tiles.begin(t) * pitch : own;
      for (int64_t panel = column_task * panels / column_tasks; panel < (column_task + 1) * panels / column_tasks;
           ++panel) {
        if (pack_between) pack(panel);
        const E* const b = panel_at(panel);
        const int64_t column = panel * kPanel<A>, columns = p.columns - column;
        const int64_t offset = tiles.begin(t) * p.columns + column;
        T* const y = p.y + offset;
        const T* const residual = p.residual ? p.residual + offset : nullptr;
        const A* const bias = p.bias ? p.bias + column : nullptr;
        if (statistics) {
          StoreWithMoments<T> epilogue(y, p.columns, columns, bias, streaming);
          multiply_tile<false>(tile, pitch, rows, b, columns, depth_groups, ahead, epilogue);
          epilogue.finish(rows, p.columns, moments + t * kMoments * p.columns + column);
        } else {
          StoreNormAct<T> epilogue{y, p.columns, columns, bias, output.from(column), residual, streaming};
          multiply_tile<false>(tile, pitch, rows, b, columns, depth_groups, ahead, epilogue);
        }
      }
    }
    if (streaming) finish_streaming();
  });

  if (statistics)
    merge_statistics<A>(tiles.count, p.columns, moments, [&](int64_t t) { return tiles.size(t); }, p.statistics);
}

template <class T>
struct BackwardProduct {
  using A = Acc<T>;
  int64_t rows, depth, columns;
  OutputGradient<T> gradient;
  const T* weight;  // [columns][depth]
  // The input; dz_u and grad_bn_u are only made for an input of one row of u per row of the product.
  const T* u;
  NormAct input;
  bool batch_stats_u;
  Gate<T> gate;    // of the input
  T* dz_u;         // null: not wanted
  A* grad_weight;  // [columns][depth]; null: not wanted
  A* grad_bn_u;    // null: not wanted
  A* grad_gate;    // [images][depth]; where there are a gate and a dz_u
};

// The parts of a backward pass that its two schedules share.
template <class T>
class BackwardTiles {
 public:
  using A = Acc<T>;
  using E = Operand<T>;

  BackwardTiles(const BackwardProduct<T>& p, RowTiles tiles)
      : p_(p), tiles_(tiles), streaming_(streams<T, kPanelVectors>(p.dz_u, p.rows, p.depth)) {}

  int64_t panels() const { return ceil_div(p_.depth, kPanel<A>); }
  int64_t panel_size() const { return groups_of<E>(p_.columns) * kPanel<A>; }
  int64_t packed_size() const { return p_.dz_u ? panels() * panel_size() : 0; }
  // Of each tile the sums of dz_u, or the gradient of the gates of the images that it has rows of.
  int64_t sums_size() const {
    return p_.grad_bn_u ? tiles_.count * 2 * p_.depth : p_.grad_gate ? tiles_.count * images() * p_.depth : 0;
  }

  void pack(E* packed) {
    packed_ = packed;
    if (p_.dz_u)
      parallel(panels(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          pack_rows<T>(p_.weight + i * kPanel<A>, p_.depth, p_.depth - i * kPanel<A>, p_.columns,
                       packed + i * panel_size());
      });
  }

  void set_sums(A* sums) { sums_ = sums; }

  // What tile t will be made from, to be asked for during `products` products per row and column.
  template <class Reach>
  Prefetcher ahead(int64_t t, int products, const Reach& reach) const {
    Prefetcher ahead(Prefetcher::steps<E>(tiles_.rows, panels(), p_.columns) * products);
    if (t < tiles_.count) {
      const int64_t begin = tiles_.begin(t), end = begin + tiles_.size(t);
      ahead.add(reach(begin), reach(end));
      ahead.add(p_.gradient.dz + begin * p_.columns, p_.gradient.dz + end * p_.columns);
      if (p_.gradient.y) ahead.add(p_.gradient.y + begin * p_.columns, p_.gradient.y + end * p_.columns);
    }
    return ahead;
  }

  // dz_u of tile t, whose output gradient is dy, by row.
  void input_gradient(int64_t t, const E* dy, Prefetcher& ahead) const {
    const ChannelNormAct<A> input(p_.input, p_.depth);
    if (p_.grad_gate) clear_gate_sums(t);
    for (int64_t i = 0; i < panels(); ++i) {
      const int64_t channel = i * kPanel<A>, offset = tiles_.begin(t) * p_.depth + channel;
      if (p_.grad_gate) {
        Gate<T> gate = p_.gate.from(tiles_.begin(t));
        gate.factors += channel;
        StoreGatedGradient<T> epilogue{p_.dz_u + offset,
                                       p_.u + offset,
                                       input.from(channel),
                                       gate,
                                       gate_sums(t) + channel - gate.image(0) * p_.depth,
                                       p_.depth - channel,
                                       streaming_};
        multiply_tile<false>(dy, tile_pitch<E>(p_.columns), tiles_.size(t), packed_ + i * panel_size(),
                             epilogue.columns, groups_of<E>(p_.columns), ahead, epilogue);
        continue;
      }
      StoreInputGradient<T> epilogue{p_.dz_u + offset, p_.u + offset, input.from(channel), p_.depth - channel,
                                     streaming_};
      multiply_tile<false>(dy, tile_pitch<E>(p_.columns), tiles_.size(t), packed_ + i * panel_size(), epilogue.columns,
                           groups_of<E>(p_.columns), ahead, epilogue);
      if (p_.grad_bn_u) {
        A* const sums = sums_ + t * 2 * p_.depth + channel;
        epilogue.finish(sums, sums + p_.depth);
      }
    }
    if (streaming_) finish_streaming();
  }

  void merge_sums() const {
    if (p_.grad_bn_u)
      merge_grad_bn<A>(tiles_.count, p_.depth, 2 * p_.depth, sums_, p_.rows, static_cast<const A*>(p_.input.bn),
                       p_.batch_stats_u, p_.grad_bn_u);
    if (p_.grad_gate) merge_gate_sums();
  }

 private:
  // How many images a tile has rows of, at most.
  int64_t images() const { return min_of((tiles_.rows + p_.gate.pixels - 2) / p_.gate.pixels + 1, tiles_.rows); }
  A* gate_sums(int64_t t) const { return sums_ + t * images() * p_.depth; }
  void clear_gate_sums(int64_t t) const { __builtin_memset(gate_sums(t), 0, images() * p_.depth * sizeof(A)); }

  void merge_gate_sums() const {
    parallel(p_.rows / p_.gate.pixels, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        A* const to = p_.grad_gate + image * p_.depth;
        __builtin_memset(to, 0, p_.depth * sizeof(A));
        const int64_t first = tiles_.of(image * p_.gate.pixels), last = tiles_.of((image + 1) * p_.gate.pixels - 1);
        for (int64_t t = first; t <= last; ++t) {
          const A* const from = gate_sums(t) + (image - p_.gate.image(tiles_.begin(t))) * p_.depth;
          for (int64_t c = 0; c < p_.depth; c += kLanes<A>) {
            const int count = int(min_of(p_.depth - c, kLanes<A>));
            store_partial<A>(to + c, load_partial<A>(to + c, count) + load_partial<A>(from + c, count), count);
          }
        }
      }
    });
  }

  const BackwardProduct<T>& p_;
  RowTiles tiles_;
  bool streaming_;
  E* packed_ = nullptr;
  A* sums_ = nullptr;
};

// Small weights: each chunk of tiles adds up a weight gradient of its own, in one pass over the data.
template <class T, class BuildPanels, class Reach>
inline void backward_in_chunks(const BackwardProduct<T>& p, const BuildPanels& build_panels, const Reach& reach) {
  using A = Acc<T>;
  using E = Operand<T>;
  using Gradient = GradientTile<T>;
  constexpr int64_t kMostChunks = 64;
  const int64_t weight_size = p.columns * p.depth, panels = ceil_div(p.depth, kPanel<A>);
  const int64_t row_pitch = tile_pitch<E>(p.columns);
  const int64_t row_bytes = (row_pitch + ceil_div(panels * kPanel<A>, kGroup<E>)) * sizeof(E);
  const RowTiles tiles = row_tiles(p.rows, row_bytes);
  const int64_t groups = tiles.rows / kGroup<E>;
  const AcrossLayout<E> layout(groups, p.columns);
  BackwardTiles<T> backward(p, tiles);
  const int64_t chunks = p.grad_weight ? min_of(tiles.count, kMostChunks) : tiles.count;
  const int64_t partials_size = p.grad_weight ? chunks * weight_size : 0;
  Workspace shared(scratch(kSharedSlot, Workspace::bytes<E>(backward.packed_size()) +
                                            Workspace::bytes<A>(backward.sums_size()) +
                                            Workspace::bytes<A>(partials_size)));
  backward.pack(shared.take<E>(backward.packed_size()));
  backward.set_sums(shared.take<A>(backward.sums_size()));
  A* const partials = shared.take<A>(partials_size);

  parallel(chunks, [&](int64_t begin, int64_t end) {
    const MatrixUnit unit;
    const int64_t rows_size = p.dz_u || !Gradient::kApart || Gradient::kTransposed ? tiles.rows * row_pitch : 0;
    const int64_t across_size = p.grad_weight && Gradient::kApart ? layout.size : 0;
    const int64_t a_size = p.grad_weight ? panels * groups * kPanel<A> : 0;
    Workspace own(scratch(
        kWorkerSlot, Workspace::bytes<E>(rows_size) + Workspace::bytes<E>(across_size) + Workspace::bytes<E>(a_size)));
    E* const by_row = own.take<E>(rows_size);
    E* const across = Gradient::kApart ? own.take<E>(across_size) : by_row;
    E* const a = own.take<E>(a_size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * tiles.count / chunks, last = (chunk + 1) * tiles.count / chunks;
      for (int64_t t = first; t < last; ++t) {
        gradient_rows<T>(p.gradient, tiles.begin(t), tiles.size(t),
                         {rows_size ? by_row : nullptr, across_size ? across : nullptr, layout.pitch});
        Prefetcher ahead = backward.ahead(t + 1, (p.grad_weight != nullptr) + (p.dz_u != nullptr), reach);
        if (p.grad_weight) {
          build_panels(tiles.begin(t), tiles.size(t), a, tiles.rows);
          fill_up_panels(a, tiles.size(t), panels, tiles.rows);
          for (int64_t i = 0; i < panels; ++i) {
            const int64_t column = i * kPanel<A>;
            AddToRows<A> epilogue{partials + chunk * weight_size + column, p.depth, p.depth - column, t > first};
            multiply_tile<layout.kByColumn>(across, layout.pitch, p.columns, a + i * groups * kPanel<A>,
                                            epilogue.columns, groups_of<E>(tiles.size(t)), ahead, epilogue);
          }
        }
        if (p.dz_u) backward.input_gradient(t, by_row, ahead);
      }
    }
  });

  backward.merge_sums();
  if (p.grad_weight)
    parallel(ceil_div(weight_size, 1024), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * 1024; i < min_of(end * 1024, weight_size); i += kLanes<A>) {
        const int count = int(min_of(weight_size - i, kLanes<A>));
        Vec<A> sum = zero<A>();
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sum += load_partial<A>(partials + chunk * weight_size + i, count);
        store_partial<A>(p.grad_weight + i, sum, count);
      }
    });
}

// Large weights: a partial gradient per chunk would cost more traffic than the activations. Instead, stretches of rows
// go through two steps: row tiles (dy and a are built and kept, dz_u is made), then blocks of the weight gradient over
// all rows of the stretch, which is short enough for what was kept to be still in cache.
template <class T, class BuildPanels, class Reach>
inline void backward_in_stretches(const BackwardProduct<T>& p, const BuildPanels& build_panels, const Reach& reach) {
  using A = Acc<T>;
  using E = Operand<T>;
  using Gradient = GradientTile<T>;
  constexpr int64_t kStretchBytes = 4 << 20, kDepth = 192, kWeightRows = 240 / kBlockRows * kBlockRows;
  constexpr int64_t kTaskPanels = kPanel<A> < 64 ? 64 / kPanel<A> : 1;
  static_assert(kDepth % kDepthStep<E> == 0 && kTileStep % kDepthStep<E> == 0);
  const int64_t panels = ceil_div(p.depth, kPanel<A>), row_pitch = tile_pitch<E>(p.columns);
  const int64_t row_bytes = (row_pitch + ceil_div(panels * kPanel<A>, kGroup<E>)) * sizeof(E);
  const RowTiles tiles = row_tiles(p.rows, row_bytes);
  BackwardTiles<T> backward(p, tiles);
  const int64_t stretch_tiles = min_of(max_of(kStretchBytes / (tiles.rows * row_bytes), 1), tiles.count);
  const int64_t stretch_groups = stretch_tiles * tiles.rows / kGroup<E>;
  const AcrossLayout<E> layout(stretch_groups, p.columns);
  const int64_t a_size = panels * stretch_groups * kPanel<A>;
  const int64_t rows_size = Gradient::kTransposed || (p.dz_u && Gradient::kApart) ? tiles.rows * row_pitch : 0;
  Workspace shared(scratch(kSharedSlot, Workspace::bytes<E>(backward.packed_size()) +
                                            Workspace::bytes<A>(backward.sums_size()) +
                                            Workspace::bytes<E>(layout.size) + Workspace::bytes<E>(a_size)));
  backward.pack(shared.take<E>(backward.packed_size()));
  backward.set_sums(shared.take<A>(backward.sums_size()));
  E* const dy = shared.take<E>(layout.size);
  E* const a = shared.take<E>(a_size);

  for (int64_t first = 0; first < tiles.count; first += stretch_tiles) {
    const int64_t stretch = min_of(stretch_tiles, tiles.count - first);
    const int64_t rows = min_of(stretch * tiles.rows, p.rows - tiles.begin(first));
    parallel(stretch, [&](int64_t begin, int64_t end) {
      const MatrixUnit unit;
      E* const own = static_cast<E*>(scratch(kWorkerSlot, Workspace::bytes<E>(rows_size)));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = first + i, group = i * tiles.rows / kGroup<E>;
        E* const across = dy + layout.at(group, 0);
        E* const by_row = Gradient::kApart ? own : across;
        gradient_rows<T>(p.gradient, tiles.begin(t), tiles.size(t),
                         {rows_size || !Gradient::kApart ? by_row : nullptr, across, layout.pitch});
        build_panels(tiles.begin(t), tiles.size(t), a + group * kPanel<A>, stretch_groups * kGroup<E>);
        fill_up_panels(a + group * kPanel<A>, tiles.size(t), panels, stretch_groups * kGroup<E>);
        Prefetcher ahead = backward.ahead(t + 1, 1, reach);
        if (p.dz_u) backward.input_gradient(t, by_row, ahead);
      }
    });
    const int64_t row_tasks = ceil_div(p.columns, kWeightRows);
    parallel(ceil_div(panels, kTaskPanels) * row_tasks, [&](int64_t begin, int64_t end) {
      const MatrixUnit unit;
      for (int64_t task = begin; task < end; ++task) {
        Prefetcher none;
        const int64_t n = task % row_tasks * kWeightRows, panel = task / row_tasks * kTaskPanels;
        for (int64_t d = 0; d < rows; d += kDepth)
          for (int64_t i = panel; i < min_of(panel + kTaskPanels, panels); ++i) {
            const int64_t column = i * kPanel<A>, group = d / kGroup<E>;
            AddToRows<A> epilogue{p.grad_weight + n * p.depth + column, p.depth, p.depth - column, first + d > 0};
            multiply_tile<layout.kByColumn>(dy + layout.at(group, n), layout.pitch, min_of(kWeightRows, p.columns - n),
                                            a + (i * stretch_groups + group) * kPanel<A>, epilogue.columns,
                                            groups_of<E>(min_of(kDepth, rows - d)), none, epilogue);
          }
      }
    });
  }
  backward.merge_sums();
}

// build_panels(begin, rows, panels, panel_rows) fills panels (see activate_panels) with rows [begin, begin + rows) of
// a; reach as in forward_product.
template <class T, class BuildPanels, class Reach>
inline void backward_product(const BackwardProduct<T>& p, const BuildPanels& build_panels, const Reach& reach) {
  constexpr int64_t kLargeWeight = 256 * 256;
  if (p.rows == 0 && p.grad_weight) {
    __builtin_memset(p.grad_weight, 0, p.columns * p.depth * sizeof(Acc<T>));
    BackwardTiles<T>(p, {}).merge_sums();
  } else if (p.grad_weight && p.columns * p.depth > kLargeWeight) {
    backward_in_stretches(p, build_panels, reach);
  } else {
    backward_in_chunks(p, build_panels, reach);
  }
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
