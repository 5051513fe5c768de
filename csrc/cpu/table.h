// The kernels of one instruction set, by dtype; the including file has set the target up (see vec.h) and defines
// MX_ISA_NAMESPACE.
#pragma once

#include "block_inference.h"
#include "dense.h"
#include "depthwise.h"
#include "kernels.h"
#include "norm_act.h"
#include "pointwise.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

template <class T>
constexpr Kernels kKernels = {
    {depthwise_forward<T>, pointwise_forward<T>, dense_forward<T>},
    {depthwise_backward<T>, pointwise_backward<T>, dense_backward<T>},
    norm_act_forward<T>,
    norm_act_backward<T>,
    block_inference<T>,
    packed_bytes<T>,
    pack<T>,
    depthwise_packed_bytes<T>,
    pack_depthwise<T>,
};

}  // namespace mx::cpu::MX_ISA_NAMESPACE

// The table of all dtypes.
#define MX_ALL_KERNELS                                                    \
  {MX_ISA_NAMESPACE::kKernels<float>, MX_ISA_NAMESPACE::kKernels<double>, \
   MX_ISA_NAMESPACE::kKernels<MX_ISA_NAMESPACE::bf16>, MX_ISA_NAMESPACE::kKernels<MX_ISA_NAMESPACE::f16>}
