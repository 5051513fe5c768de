// Plans: inference ops on weights that do not change, run in one call: a chain, or a network with its residuals and
// gates.
//
// For a single image the kernels of a network take microseconds each, and what happens between them counts: code and
// objects that the weights have pushed out of the cache since the last time, and fresh memory for every activation.
// So a plan holds the arguments of its kernels ready, all but the sizes that depend on the image, in memory of its own,
// and its activations take turns in as few pieces of memory as there can be.
#pragma once

#include <string>
#include <vector>

#include "../bindings.h"

namespace mx::cpu {

// `tensors`, `settings` and `slopes` are the arguments of the inference ops after the activation (csrc/ops.h), in
// order; a weight that can be packed comes with its packed form, and the plan copies what it needs. Besides these ops
// there are "sigmoid" and "hardsigmoid", of what a gate is made of. Values are numbered, the `inputs` of the plan first
// and then what the ops give: `sources` has of each op its input, gate and residual, -1 where there is none, `outputs`
// what is returned. The result is a handle: a tensor that owns the plan, known by where it lies and not by what it
// holds.
Tensor make_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                 const std::vector<int64_t>& settings, const std::vector<double>& slopes, int64_t inputs,
                 const std::vector<int64_t>& sources, const std::vector<int64_t>& outputs);
std::vector<Tensor> run_plan(const std::vector<Tensor>& inputs, const Tensor& plan);

}  // namespace mx::cpu
