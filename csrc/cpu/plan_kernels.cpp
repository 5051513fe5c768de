#include "plan_kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <type_traits>

namespace mx::cpu {
namespace {

using Nothing = std::monostate;

template <class Kernel>
Geometry with_sizes(const Kernel& kernel, const Images& x) {
  return conv_geometry(kernel.settings, x.n, x.h, x.w, kernel.args.g.c_in, kernel.args.g.c_out);
}

template <class Kernel>
Images output_of(const Kernel& kernel, const Images& x) {
  const Geometry g = with_sizes(kernel, x);
  return {g.n, g.c_out, g.out_h, g.out_w};
}
Images output_of(const Nothing&, const Images&) { return {}; }
Images output_of(const PoolKernel&, const Images& x) { return {x.n, x.c, 1, 1}; }
Images output_of(const GateKernel&, const Images& x) { return x; }
Images output_of(const BandsKernel& bands, Images x) {
  for (const Convolution& each : bands.convolutions)
    x = std::visit([&](const auto& kernel) { return output_of(kernel, x); }, each);
  return x;
}

template <class Kernel>
int64_t channels_of_input(const Kernel& kernel) {
  return kernel.args.g.c_in;
}
int64_t channels_of_input(const BandsKernel& bands) {
  return std::visit([](const auto& kernel) { return channels_of_input(kernel); }, bands.convolutions[0]);
}

void run(const Nothing&, const Backend&, const Images&, const Memories&) {}

void run(ConvKernel kernel, const Backend& backend, const Images& x, const Memories& memories) {
  kernel.args.g = with_sizes(kernel, x);
  kernel.args.u = memories.input;
  kernel.args.gate = memories.gate;
  kernel.args.residual = memories.residual;
  kernel.args.y = memories.output;
  backend.forward(kernel.conv, kernel.args);
}

void run(BlockKernel kernel, const Backend& backend, const Images& x, const Memories& memories) {
  kernel.args.g = with_sizes(kernel, x);
  kernel.args.x = memories.input;
  kernel.args.residual = memories.residual;
  kernel.args.y = memories.output;
  backend.block_inference(kernel.args);
}

void run(PoolKernel kernel, const Backend& backend, const Images& x, const Memories& memories) {
  kernel.args.n = x.n;
  kernel.args.hw = x.h * x.w;
  kernel.args.y = memories.input;
  kernel.args.out = memories.output;
  backend.norm_act_forward(kernel.args);
}

// Computed as PyTorch does: 16-bit values in float.
template <class T>
void make_gate(bool hard, int64_t count, const T* from, T* to) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t i = 0; i < count; ++i) {
    const A x = A(from[i]);
    // In this order a NaN stays one.
    to[i] = T(hard ? std::min(std::max(x + A(3), A(0)), A(6)) / A(6) : A(1) / (A(1) + std::exp(-x)));
  }
}

void run(const GateKernel& kernel, const Backend&, const Images& x, const Memories& memories) {
  const auto make = [&](auto example) {
    using T = decltype(example);
    make_gate(kernel.hard, x.numel(), static_cast<const T*>(memories.input), static_cast<T*>(memories.output));
  };
  switch (kernel.dtype) {
    case Dtype::f32:
      return make(float());
    case Dtype::f64:
      return make(double());
    case Dtype::bf16:
      return make(torch::headeronly::BFloat16());
    case Dtype::f16:
      return make(torch::headeronly::Half());
  }
}

template <class F>
void in_parallel(int64_t n, const F& f) {
  parallel_for(n, const_cast<F*>(&f),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); });
}

// --- bands ----------------------------------------------------------------------------------------------------------

// So much of what is between the convolutions stays in a core's L2 cache beside their weights; and in the caches of
// two, where all images together are made at once.
constexpr int64_t kBandBytes = 512 << 10, kWholeBytes = 2 * kBandBytes;

// Some rows of some images; either all rows, or one image.
struct Part {
  int64_t image, images, row, rows;
};

Images sizes_of(const Part& part, const Images& whole) { return {part.images, whole.c, part.rows, whole.w}; }

int64_t elements_before(const Part& part, const Images& whole) {
  return (part.image * whole.h + part.row) * whole.w * whole.c;
}

// The rows of an input of `h` rows that a convolution reads for a part of its output.
Part part_read(const ConvSettings& s, int64_t h, const Part& part, int64_t out_h) {
  if (part.rows == out_h) return {part.image, part.images, 0, h};
  const int64_t row = std::max<int64_t>(part.row * s.stride - s.top, 0);
  const int64_t end = std::min((part.row + part.rows - 1) * s.stride - s.top + s.kernel, h);
  return {part.image, part.images, row, end - row};
}

// The settings with which it makes the part of that.
ConvSettings settings_of(ConvSettings s, const Part& read, const Part& part, int64_t out_h) {
  if (part.rows == out_h) return s;
  const int64_t first = part.row * s.stride - s.top, end = first + (part.rows - 1) * s.stride + s.kernel;
  s.top = read.row - first;
  s.bottom = end - (read.row + read.rows);
  return s;
}

const ConvSettings& settings_of(const Convolution& convolution) {
  return std::visit([](const auto& kernel) -> const ConvSettings& { return kernel.settings; }, convolution);
}

class Bands {
 public:
  Bands(const BandsKernel& bands, const Backend& backend, const Images& x, const Memories& memories)
      : convolutions_(bands.convolutions), backend_(backend), memories_(memories), itemsize_(size_of(bands.dtype)) {
    sizes_.push_back(x);
    for (const Convolution& each : convolutions_)
      sizes_.push_back(std::visit([&](const auto& kernel) { return output_of(kernel, sizes_.back()); }, each));
    for (size_t i = 1; i < convolutions_.size(); ++i) bytes_ += sizes_[i].numel() * itemsize_;
    divide();
  }

  void run_all() const {
    const int64_t n = sizes_[0].n, groups = (n + images_ - 1) / images_;
    if (groups * bands_ == 1) return run_part({0, n, 0, sizes_.back().h});
    const auto run_tasks = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / bands_ * images_, h = sizes_.back().h;
        const int64_t row = task % bands_ * h / bands_, end_row = (task % bands_ + 1) * h / bands_;
        run_part({image, std::min(images_, n - image), row, end_row - row});
      }
    };
    in_parallel(groups * bands_, run_tasks);
  }

 private:
  // As many images, or rows, as the cache holds what is made of on the way, but enough parts for all workers.
  void divide() {
    const int64_t n = sizes_[0].n, out_h = sizes_.back().h;
    if (bytes_ <= kWholeBytes) {
      images_ = std::max<int64_t>(n, 1);
      return;
    }
    const int64_t of_image = (bytes_ + n - 1) / n, wanted = 2 * max_threads();
    bands_ = std::max((of_image + kBandBytes - 1) / kBandBytes, (wanted + n - 1) / n);
    bands_ = std::min(bands_, out_h);
    if (bands_ == 1) images_ = std::max<int64_t>(std::min(kBandBytes / of_image, n / wanted), 1);
  }

  void run_part(const Part& part) const {
    const size_t count = convolutions_.size();
    std::vector<Part> parts(count + 1, part);  // of each size
    for (size_t i = count; i > 0; --i)
      parts[i - 1] = part_read(settings_of(convolutions_[i - 1]), sizes_[i - 1].h, parts[i], sizes_[i].h);
    std::deque<Memory> between;
    const void* input = at(memories_.input, 0, parts[0]);
    for (size_t i = 0; i < count; ++i) {
      const bool last = i + 1 == count;
      void* output;
      if (last) {
        output = const_cast<void*>(at(memories_.output, count, part));
      } else {
        between.emplace_back(size_t(sizes_of(parts[i + 1], sizes_[i + 1]).numel() * itemsize_));
        output = between.back().data();
      }
      const void* const residual = last && memories_.residual ? at(memories_.residual, count, part) : nullptr;
      std::visit(
          [&](auto kernel) {
            kernel.settings = settings_of(kernel.settings, parts[i], parts[i + 1], sizes_[i + 1].h);
            run(kernel, backend_, sizes_of(parts[i], sizes_[i]), {input, nullptr, residual, output});
          },
          convolutions_[i]);
      input = output;
    }
  }

  const void* at(const void* memory, size_t i, const Part& part) const {
    return static_cast<const char*>(memory) + elements_before(part, sizes_[i]) * itemsize_;
  }

  const std::vector<Convolution>& convolutions_;
  const Backend& backend_;
  const Memories& memories_;
  int64_t itemsize_, bytes_ = 0;    // of all that is between
  std::vector<Images> sizes_;       // of the input, and of what each convolution gives
  int64_t images_ = 1, bands_ = 1;  // of a part; of an image
};

void run(const BandsKernel& bands, const Backend& backend, const Images& x, const Memories& memories) {
  Bands(bands, backend, x, memories).run_all();
}

}  // namespace

Images input_of(const Step& step, const Images& x) {
  return std::visit(
      [&](const auto& kernel) -> Images {
        using Kernel = std::decay_t<decltype(kernel)>;
        if constexpr (std::is_same_v<Kernel, Nothing> || std::is_same_v<Kernel, PoolKernel> ||
                      std::is_same_v<Kernel, GateKernel>)
          return x;
        else
          return {x.n, channels_of_input(kernel), x.h, x.w};
      },
      step.kernel);
}

Images output_of(const Step& step, const Images& x) {
  return std::visit([&](const auto& kernel) { return output_of(kernel, x); }, step.kernel);
}

void run(const Step& step, const Backend& backend, const Images& x, const Memories& memories) {
  std::visit([&](const auto& kernel) { run(kernel, backend, x, memories); }, step.kernel);
}

}  // namespace mx::cpu
