// SPDX-License-Identifier: Apache-2.0
// The safetensors format: 8 bytes header length (little endian), a JSON header {name: {dtype,
// shape, data_offsets}}, then the tensors' bytes without gaps. Files are mapped, and everything a
// header says is checked against the file before a single tensor is looked at, so a truncated or
// hostile file ends in one gdn::Error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/base/file.h"

namespace gdn {

enum class FileDType : uint8_t { kF64, kF32, kF16, kBF16, kI64, kI32, kI16, kI8, kU8, kBool };
const char* name_of(FileDType dtype);  // "F64", ..., "BOOL"
int64_t size_of(FileDType dtype);      // bytes per element

// One tensor of a file. `data` may lie at any address: copy it with memcpy.
struct FileTensor {
  std::string name;
  FileDType dtype = FileDType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<FileTensor> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// The tensors in the bytes of one file, pointing into them; `label` names the file in errors.
SafetensorsHeader parse_safetensors(std::string_view bytes, const std::string& label);

// All tensors of a model: one file, or the folder of model.safetensors or of
// model.safetensors.index.json and its shards. The files stay mapped as long as the object lives.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);

  const std::vector<FileTensor>& tensors() const { return tensors_; }
  const FileTensor* find(std::string_view name) const;  // null: absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  void add_file(const std::string& path, const std::map<std::string, std::string>* expected);

  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<FileTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
  std::map<std::string, std::string> metadata_;
};

// Writes one file atomically, the widest element types first, so that every tensor is aligned. The
// metadata says
// {"format": "pt"}, which Hugging Face's loaders ask for, and what is given.
void write_safetensors(const std::string& path, const std::vector<FileTensor>& tensors,
                       std::map<std::string, std::string> metadata = {});

}  // namespace gdn
