// What the depthwise kernels share: the shape of their blocks and of their grid.
//
// A thread owns a pack of neighbouring channels and one or two neighbouring columns of an image, and walks down a chunk
// of its rows. Lanes count through the columns of all images, so that blocks are full whatever the width.
#pragma once
#include "kernels.h"

namespace mx::cuda {

struct DepthwiseGrid {
  int packs, lanes;     // threads of a block: packs of channels (x), columns (y)
  int channel_blocks;   // blocks in x
  int programs;         // blocks in y
  int rows;             // of a chunk
  int lanes_per_image;  // and all of them:
  int64_t total_lanes;
};

constexpr int kDepthwiseThreads = 128;

// For `packs` packs of channels in all. Chunks of rows give the programs work of even size, at the price of two more
// rows (of 5x5 four) to load in each. `bounded`: as few programs as fill the GPU, because each leaves a row of partial
// results.
inline DepthwiseGrid depthwise_grid(int packs, int64_t images, int rows, int lanes_per_image, bool bounded,
                                    const Launch& on) {
  DepthwiseGrid grid{};
  grid.packs = 1;
  while (grid.packs < 8 && grid.packs < packs) grid.packs *= 2;  // 8 packs of 16 bytes: a cache line
  grid.lanes = kDepthwiseThreads / grid.packs;
  grid.channel_blocks = (packs + grid.packs - 1) / grid.packs;
  grid.lanes_per_image = lanes_per_image;
  grid.total_lanes = images * lanes_per_image;
  const int64_t strips = (grid.total_lanes + grid.lanes - 1) / grid.lanes;
  grid.rows = rows;
  auto chunks = [&] { return (rows + grid.rows - 1) / grid.rows; };
  while (grid.rows > 1 &&
         grid.channel_blocks * strips * chunks() < int64_t(grid.rows > 8 ? 12 : 2) * on.gpu.multiprocessors)
    grid.rows = (grid.rows + 1) / 2;
  const int64_t tasks = strips * chunks();
  const int64_t enough = 4 * on.gpu.multiprocessors / grid.channel_blocks;
  const int64_t most = bounded ? (enough > 1 ? enough : 1) : 65535;
  grid.programs = int(tasks < most ? tasks : most);
  return grid;
}

}  // namespace mx::cuda
