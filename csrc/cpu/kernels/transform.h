// The products of the transform: rows [n, K] of context or hidden units with a weight matrix W [M, K].
//
// One sample's result never depends on how many others are worked on with it: every output element has its own accumulator and
// its own fixed order of additions.
#pragma once

#include "simd.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr int kRowBlock = 4;                              // rows of W that are worked on together
constexpr int kSampleBlock = kVectorBytes == 64 ? 8 : 3;  // samples that share one load of W
constexpr int kSums = kVectorBytes == 64 ? 16 : 12;       // of a row and a sample, side by side: what the registers hold
constexpr int kColumnBlock = kVectorBytes == 64 ? 4 : 2;  // vectors along K
constexpr int64_t kColumnsAtOnce = 512;                   // of x, which stays in the first-level cache meanwhile
constexpr int64_t kRowPanel = 64;                         // rows of W that go through all samples, from the second level
constexpr int64_t kWeightsAhead = 4096;                   // W may come from memory: ask for it so many elements early
constexpr int64_t kWeightRowsAhead = 16;                  // a column block of W is short rows far apart: so many rows early

// y[n, m] = start + sum_k W[m, k] x[n, k] for J samples, I rows and `count` columns; start is y[n, m] for those that go on with
// a sum, otherwise bias[m]. The rows at `next` are fetched meanwhile, into the second-level cache. (Not inlined: several in one
// function run out of registers.)
template <int J, int I, typename acc, typename weight_t>
[[gnu::noinline]] void linear_block(const acc* x, int64_t x_stride, const weight_t* weight, int64_t columns, int64_t count,
                                    const weight_t* next, const acc* bias, bool go_on, acc* y, int64_t y_stride) {
  constexpr int kRead = 0, kSecondLevel = 2;
  Vec<acc> sums[J * I];
  clear(sums);
  for_each_vector<acc>(count, [&](int64_t k, auto lanes) {
    Vec<acc> xk[J];
#pragma GCC unroll kSampleBlock  // early enough for the sums to stay in registers
    for (int j = 0; j < J; j++) xk[j] = load(x + j * x_stride + k, lanes);
#pragma GCC unroll kRowBlock
    for (int i = 0; i < I; i++) {
      __builtin_prefetch(next + i * columns + k, kRead, kSecondLevel);
      const Vec<acc> w = load(weight + i * columns + k, lanes);
#pragma GCC unroll kSampleBlock
      for (int j = 0; j < J; j++) sums[j * I + i] += w * xk[j];
    }
  });
  acc start[I] = {};
  if (bias) std::memcpy(start, bias, sizeof start);
  alignas(kVectorBytes) acc totals[J * I];
  sum_each(sums, totals);
  for (int j = 0; j < J; j++) {
    acc* yj = y + j * y_stride;
    if (go_on) {
      for (int i = 0; i < I; i++) yj[i] += totals[j * I + i];
    } else {
      for (int i = 0; i < I; i++) yj[i] = totals[j * I + i] + start[i];
    }
  }
}

template <typename acc, typename weight_t>
void linear(const acc* x, int64_t x_stride, int64_t samples, const weight_t* weight, int64_t columns, const acc* bias,
            int64_t m0, int64_t m1, acc* y, int64_t y_stride) {
  // The columns of a few samples, side by side: rows that are a power of two apart would throw each other out of the cache.
  constexpr int64_t kStride = kColumnsAtOnce + kLanes<acc>;
  alignas(kVectorBytes) acc some_x[kSampleBlock * kStride];
  for (int64_t k0 = 0; k0 < columns; k0 += kColumnsAtOnce) {
    const int64_t count = std::min(kColumnsAtOnce, columns - k0);
    const int64_t ahead = std::max<int64_t>(kRowBlock, kWeightsAhead / count);
    for (int64_t panel = m0; panel < m1; panel += kRowPanel) {
      for_each_batch<kSampleBlock>(samples, [&](int64_t n, auto block) {
        for (int j = 0; j < block; j++) std::copy_n(x + (n + j) * x_stride + k0, count, some_x + j * kStride);
        for_each_rows<kRowBlock>(panel, std::min(m1, panel + kRowPanel), [&](int64_t m, auto rows) {
          constexpr int some = rows * block > kSums ? 2 : rows;
          for (int64_t i = m; i < m + rows; i += some) {
            // Behind the last row come the next columns of the first ones.
            const int64_t next = i + ahead < m1 ? ahead * columns : (m0 + ahead - m1) * columns + kColumnsAtOnce;
            const weight_t* wi = weight + i * columns + k0;
            linear_block<block, some>(some_x, kStride, wi, columns, count, wi + next, bias ? bias + i : nullptr,
                                      /*go_on=*/k0 > 0, y + n * y_stride + i, y_stride);
          }
        });
      });
    }
  }
}

template <typename acc, typename weight_t>
void linear_backward_input(const acc* grad_y, int64_t y_stride, int64_t samples, const weight_t* weight, int64_t columns,
                           int64_t m0, int64_t m1, int64_t k0, int64_t k1, acc* grad_x, int64_t x_stride) {
  constexpr int64_t kSpan = kColumnBlock * kLanes<acc>;
  for_each_rows<4>(0, samples, [&](int64_t n, auto block) {
    int64_t k = k0;
    for (; k + kSpan <= k1; k += kSpan) {
      Vec<acc> sums[kColumnBlock][block.value] = {};
      for (int64_t m = m0; m < m1; m++) {
        __builtin_prefetch(weight + (m + kWeightRowsAhead) * columns + k);
        for (int i = 0; i < kColumnBlock; i++) {
          const Vec<acc> w = load(weight + m * columns + k + i * kLanes<acc>);
          for (int j = 0; j < block; j++) sums[i][j] += grad_y[(n + j) * y_stride + m] * w;
        }
      }
      for (int i = 0; i < kColumnBlock; i++) {
        for (int j = 0; j < block; j++) store(grad_x + (n + j) * x_stride + k + i * kLanes<acc>, sums[i][j]);
      }
    }
    for_each_vector<acc>(k1 - k, [&](int64_t i, auto lanes) {
      Vec<acc> sums[block.value] = {};
      for (int64_t m = m0; m < m1; m++) {
        const Vec<acc> w = load(weight + m * columns + k + i, lanes);
        for (int j = 0; j < block; j++) sums[j] += grad_y[(n + j) * y_stride + m] * w;
      }
      for (int j = 0; j < block; j++) store(grad_x + (n + j) * x_stride + k + i, sums[j], lanes);
    });
  });
}

template <typename acc, typename weight_t>
void linear_backward_weight(const acc* grad_y, int64_t y_stride, const acc* x, int64_t x_stride, int64_t samples,
                            int64_t columns, int64_t m0, int64_t m1, weight_t* grad_weight) {
  for_each_rows<kRowBlock>(m0, m1, [&](int64_t m, auto rows) {
    for_each_vector<acc>(columns, [&](int64_t k, auto lanes) {
      Vec<acc> sums[rows.value] = {};
      for (int64_t n = 0; n < samples; n++) {
        const Vec<acc> xk = load(x + n * x_stride + k, lanes);
        for (int i = 0; i < rows; i++) sums[i] += grad_y[n * y_stride + m + i] * xk;
      }
      for (int i = 0; i < rows; i++) store(grad_weight + (m + i) * columns + k, sums[i], lanes);
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
