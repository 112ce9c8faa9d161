// The products of the transform: x [N, K], of context or hidden units, with a weight matrix W [M, K].
//
// One sample's result never depends on how many others are worked on with it: every output element has its own accumulator and
// its own fixed order of additions.
#pragma once

#include "simd.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr int kRowBlock = 4;                              // rows of W that are worked on together
constexpr int kSampleBlock = kVectorBytes == 64 ? 8 : 3;  // samples that share one load of W
constexpr int kSums = kVectorBytes == 64 ? 16 : 12;       // sums, each of a row and a sample, that the registers hold
constexpr int kColumnBlock = kVectorBytes == 64 ? 4 : 2;  // vectors along K that are worked on together
constexpr int64_t kColumnsAtOnce = 512;                   // columns of x that stay in the first-level cache
constexpr int64_t kRowPanel = 64;                         // rows of W that stay in the second-level cache for all samples
constexpr int64_t kWeightsAhead = 4096;                   // elements that W is asked for ahead, because it may come from memory
constexpr int64_t kWeightRowsAhead = 16;                  // rows of a column block, which are short and lie far apart

// y[n, m] = start + sum_k W[m, k] x[n, k] for the J samples of x and y and the I rows of W; start is y[n, m] for those that go
// on with a sum, otherwise bias[m]. The rows at `next` are fetched meanwhile, into the second-level cache. (It is not inlined,
// because several of it in one function run out of registers.)
template <int J, int I, typename acc, typename weight_t>
[[gnu::noinline]] void linear_block(const Matrix<const acc>& x, const Matrix<const weight_t>& weight, const weight_t* next,
                                    const acc* bias, bool go_on, const Matrix<acc>& y) {
  constexpr int kRead = 0, kSecondLevel = 2;
  const acc* const x_data = x.data;
  const weight_t* const w_data = weight.data;
  const int64_t x_stride = x.stride, w_stride = weight.stride;
  Vec<acc> sums[J * I];
  clear(sums);
  for_each_vector<acc>(x.columns, [&](int64_t k, auto lanes) {
    Vec<acc> xk[J];
#pragma GCC unroll kSampleBlock  // early enough for the sums to stay in registers
    for (int j = 0; j < J; j++) xk[j] = load(x_data + j * x_stride + k, lanes);
#pragma GCC unroll kRowBlock
    for (int i = 0; i < I; i++) {
      __builtin_prefetch(next + i * w_stride + k, kRead, kSecondLevel);
      const Vec<acc> w = load(w_data + i * w_stride + k, lanes);
#pragma GCC unroll kSampleBlock
      for (int j = 0; j < J; j++) sums[j * I + i] += w * xk[j];
    }
  });
  acc start[I] = {};
  if (bias) std::memcpy(start, bias, sizeof start);
  alignas(kVectorBytes) acc totals[J * I];
  sum_each(sums, totals);
  for (int j = 0; j < J; j++) {
    acc* yj = y.row(j);
    if (go_on) {
      for (int i = 0; i < I; i++) yj[i] += totals[j * I + i];
    } else {
      for (int i = 0; i < I; i++) yj[i] = totals[j * I + i] + start[i];
    }
  }
}

template <typename acc, typename weight_t>
void linear(Matrix<const acc> x, Matrix<const weight_t> weight, const acc* bias, Matrix<acc> y) {
  // The columns of a few samples are copied side by side: rows a power of two apart would throw each other out of the cache.
  constexpr int64_t kStride = kColumnsAtOnce + kLanes<acc>;
  alignas(kVectorBytes) acc x_columns[kSampleBlock * kStride];
  for (int64_t k0 = 0; k0 < weight.columns; k0 += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, weight.columns - k0);
    const int64_t ahead = std::max<int64_t>(kRowBlock, kWeightsAhead / count);
    for (int64_t panel = 0; panel < weight.rows; panel += kRowPanel) {
      for_each_batch<kSampleBlock>(x.rows, [&](int64_t n, auto block) {
        for (int j = 0; j < block; j++) std::copy_n(x.row(n + j) + k0, count, x_columns + j * kStride);
        for_each_rows<kRowBlock>(panel, std::min(weight.rows, panel + kRowPanel), [&](int64_t m, auto rows) {
          constexpr int at_once = rows * block > kSums ? 2 : rows;
          for (int64_t i = m; i < m + rows; i += at_once) {
            // Behind the last row come the next columns of the first ones.
            const int64_t next =
                i + ahead < weight.rows ? ahead * weight.stride : (ahead - weight.rows) * weight.stride + kColumnsAtOnce;
            const Matrix<const weight_t> wi = weight.row_range(i, at_once).column_range(k0, count);
            linear_block<block, at_once, acc, weight_t>({x_columns, block, count, kStride}, wi, wi.data + next,
                                                        bias ? bias + i : nullptr,
                                                        /*go_on=*/k0 > 0, {y.row(n) + i, block, at_once, y.stride});
          }
        });
      });
    }
  }
}

template <typename acc, typename weight_t>
void linear_backward_input(Matrix<const acc> grad_y, Matrix<const weight_t> weight, Matrix<acc> grad_x) {
  constexpr int64_t kSpan = kColumnBlock * kLanes<acc>;
  const int64_t rows = weight.rows, columns = weight.columns;
  for_each_rows<4>(0, grad_y.rows, [&](int64_t n, auto block) {
    int64_t k = 0;
    for (; k + kSpan <= columns; k += kSpan) {
      Vec<acc> sums[kColumnBlock][block.value] = {};
      for (int64_t m = 0; m < rows; m++) {
        __builtin_prefetch(weight.row(m + kWeightRowsAhead) + k);
        for (int i = 0; i < kColumnBlock; i++) {
          const Vec<acc> w = load(weight.row(m) + k + i * kLanes<acc>);
          for (int j = 0; j < block; j++) sums[i][j] += grad_y.row(n + j)[m] * w;
        }
      }
      for (int i = 0; i < kColumnBlock; i++) {
        for (int j = 0; j < block; j++) store(grad_x.row(n + j) + k + i * kLanes<acc>, sums[i][j]);
      }
    }
    for_each_vector<acc>(columns - k, [&](int64_t i, auto lanes) {
      Vec<acc> sums[block.value] = {};
      for (int64_t m = 0; m < rows; m++) {
        const Vec<acc> w = load(weight.row(m) + k + i, lanes);
        for (int j = 0; j < block; j++) sums[j] += grad_y.row(n + j)[m] * w;
      }
      for (int j = 0; j < block; j++) store(grad_x.row(n + j) + k + i, sums[j], lanes);
    });
  });
}

template <typename acc, typename weight_t>
void linear_backward_weight(Matrix<const acc> grad_y, Matrix<const acc> x, Matrix<weight_t> grad_weight) {
  for_each_rows<kRowBlock>(0, grad_weight.rows, [&](int64_t m, auto rows) {
    for_each_vector<acc>(x.columns, [&](int64_t k, auto lanes) {
      Vec<acc> sums[rows.value] = {};
      for (int64_t n = 0; n < x.rows; n++) {
        const Vec<acc> xk = load(x.row(n) + k, lanes);
        for (int i = 0; i < rows; i++) sums[i] += grad_y.row(n)[m + i] * xk;
      }
      for (int i = 0; i < rows; i++) store(grad_weight.row(m + i) + k, sums[i], lanes);
    });
  });
}

template <typename acc>
void moments(const acc* values, int64_t count, acc* mean, acc* variance) {
  Vec<acc> sums{}, squares{};
  for_each_vector<acc>(count, [&](int64_t i, auto lanes) { sums += load(values + i, lanes); });
  *mean = sum(sums) / acc(count);
  acc rest = 0;
  for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
    if constexpr (std::is_same_v<decltype(lanes), int64_t>) {  // a partial vector would count its unused lanes
      for (int64_t j = i; j < i + lanes; j++) rest += (values[j] - *mean) * (values[j] - *mean);
    } else {
      const Vec<acc> difference = load(values + i, lanes) - *mean;
      squares += difference * difference;
    }
  });
  *variance = (sum(squares) + rest) / acc(count);
}

template <typename acc>
void sigmoid(acc* t, int64_t count) {
  for_each_vector<acc>(count,
                       [&](int64_t i, auto lanes) { store(t + i, acc(1) / (acc(1) + exp(-load(t + i, lanes))), lanes); });
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
