// How the depthwise kernels cut their work, and the weights in the order they read them.
#pragma once

#include "dispatch.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

// Calls f(Constant<K>) for a kernel of K x K taps.
template <class F>
MX_INLINE void with_kernel(int64_t kernel, const F& f) {
  kernel == 3 ? f(Constant<3>{}) : f(Constant<5>{});
}
// Calls f(Constant<K>, Constant<stride>) for the convolution's.
template <class F>
MX_INLINE void with_kernel_and_stride(const Geometry& g, const F& f) {
  with_kernel(g.kernel, [&](auto kernel) { g.stride == 1 ? f(kernel, Constant<1>{}) : f(kernel, Constant<2>{}); });
}

// A tile keeps as many rows of its input as the kernel has, in the accumulation type, [vectors of channels][pixels]
// [lanes], each of about this many bytes: three fill an L1 cache, and five are quicker partly out of it than cut
// shorter. It takes kChannelBytes of channels where there are so many, for long runs of memory, more where the image is
// small, and then as many columns as fit.
constexpr int64_t kRowBytes = 16 * 1024;
constexpr int64_t kChannelBytes = 512;
constexpr int64_t kMaxChannelBytes = 4096;

// Bands of rows are cut until there are this many tiles, but not lower than kMinBandRows: every band reads rows that
// its neighbour reads too.
constexpr int64_t kEnoughTiles = 256;
constexpr int64_t kMinBandRows = 14;

struct Tile {
  int64_t image, row_begin, row_end, column_begin, column_end, channel_begin;
  int channels;
  int64_t place;  // of the tile's partial results: the same for all channel blocks of one piece of the image

  int64_t pixels() const { return (row_end - row_begin) * (column_end - column_begin); }
};

// The grid of tiles over images of rows x columns pixels. It depends on the shape only, never on the threads.
struct TileGrid {
  int64_t images, rows, columns, channels, channel_block, bands, column_tiles, channel_blocks;

  // Images of rows x columns pixels are tiled; a tile of n columns keeps n * columns_per_column + kernel - 1 in its
  // ring.
  TileGrid(int64_t images, int64_t rows, int64_t columns, int64_t channels, int64_t element_bytes,
           int64_t columns_per_column, int64_t kernel)
      : images(images), rows(rows), columns(columns), channels(channels) {
    const int64_t elements = kRowBytes / element_bytes, more = kernel - 1;
    const int64_t wanted = max_of(elements / (columns * columns_per_column + more), kChannelBytes / element_bytes);
    const int64_t block_bytes = min_of(wanted * element_bytes / 128 * 128, kMaxChannelBytes);
    channel_blocks = ceil_div(channels * element_bytes, block_bytes);
    channel_block = ceil_div(ceil_div(channels, channel_blocks) * element_bytes, 64) * 64 / element_bytes;
    channel_blocks = ceil_div(channels, channel_block);
    column_tiles =
        ceil_div(columns, max_of((elements / min_of(channel_block, channels) - more) / columns_per_column, 1));
    const int64_t tiles = max_of(images * column_tiles * channel_blocks, 1);
    bands = max_of(min_of(ceil_div(kEnoughTiles, tiles), rows / kMinBandRows), 1);
  }

  int64_t places() const { return images * bands * column_tiles; }
  int64_t tiles() const { return places() * channel_blocks; }

  Tile tile(int64_t index) const {
    Tile t = at_place(index / channel_blocks);
    t.channel_begin = index % channel_blocks * channel_block;
    t.channels = int(min_of(channels - t.channel_begin, channel_block));
    return t;
  }

  Tile at_place(int64_t place) const {
    Tile t{};
    t.place = place;
    const int64_t column_tile = place % column_tiles, band = place / column_tiles % bands;
    t.image = place / column_tiles / bands;
    t.row_begin = rows * band / bands;
    t.row_end = rows * (band + 1) / bands;
    t.column_begin = columns * column_tile / column_tiles;
    t.column_end = columns * (column_tile + 1) / column_tiles;
    return t;
  }
};

// The size of what arrange_weight makes.
template <class A, int K>
inline int64_t arranged_size(int64_t channels) {
  return ceil_div(channels, kLanes<A>) * kLanes<A> * K * K;
}

// weight [channels][taps] to [vectors of channels][taps][lanes] in the accumulation type. The taps of a vector lie
// together: one channel row apart, they could all fall on the same lines of a cache. Lanes without a channel are 0.
template <class T, int K>
inline void arrange_weight(const T* weight, int64_t channels, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>, kTaps = K * K;
  for (int64_t c = 0; c < ceil_div(channels, L) * L; ++c)
    for (int tap = 0; tap < kTaps; ++tap) {
      const Vec<A> value = load_partial<T>(weight + c * kTaps + tap, c < channels);
      out[(c / L * kTaps + tap) * L + c % L] = value[0];
    }
}

// What a depthwise convolution takes as packed: its weight, arranged.
template <class T>
inline int64_t depthwise_packed_bytes(int64_t channels, int64_t kernel) {
  return ceil_div(channels, kLanes<Acc<T>>) * kLanes<Acc<T>> * kernel * kernel * int64_t(sizeof(Acc<T>));
}
template <class T>
inline void pack_depthwise(const void* weight, int64_t channels, int64_t kernel, void* packed) {
  with_kernel(kernel, [&](auto taps) {
    arrange_weight<T, taps.value>(static_cast<const T*>(weight), channels, static_cast<Acc<T>*>(packed));
  });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
