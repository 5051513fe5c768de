// The small kernels after the large ones: they merge partial results, in a fixed order, into per-channel vectors.
//
// Each program of a large kernel leaves one row of partial results. Merging is a kernel of its own because programs of
// one launch cannot wait for each other; the order of the rows, and so every bit of the result, is that of the
// programs.
#pragma once
#include "device.h"
#include "kernels.h"

namespace mx::cuda {

// Rows of a program's partial statistics, float32 [programs][STATISTICS_ROWS][channels]. The mean is MEAN + MEAN_REST:
// in one float32 a large mean would round off what the variance needs.
enum StatisticsRow { STATISTICS_COUNT, STATISTICS_MEAN, STATISTICS_MEAN_REST, STATISTICS_M2, STATISTICS_ROWS };
// Rows of a program's partial sums, float32 [programs][SUM_ROWS][channels]: of dz, and of dz*(y - mean).
enum SumRow { SUM_DZ, SUM_DZ_CENTRED, SUM_ROWS };

// Sums of squares about another point: squares + change, where they did not overflow. The change is as large as they
// are: Inf - Inf would be a NaN, or with a fused multiply-add Inf.
__device__ __forceinline__ float moved_squares(float squares, float change) {
  return squares - squares == 0.0f ? squares + change : squares;
}

// The normalisation statistics.bn from the partial statistics of `programs` programs; of none: mean 0, variance 0.
cudaError_t merge_statistics(const float* partial, int programs, int channels, const Statistics& statistics,
                             const Launch& launch);

// Partial results, a row per program.
struct Partial {
  float* data = nullptr;
  int programs = 0;
};

// Partial sums of dz and dz*(y - mean), of `count` values per channel, and the grad_bn to be made of them; null: not
// wanted.
struct SumsToMerge {
  Partial sums;
  int channels = 0;
  const void* bn = nullptr;
  bool batch_stats = false;
  int64_t count = 0;
  void* grad_bn = nullptr;
};

// Partial sums [programs][elements] of a weight's gradient; grad_weight null: not wanted.
struct WeightToMerge {
  Partial sums;
  int64_t elements = 0;
  void* grad_weight = nullptr;
};

// Both in one launch.
cudaError_t merge_gradients(const SumsToMerge& of_bn, const WeightToMerge& of_weight, const Launch& launch);

// Sums over each image's pixels, [images][channels], from partial sums over the pixels that it has in parts of
// `part_rows` rows of all images: those of an image in a part are row part + image of `partial`.
cudaError_t merge_images(const float* partial, int part_rows, int64_t images, int64_t pixels, int channels, float* sums,
                         const Launch& launch);

}  // namespace mx::cuda
