// Which positions of a sample count in the pool. They are walked in runs of neighbours, so that the kernels skip the others.
#pragma once

#include <algorithm>
#include <cstring>

#include "tensors.h"

namespace gcnet_ext::cpu {

class Valid {
 public:
  // Every position counts.
  Valid() = default;
  // A dense bool [N or 1, *spatial], which must outlive this view of it; without a tensor every position counts.
  Valid(const OptionalTensor& valid, int64_t positions) : positions_(positions) {
    if (!valid) return;
    data_ = data<bool>(*valid);
    stride_ = valid->size(0) == 1 ? 0 : positions;
  }
  // The positions of the samples from `first` on.
  Valid samples(int64_t first) const {
    Valid part = *this;
    part.data_ += first * stride_;
    return part;
  }
  explicit operator bool() const { return data_ != nullptr; }

  // How many positions of a sample count.
  int64_t count(int64_t sample) const { return data_ ? std::count(row(sample), row(sample) + positions_, true) : positions_; }

  // body(begin, end, counts) for the longest runs of positions, from p0 up to p1, that all count or all do not.
  template <typename Body>
  void for_each_piece(int64_t sample, int64_t p0, int64_t p1, const Body& body) const {
    if (!data_) return body(p0, p1, true);
    const bool* const valid = row(sample);
    for (int64_t begin = p0; begin < p1;) {
      const void* other = std::memchr(valid + begin, !valid[begin], p1 - begin);
      const int64_t end = other ? static_cast<const bool*>(other) - valid : p1;
      body(begin, end, valid[begin]);
      begin = end;
    }
  }
  // body(begin, end) for the runs of positions that count.
  template <typename Body>
  void for_each_run(int64_t sample, int64_t p0, int64_t p1, const Body& body) const {
    for_each_piece(sample, p0, p1, [&](int64_t begin, int64_t end, bool counts) {
      if (counts) body(begin, end);
    });
  }
  // values[p] = value at the positions of a sample that do not count.
  template <typename acc>
  void fill_others(int64_t sample, int64_t p0, int64_t p1, acc value, acc* values) const {
    for_each_piece(sample, p0, p1, [&](int64_t begin, int64_t end, bool counts) {
      if (!counts) std::fill(values + begin, values + end, value);
    });
  }

 private:
  const bool* row(int64_t sample) const { return data_ + sample * stride_; }

  const bool* data_ = nullptr;
  int64_t positions_ = 0, stride_ = 0;
};

}  // namespace gcnet_ext::cpu
