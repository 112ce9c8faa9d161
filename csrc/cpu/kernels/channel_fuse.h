// Channel fusion of one block, and the sums over positions that its backward pass and average pooling need.
//
//   out = relu(x*scale + shift + residual)        sum_a = sum_p a_p        sum_ab = sum_p a_p b_p
//
// The ReLU leaves a bit for each element, 0 where its argument is at most 0: the gradient passes where the bit is 1.
#pragma once

#include "simd.h"

namespace gcnet_ext::cpu::GCNET_CAPABILITY {

// A processor fetches the lines that it writes later than those that it reads, so they are asked for so many elements ahead.
template <typename scalar_t>
constexpr int64_t kWriteAhead = 2048 / sizeof(scalar_t);

// row[i] = value(i, lanes) for `count` elements of a row, in their order.
template <bool non_temporal, typename scalar_t, typename Value>
[[gnu::always_inline]] inline void write_row(scalar_t* row, int64_t count, const Value& value) {
  using acc = acc_t<scalar_t>;
  constexpr std::integral_constant<int64_t, kLanes<acc>> all;
  if constexpr (non_temporal) {
    return for_each_vector_to<true>(row, count,
                                    [&](int64_t i, auto lanes) { store_to<true>(row + i, value(i, lanes), lanes); });
  }
  const auto ask = [&](int64_t i) { __builtin_prefetch(row + i + kWriteAhead<scalar_t>, 1); };
  constexpr int64_t lines = std::max<int64_t>(1, 2 * all / kLine<scalar_t>);
  int64_t i = 0;
  for (; i + 2 * all <= count; i += 2 * all) {
    for (int64_t line = 0; line < lines; line++) ask(i + line * kLine<scalar_t>);
    const Vec<acc> first = value(i, all), second = value(i + all, all);
    store_two(row + i, first, second);
  }
  if (i == count) return;
  ask(i);
  for_each_vector<acc>(count - i, [&](int64_t j, auto lanes) { store(row + i + j, value(i + j, lanes), lanes); });
}

// Writes the bits of a row, in their order.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* next) : next_(next) {}
  void push(uint32_t bits, int64_t count) {
    bits_ |= static_cast<uint64_t>(bits & ((1u << count) - 1)) << held_;
    for (held_ += count; held_ >= 8; held_ -= 8, bits_ >>= 8) *next_++ = static_cast<uint8_t>(bits_);
  }
  void flush() {
    if (held_ > 0) *next_ = static_cast<uint8_t>(bits_);
  }

 private:
  uint8_t* next_;
  uint64_t bits_ = 0;
  int64_t held_ = 0;  // bits that have not been written
};
// Reads the bits of a row, in their order.
class BitReader {
 public:
  explicit BitReader(const uint8_t* next) : next_(next) {}
  uint32_t pull(int64_t count) {
    for (; held_ < count; held_ += 8) bits_ |= static_cast<uint64_t>(*next_++) << held_;
    const uint32_t found = static_cast<uint32_t>(bits_);
    bits_ >>= count;
    held_ -= count;
    return found;
  }

 private:
  const uint8_t* next_;
  uint64_t bits_ = 0;
  int64_t held_ = 0;  // bits that have been read and not been asked for
};

// row = in, bit for bit. Arithmetic could change the bits of a NaN, and with AVX512_BF16 it would turn a bfloat16 below 2^-126 into
// zero.
template <bool non_temporal, typename scalar_t>
inline void copy_row(const scalar_t* in, int64_t count, scalar_t* row) {
  const auto copy = [&](int64_t begin, int64_t end) {
    std::memmove(row + begin, in + begin, (end - begin) * sizeof(scalar_t));
  };
  if constexpr (!non_temporal) return copy(0, count);
  constexpr int64_t line = kLine<scalar_t>, lanes = kVectorBytes / sizeof(scalar_t);
  const int64_t address = reinterpret_cast<intptr_t>(row) / sizeof(scalar_t);
  const int64_t begin = std::min(-address & (line - 1), count), end = begin + (count - begin) / line * line;
  copy(0, begin);
  for (int64_t i = begin; i < end; i += lanes) {  // whole vectors are moved as if they were of floats
    store_non_temporal(reinterpret_cast<float*>(row + i), load(reinterpret_cast<const float*>(in + i)));
  }
  copy(end, count);
}

// row = relu(in*scale + shift + residual), with a residual or a ReLU, or both; scale(i, lanes) and shift(i, lanes) are the
// vectors from element i on. The bits of the ReLU go to `bits`, unless that is null.
template <bool non_temporal, bool has_residual, bool has_relu, typename scalar_t, typename Scale, typename Shift>
[[gnu::always_inline]] inline void fuse_row_with(const scalar_t* in, const scalar_t* residual, int64_t count, uint8_t* bits,
                                                 const Scale& scale, const Shift& shift, scalar_t* row) {
  using acc = acc_t<scalar_t>;
  BitWriter positive(bits);
  write_row<non_temporal>(row, count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    Vec<acc> value = load(in + i, lanes) * scale(i, lanes) + shift(i, lanes);
    if constexpr (has_residual) value += load(residual + i, lanes);
    if constexpr (has_relu) {
      if (bits) positive.push(above_zero(value), lanes);
      value = value < acc(0) ? Vec<acc>{} : value;  // a NaN stays one
    }
    return value;
  });
  if (bits) positive.flush();
}

// out = relu(x*scale + shift + residual) with a residual or a ReLU, or both.
template <bool non_temporal, bool has_residual, bool has_relu, typename scalar_t>
void fuse_with(Block<const scalar_t> x, const BlockFusion<scalar_t>& fusion, Block<scalar_t> out) {
  using acc = acc_t<scalar_t>;
  const Block<const scalar_t> residual = fusion.residual;
  const acc *const scale = fusion.scale, *const shift = fusion.shift;
  const Bits<uint8_t> positive = fusion.positive;
  const auto bits = [=](int64_t r) { return positive.data ? positive.data + r * positive.stride : nullptr; };
  if (!x.channels_last) {
    for (int64_t c = 0; c < x.channels; c++) {
      const Vec<acc> s = broadcast(scale ? scale[c] : acc(1)), t = broadcast(shift ? shift[c] : -acc(0));
      fuse_row_with<non_temporal, has_residual, has_relu>(
          x.data + c * x.channel_stride, has_residual ? residual.data + c * residual.channel_stride : nullptr, x.positions,
          bits(c), [=](auto...) { return s; }, [=](auto...) { return t; }, out.data + c * out.channel_stride);
    }
    return;
  }
  const auto s = [=](int64_t c, auto lanes) { return scale ? load(scale + c, lanes) : broadcast(acc(1)); };
  const auto t = [=](int64_t c, auto lanes) { return shift ? load(shift + c, lanes) : broadcast(-acc(0)); };
  for (int64_t p = 0; p < x.positions; p++) {
    fuse_row_with<non_temporal, has_residual, has_relu>(x.data + p * x.position_stride,
                                                        has_residual ? residual.data + p * residual.position_stride : nullptr,
                                                        x.channels, bits(p), s, t, out.data + p * out.position_stride);
  }
}

// An absent shift is -0, because the sum of -0 and 0 would be 0.
template <typename scalar_t>
void channel_fuse(Block<const scalar_t> x, const BlockFusion<scalar_t>& fusion, Block<scalar_t> out) {
  using acc = acc_t<scalar_t>;
  const acc *const scale = fusion.scale, *const shift = fusion.shift;
  const auto copied = [&](auto non_temporal) {
    const int64_t rows = x.channels_last ? x.positions : x.channels, count = x.channels_last ? x.channels : x.positions;
    const int64_t in_stride = x.channels_last ? x.position_stride : x.channel_stride;
    const int64_t out_stride = x.channels_last ? out.position_stride : out.channel_stride;
    for (int64_t r = 0; r < rows; r++) copy_row<non_temporal>(x.data + r * in_stride, count, out.data + r * out_stride);
  };
  const auto rows = [&](auto non_temporal) {
    for (int64_t c = 0; c < x.channels; c++) {
      const Vec<acc> s = broadcast(scale ? scale[c] : acc(1)), t = broadcast(shift ? shift[c] : -acc(0));
      const scalar_t* in = x.data + c * x.channel_stride;
      write_row<non_temporal>(out.data + c * out.channel_stride, x.positions,
                              [=](int64_t i, auto lanes) { return load(in + i, lanes) * s + t; });
    }
  };
  const auto rows_of_channels = [&](auto non_temporal, auto scaled, auto shifted) {
    // Copies: a vector that is stored might lie anywhere, as far as the compiler knows, and change what is only referred to.
    const Block<const scalar_t> from = x;
    const Block<scalar_t> to = out;
    for (int64_t p = 0; p < from.positions; p++) {
      const scalar_t* in = from.data + p * from.position_stride;
      write_row<non_temporal>(to.data + p * to.position_stride, from.channels, [=](int64_t c, auto lanes) {
        const Vec<acc> s = scaled ? load(scale + c, lanes) : broadcast(acc(1));
        const Vec<acc> t = shifted ? load(shift + c, lanes) : broadcast(-acc(0));
        return load(in + c, lanes) * s + t;
      });
    }
  };
  if (fusion.residual.data && fusion.relu) {
    with_flags([&](auto non_temporal) { fuse_with<non_temporal, true, true>(x, fusion, out); }, out.non_temporal);
  } else if (fusion.residual.data) {
    with_flags([&](auto non_temporal) { fuse_with<non_temporal, true, false>(x, fusion, out); }, out.non_temporal);
  } else if (fusion.relu) {
    with_flags([&](auto non_temporal) { fuse_with<non_temporal, false, true>(x, fusion, out); }, out.non_temporal);
  } else if (!scale && !shift) {
    with_flags(copied, out.non_temporal);
  } else if (x.channels_last) {
    with_flags(rows_of_channels, out.non_temporal, scale, shift);
  } else {
    with_flags(rows, out.non_temporal);
  }
  if (out.non_temporal) fence();
}

template <typename scalar_t>
void relu_backward(Block<const scalar_t> grad, Bits<const uint8_t> positive, Block<scalar_t> masked) {
  using acc = acc_t<scalar_t>;
  const bool channels_last = grad.channels_last;
  const int64_t rows = channels_last ? grad.positions : grad.channels;
  const int64_t count = channels_last ? grad.channels : grad.positions;
  const int64_t grad_stride = channels_last ? grad.position_stride : grad.channel_stride;
  const int64_t masked_stride = channels_last ? masked.position_stride : masked.channel_stride;
  for (int64_t r = 0; r < rows; r++) {
    const scalar_t* in = grad.data + r * grad_stride;
    BitReader bits(positive.data + r * positive.stride);
    write_row</*non_temporal=*/false>(masked.data + r * masked_stride, count, [&](int64_t i, auto lanes) {
      return where(bits.pull(lanes), Vec<acc>(load(in + i, lanes)));
    });
  }
}

// A sum that is null is not computed, and b is then not loaded.
template <typename scalar_t>
void channel_sums(Block<const scalar_t> a, Block<const scalar_t> b, acc_t<scalar_t>* sum_a, acc_t<scalar_t>* sum_ab) {
  using acc = acc_t<scalar_t>;
  if (!a.channels_last) {
    const auto add = [&](auto with_b) {
      for_each_rows<4>(0, a.channels, [&](int64_t c, auto rows) {  // channels whose sums grow side by side
        constexpr int R = rows;
        const scalar_t *ac = a.data + c * a.channel_stride, *bc = with_b ? b.data + c * b.channel_stride : nullptr;
        Vec<acc> plain[R], product[R];
        clear(plain);
        clear(product);
        for_each_vector<acc>(a.positions, [&](int64_t p, auto lanes) {
#pragma GCC unroll 4  // early enough for the sums to stay in registers
          for (int r = 0; r < R; r++) {
            const Vec<acc> value = load(ac + r * a.channel_stride + p, lanes);
            plain[r] += value;
            if constexpr (with_b) product[r] += value * load(bc + r * b.channel_stride + p, lanes);
          }
        });
        const auto add_to = [&](acc* total, const Vec<acc>(&of_rows)[R]) {
          acc sums[R];
          sum_each(of_rows, sums);
          for (int r = 0; r < R; r++) total[c + r] += sums[r];
        };
        if (sum_a) add_to(sum_a, plain);
        if constexpr (with_b) add_to(sum_ab, product);
      });
    };
    return with_flags(add, sum_ab);
  }
  constexpr int64_t kRows = 4;  // positions that share one load and store of the sums
  for (int64_t p = 0; p < a.positions; p += kRows) {
    const int64_t rows = a.positions - p < kRows ? a.positions - p : kRows;
    const scalar_t* ap = a.data + p * a.position_stride;
    const scalar_t* bp = sum_ab ? b.data + p * b.position_stride : nullptr;
    for_each_vector<acc>(a.channels, [&](int64_t c, auto lanes) {
      Vec<acc> plain{}, product{};
      for (int64_t r = 0; r < rows; r++) {
        const Vec<acc> value = load(ap + r * a.position_stride + c, lanes);
        plain += value;
        if (sum_ab) product += value * load(bp + r * b.position_stride + c, lanes);
      }
      if (sum_a) store(sum_a + c, load(sum_a + c, lanes) + plain, lanes);
      if (sum_ab) store(sum_ab + c, load(sum_ab + c, lanes) + product, lanes);
    });
  }
}

}  // namespace gcnet_ext::cpu::GCNET_CAPABILITY
