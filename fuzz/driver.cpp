// SPDX-License-Identifier: Apache-2.0
// Stands in for libFuzzer where the compiler has none: runs a target on the files of a corpus and
// on mutations of them, the same for the same seed. Understands the same arguments: -runs=N -seed=S
// FOLDER_OR_FILE... An input that ends the process is left in the file crash-input of the working
// folder.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/base/rng.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMaxSize = 4096;
const std::string* current = nullptr;

// Called by abort and the terminate handler.
void keep_input() {
  if (current == nullptr) return;
  if (std::FILE* file = std::fopen("crash-input", "wb")) {
    std::fwrite(current->data(), 1, current->size(), file);
    std::fclose(file);
  }
  current = nullptr;
  std::fprintf(stderr, "the input is in the file crash-input\n");
}

void run(const std::string& input) {
  current = &input;
  // A copy of exact size, so that reading past its end is seen.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  current = nullptr;
}

std::vector<std::string> read_corpus(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  for (const std::string& path : paths) {
    if (fs::is_directory(path)) {
      for (const fs::directory_entry& entry : fs::directory_iterator(path))
        files.push_back(entry.path());
    } else {
      files.emplace_back(path);
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<std::string> corpus;
  for (const fs::path& path : files) {
    std::ifstream in(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return corpus;
}

// Values at which sizes, offsets and counts go wrong, and tokens of JSON and TOML.
constexpr std::string_view kPieces[] = {"0",
                                        "-1",
                                        "1",
                                        "7",
                                        "255",
                                        "65536",
                                        "2147483648",
                                        "4294967296",
                                        "9223372036854775807",
                                        "9223372036854775808",
                                        "18446744073709551615",
                                        "-9223372036854775808",
                                        "1e308",
                                        "1e-400",
                                        "nan",
                                        "inf",
                                        "0.5",
                                        "[",
                                        "]",
                                        "{",
                                        "}",
                                        "[]",
                                        "{}",
                                        "\"",
                                        "\"\"",
                                        ",",
                                        ":",
                                        "=",
                                        "\n",
                                        "\\u0000",
                                        "\\ud800",
                                        "\xff",
                                        "\xc3",
                                        "null",
                                        "true",
                                        "[[model.layers]]",
                                        "\"F64\"",
                                        "\"BOOL\"",
                                        "[4611686018427387904,4]",
                                        std::string_view("\0", 1)};

void mutate_once(std::string& text, const std::vector<std::string>& corpus, gdn::Rng& rng) {
  const size_t at = rng.below(text.size() + 1);
  const auto span = [&] { return rng.below(text.size() - at + 1); };
  const std::string_view piece = kPieces[rng.below(std::size(kPieces))];
  switch (rng.below(7)) {
    case 0:
      if (at < text.size()) text[at] = static_cast<char>(rng.next());
      break;
    case 1:
      text.erase(at, rng.below(4) == 0 ? span() : 1);
      break;
    case 2:
      text.insert(at, piece);
      break;
    case 3:  // a part twice: duplicate keys, overlapping tensors
      text.insert(at, text.substr(at, std::min<size_t>(span(), 64)));
      break;
    case 4: {  // another number in place of one that is there
      const size_t begin = text.find_first_of("0123456789", at);
      if (begin == std::string::npos) break;
      const size_t end = std::min(text.find_first_not_of("0123456789.", begin), text.size());
      text.replace(begin, end - begin,
                   rng.below(2) ? std::string(piece) : std::to_string(rng.below(300)));
      break;
    }
    case 5: {  // the end of another input
      const std::string& other = corpus[rng.below(corpus.size())];
      text.resize(at);
      text += other.substr(rng.below(other.size() + 1));
      break;
    }
    default:
      if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << rng.below(8)));
  }
  if (text.size() > kMaxSize) text.resize(kMaxSize);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t runs = 10000, seed = 1;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with("-runs=")) {
      runs = std::strtoull(argument.c_str() + 6, nullptr, 10);
    } else if (argument.starts_with("-seed=")) {
      seed = std::strtoull(argument.c_str() + 6, nullptr, 10);
    } else {
      paths.push_back(argument);
    }
  }
  const std::vector<std::string> corpus = read_corpus(paths);
  if (corpus.empty()) {
    std::fprintf(stderr, "usage: %s [-runs=N] [-seed=S] FOLDER_OR_FILE...\n", argv[0]);
    return 2;
  }
  std::set_terminate([] {
    keep_input();
    std::abort();
  });
  std::signal(SIGABRT, [](int) {
    keep_input();
    std::_Exit(1);
  });

  for (const std::string& input : corpus) run(input);
  gdn::Rng rng(seed);
  for (uint64_t i = 0; i < runs; ++i) {
    std::string input = corpus[rng.below(corpus.size())];
    for (uint64_t n = 1 + rng.below(6); n > 0; --n) mutate_once(input, corpus, rng);
    run(input);
  }
  std::printf("%zu inputs of the corpus and %llu mutations\n", corpus.size(),
              static_cast<unsigned long long>(runs));
}
