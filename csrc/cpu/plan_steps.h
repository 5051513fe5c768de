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
struct PoolKernel {
  NormActArgs args;
};
struct GateKernel {  // what squeeze-excite makes a gate with: a factor for each image and channel
  Dtype dtype;
  bool hard;
};

// Values are numbered: the plan's inputs, then what the steps give, in order.
constexpr int64_t kNone = -1;

struct Step {
  std::variant<ConvKernel, BlockKernel, PoolKernel, GateKernel> kernel;
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
  // For each value the piece of memory that it lies in, none where it is an input or output. A piece holds one value
  // after the other.
  std::vector<int64_t> pieces;
  int64_t piece_count = 0;
};

// As make_plan in plan.h.
std::shared_ptr<const Plan> build_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                                       const std::vector<int64_t>& settings, const std::vector<double>& slopes,
                                       int64_t inputs, const std::vector<int64_t>& sources,
                                       const std::vector<int64_t>& outputs);

}  // namespace mx::cpu
