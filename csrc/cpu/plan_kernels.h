// How the steps of a plan run.
#pragma once

#include "plan_steps.h"

namespace mx::cpu {

// What an activation of these sizes has to have for a step that reads it, and what the step makes of it.
Images input_of(const Step& step, const Images& x);
Images output_of(const Step& step, const Images& x);

// The memory that a step reads and writes; null: none.
struct Memories {
  const void *input, *gate, *residual;
  void* output;
};

void run(const Step& step, const Backend& backend, const Images& x, const Memories& memories);

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

}  // namespace mx::cpu
