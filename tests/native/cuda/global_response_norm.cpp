// What stands between and behind the sums of the global response norm: its factors, and the gradients.
#include "../../../csrc/cuda/global_response_norm.cuh"
#include "kernel_test.h"

namespace kernel_test {
namespace {

using namespace gcnet_ext::cuda;

constexpr double kEps = 1e-3;

// What forward and backward make of the sums over the positions, in double.
struct Expected {
  std::vector<double> norms, scale, factor, products, grad_gamma, grad_beta;

  template <class T, class A>
  Expected(const Extent& extent, const std::vector<A>& squares, const std::vector<A>& sums, const std::vector<A>& sum_g,
           const std::vector<T>& gamma)
      : grad_gamma(extent.channels), grad_beta(extent.channels) {
    const int64_t C = extent.channels;
    for (int64_t n = 0; n < extent.samples; n++) {
      double mean_norm = 0, mean = 0;
      for (int64_t c = 0; c < C; c++) mean_norm += std::sqrt(static_cast<double>(squares[n * C + c])) / C;
      const double D = mean_norm + kEps;
      for (int64_t c = 0; c < C; c++) {
        norms.push_back(std::sqrt(static_cast<double>(squares[n * C + c])));
        mean += static_cast<double>(gamma[c]) * sums[n * C + c] * norms.back() / D / C;
      }
      for (int64_t c = 0; c < C; c++) {
        const double G = norms[n * C + c], g = static_cast<double>(gamma[c]);
        scale.push_back(1 + g * G / D);
        factor.push_back(G == 0 ? 0 : (g * sums[n * C + c] - mean) / D / G);
        products.push_back(sums[n * C + c] * G / D);
        grad_gamma[c] += products.back();
        grad_beta[c] += sum_g[n * C + c];
      }
    }
  }
};

template <class T, class A>
void compare(const std::string& what, const std::vector<T>& found, const std::vector<A>& expected, double size) {
  Comparison comparison(what, resolution<acc_t<T>, T>(), size);
  for (size_t i = 0; i < found.size(); i++) comparison.add(static_cast<double>(found[i]), static_cast<double>(expected[i]));
}

template <class T>
void test_factors(const Shape& shape) {
  using A = acc_t<T>;
  const Extent extent = shape.extent();
  const int64_t count = extent.samples * extent.channels;
  auto squares = random_values<A>(count, 1, 1.5);
  squares[0] = 0;
  const auto sums = random_values<A>(count), sum_g = random_values<A>(count);
  const auto gamma = random_values<T>(extent.channels), beta = random_values<T>(extent.channels);
  const Expected expected(extent, squares, sums, sum_g, gamma);
  const std::string name = std::string("response factors ") + kName<T> + " " + shape.text();

  auto norms = squares, scale = unwritten<A>(count), shift = unwritten<A>(count);
  ResponseParams<T> params;
  params.extent = extent;
  params.eps = static_cast<A>(kEps);
  params.gamma = parameter(gamma), params.beta = parameter(beta);
  params.norms = norms.data(), params.scale = scale.data(), params.shift = shift.data();
  launch_response_factors(params, nullptr);
  compare(name + ", norms", norms, expected.norms, 1);
  compare(name + ", scale", scale, expected.scale, 1);
  std::vector<A> shifts(count);
  for (int64_t i = 0; i < count; i++) shifts[i] = static_cast<A>(beta[i % extent.channels]);
  compare(name + ", shift", shift, shifts, 1);

  auto products = sums, factor = unwritten<A>(count), grad_gamma = unwritten<A>(extent.channels);
  auto grad_beta = unwritten<A>(extent.channels);
  std::fill(scale.begin(), scale.end(), A(0));
  params.products = products.data(), params.sum_g = sum_g.data(), params.factor = factor.data();
  params.grad_gamma = MutableParameter<T>(grad_gamma.data()), params.grad_beta = MutableParameter<T>(grad_beta.data());
  launch_response_gradient_factors(params, nullptr);
  compare(name + ", scale of the gradient", scale, expected.scale, 1);
  compare(name + ", factor", factor, expected.factor, 10);
  compare(name + ", products", products, expected.products, 1);
  compare(name + ", grad_gamma", grad_gamma, expected.grad_gamma, static_cast<double>(extent.samples));
  compare(name + ", grad_beta", grad_beta, expected.grad_beta, static_cast<double>(extent.samples));
}

template <class T>
void test_gradient(const Shape& shape) {
  using A = acc_t<T>;
  const auto grad = FeatureMap<T>::random(shape), x = FeatureMap<T>::random(shape);
  auto grad_x = FeatureMap<T>::empty({shape.samples, shape.channels, shape.positions, shape.channels_last});
  const int64_t count = shape.samples * shape.channels;
  const auto scale = random_values<A>(count), factor = random_values<A>(count);
  launch_response_gradient<T>(grad.read(), x.read(), grad_x.write(), shape.extent(), scale.data(), factor.data(), nullptr);
  Comparison comparison(std::string("response gradient ") + kName<T> + " " + shape.text(), resolution<T, T>());
  for (int64_t n = 0; n < shape.samples; n++) {
    for (int64_t c = 0; c < shape.channels; c++) {
      const int64_t i = n * shape.channels + c;
      for (int64_t p = 0; p < shape.positions; p++) {
        comparison.add(grad_x.at(n, c, p), grad.at(n, c, p) * scale[i] + x.at(n, c, p) * factor[i]);
      }
    }
  }
}

template <class T>
void test_dtype() {
  for (const bool channels_last : {false, true}) {
    for (const Shape& shape : {Shape{1, 1, 1, channels_last},
                               {3, 5, 7, channels_last},
                               {2, 16, 72, channels_last},
                               {2, 16, 72, channels_last, 1},
                               {3, 24, 40, channels_last, 0, 8},
                               {2, 300, 9, channels_last},
                               {1, 600, 16, channels_last}}) {
      test_factors<T>(shape);
      test_gradient<T>(shape);
    }
  }
}

}  // namespace

void test_global_response_norm(bool small) {
  if (!small) {
    test_dtype<double>();
    test_dtype<BFloat16>();
    test_dtype<Half>();
    test_dtype<float>();
  }
  test_factors<float>({3, 300, 1});
  test_gradient<float>({2, 8, 12, true});
}

}  // namespace kernel_test
