// The small kernels behind the large ones: they merge partial results, in a fixed order, into per-channel vectors.
//
// A large kernel leaves one row of partial results a program. Merging is a kernel of its own because programs of one
// launch cannot wait for each other; the order of the rows, and so every bit of the result, is that of the programs.
#pragma once
#include "kernels.h"

namespace mx::cuda {

// Rows of a program's partial statistics, float32 [programs][STATISTICS_ROWS][channels]. The mean is MEAN + MEAN_REST:
// in one float32 a large mean would round off what the variance needs.
enum StatisticsRow { STATISTICS_COUNT, STATISTICS_MEAN, STATISTICS_MEAN_REST, STATISTICS_M2, STATISTICS_ROWS };
// Rows of a program's partial sums, float32 [programs][SUM_ROWS][channels]: of h, and of h*(u - mean).
enum SumRow { SUM_H, SUM_H_CENTRED, SUM_ROWS };

// bn [BN_ROWS][channels] from partial statistics; no program: mean 0, variance 0. gamma null: 1; beta null: 0.
cudaError_t finish_statistics(const float* partial, int programs, int channels, const void* gamma, const void* beta,
                              double eps, void* bn, const Launch& launch);

// grad_bn [GRAD_ROWS][channels] from partial sums of `count` values a channel, and grad_weight [elements] from its
// partial sums [weight_programs][elements], in one launch; either may be null: not wanted.
cudaError_t finish_gradients(const float* sums, int programs, int channels, const void* bn, bool batch_stats,
                             int64_t count, void* grad_bn, const float* weight_partial, int weight_programs,
                             int64_t elements, void* grad_weight, const Launch& launch);

}  // namespace mx::cuda
