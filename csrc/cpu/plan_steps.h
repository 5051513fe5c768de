// What a plan is made of.
#pragma once

#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "backend.h"

namespace mx::cpu {

// The kernels of a plan's steps with their arguments, all but the image's memory and sizes.
struct ConvKernel {
  Conv conv;
  ConvSettings settings;
  ForwardArgs args;
};
struct BlockKernel {
  ConvSettings settings;
  BlockArgs args;
};
using Convolution = std::variant<ConvKernel, BlockKernel>;

// Convolutions of which each is all that reads what the one before gives: a pointwise one, or none, one with taps, and
// a pointwise one, or none (an inverted residual, arXiv:1801.04381, has all three). A batch goes through them band by
// band: some rows of an image, or some images, so that what is between them stays in the cache.
struct BandsKernel {
  Dtype dtype;
  std::vector<Convolution> convolutions;
};
struct PoolKernel {
  NormActArgs args;
};
struct GateKernel {  // what squeeze-excite makes a gate with: a factor for each image and channel
  Dtype dtype;
  bool hard;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Values are numbered: the plan's inputs, then what the steps give, in order.
constexpr int64_t kNone = -1;

struct Step {
  // None: a later one has taken it over.
  std::variant<std::monostate, ConvKernel, BlockKernel, BandsKernel, PoolKernel, GateKernel> kernel;
  int64_t input, gate, residual;
  int64_t channels;  // of what it gives
};

// An activation, or the place for one.
struct Images {
  int64_t n, c, h, w;
  int64_t numel() const { return n * c * h * w; }
  bool operator==(const Images& o) const { return n == o.n && c == o.c && h == o.h && w == o.w; }
};

struct Plan {
  std::vector<Tensor> copies;  // of what the steps read
  ScalarType type;
  Dtype dtype;
  int64_t inputs;
  std::vector<Step> steps;
  std::vector<int64_t> outputs;  // values
  // For each value the piece of memory that it lies in, none where it is an input or output, or never whole. A piece
  // holds one value after the other.
  std::vector<int64_t> pieces;
  int64_t piece_count = 0;
};

// As make_plan in plan.h.
std::shared_ptr<const Plan> build_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                                       const std::vector<int64_t>& settings, const std::vector<double>& slopes,
                                       int64_t inputs, const std::vector<int64_t>& sources,
                                       const std::vector<int64_t>& outputs);

}  // namespace mx::cpu
