// From tensors to the plain pointers that the kernels take.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../arguments.h"
#include "../plan_cpu.h"
#include "../tensors.h"
#include "kernels/table.h"

namespace gcnet_ext::cpu {

constexpr std::align_val_t kAlignment{64};

template <typename scalar_t>
constexpr ScalarType kDtype = std::is_same_v<scalar_t, double>  ? ScalarType::Double
                              : std::is_same_v<scalar_t, float> ? ScalarType::Float
                              : std::is_same_v<scalar_t, Half>  ? ScalarType::Half
                                                                : ScalarType::BFloat16;

// Uninitialised memory that starts where a cache line does: a vector across two of them is two accesses.
struct FreeAligned {
  void operator()(void* memory) const { ::operator delete[](memory, kAlignment); }
};
template <typename acc>
using Buffer = std::unique_ptr<acc[], FreeAligned>;
template <typename acc>
Buffer<acc> buffer(int64_t count) {
  return Buffer<acc>(static_cast<acc*>(::operator new[](count * sizeof(acc), kAlignment)));
}

// A matrix with memory of its own, which is uninitialised. One that is not needed has no data.
template <typename acc>
struct MatrixBuffer : Matrix<acc> {
  Buffer<acc> memory;

  MatrixBuffer(int64_t rows, int64_t columns, bool needed = true) {
    if (!needed) return;
    memory = buffer<acc>(rows * columns);
    static_cast<Matrix<acc>&>(*this) = {memory.get(), rows, columns, columns};
  }
  void clear() { std::fill_n(memory.get(), this->rows * this->columns, acc(0)); }
};

template <typename scalar_t>
const scalar_t* data(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.data_ptr());
}
template <typename scalar_t>
scalar_t* mutable_data(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.data_ptr());
}

// A view of a dense [N, columns] tensor.
template <typename acc>
Matrix<acc> matrix_of(const Tensor& tensor) {
  return {mutable_data<acc>(tensor), tensor.size(0), tensor.size(1), tensor.size(1)};
}

// A feature map and its layout. Without data it stands for one that is absent.
template <typename scalar_t>
struct Map {
  scalar_t* data = nullptr;
  Layout layout{};
  bool non_temporal = false;

  // The map of the samples from `first` on.
  Map samples(int64_t first, int64_t count) const {
    Map part{data + first * layout.sample_stride, layout, non_temporal};
    part.layout.samples = count;
    return part;
  }
  Block<scalar_t> block(int64_t sample, int64_t c0, int64_t channels, int64_t p0, int64_t positions) const {
    scalar_t* start =
        data ? data + sample * layout.sample_stride + c0 * layout.channel_stride + p0 * layout.position_stride : nullptr;
    return {start, channels, positions, layout.channel_stride, layout.position_stride, layout.channels_last, non_temporal};
  }
};

template <typename scalar_t>
Map<const scalar_t> read_map(const Tensor& tensor) {
  return {data<scalar_t>(tensor), layout_of(tensor)};
}
// The map has no data if there is no tensor.
template <typename scalar_t>
Map<const scalar_t> read_map(const OptionalTensor& tensor) {
  return tensor ? read_map<scalar_t>(*tensor) : Map<const scalar_t>{};
}
// A map that is written by a loop that reads the maps `read`, which are of its size.
template <typename scalar_t>
Map<scalar_t> write_map(const Tensor& tensor, const auto&... read) {
  const bool in_place = ((read.data_ptr() == tensor.data_ptr()) || ...);
  const int64_t bytes = (1 + sizeof...(read)) * tensor.numel() * sizeof(scalar_t);
  return {mutable_data<scalar_t>(tensor), layout_of(tensor), !in_place && plan_cpu_non_temporal(bytes)};
}
// A map to write to, or one without data when it is not needed (the tensor is then empty).
template <typename scalar_t>
Map<scalar_t> write_map_if(bool needed, const Tensor& tensor, const auto&... read) {
  return needed ? write_map<scalar_t>(tensor, read...) : Map<scalar_t>{};
}

// A small parameter as a vector of acc; empty when there is none.
template <typename acc>
std::vector<acc> to_acc(const OptionalTensor& tensor) {
  if (!tensor) return {};
  const Tensor values_of = dense(*tensor);
  return dispatch(values_of.scalar_type(), [&](auto kind) {
    const auto* values = data<decltype(kind)>(values_of);
    return std::vector<acc>(values, values + values_of.numel());
  });
}

template <typename acc>
const acc* pointer(const std::vector<acc>& values) {
  return values.empty() ? nullptr : values.data();
}

// Writes values of acc to a tensor of any dtype.
template <typename acc>
void from_acc(const acc* values, const Tensor& tensor) {
  dispatch(tensor.scalar_type(),
           [&](auto kind) { std::copy(values, values + tensor.numel(), mutable_data<decltype(kind)>(tensor)); });
}

}  // namespace gcnet_ext::cpu
