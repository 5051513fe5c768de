// The kernel table of one instruction set; the including file has set the target up (see vec.h) and defines
// MX_ISA_NAMESPACE and MX_KERNEL_TABLE.
#pragma once

#include "block.h"
#include "depthwise.h"
#include "kernels.h"
#include "normalise.h"
#include "pointwise.h"
#include "stem.h"

#define MX_STRING_OF(x) #x
#define MX_STRING(x) MX_STRING_OF(x)

namespace mx::cpu {

const Kernels MX_KERNEL_TABLE = {
    MX_STRING(MX_ISA_NAMESPACE),          MX_ISA_NAMESPACE::packed_layout,     MX_ISA_NAMESPACE::depthwise_forward,
    MX_ISA_NAMESPACE::depthwise_backward, MX_ISA_NAMESPACE::pointwise_forward, MX_ISA_NAMESPACE::pointwise_backward,
    MX_ISA_NAMESPACE::stem_forward,       MX_ISA_NAMESPACE::stem_backward,     MX_ISA_NAMESPACE::normalise_forward,
    MX_ISA_NAMESPACE::normalise_backward, MX_ISA_NAMESPACE::block_inference,
};

}  // namespace mx::cpu
