#include "check.h"

#include "layout.h"

#include <algorithm>
#include <stdexcept>

namespace gcnet_ext {
namespace {

[[noreturn]] void fail(const char* op, const std::string& message) {
  throw std::runtime_error("gcnet_ext::" + std::string(op) + ": " + message);
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    default: return "another dtype";
  }
}

const char* name_of(torch::headeronly::DeviceType device) {
  switch (device) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::CUDA: return "cuda";
    case torch::headeronly::DeviceType::Meta: return "meta";
    default: return "another device";
  }
}

template <typename Range>
std::string shape_of(const Range& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Whether the tensor has these sizes, followed by nothing but ones.
bool has_shape(const Tensor& tensor, check::Sizes sizes) {
  const auto actual = tensor.sizes();
  if (actual.size() < sizes.size()) return false;
  const auto is_one = [](int64_t size) { return size == 1; };
  return std::equal(sizes.begin(), sizes.end(), actual.begin()) &&
         std::all_of(actual.begin() + sizes.size(), actual.end(), is_one);
}

// What the schema calls a Tensor comes undefined where Python said None.
void given(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(op, std::string(name) + " must be a tensor, got None");
}

void on_device_of(const char* op, check::Name name, const Tensor& tensor, const Tensor& x) {
  if (tensor.device() == x.device()) return;
  fail(op, std::string(name) + " must be on x's device (" + name_of(x.device().type()) + "), got " +
               name_of(tensor.device().type()));
}

void branch(const char* op, const char* prefix, const BranchTensors& params, const Tensor& x) {
  static constexpr std::array names{"w1", "b1", "norm_weight", "norm_bias", "w2", "b2"};
  const auto& [w1, b1, norm_weight, norm_bias, w2, b2] = params;
  const int64_t channels = x.size(1);
  const auto missing = [&](size_t i, size_t needed) {
    if (!params[i]) return;
    const std::string name = std::string(prefix) + names[needed];
    fail(op, std::string(prefix) + names[i] + " must come with a " + name + ", got " + name + " None");
  };
  if (!w1) {
    for (size_t i = 1; i < names.size(); i++) missing(i, /*w1*/ 0);
    return;
  }
  int64_t hidden = channels;
  if (w2) {
    hidden = w1->dim() > 0 ? w1->size(0) : 0;
    if (hidden == 0) fail(op, std::string(prefix) + "w1 must have at least one row, got shape " + shape_of(w1->sizes()));
  } else {
    for (size_t i : {2, 3, 5}) missing(i, /*w2*/ 4);
  }
  check::parameter(op, {prefix, "w1"}, w1, x, {hidden, channels});
  check::parameter(op, {prefix, "b1"}, b1, x, {hidden});
  check::parameter(op, {prefix, "norm_weight"}, norm_weight, x, {hidden});
  check::parameter(op, {prefix, "norm_bias"}, norm_bias, x, {hidden});
  check::parameter(op, {prefix, "w2"}, w2, x, {channels, hidden});
  check::parameter(op, {prefix, "b2"}, b2, x, {channels});
}

}  // namespace

namespace check {

void feature_map(const char* op, const Tensor& x, bool pooled) {
  given(op, "x", x);
  if (x.dim() < 3) fail(op, "x must have at least 3 dimensions [N, C, *spatial], got shape " + shape_of(x.sizes()));
  switch (x.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float:
    case ScalarType::Double: break;
    default: fail(op, "x must be float16, bfloat16, float32 or float64, got " + std::string(name_of(x.scalar_type())));
  }
  if (x.size(1) == 0) fail(op, "x must have at least one channel, got shape " + shape_of(x.sizes()));
  if (pooled && positions(x) == 0) fail(op, "x must have at least one position to pool over, got shape " + shape_of(x.sizes()));
}

void in_place(const char* op, const Tensor& x) {
  if (has_own_memory(x)) return;
  fail(op, "x must not have elements that share memory when it is overwritten, got shape " + shape_of(x.sizes()) +
               " with strides " + shape_of(x.strides()));
}

void gradient(const char* op, const Tensor& grad, const Tensor& x) {
  given(op, "grad", grad);
  on_device_of(op, {"", "grad"}, grad, x);
  if (grad.scalar_type() != x.scalar_type()) {
    fail(op, std::string("grad must be x's dtype (") + name_of(x.scalar_type()) + "), got " + name_of(grad.scalar_type()));
  }
  if (!std::ranges::equal(grad.sizes(), x.sizes())) {
    fail(op, "grad must have shape " + shape_of(x.sizes()) + ", got " + shape_of(grad.sizes()));
  }
}

void side(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes) {
  given(op, name, tensor);
  on_device_of(op, {"", name}, tensor, x);
  const ScalarType dtype = accumulation_dtype(x);
  if (tensor.scalar_type() != dtype) {
    fail(op, std::string(name) + " must be " + name_of(dtype) + ", got " + name_of(tensor.scalar_type()));
  }
  if (!has_shape(tensor, sizes)) {
    fail(op, std::string(name) + " must have shape " + shape_of(sizes) + ", got " + shape_of(tensor.sizes()));
  }
}

void parameter(const char* op, Name name, const OptionalTensor& tensor, const Tensor& x, Sizes sizes) {
  if (!tensor) return;
  on_device_of(op, name, *tensor, x);
  const ScalarType dtype = tensor->scalar_type();
  if (dtype != ScalarType::Float && dtype != x.scalar_type()) {
    fail(op, std::string(name) + " must be float32 or x's dtype (" + name_of(x.scalar_type()) + "), got " + name_of(dtype));
  }
  if (!has_shape(*tensor, sizes)) {
    fail(op,
         std::string(name) + " must have shape " + shape_of(sizes) + ", trailing ones aside, got " + shape_of(tensor->sizes()));
  }
}

void mask(const char* op, const char* prefix, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& x) {
  const Name weight_name{prefix, "weight"}, bias_name{prefix, "bias"};
  if (!weight) {
    if (!bias) return;
    const std::string needed = weight_name;
    fail(op, std::string(bias_name) + " must come with a " + needed + ", got " + needed + " None");
  }
  const int64_t channels = x.size(1);
  const bool leading = channels != 1 && weight->dim() > 1 && weight->size(0) == 1;
  if (leading) {
    parameter(op, weight_name, weight, x, {1, channels});
  } else {
    parameter(op, weight_name, weight, x, {channels});
  }
  parameter(op, bias_name, bias, x, {1});
}

void branches(const char* op, const BranchTensors& scale, const BranchTensors& shift, const Tensor& x) {
  if (!scale[0] && !shift[0]) fail(op, "scale_w1 or shift_w1 must be given, got None for both");
  branch(op, "scale_", scale, x);
  branch(op, "shift_", shift, x);
}

}  // namespace check

ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t positions(const Tensor& x) {
  int64_t product = 1;
  for (int64_t dim = 2; dim < x.dim(); dim++) product *= x.size(dim);
  return product;
}

int64_t hidden_units(const BranchTensors& branch) { return branch[0] ? branch[0]->size(0) : 0; }

}  // namespace gcnet_ext
