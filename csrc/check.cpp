#include "check.h"

#include "layout.h"

#include <algorithm>
#include <stdexcept>

namespace gcnet_ext::check {
namespace {

// Whether the tensor has these sizes, followed by nothing but ones.
bool has_shape(const Tensor& tensor, Sizes sizes) {
  const auto actual = tensor.sizes();
  if (actual.size() < sizes.size()) return false;
  const auto is_one = [](int64_t size) { return size == 1; };
  return std::equal(sizes.begin(), sizes.end(), actual.begin()) &&
         std::all_of(actual.begin() + sizes.size(), actual.end(), is_one);
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
         dtype == ScalarType::Double;
}

// Whether the tensor has the device, dtype and sizes of x.
bool is_like(const Tensor& tensor, const Tensor& x) {
  return tensor.defined() && tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type() &&
         std::ranges::equal(tensor.sizes(), x.sizes());
}

}  // namespace

void require(bool holds, const char* op, Name name) {
  if (holds) return;
  throw std::runtime_error("gcnet_ext::" + std::string(op) + ": " + name.prefix + name.rest + " is not valid");
}

void count(const char* op, const char* name, size_t elements, size_t wanted) { require(elements == wanted, op, {"", name}); }

void feature_map(const char* op, const Tensor& x, bool pooled) {
  // If Python passes None for what the schema calls a Tensor, it arrives undefined.
  require(x.defined() && x.dim() >= 3 && is_floating(x.scalar_type()) && x.size(1) > 0 && (!pooled || positions(x) > 0), op,
          {"", "x"});
}

void in_place(const char* op, const Tensor& x, const OptionalTensor& residual) {
  require(has_own_memory(x), op, {"", "x"});
  require(!residual || overlap(*residual, x) != Overlap::partial, op, {"", "residual"});
}

void gradient(const char* op, const Tensor& grad, const Tensor& x) { require(is_like(grad, x), op, {"", "grad"}); }

void residual(const char* op, const OptionalTensor& residual, const Tensor& x) {
  require(!residual || is_like(*residual, x), op, {"", "residual"});
}

void valid(const char* op, const OptionalTensor& valid, const Tensor& x) {
  if (!valid) return;
  require(valid->device() == x.device() && valid->scalar_type() == ScalarType::Bool && valid->dim() == x.dim() - 1 &&
              (valid->size(0) == 1 || valid->size(0) == x.size(0)) &&
              std::equal(x.sizes().begin() + 2, x.sizes().end(), valid->sizes().begin() + 1),
          op, {"", "valid"});
}

void saved(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes) {
  require(tensor.defined() && tensor.device() == x.device() && tensor.scalar_type() == accumulation_dtype(x) &&
              has_shape(tensor, sizes),
          op, {"", name});
}

void positive(const char* op, const Tensor& tensor, const Tensor& x, bool has_relu) {
  require(tensor.defined() && tensor.device() == x.device() && tensor.scalar_type() == ScalarType::Byte &&
              has_shape(tensor, {x.size(0), has_relu ? bytes_of_bits(x) : 0}),
          op, {"", "positive"});
}

void parameter(const char* op, Name name, const OptionalTensor& tensor, const Like& x, Sizes sizes) {
  if (!tensor) return;
  const ScalarType dtype = tensor->scalar_type();
  require(tensor->device() == x.device && (dtype == ScalarType::Float || dtype == x.dtype) && has_shape(*tensor, sizes), op,
          name);
}

void mask(const char* op, const char* prefix, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x) {
  const Name weight_name{prefix, "weight"}, bias_name{prefix, "bias"};
  if (!weight) return require(!bias, op, bias_name);
  const int64_t channels = x.size(1);
  const bool leading = channels != 1 && weight->dim() > 1 && weight->size(0) == 1;
  if (leading) {
    parameter(op, weight_name, weight, x, {1, channels});
  } else {
    parameter(op, weight_name, weight, x, {channels});
  }
  parameter(op, bias_name, bias, x, {1});
}

}  // namespace gcnet_ext::check
