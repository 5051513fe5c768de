// Sums over the threads of a block that have the same channels, and what they leave as a program's partial results.
//
// Blocks are (packs of channels, lanes): threads with one threadIdx.x share kChannels channels.
#pragma once
#include "merge.h"

namespace mx::cuda {

// Shared memory that the functions below need.
constexpr size_t lanes_bytes(int threads, int channels) { return sizeof(float) * threads * channels; }

// value[i] of all lanes added up, in the lanes' order; every thread gets the sums.
template <int kChannels>
__device__ __forceinline__ void sum_lanes(float (&value)[kChannels]) {
  float* shared = shared_memory<float>() + threadIdx.x * kChannels;
  const int stride = blockDim.x * kChannels;
  __syncthreads();
  for (int i = 0; i < kChannels; ++i) shared[threadIdx.y * stride + i] = value[i];
  __syncthreads();
  for (int i = 0; i < kChannels; ++i) {
    float sum = 0.0f;
    for (int lane = 0; lane < int(blockDim.y); ++lane) sum += shared[lane * stride + i];
    value[i] = sum;
  }
}

// A thread's statistics: sums of differences from an offset, which is the first value, and after that now and then the
// mean of the values so far: neither a large mean nor an outlier at the start cancels in M2.
template <int kChannels>
struct ThreadStatistics {
  float count, offset[kChannels], total[kChannels], squares[kChannels];

  __device__ void clear() {
    count = 0.0f;
    for (int i = 0; i < kChannels; ++i) offset[i] = total[i] = squares[i] = 0.0f;
  }

  // Before the values number 1, 2, 3, 5, 9, ... of a run; `first` is the next value.
  __device__ void recentre(const float (&first)[kChannels]) {
    for (int i = 0; i < kChannels; ++i) {
      const float nearer = count > 0.0f ? offset[i] + total[i] / count : first[i];
      const float moved = nearer - offset[i];  // not total/count, but what rounding left of it
      squares[i] = moved_squares(squares[i], moved * (count * moved - 2.0f * total[i]));
      total[i] -= count * moved;
      offset[i] = nearer;
    }
  }

  __device__ void add(const float (&value)[kChannels]) {
    for (int i = 0; i < kChannels; ++i) {
      const float difference = value[i] - offset[i];
      total[i] += difference;
      squares[i] += difference * difference;
    }
    count += 1.0f;
  }

  // Merges the block's lanes and writes its row of partial statistics; lane 0 has a value. `partial` is at the thread's
  // first channel.
  __device__ void store(float* partial, int channels, bool inside) {
    // Means are differences from the first lane's offset: rounded at the size of a large mean, they would cost the
    // variance its last digits.
    float origin[kChannels], mean[kChannels], sum[kChannels], counts[1] = {count};
    for (int i = 0; i < kChannels; ++i) origin[i] = threadIdx.y == 0 ? offset[i] : 0.0f;
    sum_lanes(origin);
    sum_lanes(counts);
    for (int i = 0; i < kChannels; ++i) {
      const float own = count > 0.0f ? total[i] / count : 0.0f;
      squares[i] = moved_squares(squares[i], -total[i] * own);
      mean[i] = count > 0.0f ? offset[i] - origin[i] + own : 0.0f;
      sum[i] = count * mean[i];
    }
    sum_lanes(sum);
    for (int i = 0; i < kChannels; ++i) {
      const float difference = mean[i] - sum[i] / counts[0];
      squares[i] += count * difference * difference;
    }
    sum_lanes(squares);
    if (inside && threadIdx.y == 0)
      for (int i = 0; i < kChannels; ++i) {
        partial[STATISTICS_COUNT * channels + i] = counts[0];
        partial[STATISTICS_MEAN * channels + i] = origin[i];
        partial[STATISTICS_MEAN_REST * channels + i] = sum[i] / counts[0];
        partial[STATISTICS_M2 * channels + i] = squares[i];
      }
  }
};

// Merges the block's lanes of the sums of dz and of dz*(y - mean), and writes the program's row of partial sums.
// `sums` is at the thread's first channel.
template <int kChannels>
__device__ __forceinline__ void store_sums(float* sums, int channels, bool inside, float (&sum_dz)[kChannels],
                                           float (&sum_dz_centred)[kChannels]) {
  sum_lanes(sum_dz);
  sum_lanes(sum_dz_centred);
  if (inside && threadIdx.y == 0)
    for (int i = 0; i < kChannels; ++i) {
      sums[SUM_DZ * channels + i] = sum_dz[i];
      sums[SUM_DZ_CENTRED * channels + i] = sum_dz_centred[i];
    }
}

}  // namespace mx::cuda
