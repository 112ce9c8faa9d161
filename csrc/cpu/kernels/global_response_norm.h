// The gradient of x in a global response norm, for one block: dx = g*scale + x*factor.
#pragma once

#include "channel_fuse.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

template <typename scalar_t>
void response_gradient(Block<const scalar_t> grad, Block<const scalar_t> x, const acc_t<scalar_t>* scale,
                       const acc_t<scalar_t>* factor, Block<scalar_t> grad_x) {
  using acc = acc_t<scalar_t>;
  const auto rows = [&](auto non_temporal) {
    if (x.channels_last) {
      for (int64_t p = 0; p < x.positions; p++) {
        const scalar_t *g = grad.data + p * grad.position_stride, *in = x.data + p * x.position_stride;
        write_row<non_temporal>(grad_x.data + p * grad_x.position_stride, x.channels, [=](int64_t c, auto lanes) {
          return load(g + c, lanes) * load(scale + c, lanes) + load(in + c, lanes) * load(factor + c, lanes);
        });
      }
      return;
    }
    for (int64_t c = 0; c < x.channels; c++) {
      const scalar_t *g = grad.data + c * grad.channel_stride, *in = x.data + c * x.channel_stride;
      const Vec<acc> s = broadcast(scale[c]), f = broadcast(factor[c]);
      write_row<non_temporal>(grad_x.data + c * grad_x.channel_stride, x.positions,
                              [=](int64_t p, auto lanes) { return load(g + p, lanes) * s + load(in + p, lanes) * f; });
    }
  };
  with_flags(rows, grad_x.non_temporal);
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
