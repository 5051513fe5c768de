// A file of its own, because build_info_generated.h changes with every commit and this compiles in no time.
#include "host/build_info.h"

#include "build_info_generated.h"  // written by setup.py

#if defined(__clang__)
#define MX_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define MX_COMPILER "GCC " __VERSION__
#else
#define MX_COMPILER "unknown"
#endif

namespace mx::host {

const BuildInfo build_info = {MX_COMPILER,           MX_BUILD_FLAGS, MX_BUILD_TORCH,
                              MX_BUILD_TORCH_TARGET, MX_BUILD_CUDA,  MX_BUILD_CUDA_ARCHITECTURES,
                              MX_BUILD_COMMIT};

}  // namespace mx::host
