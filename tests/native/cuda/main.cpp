// Every CUDA kernel on a grid of shapes, emulated, against sums in double.
//
//   cuda_kernels [--small] [group ...]
#include <map>

#include "kernel_test.h"

int main(int count, char** arguments) {
  using namespace kernel_test;
  std::map<std::string, void (*)(bool)> groups = {{"attention_pool", test_attention_pool},
                                                  {"backward_tickets", test_backward_tickets},
                                                  {"channel_fuse", test_channel_fuse},
                                                  {"channel_sums", test_channel_sums},
                                                  {"flat_stages", test_flat_stages},
                                                  {"forward_tickets", test_forward_tickets},
                                                  {"global_context", test_global_context},
                                                  {"global_response_norm", test_global_response_norm},
                                                  {"tickets", test_tickets}};
  bool small = false, selected = false;
  for (int i = 1; i < count; i++) {
    if (std::strcmp(arguments[i], "--small") == 0) {
      small = true;
      continue;
    }
    groups.at(arguments[i])(small);
    selected = true;
  }
  if (!selected) {
    for (const auto& [name, test] : groups) test(small);
  }
  std::printf("%d comparisons, %d failed\n", comparisons, failures);
  return failures != 0 || comparisons == 0;
}
