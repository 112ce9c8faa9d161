// From tensors to the plain structs that the kernels take. For the torch glue only.
#pragma once

#include "../arguments.h"
#include "../tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "launch.h"
#include "transform.cuh"

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
// A map without data when it is not needed (the tensor is then empty).
template <typename T>
Map<T> map_if(bool needed, const Tensor& tensor) {
  return needed ? map_of<T>(tensor) : Map<T>{};
}

template <typename T>
acc_t<T>* acc_data(const Tensor& tensor) {
  return static_cast<acc_t<T>*>(tensor.data_ptr());
}

// A dense parameter.
template <typename T>
Parameter<T> parameter(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return Parameter<T>(tensor->data_ptr(), tensor->scalar_type() == ScalarType::Float);
}
// A gradient of a parameter; empty: not wanted.
template <typename T>
MutableParameter<T> mutable_parameter(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return MutableParameter<T>(tensor.data_ptr(), tensor.scalar_type() == ScalarType::Float);
}

}  // namespace gcnet_ext::cuda
