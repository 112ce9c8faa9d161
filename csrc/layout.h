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

// Whether the channels of a position lie next to each other, and the positions apart. gcnet_ext/ops/_relu_bits.py has this
// rule, too.
bool is_channels_last(const Tensor& x);
// The positions of x: the product of its spatial sizes.
int64_t positions(const Tensor& x);
// The dtype in which sums over x are taken: float64 for float64, float32 for everything else.
ScalarType accumulation_dtype(const Tensor& x);
// The layout of a tensor that native() returned.
Layout layout_of(const Tensor& x);
// x itself when it lies in one of the two layouts, otherwise a dense copy in the memory format it is nearest to.
Tensor native(const Tensor& x);
// x itself when it is dense in one of the two layouts, otherwise a dense copy.
Tensor native_dense(const Tensor& x);
// Copies what was computed on a dense copy of x back into x; does nothing where the map is x itself.
void write_back(const Tensor& map, const Tensor& x);
// grad itself if it lies as native(like) does, otherwise a dense copy that does, because kernels walk the two together.
Tensor native_like(const Tensor& grad, const Tensor& like);
// Whether no two elements of x share memory, so that each can be overwritten.
bool has_own_memory(const Tensor& x);
// How a tensor and x, which have the same sizes and dtype, share memory: not at all; completely, each element with the same
// element of x; or in part. If the two are interleaved, it is unknown.
enum class Overlap { none, all, partial, unknown };
Overlap overlap(const Tensor& tensor, const Tensor& x);
// How many bytes hold a bit for every element of a sample of x. The bits of a channel (NCHW) or of a position (channels_last)
// begin with a byte of their own, so that no two threads write to one byte.
int64_t bytes_of_bits(const Tensor& x);
// An uninitialised contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);
// An uninitialised dense tensor like a parameter. If the parameter is contiguous it has exactly the parameter's strides, even
// for dimensions of size 1 (channels_last gives a 1x1 convolution unusual ones): DistributedDataParallel compares them.
Tensor empty_like_parameter(const Tensor& parameter);
// An uninitialised tensor of the shape and memory format of x, dense.
Tensor empty_like_map(const Tensor& x);

}  // namespace gcnet_ext
