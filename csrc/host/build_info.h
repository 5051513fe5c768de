// What this installation was built with.
#pragma once

namespace mx::host {

struct BuildInfo {
  const char* compiler;
  const char* flags;
  const char* torch;         // version built against
  const char* torch_target;  // oldest version whose stable ABI is used
  const char* cuda;          // toolkit, or why CUDA was not built
  // As in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX"; empty where CUDA was not built.
  const char* cuda_architectures;
  const char* commit;  // empty: not known
};

extern const BuildInfo build_info;

}  // namespace mx::host
