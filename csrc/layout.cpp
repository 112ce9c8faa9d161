#include "layout.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace gcnet_ext {
namespace {

// The spatial dimensions as one: its stride, or -1 when no single stride walks them.
int64_t collapsed_stride(const Tensor& x) {
  int64_t stride = -1, expected = -1;
  for (int64_t dim = x.dim() - 1; dim >= 2; dim--) {
    if (x.size(dim) == 1) continue;
    if (stride < 0) {
      stride = x.stride(dim);
    } else if (x.stride(dim) != expected) {
      return -1;
    }
    expected = x.stride(dim) * x.size(dim);
  }
  return stride < 0 ? 1 : stride;
}

Tensor empty_map(const Tensor& x, bool channels_last) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(dims);
  int64_t stride = channels_last ? sizes[1] : 1;
  for (int64_t dim = dims - 1; dim >= 2; dim--) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  strides[1] = channels_last ? 1 : stride;
  strides[0] = channels_last ? stride : stride * sizes[1];
  AtenTensorHandle handle = nullptr;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor dense_copy(const Tensor& x, bool channels_last) {
  Tensor copy = empty_map(x, channels_last);
  torch::stable::copy_(copy, x);
  return copy;
}

bool is_native(const Tensor& x, bool channels_last) {
  const int64_t stride = collapsed_stride(x);
  return channels_last ? x.stride(1) == 1 && stride >= 0 : stride == 1;
}

}  // namespace

bool is_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1);
  if (channels == 1 || x.stride(1) != 1) return false;
  bool one_position = true;
  for (int64_t dim = 2; dim < x.dim(); dim++) {
    if (x.size(dim) == 1) continue;
    one_position = false;
    if (x.stride(dim) < channels) return false;
  }
  return !one_position;
}

Layout layout_of(const Tensor& x) {
  const bool channels_last = is_channels_last(x);
  int64_t count = 1;
  for (int64_t dim = 2; dim < x.dim(); dim++) count *= x.size(dim);
  return {x.size(0),    x.size(1), count, x.stride(0), channels_last ? 1 : x.stride(1), channels_last ? collapsed_stride(x) : 1,
          channels_last};
}

Tensor native(const Tensor& x) {
  const bool channels_last = is_channels_last(x);
  return is_native(x, channels_last) ? x : dense_copy(x, channels_last);
}

Tensor native_like(const Tensor& grad, const Tensor& like) {
  const bool channels_last = is_channels_last(like);
  const bool same = is_channels_last(grad) == channels_last && is_native(grad, channels_last);
  return same ? grad : dense_copy(grad, channels_last);
}

Tensor empty_like_map(const Tensor& x) { return empty_map(x, is_channels_last(x)); }

}  // namespace gcnet_ext
