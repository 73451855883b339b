// SPDX-License-Identifier: Apache-2.0
// A hostile safetensors file ends in gdn::Error; an accepted one has only tensors whose bytes are
// there.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "gdn/base/check.h"
#include "gdn/model/safetensors.h"

namespace {

void parse(const std::string& file) {
  gdn::SafetensorsHeader header;
  try {
    header = gdn::parse_safetensors(file, "fuzz");
  } catch (const gdn::Error&) {
    return;
  }
  for (const gdn::FileTensor& tensor : header.tensors) {
    int64_t bytes = gdn::size_of(tensor.dtype);
    for (int64_t size : tensor.shape) bytes *= size;
    if (bytes < 0 || static_cast<size_t>(bytes) != tensor.bytes) std::abort();
    // The sanitizer watches these reads; the copy must be complete.
    const std::string copy(reinterpret_cast<const char*>(tensor.data), tensor.bytes);
    if (tensor.bytes != 0 && std::memcmp(copy.data(), tensor.data, tensor.bytes) != 0) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input(reinterpret_cast<const char*>(data), size);
  parse(input);
  // The same with a header length that fits, which mutation alone would hardly find: the first line
  // is the header.
  const size_t end = std::min(input.find('\n'), input.size());
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(uint64_t{end} >> (8 * i));
  file += input.substr(0, end);
  if (end < input.size()) file += input.substr(end + 1);
  parse(file);
  return 0;
}
