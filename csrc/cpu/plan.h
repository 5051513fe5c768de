// Plans: chains of inference ops on weights that do not change, run in one call.
//
// For a single image the kernels of a network take microseconds each, and what happens between them counts: code and
// objects that the weights have pushed out of the cache since the last time, and fresh memory for every activation.
// So a plan holds the arguments of its kernels ready, all but the sizes that depend on the image, in memory of its own,
// and its activations take turns in two pieces of memory.
#pragma once

#include <string>
#include <vector>

#include "../bindings.h"

namespace mx::cpu {

// `tensors`, `settings` and `slopes` are the arguments of the inference ops after the activation (csrc/ops.h), in
// order; a weight that can be packed comes with its packed form, and the plan copies what it needs. The result is a
// handle: a tensor that owns the plan, known by where it lies and not by what it holds. A gate belongs to a plan whose
// first op is gated_pointwise_inference, a residual to what the last convolution gives.
Tensor make_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                 const std::vector<int64_t>& settings, const std::vector<double>& slopes);
Tensor run_plan(const Tensor& x, const Tensor& plan, const OptionalTensor& gate, const OptionalTensor& residual);

}  // namespace mx::cpu
