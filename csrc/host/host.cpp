// mobilenet_ext._host: a small Python module that needs no torch.
#include <pybind11/pybind11.h>

#include "host/build_info.h"
#include "host/cpu_features.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "Build information and CPU features of mobilenet_ext.";

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
        mx::host::CpuFeature features[mx::host::kCpuFeatures];
        mx::host::cpu_features(features);
        py::dict d;
        for (const mx::host::CpuFeature& f : features) d[f.name] = f.usable;
        return d;
      },
      "dict of bool: the instruction sets that both CPU and operating system let this process use. Asks the operating "
      "system for permission to use AMX where there is AMX.");
}
