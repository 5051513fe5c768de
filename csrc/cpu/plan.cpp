#include "plan.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <variant>

#include "backend.h"
#include "fork_safe_mutex.h"

namespace mx::cpu {
namespace {

// The steps of a plan hold the arguments of their kernels, all but the image's memory and sizes.
struct ConvStep {
  Conv conv;
  ConvSettings settings;
  ForwardArgs args;
};
struct BlockStep {
  ConvSettings settings;
  BlockArgs args;
};
struct PoolStep {
  NormActArgs args;
};
using Step = std::variant<ConvStep, BlockStep, PoolStep>;

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
  bool gated;        // the first step, a pointwise convolution, has a gate
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

// Reads the steps' tensors and settings, in the order of the ops' arguments in csrc/ops.h.
class PlanBuilder {
 public:
  PlanBuilder(const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
              const std::vector<double>& slopes)
      : tensors_(tensors),
        settings_(settings),
        slopes_(slopes),
        plan_(new Plan{{}, weight_of(tensors).scalar_type(), Dtype::f32, 0, false, {}}),
        call_(weight_of(tensors)) {
    plan_->dtype = dtype_of<Backend>(weight_of(tensors), "weight");
  }

  void add(const std::string& op) {
    if (op == "depthwise_inference") return add_convolution(Conv::depthwise);
    if (op == "pointwise_inference") return add_convolution(Conv::pointwise);
    if (op == "dense_inference") return add_convolution(Conv::dense);
    if (op == "block_inference") return add_block();
    if (op == "gated_pointwise_inference") return add_convolution(Conv::pointwise, true);
    STD_TORCH_CHECK(op == "norm_act_forward", "ops: no step of a plan: ", op);
    add_pool();
  }

  std::shared_ptr<const Plan> finish() {
    STD_TORCH_CHECK(next_tensor_ == tensors_.size(), "tensors: more than the ops take");
    STD_TORCH_CHECK(next_setting_ == settings_.size(), "settings: more than the ops take");
    STD_TORCH_CHECK(next_slope_ == slopes_.size(), "slopes: more than the ops take");
    return std::move(plan_);
  }

 private:
  void add_convolution(Conv conv, bool gated = false) {
    STD_TORCH_CHECK(!gated || plan_->steps.empty(), "ops: expected the convolution with a gate as the first");
    plan_->gated |= gated;
    const Tensor& bn = tensor();
    const int64_t act = setting();
    const Tensor& weight = tensor();
    ConvStep step{conv, begin(conv, weight, gated), {}};
    step.args.dtype = plan_->dtype;
    step.args.g = sizeless(weight.size(0));
    step.args.output = norm_act(bn, act, weight.size(0));
    if (conv == Conv::pointwise) {
      const Tensor& packed = tensor();
      call_.check_packed(packed, plan_->dtype, channels_, weight.size(0), false);
      step.args.packed = copy(packed);
    } else {
      step.args.weight = copy(weight);
    }
    end(step, weight.size(0));
  }

  void add_block() {
    const Tensor& depthwise_bn = tensor();
    const int64_t depthwise_act = setting();
    const Tensor& depthwise_weight = tensor();
    BlockStep step{begin(Conv::depthwise, depthwise_weight), {}};
    const ConvSettings& s = step.settings;
    check_block(s.kernel, {s.left, s.right, s.top, s.bottom});
    step.args.dtype = plan_->dtype;
    const Tensor& pointwise_bn = tensor();
    const int64_t pointwise_act = setting();
    const Tensor &pointwise_weight = tensor(), &packed = tensor();
    call_.check_weight(Conv::pointwise, pointwise_weight, plan_->type, channels_);
    const int64_t c_out = pointwise_weight.size(0);
    step.args.g = sizeless(c_out);
    call_.check_packed(packed, plan_->dtype, channels_, c_out, true);
    step.args.depthwise =
        call_.check_norm_act(depthwise_bn, "bn", depthwise_act, "act", slope(), plan_->type, channels_);
    step.args.depthwise.bn = nullptr;  // packed, as both weights are; the tensor may go before the plan does
    step.args.pointwise = norm_act(pointwise_bn, pointwise_act, c_out);
    step.args.packed = copy(packed);
    end(step, c_out);
  }

  void add_pool() {
    const Tensor& bn = tensor();
    const int64_t act = setting();
    const bool pool = setting();
    STD_TORCH_CHECK(pool && channels_ > 0, "ops: expected pooling after a convolution");
    PoolStep step{};
    step.args.dtype = plan_->dtype;
    step.args.c = channels_;
    step.args.norm_act = norm_act(bn, act, channels_);
    step.args.pool = true;
    end(step, channels_);
  }

  // Every plan begins with a convolution, whose weight is the second tensor.
  static const Tensor& weight_of(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(tensors.size() >= 2, "tensors: too few for the ops");
    return tensors[1];
  }

  const Tensor& tensor() {
    STD_TORCH_CHECK(next_tensor_ < tensors_.size(), "tensors: too few for the ops");
    return tensors_[next_tensor_++];
  }

  int64_t setting() {
    STD_TORCH_CHECK(next_setting_ < settings_.size(), "settings: too few for the ops");
    return settings_[next_setting_++];
  }

  double slope() {
    STD_TORCH_CHECK(next_slope_ < slopes_.size(), "slopes: too few for the ops");
    return slopes_[next_slope_++];
  }

  // A copy of the plan's own: whoever holds the tensor may write to it, free it or give it another memory.
  const void* copy(const Tensor& dense) {
    const int64_t bytes = dense.numel() * int64_t(dense.element_size());
    const Tensor to = call_.empty({bytes}, ScalarType::Byte);
    memcpy(to.mutable_data_ptr(), data(dense), size_t(bytes));
    plan_->copies.push_back(to);
    return data(to);
  }

  NormAct norm_act(const Tensor& bn, int64_t act, int64_t channels) {
    NormAct checked = call_.check_norm_act(bn, "bn", act, "act", slope(), plan_->type, channels);
    checked.bn = copy(bn);
    return checked;
  }

  // A convolution, whose stride and padding come next, unless it has a gate and can only have one of each; the first
  // one tells the channels of the input.
  ConvSettings begin(Conv conv, const Tensor& weight, bool gated = false) {
    const int64_t stride = gated ? 1 : setting();
    std::vector<int64_t> padding;
    for (int side = 0; side < 4; ++side) padding.push_back(gated ? 0 : setting());
    if (plan_->steps.empty()) {
      STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions, got ", weight.dim());
      plan_->channels = channels_ = weight.size(conv == Conv::depthwise ? 0 : 1);
    }
    return check_settings(conv, call_.check_weight(conv, weight, plan_->type, channels_), stride, padding);
  }

  Geometry sizeless(int64_t c_out) const {
    Geometry g{};
    g.c_in = channels_;
    g.c_out = c_out;
    return g;
  }

  template <class AStep>
  void end(const AStep& step, int64_t channels) {
    plan_->steps.push_back(step);
    channels_ = channels;
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& settings_;
  const std::vector<double>& slopes_;
  std::unique_ptr<Plan> plan_;
  Call<Backend> call_;
  size_t next_tensor_ = 0, next_setting_ = 0, next_slope_ = 0;
  int64_t channels_ = 0;  // of what the next step reads
};

// What a call hands to a step besides its input: null where there is none.
struct Seam {
  const void *gate, *residual;
};

template <class AStep>
Geometry with_sizes(const AStep& step, const Images& x) {
  return conv_geometry(step.settings, x.n, x.h, x.w, step.args.g.c_in, step.args.g.c_out);
}

template <class AStep>
Images output_of(const AStep& step, const Images& x) {
  const Geometry g = with_sizes(step, x);
  return {g.n, g.c_out, g.out_h, g.out_w};
}
Images output_of(const PoolStep&, const Images& x) { return {x.n, x.c, 1, 1}; }
Images output_of(const Step& step, const Images& x) {
  return std::visit([&](const auto& each) { return output_of(each, x); }, step);
}

void run(const Backend& backend, ConvStep step, const Images& x, const Seam& seam, const void* from, void* to) {
  step.args.g = with_sizes(step, x);
  step.args.gate = seam.gate;
  step.args.residual = seam.residual;
  step.args.u = from;
  step.args.y = to;
  backend.forward(step.conv, step.args);
}

void run(const Backend& backend, BlockStep step, const Images& x, const Seam& seam, const void* from, void* to) {
  step.args.g = with_sizes(step, x);
  step.args.residual = seam.residual;
  step.args.x = from;
  step.args.y = to;
  backend.block_inference(step.args);
}

void run(const Backend& backend, PoolStep step, const Images& x, const Seam&, const void* from, void* to) {
  step.args.n = x.n;
  step.args.hw = x.h * x.w;
  step.args.y = from;
  step.args.out = to;
  backend.norm_act_forward(step.args);
}

class Memory {
 public:
  explicit Memory(size_t bytes) : data_(bytes ? take_memory(bytes) : nullptr) {
    STD_TORCH_CHECK(data_ || bytes == 0, "not enough memory for an activation of ", bytes, " bytes");
  }
  ~Memory() {
    if (data_) return_memory(data_);
  }
  Memory(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace

Tensor make_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                 const std::vector<int64_t>& settings, const std::vector<double>& slopes) {
  STD_TORCH_CHECK(!ops.empty(), "ops: expected at least one");
  PlanBuilder builder(tensors, settings, slopes);
  for (const std::string& op : ops) builder.add(op);
  return plans->add(builder.finish());
}

Tensor run_plan(const Tensor& x, const Tensor& handle, const OptionalTensor& gate, const OptionalTensor& residual) {
  const std::shared_ptr<const Plan> found = plans->at(handle);
  const Plan& plan = *found;
  const Call<Backend> call(x);
  call.check_activation(x, "x");
  call.check_type(x, "x", plan.type);
  const Images input{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(input.c == plan.channels, "x: expected ", plan.channels, " channels, got ", input.c);

  STD_TORCH_CHECK(bool(gate) == plan.gated, "gate: expected ", plan.gated ? "one" : "none");
  if (gate) call.check_activation_like(*gate, "gate", plan.type, {input.n, input.c, 1, 1});

  const size_t last = plan.steps.size() - 1, itemsize = x.element_size();
  size_t bytes[2] = {};
  Images images = input;
  for (size_t i = 0; i < last; ++i) {
    images = output_of(plan.steps[i], images);
    bytes[i % 2] = std::max(bytes[i % 2], size_t(images.numel()) * itemsize);
  }
  images = output_of(plan.steps[last], images);
  STD_TORCH_CHECK(!residual || !std::holds_alternative<PoolStep>(plan.steps[last]), "residual: expected none");
  if (residual) call.check_activation_like(*residual, "residual", plan.type, {images.n, images.c, images.h, images.w});
  Tensor y = call.empty_activation(images.n, images.c, images.h, images.w, plan.type);
  const Memory memory[2] = {Memory(bytes[0]), Memory(bytes[1])};

  images = input;
  const void* from = data(x);
  for (size_t i = 0; i <= last; ++i) {
    void* const to = i == last ? y.mutable_data_ptr() : memory[i % 2].data();
    const Seam seam{i == 0 ? data(gate) : nullptr, i == last ? data(residual) : nullptr};
    std::visit([&](const auto& step) { run(call.backend, step, images, seam, from, to); }, plan.steps[i]);
    images = output_of(plan.steps[i], images);
    from = to;
  }
  return y;
}

}  // namespace mx::cpu
