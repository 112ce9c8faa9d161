// Attention pooling of one block, and its backward pass.
//
//   logit_p = w . x_p + b         ctx = sum_p m_p x_p with m = softmax(logit)
//   u_p = dctx . x_p              dl_p = m_p (u_p - dctx . ctx)
//   dx = g*scale + m_p dctx + dl_p w      dw = sum_p dl_p x_p (subtract_context of csrc/cpu/pool_inputs.h completes it)
//
// g is the gradient of the output, dctx that of the context, dl_p that of a logit, and m the attention (docs/backward.md). A block
// is small enough to stay in the second-level cache: x comes from memory once, although each formula needs it twice.
#pragma once

#include "simd.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

constexpr int64_t kRowsPerSum = 32;                  // rows of a partial sum: one chain of all rows would round once for each
constexpr int kStrip = kVectorBytes == 64 ? 16 : 8;  // vectors that sums over rows take: as many as the registers hold
constexpr int kRowsAtOnce = 4;                       // rows that share a load and a store of what they are added to
constexpr int kDotsAtOnce = kVectorBytes == 64 ? 16 : 4;  // dot products whose sums across lanes are taken together
// Rows that lie far apart and lines that are written arrive late, so they are asked for so many rows ahead.
constexpr int64_t kRowsAhead = 8;

// dots[r] = sum_i w_i x_ri over `count` elements, for R rows of x at once.
template <int R, typename scalar_t>
inline void dot_rows(const scalar_t* x, int64_t stride, const acc_t<scalar_t>* w, int64_t count, acc_t<scalar_t>* dots) {
  using acc = acc_t<scalar_t>;
  Vec<acc> sums[R];
  clear(sums);
  for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
    const Vec<acc> wi = load(w + i, lanes);
#pragma GCC unroll 4  // early enough for the sums to stay in registers
    for (int r = 0; r < R; r++) sums[r] += wi * load(x + r * stride + i, lanes);
  });
  sum_each(sums, dots);
}

// dots[r] = sum_i w_i x_ri, too, but one row after the other, in the order of memory: a processor fetches such rows well ahead.
template <int R, typename scalar_t>
inline void dot_rows_in_turn(const scalar_t* x, int64_t stride, const acc_t<scalar_t>* w, int64_t count,
                             acc_t<scalar_t>* dots) {
  using acc = acc_t<scalar_t>;
  constexpr int kChains = 4;  // of additions side by side, in one row
  constexpr int64_t lanes = kLanes<acc>;
  Vec<acc> totals[R];
  for (int r = 0; r < R; r++, x += stride) {
    Vec<acc> sums[kChains];
    clear(sums);
    int64_t i = 0;
    for (; i + kChains * lanes <= count; i += kChains * lanes) {
      for (int k = 0; k < kChains; k++) sums[k] += load(w + i + k * lanes) * load(x + i + k * lanes);
    }
    for_each_vector<acc>(count - i, [&](int64_t j, auto last) { sums[0] += load(w + i + j, last) * load(x + i + j, last); });
    totals[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  sum_each(totals, dots);
}

// y_i += sum_r a_r x_ri over all rows, for V vectors of elements, of which the last has `last` lanes: their sums stay in
// registers while the rows go by.
template <int V, typename scalar_t, typename Lanes>
inline void add_rows_strip(const scalar_t* x, int64_t stride, int64_t rows, const acc_t<scalar_t>* a, acc_t<scalar_t>* y,
                           Lanes last) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t lanes = kLanes<acc>;
  constexpr std::integral_constant<int64_t, lanes> all;
  Vec<acc> sums[V] = {};
  for (int64_t r = 0; r < rows; r++, x += stride) {
    const Vec<acc> factor = broadcast(a[r]);
    for (int v = 0; v < V - 1; v++) sums[v] += factor * load(x + v * lanes, all);
    sums[V - 1] += factor * load(x + (V - 1) * lanes, last);
  }
  for (int v = 0; v < V - 1; v++) store(y + v * lanes, load(y + v * lanes, all) + sums[v], all);
  store(y + (V - 1) * lanes, load(y + (V - 1) * lanes, last) + sums[V - 1], last);
}

// y_i += sum_r a_r x_ri over `count` elements of all rows; the order of the additions depends on their number alone.
template <typename scalar_t>
inline void add_rows(const scalar_t* x, int64_t stride, int64_t rows, const acc_t<scalar_t>* a, int64_t count,
                     acc_t<scalar_t>* y) {
  constexpr int64_t lanes = kLanes<acc_t<scalar_t>>;
  constexpr std::integral_constant<int64_t, lanes> all;
  int64_t i = 0;
  for (; i + kStrip * lanes <= count; i += kStrip * lanes) {
    add_rows_strip<kStrip>(x + i, stride, rows, a, y + i, all);
  }
  if (i == count) return;
  const int64_t vectors = (count - i + lanes - 1) / lanes, last = count - i - (vectors - 1) * lanes;
  with_constant<kStrip>(vectors, [&](auto v) {
    if (last == lanes) {
      add_rows_strip<v>(x + i, stride, rows, a, y + i, all);
    } else {
      add_rows_strip<v>(x + i, stride, rows, a, y + i, last);
    }
  });
}

// y_i += sum_r a_r x_ri, too, but in one chain of additions, a few rows at a time: this is for rows that are long, or few.
template <typename scalar_t>
inline void add_rows_in_order(const scalar_t* x, int64_t stride, int64_t rows, const acc_t<scalar_t>* a, int64_t count,
                              acc_t<scalar_t>* y) {
  using acc = acc_t<scalar_t>;
  const auto add = [&](auto apart) {
    for_each_rows<kRowsAtOnce>(0, rows, [&](int64_t first, auto at_once) {
      Vec<acc> factor[at_once.value];
      for (int r = 0; r < at_once; r++) factor[r] = broadcast(a[first + r]);
      for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
        Vec<acc> sum = load(y + i, lanes);
        for (int r = 0; r < at_once; r++) {
          if constexpr (apart) __builtin_prefetch(x + (first + r + kRowsAhead) * stride + i);
          sum += factor[r] * load(x + (first + r) * stride + i, lanes);
        }
        store(y + i, sum, lanes);
      });
    });
  };
  with_flags(add, count < stride);
}

// dots[p] = sum_c w_c x_cp for every position of the block. The order of the additions depends on C alone.
template <typename scalar_t>
void position_dots(Block<const scalar_t> x, const acc_t<scalar_t>* w, acc_t<scalar_t>* dots) {
  if (x.channels_last) {
    for_each_rows<kDotsAtOnce>(0, x.positions, [&](int64_t p, auto rows) {
      dot_rows_in_turn<rows>(x.data + p * x.position_stride, x.position_stride, w, x.channels, dots + p);
    });
    return;
  }
  std::memset(dots, 0, x.positions * sizeof *dots);
  if (x.positions <= kStrip * kLanes<acc_t<scalar_t>>) {  // the sums of one strip are single chains, too
    add_rows(x.data, x.channel_stride, x.channels, w, x.positions, dots);
  } else {
    add_rows_in_order(x.data, x.channel_stride, x.channels, w, x.positions, dots);
  }
}

// sums[c] += sum_p a_p x_cp for every channel of the block.
template <typename scalar_t>
void channel_dots(Block<const scalar_t> x, const acc_t<scalar_t>* a, acc_t<scalar_t>* sums) {
  if (x.channels_last) {
    for (int64_t p = 0; p < x.positions; p += kRowsPerSum) {
      const int64_t rows = x.positions - p < kRowsPerSum ? x.positions - p : kRowsPerSum;
      add_rows(x.data + p * x.position_stride, x.position_stride, rows, a + p, x.channels, sums);
    }
  } else {
    for_each_rows<4>(0, x.channels, [&](int64_t c, auto rows) {
      acc_t<scalar_t> dots[rows.value];
      dot_rows<rows>(x.data + c * x.channel_stride, x.channel_stride, a, x.positions, dots);
      for (int r = 0; r < rows; r++) sums[c + r] += dots[r];
    });
  }
}

// values[i] += addend; returns the largest of them, -inf for none and for NaN.
template <typename acc>
inline acc add_and_max(acc* values, int64_t count, acc addend) {
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  Vec<acc> largest = broadcast(lowest);
  acc rest = lowest;
  for_each_vector<acc>(count, [&](int64_t i, auto lanes) {
    const Vec<acc> value = load(values + i, lanes) + addend;
    store(values + i, value, lanes);
    if constexpr (std::is_same_v<decltype(lanes), int64_t>) {  // a partial vector must not count its unused lanes
      for (int64_t j = i; j < i + lanes; j++) rest = values[j] > rest ? values[j] : rest;
    } else {
      largest = max<acc>(value, largest);
    }
  });
  for (int lane = 0; lane < kLanes<acc>; lane++) rest = largest[lane] > rest ? largest[lane] : rest;
  return rest;
}

// Zeros in the place of subnormal numbers that are not negative: a processor takes a hundred cycles and more for each product
// with one.
template <typename acc>
inline Vec<acc> without_subnormal(Vec<acc> v) {
  return v < std::numeric_limits<acc>::min() ? Vec<acc>{} : v;
}

template <typename scalar_t>
void attention_pool(Block<const scalar_t> x, const acc_t<scalar_t>* weight, acc_t<scalar_t> bias, acc_t<scalar_t>* logits,
                    SoftmaxSum<acc_t<scalar_t>>& state) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  position_dots(x, weight, logits);
  const acc tile_max = add_and_max(logits, x.positions, bias);
  const acc new_max = tile_max > state.max ? tile_max : state.max;
  const acc reference = new_max == lowest ? acc(0) : new_max;  // all logits -inf: every weight is exp(-inf) = 0
  if (new_max != state.max) {
    const acc rescale = std::exp(state.max - reference);  // 0 for the first block
    state.sum *= rescale;
    for (int64_t c = 0; c < x.channels; c++) state.weighted[c] *= rescale;
    state.max = new_max;
  }

  alignas(kVectorBytes) acc weights[kMaxTile];
  Vec<acc> sums{};
  for_each_vector<acc>(x.positions, [&](int64_t p, auto lanes) {
    const Vec<acc> e = without_subnormal<acc>(exp(load(logits + p, lanes) - reference));
    store(weights + p, e, lanes);
    sums += load(weights + p, lanes);  // loaded again: a partial vector must not count its unused lanes
  });
  state.sum += sum(sums);
  channel_dots(x, weights, state.weighted);
}

// dx = g*scale + m dctx + dl w and dw += sum_p dl x for R channels in NCHW, which share the vectors over positions.
template <int R, typename scalar_t, bool non_temporal, bool has_grad, bool has_weight_grad>
inline void grad_channels(Block<const scalar_t> grad, Block<const scalar_t> x, const acc_t<scalar_t>* m,
                          const acc_t<scalar_t>* dl, const PoolBackwardSample<acc_t<scalar_t>>& sample, Block<scalar_t> grad_x,
                          int64_t c, acc_t<scalar_t>* grad_weight) {
  using acc = acc_t<scalar_t>;
  const int64_t g_stride = grad.channel_stride, x_stride = x.channel_stride, dx_stride = grad_x.channel_stride;
  const scalar_t *g = has_grad ? grad.data + c * g_stride : nullptr, *xc = x.data + c * x_stride;
  scalar_t* dx = grad_x.data + c * dx_stride;
  Vec<acc> dctx[R], w[R], scale[R], dw[R];
  clear(dw);
  for (int r = 0; r < R; r++) {
    dctx[r] = broadcast(sample.grad_context[c + r]);
    w[r] = broadcast(sample.weight[c + r]);
    scale[r] = broadcast(sample.scale ? sample.scale[c + r] : acc(1));
  }
  for_each_vector_to<non_temporal>(dx, x.positions, [&](int64_t p, auto lanes) {
    const Vec<acc> mp = load(m + p, lanes), dlp = load(dl + p, lanes);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      if constexpr (has_grad) __builtin_prefetch(g + (r + kRowsAhead) * g_stride + p);
      if constexpr (!non_temporal) __builtin_prefetch(dx + (r + kRowsAhead) * dx_stride + p, 1);
      Vec<acc> value = mp * dctx[r] + dlp * w[r];
      if constexpr (has_grad) value += load(g + r * g_stride + p, lanes) * scale[r];
      if constexpr (has_weight_grad) dw[r] += dlp * load(xc + r * x_stride + p, lanes);
      store_to<non_temporal>(dx + r * dx_stride + p, value, lanes);
    }
  });
  if constexpr (has_weight_grad) {
    for (int r = 0; r < R; r++) grad_weight[c + r] += sum(dw[r]);
  }
}

// dx and dw of R neighbouring positions from p on, in channels_last, which share the vectors over channels.
template <int R, typename scalar_t, bool non_temporal, bool has_grad, bool has_scale, bool has_weight_grad>
inline void grad_positions(const Block<const scalar_t>& grad, const Block<const scalar_t>& x_block,
                           const acc_t<scalar_t>* attention, const acc_t<scalar_t>* all_dl,
                           const PoolBackwardSample<acc_t<scalar_t>>& sample, const Block<scalar_t>& grad_x, int64_t p,
                           acc_t<scalar_t>* dw) {
  using acc = acc_t<scalar_t>;
  const int64_t g_stride = grad.position_stride, x_stride = x_block.position_stride, dx_stride = grad_x.position_stride;
  const scalar_t *g = grad.data + p * g_stride, *x = x_block.data + p * x_stride;
  scalar_t* dx = grad_x.data + p * dx_stride;
  Vec<acc> mr[R], dlr[R];
  for (int r = 0; r < R; r++) {
    mr[r] = broadcast(attention[p + r]);
    dlr[r] = broadcast(all_dl[p + r]);
  }
  for_each_vector_to<non_temporal>(dx, x_block.channels, [&](int64_t c, auto lanes) {
    const Vec<acc> dctx = load(sample.grad_context + c, lanes), w = load(sample.weight + c, lanes);
    Vec<acc> scale{}, total{};
    if constexpr (has_scale) scale = load(sample.scale + c, lanes);
    if constexpr (has_weight_grad) total = load(dw + c, lanes);
    for (int r = 0; r < R; r++) {
      if constexpr (has_grad) __builtin_prefetch(g + (r + R) * g_stride + c);
      if constexpr (!non_temporal) __builtin_prefetch(dx + (r + R) * dx_stride + c, 1);
      Vec<acc> value = mr[r] * dctx + dlr[r] * w;
      if constexpr (has_grad && has_scale) value += load(g + r * g_stride + c, lanes) * scale;
      if constexpr (has_grad && !has_scale) value += load(g + r * g_stride + c, lanes);
      if constexpr (has_weight_grad) total += dlr[r] * load(x + r * x_stride + c, lanes);
      store_to<non_temporal>(dx + r * dx_stride + c, value, lanes);
    }
    if constexpr (has_weight_grad) store(dw + c, total, lanes);
  });
}

// dctx . ctx in the very order in which position_dots adds: where the softmax is saturated, ctx is one x_p, and
// u_p - dctx . ctx must then vanish, not leave a rounding error.
template <typename acc>
acc context_dot(const acc* grad_context, const acc* context, int64_t channels, bool channels_last) {
  acc dot;
  position_dots(Block<const acc>{context, channels, 1, 1, 1, channels_last}, grad_context, &dot);
  return dot;
}

template <typename scalar_t>
void pool_gradient(Block<const scalar_t> grad, Block<const scalar_t> x, const acc_t<scalar_t>* attention,
                   const acc_t<scalar_t>* dl, const PoolBackwardSample<acc_t<scalar_t>>& sample, Block<scalar_t> grad_x,
                   acc_t<scalar_t>* grad_weight) {
  if (!grad_x.data) {
    if (!grad_weight) return;
    if (!x.channels_last) return channel_dots(x, dl, grad_weight);
    return add_rows_in_order(x.data, x.position_stride, x.positions, dl, x.channels, grad_weight);  // as grad_positions does
  }
  // Past the caches whole lines are written, and rows that are written together must begin their lines together.
  if (x.channels_last) {
    with_flags(
        [&](auto non_temporal, auto has_grad, auto has_scale, auto has_weight_grad) {
          for_each_rows<4>(0, x.positions, [&](int64_t p, auto rows) {
            grad_positions<rows, scalar_t, non_temporal, has_grad, has_scale, has_weight_grad>(grad, x, attention, dl, sample,
                                                                                               grad_x, p, grad_weight);
          });
        },
        grad_x.non_temporal && grad_x.position_stride % kLine<scalar_t> == 0, grad.data != nullptr, sample.scale != nullptr,
        grad_weight != nullptr);
  } else {
    with_flags(
        [&](auto non_temporal, auto has_grad, auto has_weight_grad) {
          for_each_rows<non_temporal ? 1 : 2>(0, x.channels, [&](int64_t c, auto rows) {
            grad_channels<rows, scalar_t, non_temporal, has_grad, has_weight_grad>(grad, x, attention, dl, sample, grad_x, c,
                                                                                   grad_weight);
          });
        },
        grad_x.non_temporal, grad.data != nullptr, grad_weight != nullptr);
  }
  if (grad_x.non_temporal) fence();
}

// sum_i parts[i, p] for one vector of positions, in their order.
template <typename acc, typename Lanes>
inline Vec<acc> sum_of_parts(const acc* parts, int64_t parts_count, int64_t stride, int64_t p, Lanes lanes) {
  Vec<acc> sum = load(parts + p, lanes);
  for (int64_t i = 1; i < parts_count; i++) sum += load(parts + i * stride + p, lanes);
  return sum;
}

// Always inlined, so that attention_pool_backward, which passes a single part, needs no loop over the parts.
template <typename acc>
[[gnu::always_inline]] inline acc logit_gradient(const acc* parts, int64_t parts_count, int64_t stride, int64_t count,
                                                 const acc* attention, acc context_dot, acc* dl) {
  Vec<acc> sums{};
  for_each_vector<acc>(count, [&](int64_t p, auto lanes) {
    const Vec<acc> u = sum_of_parts(parts, parts_count, stride, p, lanes);
    store(dl + p, load(attention + p, lanes) * (u - context_dot), lanes);
    sums += load(dl + p, lanes);  // loaded again: a partial vector must not count its unused lanes
  });
  return sum(sums);
}

template <typename scalar_t>
acc_t<scalar_t> attention_pool_backward(Block<const scalar_t> grad, Block<const scalar_t> x, const acc_t<scalar_t>* attention,
                                        const PoolBackwardSample<acc_t<scalar_t>>& sample, Block<scalar_t> grad_x,
                                        acc_t<scalar_t>* grad_weight) {
  using acc = acc_t<scalar_t>;
  alignas(kVectorBytes) acc dl[kMaxTile];
  position_dots(x, sample.grad_context, dl);
  const acc sum_dl = logit_gradient<acc>(dl, 1, x.positions, x.positions, attention, sample.context_dot, dl);
  pool_gradient(grad, x, attention, dl, sample, grad_x, grad_weight);
  return sum_dl;
}

template <typename acc>
void softmax(acc* logits, int64_t count, acc max, acc sum) {
  const acc reference = max == -std::numeric_limits<acc>::infinity() ? acc(0) : max;
  for_each_vector<acc>(count, [&](int64_t p, auto lanes) {
    store(logits + p, without_subnormal<acc>(exp(load(logits + p, lanes) - reference) / sum), lanes);
  });
}

template <typename acc>
void softmax_of_sum(const acc* parts, int64_t parts_count, int64_t count, acc bias, acc* attention) {
  for_each_vector<acc>(
      count, [&](int64_t p, auto lanes) { store(attention + p, sum_of_parts(parts, parts_count, count, p, lanes), lanes); });
  const acc max = add_and_max(attention, count, bias);
  const acc reference = max == -std::numeric_limits<acc>::infinity() ? acc(0) : max;
  Vec<acc> sums{};
  for_each_vector<acc>(count, [&](int64_t p, auto lanes) {
    store(attention + p, exp(load(attention + p, lanes) - reference), lanes);
    sums += load(attention + p, lanes);  // loaded again: a partial vector must not count its unused lanes
  });
  const acc total = sum(sums);
  for_each_vector<acc>(count, [&](int64_t p, auto lanes) {
    store(attention + p, without_subnormal<acc>(load(attention + p, lanes) / total), lanes);
  });
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
