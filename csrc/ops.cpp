// Defines every op's schema: in `mobilenet_ext`, which the library calls and whose kernels Python registers, and the
// kernel ops again in `mobilenet_ext_cpu`, which csrc/cpu/bindings.cpp implements.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#define MX_DEFINE_OP(name, schema) m.def(schema);
#define MX_DEFINE_LAYER_OP(schema) m.def(schema);

STABLE_TORCH_LIBRARY(mobilenet_ext, m){MX_KERNEL_OPS(MX_DEFINE_OP) MX_LAYER_OPS(MX_DEFINE_LAYER_OP)}

STABLE_TORCH_LIBRARY(mobilenet_ext_cpu, m) {
  MX_KERNEL_OPS(MX_DEFINE_OP)
  // For plans of inference that do not change (mobilenet_ext/backends/cpu.py).
  m.def("pack(Tensor? depthwise_bn, Tensor? depthwise_weight, Tensor pointwise_weight) -> Tensor");
  m.def(
      "make_plan(str[] ops, Tensor[] tensors, int[] settings, float[] slopes, int inputs, int[] sources, int[] "
      "outputs) "
      "-> Tensor");
  m.def("run_plan(Tensor[] inputs, Tensor plan) -> Tensor[]");
}
