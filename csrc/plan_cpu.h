// How the CPU kernels cut their work. Results have the same bits on all machines with the same instruction set: every plan but
// plan_cpu_group is a function of shape and dtype alone, not of the threads. Python sees the plans as gcnet_ext._C.plan(...).
#pragma once

#include <cstdint>

namespace gcnet_ext {

// The attention pool of one sample on the CPU.
//
// by_channels: a small or wide sample in NCHW is cut into the blocks of its sweep, which are whole rows that follow one
// another. Every block adds to the logits, and then takes the weighted sums of its own channels.
//
// Otherwise its P positions are cut into `splits` parts of `split` positions. Each part is walked in tiles of `tile` positions,
// which stay in the second-level cache between the logits and the weighted sum.
struct PoolPlan {
  bool by_channels;
  int64_t tile, split, splits;
};

// A sweep over a sample on the CPU, which goes once over each of its elements (fusion, channel sums): it is cut into blocks of
// `channels` by `positions` elements.
struct SweepPlan {
  int64_t channels, positions;              // of one block
  int64_t channel_blocks, position_blocks;  // how many there are
};

PoolPlan plan_cpu_pool(int64_t channels, int64_t positions, int64_t element_size, bool channels_last);
SweepPlan plan_cpu_sweep(int64_t channels, int64_t positions, int64_t element_size, bool channels_last);

// How many samples go through all steps of the block before the next ones start: few enough for every thread to find its part
// of x in a cache when it is read again, and enough to outweigh the weights of the transform, which are read once per group.
// per_thread: every thread takes groups of its own. This is the only plan that may look at the number of threads, because it
// decides when and where a sample is worked on, not how.
struct GroupPlan {
  int64_t samples;
  bool per_thread;
};

GroupPlan plan_cpu_group(int64_t samples, int64_t sample_bytes, int64_t weight_bytes, int64_t threads);

// Whether a call that goes through maps of so many bytes, its output included, writes that output past the caches, by
// non-temporal stores. The next operator would not find so much in a cache anyway; the lines of the output are then not read
// before they are written, and x keeps its place in the caches.
bool plan_cpu_non_temporal(int64_t bytes);

}  // namespace gcnet_ext
