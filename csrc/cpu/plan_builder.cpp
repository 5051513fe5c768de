// Makes plans of ops, tensors and settings, and checks them.
#include <string.h>

#include <algorithm>

#include "plan_steps.h"

namespace mx::cpu {
namespace {

// The weights that run band by band: a quarter of an L2 cache, beside which there is what is between them.
constexpr int64_t kWeightsInCache = 512 << 10;

// Reads the steps' tensors and settings, in the order of the ops' arguments in csrc/ops.h.
class PlanBuilder {
 public:
  PlanBuilder(const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
              const std::vector<double>& slopes, int64_t inputs)
      : tensors_(tensors),
        settings_(settings),
        slopes_(slopes),
        plan_(new Plan{{}, weight_of(tensors).scalar_type(), Dtype::f32, inputs, {}, {}, {}}),
        call_(weight_of(tensors)),
        channels_(inputs, 0) {
    plan_->dtype = dtype_of<Backend>(weight_of(tensors), "weight");
  }

  void add(const std::string& op, int64_t input, int64_t gate, int64_t residual) {
    check_value(input, "input");
    if (gate != kNone) check_value(gate, "gate");
    if (residual != kNone) check_value(residual, "residual");
    const bool gated = op == "gated_pointwise_inference";
    STD_TORCH_CHECK(gated == (gate != kNone), "gate: expected ", gated ? "one" : "none", " of ", op);
    step_ = {PoolKernel{}, input, gate, residual, 0};
    if (op == "depthwise_inference")
      add_convolution(Conv::depthwise);
    else if (op == "pointwise_inference" || gated)
      add_convolution(Conv::pointwise);
    else if (op == "dense_inference")
      add_convolution(Conv::dense);
    else if (op == "block_inference")
      add_block();
    else if (op == "norm_act_forward")
      add_pool();
    else if (op == "sigmoid" || op == "hardsigmoid")
      add_gate(op == "hardsigmoid");
    else
      STD_TORCH_CHECK(false, "ops: no step of a plan: ", op);
    if (residual != kNone) check_channels(residual, step_.channels);
    channels_.push_back(step_.channels);
    plan_->steps.push_back(step_);
  }

  std::shared_ptr<const Plan> finish(const std::vector<int64_t>& outputs) {
    STD_TORCH_CHECK(next_tensor_ == tensors_.size(), "tensors: more than the ops take");
    STD_TORCH_CHECK(next_setting_ == settings_.size(), "settings: more than the ops take");
    STD_TORCH_CHECK(next_slope_ == slopes_.size(), "slopes: more than the ops take");
    STD_TORCH_CHECK(!outputs.empty(), "outputs: expected at least one");
    for (const int64_t output : outputs) {
      check_value(output, "outputs");
      STD_TORCH_CHECK(output >= plan_->inputs, "outputs: expected what a step gives, got an input");
    }
    plan_->outputs = outputs;
    join_convolutions();
    share_memory();
    return std::move(plan_);
  }

 private:
  void add_convolution(Conv conv) {
    const Tensor& bn = tensor();
    const int64_t act = setting();
    const Tensor& weight = tensor();
    ConvKernel kernel{conv, begin(conv, weight), {}};
    kernel.args.dtype = plan_->dtype;
    kernel.args.g = sizeless(weight.size(0));
    kernel.args.output = norm_act(bn, act, weight.size(0));
    if (conv == Conv::pointwise) {
      const Tensor& packed = tensor();
      call_.check_packed(packed, plan_->dtype, channels_[step_.input], weight.size(0), false);
      kernel.args.packed = copy(packed);
    } else if (conv == Conv::depthwise) {
      kernel.args.packed = packed_depthwise(weight);
    } else {
      kernel.args.weight = copy(weight);
    }
    if (step_.gate != kNone) check_channels(step_.gate, channels_[step_.input]);
    end(kernel, weight.size(0));
  }

  void add_block() {
    const Tensor& depthwise_bn = tensor();
    const int64_t depthwise_act = setting();
    const Tensor& depthwise_weight = tensor();
    BlockKernel kernel{begin(Conv::depthwise, depthwise_weight), {}};
    const int64_t channels = channels_[step_.input];
    const ConvSettings& s = kernel.settings;
    check_block(s.kernel, {s.left, s.right, s.top, s.bottom});
    kernel.args.dtype = plan_->dtype;
    const Tensor& pointwise_bn = tensor();
    const int64_t pointwise_act = setting();
    const Tensor &pointwise_weight = tensor(), &packed = tensor();
    call_.check_weight(Conv::pointwise, pointwise_weight, plan_->type, channels);
    const int64_t c_out = pointwise_weight.size(0);
    kernel.args.g = sizeless(c_out);
    call_.check_packed(packed, plan_->dtype, channels, c_out, true);
    kernel.args.depthwise =
        call_.check_norm_act(depthwise_bn, "bn", depthwise_act, "act", slope(), plan_->type, channels);
    kernel.args.depthwise.bn = nullptr;  // packed, as both weights are; the tensor may go before the plan does
    kernel.args.pointwise = norm_act(pointwise_bn, pointwise_act, c_out);
    kernel.args.packed = copy(packed);
    end(kernel, c_out);
  }

  void add_pool() {
    const Tensor& bn = tensor();
    const int64_t act = setting(), channels = channels_[step_.input];
    const bool pool = setting();
    STD_TORCH_CHECK(pool && channels > 0, "ops: expected pooling after a convolution");
    PoolKernel kernel{};
    kernel.args.dtype = plan_->dtype;
    kernel.args.c = channels;
    kernel.args.norm_act = norm_act(bn, act, channels);
    kernel.args.pool = true;
    check_no_residual();
    end(kernel, channels);
  }

  void add_gate(bool hard) {
    const int64_t channels = channels_[step_.input];
    STD_TORCH_CHECK(channels > 0, "ops: expected a gate after a convolution");
    check_no_residual();
    end(GateKernel{plan_->dtype, hard}, channels);
  }

  void check_no_residual() const { STD_TORCH_CHECK(step_.residual == kNone, "residual: expected none"); }

  // Every plan begins with a convolution, whose weight is the second tensor.
  static const Tensor& weight_of(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(tensors.size() >= 2, "tensors: too few for the ops");
    return tensors[1];
  }

  void check_value(int64_t value, const char* name) const {
    STD_TORCH_CHECK(value >= 0 && value < int64_t(channels_.size()), name, ": expected a value that is there, got ",
                    value);
  }

  // The first step that uses an input tells how many channels it has.
  void check_channels(int64_t value, int64_t channels) {
    if (channels_[value] == 0) channels_[value] = channels;
    STD_TORCH_CHECK(channels_[value] == channels, "sources: expected a value of ", channels, " channels, got ",
                    channels_[value]);
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

  const void* packed_depthwise(const Tensor& weight) {
    const Kernels& own = kernels(plan_->dtype);
    const int64_t channels = weight.size(0), kernel = weight.size(2);
    const Tensor packed = call_.empty({own.depthwise_packed_bytes(channels, kernel)}, ScalarType::Byte);
    own.pack_depthwise(data(weight), channels, kernel, packed.mutable_data_ptr());
    plan_->copies.push_back(packed);
    return data(packed);
  }

  NormAct norm_act(const Tensor& bn, int64_t act, int64_t channels) {
    NormAct checked = call_.check_norm_act(bn, "bn", act, "act", slope(), plan_->type, channels);
    checked.bn = copy(bn);
    return checked;
  }

  // A convolution, whose stride and padding come next, unless it has a gate and can only have one of each.
  ConvSettings begin(Conv conv, const Tensor& weight) {
    const bool gated = step_.gate != kNone;
    const int64_t stride = gated ? 1 : setting();
    std::vector<int64_t> padding;
    for (int side = 0; side < 4; ++side) padding.push_back(gated ? 0 : setting());
    STD_TORCH_CHECK(weight.dim() == 4, "weight: expected 4 dimensions, got ", weight.dim());
    if (channels_[step_.input] == 0) channels_[step_.input] = weight.size(conv == Conv::depthwise ? 0 : 1);
    const int64_t kernel = call_.check_weight(conv, weight, plan_->type, channels_[step_.input]);
    return check_settings(conv, kernel, stride, padding);
  }

  Geometry sizeless(int64_t c_out) const {
    Geometry g{};
    g.c_in = channels_[step_.input];
    g.c_out = c_out;
    return g;
  }

  template <class Kernel>
  void end(const Kernel& kernel, int64_t channels) {
    step_.kernel = kernel;
    step_.channels = channels;
  }

  // Lets a convolution with taps, and the pointwise ones before and after it, run band by band.
  void join_convolutions() {
    std::vector<int64_t> readers(channels_.size(), 0);
    for (const int64_t output : plan_->outputs) ++readers[output];
    for (const Step& step : plan_->steps)
      for (const int64_t source : sources_of(step)) ++readers[source];
    for (Step& step : plan_->steps) {
      if (step.input < plan_->inputs || readers[step.input] != 1 || step.gate != kNone) continue;
      Step& before = plan_->steps[step.input - plan_->inputs];
      if (before.gate != kNone || before.residual != kNone) continue;
      std::vector<Convolution> joined = convolutions_of(before), own = convolutions_of(step);
      if (joined.empty() || own.empty()) continue;
      const bool begins = joined.size() == 1 && is(Conv::pointwise, joined[0]) && !is(Conv::pointwise, own[0]);
      const bool ends = is(Conv::depthwise, joined.back()) && is(Conv::pointwise, own[0]);
      joined.push_back(own[0]);
      if (!(begins || ends) || weights_of(joined) * size_of(plan_->dtype) > kWeightsInCache) continue;
      step.kernel = BandsKernel{plan_->dtype, joined};
      step.input = before.input;
      before.kernel = std::monostate();
    }
  }

  // Those of a step that may run band by band.
  static std::vector<Convolution> convolutions_of(const Step& step) {
    if (const auto* const kernel = std::get_if<ConvKernel>(&step.kernel))
      return kernel->conv == Conv::dense ? std::vector<Convolution>{} : std::vector<Convolution>{*kernel};
    if (const auto* const kernel = std::get_if<BlockKernel>(&step.kernel)) return {*kernel};
    if (const auto* const kernel = std::get_if<BandsKernel>(&step.kernel)) return kernel->convolutions;
    return {};
  }

  static bool is(Conv conv, const Convolution& convolution) {
    const auto* const kernel = std::get_if<ConvKernel>(&convolution);
    return kernel && kernel->conv == conv;
  }

  static int64_t weights_of(const std::vector<Convolution>& convolutions) {
    int64_t count = 0;
    for (const Convolution& each : convolutions) {
      const bool is_block = std::holds_alternative<BlockKernel>(each),
                 depthwise = is_block || is(Conv::depthwise, each);
      std::visit(
          [&](const auto& kernel) {
            const Geometry& g = kernel.args.g;
            if (depthwise) count += g.c_in * kernel.settings.kernel * kernel.settings.kernel;
            if (is_block || !depthwise) count += g.c_in * g.c_out;
          },
          each);
    }
    return count;
  }

  // Gives each value between the steps the first piece of memory that nobody needs any more.
  void share_memory() {
    const int64_t values = int64_t(channels_.size());
    std::vector<int64_t> last_use(values, 0);
    for (size_t i = 0; i < plan_->steps.size(); ++i)
      for (const int64_t value : sources_of(plan_->steps[i])) last_use[value] = int64_t(i);
    plan_->pieces.assign(values, kNone);
    std::vector<int64_t> idle;
    for (size_t i = 0; i < plan_->steps.size(); ++i) {
      if (std::holds_alternative<std::monostate>(plan_->steps[i].kernel)) continue;
      const int64_t value = plan_->inputs + int64_t(i);
      if (std::count(plan_->outputs.begin(), plan_->outputs.end(), value) == 0) {
        if (idle.empty()) idle.push_back(plan_->piece_count++);
        plan_->pieces[value] = idle.back();
        idle.pop_back();
      }
      for (const int64_t source : sources_of(plan_->steps[i])) {
        const int64_t piece = plan_->pieces[source];
        const bool is_idle = std::count(idle.begin(), idle.end(), piece) > 0;  // it is two of the sources
        if (piece != kNone && last_use[source] == int64_t(i) && !is_idle) idle.push_back(piece);
      }
    }
  }

  static std::vector<int64_t> sources_of(const Step& step) {
    if (std::holds_alternative<std::monostate>(step.kernel)) return {};
    std::vector<int64_t> sources{step.input};
    if (step.gate != kNone) sources.push_back(step.gate);
    if (step.residual != kNone) sources.push_back(step.residual);
    return sources;
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& settings_;
  const std::vector<double>& slopes_;
  std::unique_ptr<Plan> plan_;
  Call<Backend> call_;
  size_t next_tensor_ = 0, next_setting_ = 0, next_slope_ = 0;
  std::vector<int64_t> channels_;  // of the values; 0 of an input that nobody has used
  Step step_{};                    // the one that is being made
};

}  // namespace

std::shared_ptr<const Plan> build_plan(const std::vector<std::string>& ops, const std::vector<Tensor>& tensors,
                                       const std::vector<int64_t>& settings, const std::vector<double>& slopes,
                                       int64_t inputs, const std::vector<int64_t>& sources,
                                       const std::vector<int64_t>& outputs) {
  STD_TORCH_CHECK(!ops.empty(), "ops: expected at least one");
  STD_TORCH_CHECK(inputs > 0, "inputs: expected at least one");
  STD_TORCH_CHECK(sources.size() == 3 * ops.size(), "sources: expected three of each op, got ", sources.size());
  PlanBuilder builder(tensors, settings, slopes, inputs);
  for (size_t i = 0; i < ops.size(); ++i) builder.add(ops[i], sources[3 * i], sources[3 * i + 1], sources[3 * i + 2]);
  return builder.finish(outputs);
}

}  // namespace mx::cpu
