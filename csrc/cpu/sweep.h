// A sweep goes once over every block of a feature map.
#pragma once

#include "parallel.h"
#include "tensors.h"

namespace gcnet_ext::cpu {

// The i-th block of a sweep: `channels` from c0 on at `positions` from p0 on. The blocks of a sample follow one another.
struct SweepItem {
  int64_t i, sample, c0, channels, p0, positions, position_block;
};

// body(item) for every block of a map's samples, each by one thread.
template <typename Body>
void for_each_block(const SweepPlan& plan, const Layout& layout, const Body& body, Order order = Order::forwards) {
  const int64_t items = layout.samples * plan.channel_blocks * plan.position_blocks;
  const auto item = [&](int64_t i) {
    const int64_t channel_block = i % plan.channel_blocks, rest = i / plan.channel_blocks;
    const int64_t position_block = rest % plan.position_blocks;
    const int64_t c0 = channel_block * plan.channels, p0 = position_block * plan.positions;
    body(SweepItem{i, rest / plan.position_blocks, c0, std::min(plan.channels, layout.channels - c0), p0,
                   std::min(plan.positions, layout.positions - p0), position_block});
  };
  parallel_for(items, layout.samples * layout.channels * layout.positions, item, order);
}

template <typename scalar_t>
SweepPlan sweep_plan(const Map<scalar_t>& x) {
  return plan_cpu_sweep(x.layout.channels, x.layout.positions, sizeof(scalar_t), x.layout.channels_last);
}

template <typename scalar_t>
Block<scalar_t> block_of(const Map<scalar_t>& x, const SweepItem& item) {
  return x.block(item.sample, item.c0, item.channels, item.p0, item.positions);
}

// The channels of a block at the positions begin <= p < end.
template <typename scalar_t>
Block<scalar_t> block_of(const Map<scalar_t>& x, const SweepItem& item, int64_t begin, int64_t end) {
  return x.block(item.sample, item.c0, item.channels, begin, end - begin);
}

// What a matrix [N, C] has for the channels of a block; null where it is absent.
template <typename T>
T* channels_of(const Matrix<T>& matrix, const SweepItem& item) {
  return matrix.data ? matrix.row(item.sample) + item.c0 : nullptr;
}

}  // namespace gcnet_ext::cpu
