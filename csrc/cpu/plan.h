// Plans: chains of inference ops on weights that do not change, run in one call.
//
// For a single image the kernels of a network take microseconds each, and what happens between them counts: code and
// objects that the weights have pushed out of the cache since the last time, and fresh memory for every activation.
// So a plan holds the arguments of its kernels ready, all but the sizes that depend on the image, in memory of its own,
// and its activations take turns in two blocks of memory.
#pragma once

#include <vector>

#include "../bindings.h"

namespace mx::cpu {

// `program` has four numbers a step: which op (plan.cpp), and its stride, padding and relu (1, 0, 0 where it has none);
// `tensors` are what the ops take behind the activation, in order, and the plan copies what it needs of them. The
// result is a handle: a tensor that owns the plan, known by where it lies and not by what it holds.
Tensor make_plan(const std::vector<Tensor>& tensors, const std::vector<int64_t>& program);
Tensor run_plan(const Tensor& x, const Tensor& plan);

}  // namespace mx::cpu
