// From tensors to the plain structs that the kernels take. The torch glue (*.cu) alone includes this.
#pragma once

#include "../arguments.h"
#include "../tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "final_relu.cuh"
#include "parameter.cuh"
#include "valid_positions.cuh"

namespace gcnet_ext::cuda {

// One call: x's device is current while it lasts, its launches go to the current stream, and its workspace outlives them,
// because the caching allocator hands memory out again in the order of the stream.
class Call : public Workspace {
 public:
  explicit Call(const Tensor& x) : like_(x), guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  void* allocate(size_t bytes) override {
    kept_.push_back(empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return kept_.back().data_ptr();
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> kept_;
};

inline Extent extent_of(const Tensor& x) {
  const Layout layout = layout_of(x);
  return {layout.samples, layout.channels, layout.positions, layout.channels_last};
}

template <typename T>
Map<T> map_of(const Tensor& tensor) {
  const Layout layout = layout_of(tensor);
  return {static_cast<T*>(tensor.data_ptr()), layout.sample_stride, layout.channel_stride, layout.position_stride};
}
// The map is absent if it is not needed; the tensor is then empty.
template <typename T>
Map<T> map_if(bool needed, const Tensor& tensor) {
  return needed ? map_of<T>(tensor) : Map<T>{};
}

// The map is absent if there is no tensor.
template <typename T>
Map<T> map_of(const OptionalTensor& tensor) {
  return tensor ? map_of<T>(*tensor) : Map<T>{};
}

template <typename T>
acc_t<T>* acc_data(const Tensor& tensor) {
  return static_cast<acc_t<T>*>(tensor.data_ptr());
}

// A parameter from a dense tensor.
template <typename T>
Parameter<T> parameter(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return Parameter<T>(tensor->data_ptr(), tensor->scalar_type() == ScalarType::Float);
}
// The gradient of a parameter, absent if the tensor is empty.
template <typename T>
MutableParameter<T> mutable_parameter(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return MutableParameter<T>(tensor.data_ptr(), tensor.scalar_type() == ScalarType::Float);
}

// The bits of the final ReLU; null if there are none.
inline uint8_t* bits_of(const Tensor& positive) {
  return positive.numel() > 0 ? static_cast<uint8_t*>(positive.data_ptr()) : nullptr;
}

// The positions of x that count, from a dense tensor. with_shares finds their shares.
template <typename T>
Valid<T> valid_of(const OptionalTensor& valid, const Tensor& x) {
  if (!valid) return {};
  const bool same_for_all = valid->size(0) == 1;
  return {static_cast<const uint8_t*>(valid->data_ptr()), same_for_all ? 0 : positions(x)};
}

// The gradient of the argument of the final ReLU, in the layout of native(x). It is written to `result`, or to a new tensor if
// nobody needs that.
inline Tensor relu_backward_of(const Call& call, const Tensor& grad, const Tensor& x, const Tensor& positive, bool needed,
                               const Tensor& result) {
  const Tensor to = needed ? result : empty_like_map(x), bits = dense(positive);
  dispatch(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    launch_relu_backward(map_of<const T>(grad), map_of<T>(to), extent_of(x), bits_of(bits), call.stream());
  });
  return to;
}

}  // namespace gcnet_ext::cuda
