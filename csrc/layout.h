// How a feature map [N, C, *spatial] lies in memory. Two layouts are native: the positions of a channel next to each other
// (NCHW) and the channels of a position next to each other (channels_last). In both the spatial dimensions count as one
// dimension of P positions, and the other strides are free, so slices along N and C are read in place.
#pragma once

#include "stable.h"

#include <cstdint>
#include <vector>

namespace gcnet_ext {

struct Layout {
  int64_t samples, channels, positions;
  int64_t sample_stride, channel_stride, position_stride;  // in elements
  bool channels_last;                                      // channel_stride is 1, otherwise position_stride is
};

// Channels next to each other and positions apart: the rule of gcnet_ext/_library.py, word for word.
bool is_channels_last(const Tensor& x);
// The layout of a tensor that native() returned.
Layout layout_of(const Tensor& x);
// x itself when it lies in one of the two layouts, otherwise a dense copy in the memory format it is nearest to.
Tensor native(const Tensor& x);
// The same with the memory format of `like`: for a gradient that has to be walked together with x.
Tensor native_like(const Tensor& grad, const Tensor& like);
// An uninitialised tensor of the shape and memory format of x, dense.
Tensor empty_like_map(const Tensor& x);

}  // namespace gcnet_ext
