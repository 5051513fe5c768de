// Merging of partial results (merge.h), and the normalisation that running statistics make.
#include "merge.h"
#include "packs.h"

namespace mx::cuda {
namespace {

// A block has kColumns neighbouring columns, whose rows are dealt to kLanes threads each: loads are of whole cache
// lines, and many of them are under way at once.
constexpr int kColumns = 32, kLanes = 16;

int blocks_for(int64_t columns) { return int((columns + kColumns - 1) / kColumns); }

// The lanes' values of this column added up, in the lanes' order; every lane gets the sum.
__device__ float sum_lanes(float value) {
  float* shared = shared_memory<float>();
  shared[threadIdx.y * kColumns + threadIdx.x] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += shared[lane * kColumns + threadIdx.x];
  __syncthreads();
  return sum;
}

// The sum over rows of p[row*stride], p being at the thread's column.
__device__ float sum_rows(const float* p, int rows, int64_t stride, bool inside) {
  float sum = 0.0f;
  if (inside)
    for (int row = threadIdx.y; row < rows; row += kLanes) sum += p[row * stride];
  return sum_lanes(sum);
}

__device__ void store_bn(float* bn, int channels, int c, float mean, float var, float gamma, float beta, float eps) {
  const float rstd = 1.0f / sqrtf(var + eps);
  bn[BN_MEAN * channels + c] = mean;
  bn[BN_SCALE * channels + c] = gamma * rstd;
  bn[BN_SHIFT * channels + c] = beta;
  bn[BN_RSTD * channels + c] = rstd;
  bn[BN_VAR * channels + c] = var;
}

__global__ void __launch_bounds__(kColumns* kLanes)
    statistics_kernel(const float* partial, int programs, int channels, const float* gamma, const float* beta,
                      float eps, float* bn) {
  const int c = blockIdx.x * kColumns + threadIdx.x;
  const bool inside = c < channels;
  const int64_t stride = int64_t(STATISTICS_ROWS) * channels;
  partial += c;
  const float* counts = partial + int64_t(STATISTICS_COUNT) * channels;
  const float* means = partial + int64_t(STATISTICS_MEAN) * channels;
  const float* rests = partial + int64_t(STATISTICS_MEAN_REST) * channels;
  const float* m2s = partial + int64_t(STATISTICS_M2) * channels;

  // Means are added up as differences from the first one: a large mean costs no precision.
  const float origin = inside && programs > 0 ? means[0] : 0.0f;
  float total = 0.0f;
  if (inside)
    for (int p = threadIdx.y; p < programs; p += kLanes)
      total += counts[p * stride] * (means[p * stride] - origin + rests[p * stride]);
  total = sum_lanes(total);
  float count = sum_rows(counts, programs, stride, inside);
  if (count == 0.0f) count = 1.0f;
  const float offset = total / count;
  float m2 = 0.0f;
  if (inside)
    for (int p = threadIdx.y; p < programs; p += kLanes) {
      const float difference = means[p * stride] - origin + rests[p * stride] - offset;
      m2 += m2s[p * stride] + counts[p * stride] * difference * difference;
    }
  m2 = sum_lanes(m2);
  if (inside && threadIdx.y == 0) {
    float var = m2 / count;
    if (var < 0.0f) var = 0.0f;  // by rounding, where all values are the same
    store_bn(bn, channels, c, origin + offset, var, gamma ? gamma[c] : 1.0f, beta ? beta[c] : 0.0f, eps);
  }
}

__global__ void __launch_bounds__(kColumns* kLanes)
    gradients_kernel(const float* sums, int programs, int channels, const float* bn, float inverse_count,
                     float* grad_bn, const float* weight_partial, int weight_programs, int64_t elements,
                     float* grad_weight, int channel_blocks) {
  if (int(blockIdx.x) >= channel_blocks) {
    const int64_t e = int64_t(blockIdx.x - channel_blocks) * kColumns + threadIdx.x;
    const float sum = sum_rows(weight_partial + e, weight_programs, elements, e < elements);
    if (e < elements && threadIdx.y == 0) grad_weight[e] = sum;
    return;
  }
  const int c = blockIdx.x * kColumns + threadIdx.x;
  const bool inside = c < channels;
  const int64_t stride = int64_t(SUM_ROWS) * channels;
  const float sum_dz = sum_rows(sums + int64_t(SUM_DZ) * channels + c, programs, stride, inside);
  const float sum_dz_centred = sum_rows(sums + int64_t(SUM_DZ_CENTRED) * channels + c, programs, stride, inside);
  if (!inside || threadIdx.y != 0) return;
  const float scale = bn[BN_SCALE * channels + c], rstd = bn[BN_RSTD * channels + c];
  const float grad_gamma = rstd * sum_dz_centred;
  // Without batch statistics both are 0 even where the sums are not finite.
  const bool batch_stats = inverse_count > 0.0f;
  grad_bn[GRAD_DZ_COEFFICIENT * channels + c] = scale;
  grad_bn[GRAD_Y_COEFFICIENT * channels + c] = batch_stats ? -scale * rstd * grad_gamma * inverse_count : 0.0f;
  grad_bn[GRAD_MEAN * channels + c] = bn[BN_MEAN * channels + c];
  grad_bn[GRAD_CONSTANT * channels + c] = batch_stats ? -scale * sum_dz * inverse_count : 0.0f;
  grad_bn[GRAD_GAMMA * channels + c] = grad_gamma;
  grad_bn[GRAD_BETA * channels + c] = sum_dz;
}

__global__ void __launch_bounds__(kColumns* kLanes)
    images_kernel(const float* partial, int part_rows, int64_t pixels, int channels, int channel_blocks, float* sums) {
  const int64_t image = blockIdx.x / channel_blocks;
  const int c = int(blockIdx.x % channel_blocks) * kColumns + threadIdx.x;
  const int64_t first = image * pixels / part_rows, end = ((image + 1) * pixels + part_rows - 1) / part_rows;
  const float* const mine = partial + (first + image) * channels + c;
  const float sum = sum_rows(mine, int(end - first), channels, c < channels);
  if (c < channels && threadIdx.y == 0) sums[image * channels + c] = sum;
}

__device__ float element(const VectorArg& vector, int i, float otherwise) {
  if (vector.data == nullptr) return otherwise;
  if (vector.dtype == Dtype::f32) return static_cast<const float*>(vector.data)[i];
  if (vector.dtype == Dtype::f16) return to_float(static_cast<const half*>(vector.data)[i]);
  return to_float(static_cast<const bfloat16*>(vector.data)[i]);
}

__global__ void running_kernel(RunningArgs args) {
  const int channels = int(args.c), c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  // The convolutions leave their bias out, so it comes off the mean.
  const float mean = element(args.running_mean, c, 0.0f) - element(args.conv_bias, c, 0.0f);
  store_bn(static_cast<float*>(args.bn), channels, c, mean, element(args.running_var, c, 1.0f),
           element(args.gamma, c, 1.0f), element(args.beta, c, 0.0f), float(args.eps));
}

constexpr size_t kShared = kColumns * kLanes * sizeof(float);

}  // namespace

cudaError_t merge_statistics(const float* partial, int programs, int channels, const Statistics& statistics,
                             const Launch& on) {
  return launch(statistics_kernel, blocks_for(channels), dim3(kColumns, kLanes), kShared, on.stream, partial, programs,
                channels, static_cast<const float*>(statistics.gamma), static_cast<const float*>(statistics.beta),
                float(statistics.eps), static_cast<float*>(statistics.bn));
}

cudaError_t merge_gradients(const SumsToMerge& of_bn, const WeightToMerge& of_weight, const Launch& on) {
  const int channel_blocks = of_bn.grad_bn ? blocks_for(of_bn.channels) : 0;
  const int blocks = channel_blocks + (of_weight.grad_weight ? blocks_for(of_weight.elements) : 0);
  if (blocks == 0) return cudaSuccess;
  const float inverse_count = of_bn.batch_stats ? 1.0f / float(of_bn.count > 0 ? of_bn.count : 1) : 0.0f;
  return launch(gradients_kernel, blocks, dim3(kColumns, kLanes), kShared, on.stream, of_bn.sums.data,
                of_bn.sums.programs, of_bn.channels, static_cast<const float*>(of_bn.bn), inverse_count,
                static_cast<float*>(of_bn.grad_bn), of_weight.sums.data, of_weight.sums.programs, of_weight.elements,
                static_cast<float*>(of_weight.grad_weight), channel_blocks);
}

cudaError_t merge_images(const float* partial, int part_rows, int64_t images, int64_t pixels, int channels, float* sums,
                         const Launch& on) {
  if (images == 0) return cudaSuccess;
  const int channel_blocks = blocks_for(channels);
  return launch(images_kernel, dim3(unsigned(images * channel_blocks)), dim3(kColumns, kLanes), kShared, on.stream,
                partial, part_rows, pixels, channels, channel_blocks, sums);
}

cudaError_t bn_from_running(const RunningArgs& args, const Launch& on) {
  const VectorArg vectors[] = {args.running_mean, args.running_var, args.gamma, args.beta, args.conv_bias};
  for (const VectorArg& v : vectors)
    if (v.data && v.dtype == Dtype::f64) return cudaErrorInvalidValue;
  if (args.c == 0) return cudaSuccess;
  constexpr int kThreads = 128;
  return launch(running_kernel, int((args.c + kThreads - 1) / kThreads), kThreads, 0, on.stream, args);
}

}  // namespace mx::cuda
