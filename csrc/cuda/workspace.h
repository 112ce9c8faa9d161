// Memory that the kernels of one call share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"

namespace gcnet_ext::cuda {

// Memory for one call, valid until its launches are done.
class Workspace {
 public:
  virtual ~Workspace() = default;

  template <typename Value>
  Value* take(int64_t count) {
    return static_cast<Value*>(allocate(std::max<int64_t>(count, 1) * sizeof(Value)));
  }
  unsigned* zeros(int64_t count, cudaStream_t stream) {
    unsigned* counters = take<unsigned>(count);
    if (count > 0) zero_async(counters, count * sizeof(unsigned), stream);
    return counters;
  }

 private:
  virtual void* allocate(size_t bytes) = 0;
};

}  // namespace gcnet_ext::cuda
