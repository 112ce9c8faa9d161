// What the CPU kernels take: views of memory, without torch.
#pragma once

#include <cstdint>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <type_traits>

#include "../../activation.h"

namespace gcnet_ext::cpu {

using c10::BFloat16;
using c10::Half;

// Sums over scalar_t are taken in this type.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The most positions of a block that attention_pool and attention_pool_backward take: they have an array of so many numbers on
// the stack, which is 8 MiB as a rule and 2 MiB in some threads.
constexpr int64_t kMaxTile = 4096;
static_assert(kMaxTile * sizeof(double) <= 64 << 10);

// A block of a feature map: some channels of some positions of one sample.
template <typename scalar_t>
struct Block {
  scalar_t* data;
  int64_t channels, positions;
  int64_t channel_stride, position_stride;  // one of them is 1
  bool channels_last;                       // channel_stride is 1
  bool non_temporal = false;                // is written past the caches, because nobody reads it soon
};

// A running softmax-weighted sum: `weighted` is sum_p exp(logit_p - max) x_p and `sum` is sum_p exp(logit_p - max), over the
// positions so far.
template <typename acc>
struct SoftmaxSum {
  acc max, sum;
  acc* weighted;  // [C]
};

// What the backward pass of the pool needs of one sample besides x and g.
template <typename acc>
struct PoolBackwardSample {
  const acc* grad_context;  // dctx [C]
  acc context_dot;          // dctx . ctx
  const acc* weight;        // w [C]
  const acc* scale;         // [C], what g is multiplied with; null for 1
};

// The bits of a block, one for each element. A row of them (a channel, or in channels_last a position) begins with a byte of
// its own, `stride` bytes behind the beginning of the row before.
template <typename byte_t>
struct Bits {
  byte_t* data = nullptr;
  int64_t stride = 0;
};

// What is added to a block and what it is multiplied with.
template <typename scalar_t>
struct BlockFusion {
  const acc_t<scalar_t>* scale;  // [C]; null for 1
  const acc_t<scalar_t>* shift;  // [C]; null for -0, which changes no number
  Block<const scalar_t> residual{};
  bool relu = false;
  Bits<uint8_t> positive{};  // gets a bit for each element, unless it has no data
};

// A view of a matrix whose rows lie `stride` elements apart. Without data it stands for one that is absent.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;

  T* row(int64_t i) const { return data + i * stride; }
  Matrix row_range(int64_t first, int64_t count) const { return {row(first), count, columns, stride}; }
  Matrix column_range(int64_t first, int64_t count) const { return {data + first, rows, count, stride}; }
  operator Matrix<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, rows, columns, stride};
  }
};

}  // namespace gcnet_ext::cpu
