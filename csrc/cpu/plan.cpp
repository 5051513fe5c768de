#include "plan.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <unordered_map>

#include "fork_safe_mutex.h"
#include "plan_kernels.h"

namespace mx::cpu {
namespace {

// The plans that exist, by the address of their handle's only byte. What is written there means nothing, and a handle
// that was given other memory has let go of its plan.
class Plans {
 public:
  Tensor add(std::shared_ptr<const Plan> plan) {
    void* const address = new char();
    const Tensor handle = torch::stable::from_blob(
        address, {1}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte, drop);
    const std::lock_guard<ForkSafeMutex> lock(mutex_);
    plans_.emplace(address, std::move(plan));
    return handle;
  }

  // Shared, because another thread may take the handle's memory away while the plan runs.
  std::shared_ptr<const Plan> at(const Tensor& handle) {
    const void* const address = handle.const_data_ptr();
    const std::lock_guard<ForkSafeMutex> lock(mutex_);
    const auto found = plans_.find(address);
    STD_TORCH_CHECK(found != plans_.end(), "plan: expected what make_plan gave, got another tensor or a copy of it");
    return found->second;
  }

 private:
  static void drop(void* address);

  ForkSafeMutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<const Plan>> plans_;
};

// Made when the library is loaded (activation_memory.cpp), never destroyed: handles may outlive the end of main.
Plans* const plans = new Plans;

void Plans::drop(void* address) {
  std::shared_ptr<const Plan> plan;  // destroyed without the lock
  {
    const std::lock_guard<ForkSafeMutex> lock(plans->mutex_);
    const auto found = plans->plans_.find(address);
    if (found != plans->plans_.end()) {
      plan = std::move(found->second);
      plans->plans_.erase(found);
    }
  }
  delete static_cast<char*>(address);
}

// The sizes of all values, and whether the inputs are what the steps take.
std::vector<Images> sizes_of(const Plan& plan, const std::vector<Tensor>& inputs, const Call<Backend>& call) {
  std::vector<Images> sizes;
  for (const Tensor& x : inputs) {
    call.check_activation(x, "inputs");
    call.check_type(x, "inputs", plan.type);
    sizes.push_back({x.size(0), x.size(1), x.size(2), x.size(3)});
  }
  for (const Step& step : plan.steps) {
    const Images& x = sizes[step.input];
    const auto check = [&](int64_t value, const char* name, const Images& expected) {
      const Images& got = sizes[value];
      STD_TORCH_CHECK(got == expected, name, ": expected shape [", expected.n, ", ", expected.c, ", ", expected.h, ", ",
                      expected.w, "], got [", got.n, ", ", got.c, ", ", got.h, ", ", got.w, "]");
    };
    check(step.input, "inputs", input_of(step, x));
    const Images y = output_of(step, x);
    if (step.gate != kNone) check(step.gate, "gate", {x.n, x.c, 1, 1});
    if (step.residual != kNone) check(step.residual, "residual", y);
    sizes.push_back(y);
  }
  return sizes;
}

}  // namespace

Tensor make_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                 const std::vector<int64_t>& settings, const std::vector<double>& slopes, int64_t inputs,
                 const std::vector<int64_t>& sources, const std::vector<int64_t>& outputs) {
  return plans->add(build_plan(ops, tensors, settings, slopes, inputs, sources, outputs));
}

std::vector<Tensor> run_plan(const std::vector<Tensor>& inputs, const Tensor& handle) {
  const std::shared_ptr<const Plan> found = plans->at(handle);
  const Plan& plan = *found;
  STD_TORCH_CHECK(int64_t(inputs.size()) == plan.inputs, "inputs: expected ", plan.inputs, ", got ", inputs.size());
  const Call<Backend> call(inputs[0]);
  const std::vector<Images> sizes = sizes_of(plan, inputs, call);

  const size_t itemsize = inputs[0].element_size(), values = sizes.size();
  std::vector<size_t> bytes(plan.piece_count, 0);
  for (size_t value = 0; value < values; ++value) {
    const int64_t piece = plan.pieces[value];
    if (piece != kNone) bytes[piece] = std::max(bytes[piece], size_t(sizes[value].numel()) * itemsize);
  }
  std::vector<void*> memory(values, nullptr);
  std::vector<Tensor> outputs;
  for (const int64_t value : plan.outputs) {
    const Images& y = sizes[value];
    outputs.push_back(call.empty_activation(y.n, y.c, y.h, y.w, plan.type));
    memory[value] = outputs.back().mutable_data_ptr();
  }
  const std::deque<Memory> pieces(bytes.begin(), bytes.end());
  for (size_t value = 0; value < values; ++value)
    if (plan.pieces[value] != kNone) memory[value] = pieces[plan.pieces[value]].data();

  const auto read = [&](int64_t value) -> const void* {
    return value == kNone ? nullptr : value < plan.inputs ? data(inputs[value]) : memory[value];
  };
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    const Memories memories{read(step.input), read(step.gate), read(step.residual), memory[plan.inputs + i]};
    run(step, call.backend, sizes[step.input], memories);
  }
  return outputs;
}

}  // namespace mx::cpu
