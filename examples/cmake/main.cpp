// Calls an operator of gcnet_ext through torch's dispatcher, and compares with the formula. Nothing has to be loaded: the
// program is linked with gcnet_ext::gcnet_ext, whose operators register themselves.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <optional>
#include <tuple>

using OptionalTensor = std::optional<at::Tensor>;
// x, scale, shift, residual, final_activation -> out, and bits that only a final ReLU leaves
using ChannelFuse = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                       const OptionalTensor&, int64_t);

int main() {
  const auto channel_fuse = c10::Dispatcher::singleton().findSchemaOrThrow("gcnet_ext::channel_fuse", "").typed<ChannelFuse>();

  const at::Tensor x = at::randn({2, 64, 14, 14}), scale = at::rand({2, 64}), shift = at::randn({2, 64});
  const at::Tensor got = std::get<0>(channel_fuse.call(x, scale, shift, std::nullopt, 0));
  const at::Tensor want = x * scale.view({2, 64, 1, 1}) + shift.view({2, 64, 1, 1});

  const double error = (got - want).abs().max().item<double>();
  std::printf("gcnet_ext::channel_fuse: largest error %.3g\n", error);
  return got.sizes() == want.sizes() && error <= 1e-5 ? 0 : 1;
}
