// The kernel table of one instruction set; the including file has set the target up (see vec.h) and defines
// MX_ISA_NAMESPACE and MX_KERNEL_TABLE.
#pragma once

#if __has_include("block.h")
#include "block.h"
#endif
#include "depthwise.h"
#include "kernels.h"
#include "normalise.h"
#if __has_include("pointwise.h")
#include "pointwise.h"
#endif
#if __has_include("stem.h")
#include "stem.h"
#endif

#define MX_STRING_OF(x) #x
#define MX_STRING(x) MX_STRING_OF(x)

namespace mx::cpu {

const Kernels MX_KERNEL_TABLE = {
    MX_STRING(MX_ISA_NAMESPACE),
    MX_ISA_NAMESPACE::depthwise_forward,
    MX_ISA_NAMESPACE::depthwise_backward,
#if __has_include("pointwise.h")
    MX_ISA_NAMESPACE::pointwise_forward,
    MX_ISA_NAMESPACE::pointwise_backward,
#else
    nullptr, nullptr,
#endif
#if __has_include("stem.h")
    MX_ISA_NAMESPACE::stem_forward,
    MX_ISA_NAMESPACE::stem_backward,
#else
    nullptr, nullptr,
#endif
    MX_ISA_NAMESPACE::normalise_forward,
    MX_ISA_NAMESPACE::normalise_backward,
#if __has_include("block.h")
    MX_ISA_NAMESPACE::block_inference,
#else
    nullptr,
#endif
};

}  // namespace mx::cpu
