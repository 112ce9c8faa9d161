// A fuzz target for the loops of the CPU kernels, called as csrc/cpu calls them, and for the plans.
//
// The bytes choose a loop, a capability, sizes, strides, which arguments are missing, and the numbers themselves, NaN and
// infinities among them. Buffers are of exactly the size that the block needs, for AddressSanitizer; the result must be that of
// plain loops in double, up to rounding, and every plan must cover its sample once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/kernels/table.h"
#include "../../../csrc/plan_cpu.h"

namespace gcnet_ext::cpu {
namespace {

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FUZZ: %s\n", what);
  std::abort();
}

// The input, byte by byte; zeros when it has ended.
struct Source {
  const uint8_t* next;
  const uint8_t* end;

  uint8_t byte() { return next < end ? *next++ : 0; }
  int64_t upto(int64_t most) { return (byte() | byte() << 8) % (most + 1); }
  bool flag() { return byte() & 1; }
  // Mostly small numbers; some large, some denormal, some infinite, some NaN.
  double number() {
    const uint8_t kind = byte();
    const double value = (byte() - 127.5) / 64;
    switch (kind) {
      case 0: return std::numeric_limits<double>::quiet_NaN();
      case 1: return std::numeric_limits<double>::infinity();
      case 2: return -std::numeric_limits<double>::infinity();
      case 3: return value * 1e30;
      case 4: return value * 1e-42;
      case 5: return value * 6e4;
      default: return value;
    }
  }
};

template <typename T>
std::vector<T> numbers(Source& from, int64_t count) {
  std::vector<T> values;
  values.reserve(count);
  for (int64_t i = 0; i < count; i++) values.push_back(static_cast<T>(static_cast<float>(from.number())));
  return values;
}

// A block of C channels and P positions with a gap between its rows, in a buffer that ends with its last element.
template <typename T>
struct Buffer2d {
  std::vector<T> memory;
  int64_t channel_stride, position_stride;
  bool channels_last;
  int64_t channels, positions;

  Buffer2d(Source& from, int64_t channels, int64_t positions, bool channels_last)
      : channels_last(channels_last), channels(channels), positions(positions) {
    const int64_t gap = from.upto(3);
    channel_stride = channels_last ? 1 : positions + gap;
    position_stride = channels_last ? channels + gap : 1;
    memory = numbers<T>(from, (channels - 1) * channel_stride + (positions - 1) * position_stride + 1);
    memory.shrink_to_fit();
  }
  Block<const T> read() const { return {memory.data(), channels, positions, channel_stride, position_stride, channels_last}; }
  Block<T> write(bool non_temporal) {
    return {memory.data(), channels, positions, channel_stride, position_stride, channels_last, non_temporal};
  }
  // The gaps are what they were: a store of a whole vector may not reach into them. (No sanitizer sees every such store.)
  bool gaps_as_in(const Buffer2d& before) const {
    const int64_t row = channels_last ? channels : positions, stride = channels_last ? position_stride : channel_stride;
    for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); i++) {
      if (i % stride >= row && std::memcmp(&memory[i], &before.memory[i], sizeof(T)) != 0) return false;
    }
    return true;
  }
  const T& element(int64_t c, int64_t p) const { return memory[c * channel_stride + p * position_stride]; }
  double at(int64_t c, int64_t p) const { return static_cast<double>(element(c, p)); }
};

constexpr double kMost = 1e30;  // above it float32 may overflow on the way, and there is no value to compare

// A sum of so many products: how far rounding may move it, in units of the sum of their sizes.
template <typename acc>
void same(double got, double want, double sizes, int64_t terms, const char* what) {
  if (!(sizes <= kMost)) return;
  const double bound = (4 + terms) * std::numeric_limits<acc>::epsilon() * sizes + 1e-30;
  require(std::abs(got - want) <= bound, what);
}
// One rounding to the storage type on top of the accumulated error.
template <typename T>
void same_stored(double got, double want, double sizes, const char* what) {
  if (!std::isfinite(sizes) || sizes > 6e4) return;
  const double half = std::is_same_v<T, Half> ? 1e-3 : std::is_same_v<T, BFloat16> ? 8e-3 : 0;
  require(std::abs(got - want) <= (half + 16 * std::numeric_limits<acc_t<T>>::epsilon()) * sizes + 1e-7, what);
}

template <typename T>
void fuzz_sums(Source& from, const MapKernels<T>& kernels, int64_t C, int64_t P, bool channels_last) {
  using acc = acc_t<T>;
  const Buffer2d<T> a(from, C, P, channels_last), b(from, C, P, channels_last);
  const auto w = numbers<acc>(from, C), m = numbers<acc>(from, P);
  std::vector<acc> dots(P), sums(C), sum_a(C), sum_ab(C);
  kernels.position_dots(a.read(), w.data(), dots.data());
  kernels.channel_dots(a.read(), m.data(), sums.data());
  const bool product = from.flag();
  kernels.channel_sums(a.read(), product ? b.read() : Block<const T>{nullptr, C, P, 0, 0, channels_last}, sum_a.data(),
                       product ? sum_ab.data() : nullptr);
  for (int64_t p = 0; p < P; p++) {
    double dot = 0, size = 0;
    for (int64_t c = 0; c < C; c++) dot += w[c] * a.at(c, p), size += std::abs(w[c] * a.at(c, p));
    same<acc>(dots[p], dot, size, C, "position_dots");
  }
  for (int64_t c = 0; c < C; c++) {
    double weighted = 0, weighted_size = 0, plain = 0, plain_size = 0, products = 0, products_size = 0;
    for (int64_t p = 0; p < P; p++) {
      weighted += m[p] * a.at(c, p), weighted_size += std::abs(m[p] * a.at(c, p));
      plain += a.at(c, p), plain_size += std::abs(a.at(c, p));
      products += a.at(c, p) * b.at(c, p), products_size += std::abs(a.at(c, p) * b.at(c, p));
    }
    same<acc>(sums[c], weighted, weighted_size, P, "channel_dots");
    same<acc>(sum_a[c], plain, plain_size, P, "channel_sums: a");
    if (product) same<acc>(sum_ab[c], products, products_size, P, "channel_sums: ab");
  }
}

// A byte for every eight elements of a row, in memory that ends with the last of them.
struct Bitmap {
  int64_t row;
  std::vector<uint8_t> bytes;

  Bitmap(int64_t C, int64_t P, bool channels_last)
      : row(((channels_last ? C : P) + 7) / 8), bytes(row * (channels_last ? P : C), 0xff) {
    bytes.shrink_to_fit();
  }
  bool at(int64_t c, int64_t p, bool channels_last) const {
    const int64_t i = channels_last ? c : p;
    return bytes[(channels_last ? p : c) * row + i / 8] >> i % 8 & 1;
  }
};

template <typename T>
void fuzz_fuse(Source& from, const MapKernels<T>& kernels, int64_t C, int64_t P, bool channels_last) {
  using acc = acc_t<T>;
  const Buffer2d<T> x(from, C, P, channels_last), residual(from, C, P, channels_last);
  Buffer2d<T> out(from, C, P, channels_last), masked(from, C, P, channels_last);
  const auto scale = numbers<acc>(from, C), shift = numbers<acc>(from, C);
  const bool scales = from.flag(), shifts = from.flag(), adds = from.flag(), relu = from.flag(), keeps = relu && from.flag();
  const Buffer2d<T> before = out, masked_before = masked;
  Bitmap bits(C, P, channels_last);
  BlockFusion<T> fusion{scales ? scale.data() : nullptr, shifts ? shift.data() : nullptr};
  if (adds) fusion.residual = residual.read();
  fusion.relu = relu;
  if (keeps) fusion.positive = {bits.bytes.data(), bits.row};
  kernels.channel_fuse(x.read(), fusion, out.write(from.flag()));
  require(out.gaps_as_in(before), "channel_fuse: a gap");
  for (int64_t c = 0; c < C; c++) {
    for (int64_t p = 0; p < P; p++) {
      const double product = x.at(c, p) * (scales ? scale[c] : 1), shifted = shifts ? shift[c] : 0;
      const double added = adds ? residual.at(c, p) : 0, value = product + shifted + added;
      const double sizes = std::abs(product) + std::abs(shifted) + std::abs(added), got = out.at(c, p);
      same_stored<T>(got, relu && value < 0 ? 0 : value, sizes, "channel_fuse");
      const bool same_bits = std::memcmp(&out.element(c, p), &x.element(c, p), sizeof(T)) == 0;
      require(scales || shifts || adds || relu || same_bits, "channel_fuse: a copy");
      require(!relu || !(got < 0), "channel_fuse: below zero");
      if (!keeps) continue;
      const bool bit = bits.at(c, p, channels_last);
      require(bit ? !(got < 0) : got == 0, "channel_fuse: a bit");  // a bit of 1 may be that of a number that was rounded to 0
      require(bit || !(got > 0 || std::isnan(got)), "channel_fuse: no bit");
    }
  }
  for (int64_t i = 0; keeps && i < static_cast<int64_t>(bits.bytes.size()); i++) {
    const int64_t rest = (channels_last ? C : P) % 8;
    require((i + 1) % bits.row != 0 || rest == 0 || bits.bytes[i] >> rest == 0, "channel_fuse: a bit of no element");
  }
  kernels.relu_backward(x.read(), {bits.bytes.data(), bits.row}, masked.write(false));
  require(masked.gaps_as_in(masked_before), "relu_backward: a gap");
  for (int64_t c = 0; c < C; c++) {
    for (int64_t p = 0; p < P; p++) {
      const double want = bits.at(c, p, channels_last) ? x.at(c, p) : 0, got = masked.at(c, p);
      // The instruction of AVX512_BF16 takes a number below 2^-126 for zero.
      require(std::isnan(want) ? std::isnan(got) : got == want || (std::abs(want) < 1e-37 && got == 0), "relu_backward");
    }
  }
}

template <typename T>
void fuzz_pool(Source& from, const MapKernels<T>& kernels, int64_t C, int64_t P, bool channels_last) {
  using acc = acc_t<T>;
  const Buffer2d<T> x(from, C, P, channels_last), grad(from, C, P, channels_last);
  Buffer2d<T> grad_x(from, C, P, channels_last);
  const auto w = numbers<acc>(from, C), dctx = numbers<acc>(from, C), scale = numbers<acc>(from, C);
  std::vector<acc> logits(P), weighted(C), dw(C);
  SoftmaxSum<acc> state{-std::numeric_limits<acc>::infinity(), 0, weighted.data()};
  kernels.attention_pool(x.read(), w.data(), static_cast<acc>(from.number()), logits.data(), state);
  // The reference of the weighted sum starts from the kernel's own logits: their rounding is another test's.
  bool finite = std::isfinite(state.max);
  for (const acc logit : logits) finite = finite && std::isfinite(logit);
  for (int64_t c = 0; finite && c < C; c++) {
    double sum = 0, size = 0;
    for (int64_t p = 0; p < P; p++) {
      const double e = std::exp(static_cast<double>(logits[p]) - static_cast<double>(state.max));
      sum += e * x.at(c, p), size += e * std::abs(x.at(c, p));
    }
    same<acc>(weighted[c], sum, size, 8 + P, "attention_pool");
  }
  const bool has_grad = from.flag(), has_dx = from.flag(), has_dw = from.flag(), has_scale = from.flag();
  const auto m = numbers<acc>(from, P);
  const Buffer2d<T> before = grad_x;
  const PoolBackwardSample<acc> sample{dctx.data(), static_cast<acc>(0.25), w.data(), has_scale ? scale.data() : nullptr};
  const Block<const T> none{nullptr, C, P, 0, 0, channels_last};
  const acc sum_dl = kernels.attention_pool_backward(
      has_grad ? grad.read() : none, x.read(), m.data(), sample,
      has_dx ? grad_x.write(from.flag()) : Block<T>{nullptr, C, P, 0, 0, channels_last}, has_dw ? dw.data() : nullptr);
  double total = 0, total_size = 0;
  for (int64_t p = 0; p < P; p++) {
    double u = 0, u_size = 0;
    for (int64_t c = 0; c < C; c++) u += dctx[c] * x.at(c, p), u_size += std::abs(dctx[c] * x.at(c, p));
    const double dl = m[p] * (u - 0.25), dl_size = std::abs(m[p]) * (u_size + 0.25);
    total += dl, total_size += dl_size;
    if (u_size > kMost) total_size = u_size;  // u overflows, however small m makes dl
    for (int64_t c = 0; has_dx && c < C && std::max(u_size, dl_size) <= kMost; c++) {
      const double own = has_grad ? grad.at(c, p) * (has_scale ? scale[c] : 1) : 0;
      const double size = std::abs(own) + std::abs(m[p] * dctx[c]) + dl_size * std::abs(w[c]) * (1 + C / 16.);
      same_stored<T>(grad_x.at(c, p), own + m[p] * dctx[c] + dl * w[c], size, "attention_pool_backward");
    }
  }
  same<acc>(sum_dl, total, total_size, C + P, "attention_pool_backward: the sum of dl");
  if (has_dx) require(grad_x.gaps_as_in(before), "attention_pool_backward: a gap");
}

template <typename acc, typename W>
void fuzz_matrix(Source& from, const MatrixKernels<acc, W>& kernels) {
  const int64_t N = 1 + from.upto(8), M = 1 + from.upto(40), K = 1 + from.upto(600);
  const auto x = numbers<acc>(from, N * K), bias = numbers<acc>(from, M), dy = numbers<acc>(from, N * M);
  const auto weight = numbers<W>(from, M * K);
  const bool with_bias = from.flag();
  std::vector<acc> y(N * M), dx(N * K);
  std::vector<W> dw(M * K);
  const int64_t m0 = from.upto(M - 1), rows = 1 + from.upto(M - m0 - 1), m1 = m0 + rows;
  const int64_t k0 = from.upto(K - 1), columns = 1 + from.upto(K - k0 - 1), k1 = k0 + columns;
  const Matrix<const acc> all_x{x.data(), N, K, K}, all_dy{dy.data(), N, M, M};
  const Matrix<const W> all_w{weight.data(), M, K, K};
  const Matrix<acc> all_y{y.data(), N, M, M}, all_dx{dx.data(), N, K, K};
  const auto rows_of_w = all_w.row_range(m0, rows);
  kernels.linear(all_x, rows_of_w, with_bias ? bias.data() + m0 : nullptr, all_y.column_range(m0, rows));
  kernels.linear_backward_input(all_dy.column_range(m0, rows), rows_of_w.column_range(k0, columns),
                                all_dx.column_range(k0, columns));
  kernels.linear_backward_weight(all_dy.column_range(m0, rows), all_x, Matrix<W>{dw.data(), M, K, K}.row_range(m0, rows));
  const auto w = [&](int64_t m, int64_t k) { return static_cast<double>(weight[m * K + k]); };
  for (int64_t n = 0; n < N; n++) {
    for (int64_t m = m0; m < m1; m++) {
      double sum = with_bias ? bias[m] : 0, size = std::abs(sum);
      for (int64_t k = 0; k < K; k++) sum += w(m, k) * x[n * K + k], size += std::abs(w(m, k) * x[n * K + k]);
      same<acc>(y[n * M + m], sum, size, K, "linear");
    }
    for (int64_t k = k0; k < k1; k++) {
      double sum = 0, size = 0;
      for (int64_t m = m0; m < m1; m++) sum += dy[n * M + m] * w(m, k), size += std::abs(dy[n * M + m] * w(m, k));
      same<acc>(dx[n * K + k], sum, size, M, "linear_backward_input");
    }
  }
  for (int64_t m = m0; m < m1; m++) {
    for (int64_t k = 0; k < K; k++) {
      double sum = 0, size = 0;
      for (int64_t n = 0; n < N; n++)
        sum += double(dy[n * M + m]) * x[n * K + k], size += std::abs(double(dy[n * M + m]) * x[n * K + k]);
      same_stored<W>(static_cast<double>(dw[m * K + k]), sum, size, "linear_backward_weight");
    }
  }
}

// act(z) and act'(z) in double.
std::pair<double, double> activated(Activation activation, double slope, double z) {
  const double s = 1 / (1 + std::exp(-z)), normal = 0.5 * std::erfc(-z * std::sqrt(0.5));
  const double cubic = std::sqrt(2 / std::acos(-1)) * (z + 0.044715 * z * z * z), s2 = 1 / (1 + std::exp(-2 * cubic));
  switch (activation) {
    case Activation::none: return {z, 1};
    case Activation::relu: return {z < 0 ? 0 : z, z <= 0 ? 0 : 1};
    case Activation::silu: return {z * s, s * (1 + z * (1 - s))};
    case Activation::gelu: return {z * normal, normal + z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1))};
    case Activation::gelu_tanh:
      return {z * s2, s2 + 2 * z * s2 * (1 - s2) * std::sqrt(2 / std::acos(-1)) * (1 + 3 * 0.044715 * z * z)};
    case Activation::hardswish: return {z * std::min(6., std::max(0., z + 3)) / 6, z <= -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1};
    case Activation::leaky_relu: return {z > 0 ? z : z * slope, z > 0 ? 1 : slope};
  }
  return {};
}

template <typename acc>
void fuzz_activation(Source& from, const VectorKernels<acc>& kernels) {
  const auto activation = static_cast<Activation>(from.byte() % 7);
  const acc slope = static_cast<acc>(0.25);
  const int64_t count = 1 + from.upto(40);
  const auto z = numbers<acc>(from, count), grad = numbers<acc>(from, count);
  auto out = z, through = grad;
  out.shrink_to_fit();
  through.shrink_to_fit();
  kernels.activation(activation, slope, out.data(), count);
  kernels.activation_gradient(activation, slope, z.data(), count, through.data());
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(static_cast<double>(z[i]))) require(std::isnan(static_cast<double>(out[i])), "the activation of NaN");
    if (!(std::abs(z[i]) < 1e6) || !(std::abs(grad[i]) < 1e6)) continue;
    const auto [value, slope_there] = activated(activation, slope, z[i]);
    const double bound = 32 * std::numeric_limits<acc>::epsilon() * (1 + std::abs(double(z[i])));
    require(std::abs(out[i] - value) <= bound, "activation");
    require(std::abs(through[i] - grad[i] * slope_there) <= bound * (1 + std::abs(double(grad[i]))), "activation_gradient");
  }
}

template <typename acc>
void fuzz_vectors(Source& from, const VectorKernels<acc>& kernels) {
  const int64_t P = 1 + from.upto(200), parts = 1 + from.upto(5);
  const auto values = numbers<acc>(from, parts * P);
  auto t = numbers<acc>(from, P);
  std::vector<acc> attention(P), dl(P);
  kernels.softmax_of_sum(values.data(), parts, P, acc(0.5), attention.data());
  double total = 0;
  bool finite = true;
  for (int64_t i = 0; i < parts * P; i++) finite = finite && std::abs(static_cast<double>(values[i])) < 1e29;
  for (const acc m : attention) total += m;
  require(!finite || std::abs(total - 1) < 1e-4, "softmax_of_sum");
  kernels.logit_gradient(values.data(), parts, P, P, attention.data(), acc(1), dl.data());
  kernels.context_dot(values.data(), values.data(), P, from.flag());
  acc mean, variance;
  kernels.moments(t.data(), P, &mean, &variance);
  double sum = 0, size = 0, squares = 0;
  for (const acc value : t) sum += value, size += std::abs(double(value));
  for (const acc value : t) squares += (value - sum / P) * (value - sum / P);
  same<acc>(mean, sum / P, size / P, P, "mean");
  same<acc>(variance, squares / P, squares / P + size / P * size / P, P, "variance");
  const auto before = t;
  kernels.sigmoid(t.data(), P);
  for (int64_t i = 0; i < P; i++) {
    const double want = 1 / (1 + std::exp(-static_cast<double>(before[i])));
    require(std::isnan(want) ? std::isnan(static_cast<double>(t[i])) : std::abs(t[i] - want) < 1e-6, "sigmoid");
  }
  fuzz_activation(from, kernels);
}

void fuzz_plans(Source& from) {
  const auto size = [&] { return 1 + (from.upto(60000) << from.upto(12)); };
  const int64_t C = size(), P = size(), bytes = int64_t{1} << (1 + from.upto(2));
  const bool channels_last = from.flag();
  const PoolPlan pool = plan_cpu_pool(C, P, bytes, channels_last);
  require(pool.splits >= 1 && (pool.splits - 1) * pool.split < P && P <= pool.splits * pool.split, "splits cover P");
  require(pool.tile >= 1 && pool.split % pool.tile == 0 && (pool.by_channels || pool.tile <= kMaxTile), "tiles cover a split");
  const SweepPlan sweep = plan_cpu_sweep(C, P, bytes, channels_last);
  require((sweep.channel_blocks - 1) * sweep.channels < C && C <= sweep.channel_blocks * sweep.channels, "blocks cover C");
  require((sweep.position_blocks - 1) * sweep.positions < P && P <= sweep.position_blocks * sweep.positions, "blocks cover P");
  require(!pool.by_channels || sweep.position_blocks == 1, "cut by channels means whole rows");
  const GroupPlan group = plan_cpu_group(size(), C * bytes, from.upto(60000) << 8, 1 + from.upto(128));
  require(group.samples >= 1, "a group has a sample");
}

template <typename T>
void fuzz_map(Source& from, int which, const MapKernels<T>& kernels) {
  const bool channels_last = from.flag();
  const int64_t C = 1 + from.upto(70), P = 1 + from.upto(140);
  if (which == 0) fuzz_sums(from, kernels, C, P, channels_last);
  if (which == 1) fuzz_fuse(from, kernels, C, P, channels_last);
  if (which == 2) fuzz_pool(from, kernels, C, P, channels_last);
}

void fuzz(Source from) {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found{&kernels_default()};
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) found.push_back(&kernels_avx2());
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512());
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512_bf16());
    }
#endif
    return found;
  }();
  const Kernels& kernels = *tables[from.byte() % tables.size()];
  const int which = from.byte() % 6, type = from.byte() % 4;
  if (which == 5) return fuzz_plans(from);
  const auto with = [&](auto fuzz_one, const auto&... choices) {  // calls fuzz_one with the kernels of one of these types
    int i = 0;
    ((i++ == type % static_cast<int>(sizeof...(choices)) ? fuzz_one(choices) : void()), ...);
  };
  if (which == 4) {
    with([&](const auto& of) { fuzz_vectors(from, of); }, std::get<VectorKernels<float>>(kernels),
         std::get<VectorKernels<double>>(kernels));
  } else if (which == 3) {
    with([&](const auto& of) { fuzz_matrix(from, of); }, std::get<MatrixKernels<double, double>>(kernels),
         std::get<MatrixKernels<float, float>>(kernels), std::get<MatrixKernels<float, Half>>(kernels),
         std::get<MatrixKernels<float, BFloat16>>(kernels));
  } else {
    with([&](const auto& of) { fuzz_map(from, which, of); }, std::get<MapKernels<double>>(kernels),
         std::get<MapKernels<float>>(kernels), std::get<MapKernels<Half>>(kernels), std::get<MapKernels<BFloat16>>(kernels));
  }
}

}  // namespace
}  // namespace gcnet_ext::cpu

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  gcnet_ext::cpu::fuzz({data, data + size});
  return 0;
}
