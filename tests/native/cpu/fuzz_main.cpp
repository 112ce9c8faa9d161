// Runs the fuzz target without libFuzzer: on the files given, or on random inputs, fuzz [--runs N] [--seed S] [FILE ...].
// A finding leaves its input in fuzz-finding.bin.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  long runs = 20000;
  unsigned seed = 1;
  std::vector<std::string> files;
  for (int i = 1; i < count; i++) {
    const std::string argument = arguments[i];
    if (argument == "--runs" && i + 1 < count) {
      runs = std::atol(arguments[++i]);
    } else if (argument == "--seed" && i + 1 < count) {
      seed = static_cast<unsigned>(std::atol(arguments[++i]));
    } else {
      files.push_back(argument);
    }
  }
  for (const std::string& file : files) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) {
      std::fprintf(stderr, "cannot read %s\n", file.c_str());
      return 2;
    }
    const std::vector<char> bytes(std::istreambuf_iterator<char>(stream), {});
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  if (!files.empty()) return 0;
  std::mt19937 random(seed);
  for (long run = 0; run < runs; run++) {
    std::vector<uint8_t> bytes(16 + random() % 4096);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    // Before, not after: a sanitizer does not come back.
    std::ofstream("fuzz-finding.bin", std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::remove("fuzz-finding.bin");
  std::printf("%ld inputs, nothing found\n", runs);
  return 0;
}
