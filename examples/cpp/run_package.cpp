// Runs a packaged model with blocks of gcnet_ext without Python, and compares with what Python computed.
//
//   run_package model.pt2 example.pt libgcnet_ext.so ...
//
// make_package.py writes the first two: the model, compiled by AOTInductor, and a list of an input and its output. The libraries are
// those of an installed gcnet_ext, which `python -m gcnet_ext --library` names: that of the CUDA kernels as well where it has some.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s model.pt2 example.pt libgcnet_ext.so ...\n", arguments[0]);
    return 2;
  }
  // Loading the libraries is all that it takes: the operators register themselves.
  for (int i = 3; i < count; ++i) {
    if (dlopen(arguments[i], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      return 1;
    }
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);

  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::List<c10::IValue> example = torch::jit::pickle_load(bytes).toList();
  const at::Tensor x = example.get(0).toTensor(), want = example.get(1).toTensor();

  const at::Tensor got = model.run({x}).at(0);
  const double error = (got - want).abs().max().item<double>(), size = want.abs().max().item<double>();
  std::printf("largest difference to Python: %.3g of %.3g\n", error, size);
  return got.sizes() == want.sizes() && error <= 1e-5 * size ? 0 : 1;
}
