// The pointwise (1x1) convolution: a matrix product over the pixels of all images.
#pragma once

#include "product.h"

namespace mx::cpu::MX_ISA_NAMESPACE {

template <class T, class Args>
inline Gate<T> gate_of(const Args& args) {
  return {static_cast<const T*>(args.gate), args.g.c_in, args.g.h * args.g.w, 0};
}

template <class T>
inline void pointwise_forward(const ForwardArgs& args) {
  const T* const u = static_cast<const T*>(args.u);
  const int64_t channels = args.g.c_in;
  const ChannelNormAct<Acc<T>> input(args.input, channels);
  const Gate<T> gate = gate_of<T>(args);
  forward_product(
      forward_product_of<T>(args, channels, static_cast<const T*>(args.weight)),
      [&](int64_t begin, int64_t rows, Operand<T>* tile) {
        activate_rows<T>(u + begin * channels, rows, input, gate.from(begin), tile);
      },
      [&](int64_t row) { return u + row * channels; });
}

template <class T>
inline void pointwise_backward(const BackwardArgs& args) {
  using A = Acc<T>;
  const Geometry& g = args.g;
  const T* const u = static_cast<const T*>(args.u);
  const ChannelNormAct<A> input(args.input, g.c_in);
  const Gate<T> gate = gate_of<T>(args);
  const BackwardProduct<T> product{
      g.n * g.h * g.w,
      g.c_in,
      g.c_out,
      {static_cast<const T*>(args.dz), static_cast<const T*>(args.y), static_cast<const A*>(args.grad_bn_y), g.c_out},
      static_cast<const T*>(args.weight),
      u,
      args.input,
      args.batch_stats_u,
      gate,
      static_cast<T*>(args.dz_u),
      static_cast<A*>(args.grad_weight),
      static_cast<A*>(args.grad_bn_u),
      static_cast<A*>(args.grad_gate)};
  backward_product(
      product,
      [&](int64_t begin, int64_t rows, Operand<T>* panels, int64_t panel_rows) {
        activate_panels<T>(u + begin * g.c_in, rows, input, gate.from(begin), panels, panel_rows);
      },
      [&](int64_t row) { return u + row * g.c_in; });
}

}  // namespace mx::cpu::MX_ISA_NAMESPACE
