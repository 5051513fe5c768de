// What this installation was built with.
#pragma once

namespace mx::host {

struct BuildInfo {
  const char* compiler;
  const char* flags;
  const char* torch;         // version built against
  const char* torch_target;  // oldest version whose stable ABI is used
  const char* cuda;          // toolkit, or why CUDA was not built
  const char* commit;        // empty: not known
};

extern const BuildInfo build_info;

}  // namespace mx::host
