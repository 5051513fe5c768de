#include "plan.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "backend.h"
#include "fork_safe_mutex.h"

namespace mx::cpu {
namespace {

enum class Op { stem, depthwise, pointwise, block, pool };
constexpr int64_t kOps = 5, kNumbersAStep = 4;

struct Step {
  Op op;
  int64_t channels;  // of the output
  int stride, padding;
  ForwardArgs conv{};  // of a stem, depthwise or pointwise convolution
  BlockArgs block{};
  NormaliseArgs pool{};
};

// An activation, or the place for one.
struct Images {
  int64_t n, c, h, w;
  int64_t numel() const { return n * c * h * w; }
};

struct Plan {
  std::vector<Tensor> copies;  // of what the steps read
  ScalarType type;
  Dtype dtype;
  int64_t channels;  // of the input
  std::vector<Step> steps;
};

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

// Made when the library is loaded (blocks.cpp), never destroyed: handles may outlive the end of main.
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

class PlanBuilder {
 public:
  explicit PlanBuilder(const std::vector<Tensor>& tensors)
      : tensors_(tensors),
        plan_(new Plan{{}, weight_of(tensors).scalar_type(), Dtype::f32, 0, {}}),
        call_(weight_of(tensors)) {
    plan_->dtype = dtype_of<Backend>(weight_of(tensors), "weight");
  }

  void add(Op op, int64_t stride, int64_t padding, bool relu) {
    const ScalarType acc = acc_type(plan_->type);
    Step step{op, channels_, int(stride), int(padding)};
    if (op == Op::pool) {
      const Tensor& bn = take();
      call_.check_dense(bn, "bn_y", acc, {BN_ROWS, channels_});
      step.pool.dtype = plan_->dtype;
      step.pool.c = channels_;
      step.pool.bn_y = copy(bn);
      step.pool.relu = step.pool.pool = true;
    } else if (op == Op::block) {
      const Tensor &depthwise_bn = take(), &depthwise_weight = take();
      const Tensor &pointwise_bn = take(), &pointwise_weight = take(), &packed = take();
      begin(Conv::depthwise, depthwise_weight, stride, 1);
      step.padding = 1;
      call_.check_dense(depthwise_bn, "depthwise_bn", acc, {BN_ROWS, channels_});
      call_.check_weight(Conv::pointwise, pointwise_weight, plan_->type, channels_);
      step.channels = pointwise_weight.size(0);
      call_.check_dense(pointwise_bn, "pointwise_bn", acc, {BN_ROWS, step.channels});
      call_.check_packed(packed, plan_->dtype, channels_, step.channels, true);
      step.block.dtype = plan_->dtype;
      step.block.pointwise_bn = copy(pointwise_bn);
      step.block.packed = copy(packed);  // with all the rest
    } else {
      const Tensor &bn = take(), &weight = take();
      begin(conv_of(op), weight, stride, padding);
      step.channels = weight.size(0);
      call_.check_dense(bn, "bn_y", acc, {BN_ROWS, step.channels});
      if (op == Op::pointwise) {
        const Tensor& packed = take();
        call_.check_packed(packed, plan_->dtype, channels_, step.channels, false);
        step.conv.packed = copy(packed);
      } else {
        step.conv.weight = copy(weight);
      }
      step.conv.dtype = plan_->dtype;
      step.conv.epilogue_bn = copy(bn);
      step.conv.epilogue_relu = relu;
    }
    channels_ = step.channels;
    plan_->steps.push_back(step);
  }

  static Conv conv_of(Op op) {
    return op == Op::stem ? Conv::stem : op == Op::pointwise ? Conv::pointwise : Conv::depthwise;
  }

  std::shared_ptr<const Plan> finish() {
    STD_TORCH_CHECK(next_ == tensors_.size(), "tensors: more than the program takes");
    return std::move(plan_);
  }

 private:
  // Every program begins with a convolution, whose weight is the second tensor.
  static const Tensor& weight_of(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(tensors.size() >= 2, "tensors: too few for the program");
    return tensors[1];
  }

  const Tensor& take() {
    STD_TORCH_CHECK(next_ < tensors_.size(), "tensors: too few for the program");
    return tensors_[next_++];
  }

  // Memory of the plan's own: whoever holds the tensor may write to it, free it or give it another.
  const void* copy(const Tensor& dense) {
    const int64_t bytes = dense.numel() * int64_t(dense.element_size());
    const Tensor to = call_.empty({bytes}, ScalarType::Byte);
    memcpy(to.mutable_data_ptr(), data(dense), size_t(bytes));
    plan_->copies.push_back(to);
    return data(to);
  }

  // A convolution; the first one tells the channels of the input.
  void begin(Conv conv, const Tensor& weight, int64_t stride, int64_t padding) {
    check_settings(stride, padding);
    if (plan_->steps.empty()) {
      STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions, got ", weight.dim());
      plan_->channels = channels_ = weight.size(conv == Conv::depthwise ? 0 : 1);
    }
    call_.check_weight(conv, weight, plan_->type, channels_);
  }

  const std::vector<Tensor>& tensors_;
  std::unique_ptr<Plan> plan_;
  Call<Backend> call_;
  size_t next_ = 0;
  int64_t channels_ = 0;
};

Geometry geometry_of(const Step& step, const Images& x) {
  return conv_geometry(PlanBuilder::conv_of(step.op), x.n, x.h, x.w, x.c, step.channels, step.stride, step.padding);
}

Images output_of(const Step& step, const Images& x) {
  if (step.op == Op::pool) return {x.n, x.c, 1, 1};
  const Geometry g = geometry_of(step, x);
  return {g.n, g.c_out, g.out_h, g.out_w};
}

void run(const Backend& backend, Step step, const Images& x, const void* from, void* to) {
  if (step.op == Op::pool) {
    step.pool.n = x.n;
    step.pool.hw = x.h * x.w;
    step.pool.y = from;
    step.pool.out = to;
    return backend.normalise_forward(step.pool);
  }
  if (step.op == Op::block) {
    step.block.g = geometry_of(step, x);
    step.block.x = from;
    step.block.y = to;
    return backend.block_inference(step.block);
  }
  step.conv.g = geometry_of(step, x);
  step.conv.u = from;
  step.conv.y = to;
  if (step.op == Op::stem) return backend.stem_forward(step.conv);
  if (step.op == Op::pointwise) return backend.pointwise_forward(step.conv);
  backend.depthwise_forward(step.conv);
}

class Block {
 public:
  explicit Block(size_t bytes) : data_(bytes ? take_block(bytes) : nullptr) {
    STD_TORCH_CHECK(data_ || bytes == 0, "not enough memory for an activation of ", bytes, " bytes");
  }
  ~Block() {
    if (data_) return_block(data_);
  }
  Block(const Block&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace

Tensor make_plan(const std::vector<Tensor>& tensors, const std::vector<int64_t>& program) {
  STD_TORCH_CHECK(!program.empty() && program.size() % kNumbersAStep == 0, "program: expected four numbers a step");
  PlanBuilder builder(tensors);
  for (size_t i = 0; i < program.size(); i += kNumbersAStep) {
    STD_TORCH_CHECK(program[i] >= 0 && program[i] < (i == 0 ? kOps - 1 : kOps), "program: no op ", program[i]);
    builder.add(Op(program[i]), program[i + 1], program[i + 2], program[i + 3]);
  }
  return plans->add(builder.finish());
}

Tensor run_plan(const Tensor& x, const Tensor& handle) {
  const std::shared_ptr<const Plan> found = plans->at(handle);
  const Plan& plan = *found;
  const Call<Backend> call(x);
  call.check_activation(x, "x");
  call.check_type(x, "x", plan.type);
  const Images input{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(input.c == plan.channels, "x: expected ", plan.channels, " channels, got ", input.c);

  const size_t last = plan.steps.size() - 1, itemsize = x.element_size();
  size_t bytes[2] = {};
  Images images = input;
  for (size_t i = 0; i < last; ++i) {
    images = output_of(plan.steps[i], images);
    bytes[i % 2] = std::max(bytes[i % 2], size_t(images.numel()) * itemsize);
  }
  images = output_of(plan.steps[last], images);
  Tensor y = call.empty_activation(images.n, images.c, images.h, images.w, plan.type);
  const Block blocks[2] = {Block(bytes[0]), Block(bytes[1])};

  images = input;
  const void* from = data(x);
  for (size_t i = 0; i <= last; ++i) {
    void* const to = i == last ? y.mutable_data_ptr() : blocks[i % 2].data();
    run(call.backend, plan.steps[i], images, from, to);
    images = output_of(plan.steps[i], images);
    from = to;
  }
  return y;
}

}  // namespace mx::cpu
