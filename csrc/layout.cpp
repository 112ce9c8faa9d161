#include "layout.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <utility>

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

// The stable ABI's own new_empty looks its operator up by name in every call. This does not: a call has up to 15 small outputs.
Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         static_cast<int32_t>(dtype), device_type, device_index, &handle));
  return Tensor(handle);
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
  return empty_strided(x, sizes, strides, x.scalar_type());
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

int64_t positions(const Tensor& x) {
  int64_t product = 1;
  for (int64_t dim = 2; dim < x.dim(); dim++) product *= x.size(dim);
  return product;
}

ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool has_own_memory(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> strides_and_sizes;
  for (int64_t dim = 0; dim < x.dim(); dim++) {
    if (x.size(dim) == 0) return true;
    if (x.size(dim) > 1) strides_and_sizes.emplace_back(x.stride(dim), x.size(dim));
  }
  std::sort(strides_and_sizes.begin(), strides_and_sizes.end());
  int64_t reach = 0;  // how far the dimensions with smaller strides reach together
  for (const auto& [stride, size] : strides_and_sizes) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

namespace {
struct Bytes {
  uintptr_t begin, end;
  bool dense;  // every byte between the two belongs to the tensor
};

Bytes bytes_of(const Tensor& x) {
  int64_t last = 0;  // the last element
  for (int64_t dim = 0; dim < x.dim(); dim++) last += (x.size(dim) - 1) * x.stride(dim);
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  return {begin, begin + (last + 1) * x.element_size(), last + 1 == x.numel()};
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); dim++) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}
}  // namespace

Overlap overlap(const Tensor& tensor, const Tensor& x) {
  if (x.numel() == 0) return Overlap::none;
  const Bytes a = bytes_of(tensor), b = bytes_of(x);
  if (a.end <= b.begin || b.end <= a.begin) return Overlap::none;
  if (a.begin == b.begin && same_strides(tensor, x)) return Overlap::all;
  return a.dense && b.dense ? Overlap::partial : Overlap::unknown;
}

int64_t bytes_of_bits(const Tensor& x) {
  const int64_t channels = x.size(1), count = positions(x);
  const bool channels_last = is_channels_last(x);
  const int64_t rows = channels_last ? count : channels, length = channels_last ? channels : count;
  return rows * ((length + 7) / 8);
}

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
  return {x.size(0),
          x.size(1),
          positions(x),
          x.stride(0),
          channels_last ? 1 : x.stride(1),
          channels_last ? collapsed_stride(x) : 1,
          channels_last};
}

Tensor native(const Tensor& x) {
  const bool channels_last = is_channels_last(x);
  return is_native(x, channels_last) ? x : dense_copy(x, channels_last);
}

Tensor native_dense(const Tensor& x) {
  const bool channels_last = is_channels_last(x);
  if (!is_native(x, channels_last)) return dense_copy(x, channels_last);
  const Layout at = layout_of(x);
  const bool rows = channels_last ? at.position_stride == at.channels : at.channel_stride == at.positions || at.channels == 1;
  const bool samples = at.sample_stride == at.channels * at.positions || at.samples == 1;
  return rows && samples ? x : dense_copy(x, channels_last);
}

void write_back(const Tensor& map, const Tensor& x) {
  if (map.data_ptr() == x.data_ptr()) return;
  Tensor target = x;
  torch::stable::copy_(target, map);
}

Tensor native_like(const Tensor& grad, const Tensor& like) {
  const bool channels_last = is_channels_last(like);
  const bool same = is_channels_last(grad) == channels_last && is_native(grad, channels_last);
  return same ? grad : dense_copy(grad, channels_last);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes[dim]);
  }
  return empty_strided(like, sizes, strides, dtype);
}

Tensor empty_like_parameter(const Tensor& parameter) {
  const auto sizes = parameter.sizes();
  if (!parameter.is_contiguous()) return empty(parameter, {sizes.begin(), sizes.end()}, parameter.scalar_type());
  return empty_strided(parameter, sizes, parameter.strides(), parameter.scalar_type());
}

Tensor empty_like_map(const Tensor& x) { return empty_map(x, is_channels_last(x)); }

}  // namespace gcnet_ext
