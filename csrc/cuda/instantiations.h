// The launches whose kernels another file compiles: each kernel is compiled once, in the file of its operator.
#pragma once

#include "operators.h"

namespace gcnet_ext::cuda {

#define GCNET_EXT_FOR_ALL_TYPES(instantiate) instantiate(double) instantiate(float) instantiate(Half) instantiate(BFloat16)

#define GCNET_EXT_ATTENTION_POOL(prefix, T)                                                     \
  prefix template void launch_attention_pool(PoolParams<T>, const CudaPoolPlan&, cudaStream_t); \
  prefix template void launch_attention_pool_backward(PoolBackwardParams<T>, const CudaPoolPlan&, cudaStream_t);

#define GCNET_EXT_CHANNEL_FUSE(prefix, T)                                                                                     \
  prefix template void launch_channel_fuse(FuseParams<T>, cudaStream_t);                                                      \
  prefix template void launch_channel_sums(SumsParams<T>, Workspace&, cudaStream_t);                                          \
  prefix template void launch_fuse_elements(const FuseParams<T>&, const Map<const T>&, bool, const Valid<T>&, cudaStream_t);  \
  prefix template void launch_positive_bits(const Map<const T>&, const Extent&, uint8_t*, cudaStream_t);                      \
  prefix template void launch_relu_backward(const Map<const T>&, const Map<T>&, const Extent&, const uint8_t*, cudaStream_t); \
  prefix template Valid<T> with_shares(Valid<T>, const Extent&, Workspace&, cudaStream_t);                                    \
  prefix template void launch_average_valid(const Map<const T>&, const Extent&, const Valid<T>&, acc_t<T>*, cudaStream_t);

#define GCNET_EXT_TRANSFORM(prefix, T)                                                         \
  prefix template void launch_transform(const TransformParams<T>&, cudaStream_t);              \
  prefix template void launch_transform_backward(const TransformGradParams<T>&, cudaStream_t); \
  prefix template void launch_parameter_gradients(const GradientParams<T>&, cudaStream_t);

#define GCNET_EXT_ELSEWHERE(T) \
  GCNET_EXT_ATTENTION_POOL(extern, T) GCNET_EXT_CHANNEL_FUSE(extern, T) GCNET_EXT_TRANSFORM(extern, T)
GCNET_EXT_FOR_ALL_TYPES(GCNET_EXT_ELSEWHERE)
#undef GCNET_EXT_ELSEWHERE

}  // namespace gcnet_ext::cuda
