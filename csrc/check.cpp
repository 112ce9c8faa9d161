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

}  // namespace

void require(bool holds, const char* op, Name name) {
  if (holds) return;
  throw std::runtime_error("gcnet_ext::" + std::string(op) + ": " + name.prefix + name.rest + " is not valid");
}

void count(const char* op, const char* name, size_t elements, size_t wanted) { require(elements == wanted, op, {"", name}); }

void not_yet(bool given, const char* op, const char* name) {
  if (given) throw std::runtime_error("gcnet_ext::" + std::string(op) + ": " + name + " is not implemented yet");
}

void feature_map(const char* op, const Tensor& x, bool pooled) {
  // What the schema calls a Tensor comes undefined where Python said None.
  require(x.defined() && x.dim() >= 3 && is_floating(x.scalar_type()) && x.size(1) > 0 && (!pooled || positions(x) > 0), op,
          {"", "x"});
}

void in_place(const char* op, const Tensor& x) { require(has_own_memory(x), op, {"", "x"}); }

void gradient(const char* op, const Tensor& grad, const Tensor& x) {
  require(grad.defined() && grad.device() == x.device() && grad.scalar_type() == x.scalar_type() &&
              std::ranges::equal(grad.sizes(), x.sizes()),
          op, {"", "grad"});
}

void saved(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes) {
  require(tensor.defined() && tensor.device() == x.device() && tensor.scalar_type() == accumulation_dtype(x) &&
              has_shape(tensor, sizes),
          op, {"", name});
}

void positive(const char* op, const Tensor& tensor, const Tensor& x) {
  require(tensor.defined() && tensor.device() == x.device() && tensor.scalar_type() == ScalarType::Byte &&
              has_shape(tensor, {x.size(0), 0}),
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
