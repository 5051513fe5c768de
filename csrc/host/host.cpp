// mobilenet_ext._host: a small Python module that needs no torch.
#include <pybind11/pybind11.h>

#include "host/build_info.h"
#include "host/cpu_features.h"
#include "host/unchanged.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() =
      "What mobilenet_ext asks outside of torch: its build, the CPU, and whether Python objects are as they were.";

  m.def(
      "build_info",
      [] {
        const mx::host::BuildInfo& b = mx::host::build_info;
        py::dict d;
        d["compiler"] = b.compiler;
        d["flags"] = b.flags;
        d["torch"] = b.torch;
        d["torch_target"] = b.torch_target;
        d["cuda"] = b.cuda;
        d["cuda_architectures"] = b.cuda_architectures;
        d["commit"] = b.commit;
        return d;
      },
      "dict of str: compiler, flags, torch (built against), torch_target (oldest that the library loads under), cuda "
      "(toolkit, or why it was not built), cuda_architectures (as in TORCH_CUDA_ARCH_LIST), commit (empty where not "
      "known).");

  m.def(
      "cpu_features",
      [] {
        const mx::host::CpuFeatures f = mx::host::cpu_features();
        py::dict d;
        d["avx2"] = f.avx2;
        d["fma"] = f.fma;
        d["f16c"] = f.f16c;
        d["avx512f"] = f.avx512f;
        d["avx512bw"] = f.avx512bw;
        d["avx512vl"] = f.avx512vl;
        d["avx512dq"] = f.avx512dq;
        d["avx512_bf16"] = f.avx512_bf16;
        d["amx_bf16"] = f.amx_bf16;
        return d;
      },
      "dict of bool: the instruction sets that both CPU and operating system let this process use. Asks the operating "
      "system for permission to use AMX where there is AMX.");

  m.def("dicts_are", &mx::host::dicts_are, py::arg("counted"), py::arg("counts"), py::arg("held"), py::arg("values"),
        "Whether each dict in `counted` has as many entries as `counts` says, and `values` are the objects that those "
        "in `held` have as values, one dict after the other.");

  m.def("tensors_answer", &mx::host::tensors_answer, py::arg("tensors"), py::arg("attribute"), py::arg("method"),
        py::arg("answers"),
        "Whether `answers` holds what `attribute` (a descriptor) and `method` of each tensor give now, in turn.");
}
