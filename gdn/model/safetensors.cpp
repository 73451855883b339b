// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using Json = nlohmann::json;
static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

constexpr size_t kLengthSize = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the reference implementation
constexpr int kMaxDepth = 3;                  // {name: {"shape": [..]}}

struct DTypeName {
  const char* name;
  int64_t size;
};
constexpr DTypeName kDTypes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
                                 {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1}};

// nlohmann's parser keeps the last of two equal keys; here they are an error, and so is deep
// nesting.
class StrictObject {
 public:
  explicit StrictObject(const std::string& where) : where_(where), keys_(kMaxDepth + 1) {}

  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start) {
      GDN_CHECK(depth < kMaxDepth, where_, "the header is nested too deeply");
      keys_[depth + 1].clear();
    } else if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      GDN_CHECK(keys_[depth].insert(key).second, where_, "the name \"", key, "\" occurs twice");
    }
    return true;
  }

 private:
  const std::string& where_;
  std::vector<std::set<std::string>> keys_;  // by depth
};

Json parse_strict(std::string_view text, const std::string& where, const char* what) {
  try {
    return Json::parse(text.begin(), text.end(), StrictObject(where));
  } catch (const Json::exception&) {
    throw Error(str_cat(where, what, " is not valid JSON"));
  }
}

// A non-negative integer of a header.
uint64_t to_size(const Json& value, const std::string& where, const std::string& name,
                 const char* what) {
  GDN_CHECK(value.is_number_unsigned(), where, "tensor \"", name, "\": ", what,
            " must hold non-negative integers, got ", value.dump());
  return value.get<uint64_t>();
}

FileTensor parse_tensor(const std::string& name, const Json& entry, std::string_view data,
                        const std::string& where) {
  const auto field = [&](const char* key) -> const Json& {
    GDN_CHECK(entry.is_object() && entry.contains(key), where, "tensor \"", name, "\" has no ",
              key);
    return entry[key];
  };
  FileTensor tensor;
  tensor.name = name;
  const Json& dtype = field("dtype");
  const auto* known = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                   [&](const DTypeName& t) { return dtype == t.name; });
  GDN_CHECK(known != std::end(kDTypes), where, "tensor \"", name, "\" has the unknown dtype ",
            dtype.dump());
  tensor.dtype = static_cast<FileDType>(known - kDTypes);

  const Json& shape = field("shape");
  GDN_CHECK(shape.is_array(), where, "tensor \"", name, "\": shape must be a list");
  uint64_t size = static_cast<uint64_t>(known->size);
  for (const Json& item : shape) {
    const uint64_t n = to_size(item, where, name, "shape");
    GDN_CHECK(n <= INT64_MAX && (n == 0 || size <= INT64_MAX / n), where, "tensor \"", name,
              "\": its shape ", shape.dump(), " overflows");
    size *= n;
    tensor.shape.push_back(static_cast<int64_t>(n));
  }

  const Json& offsets = field("data_offsets");
  GDN_CHECK(offsets.is_array() && offsets.size() == 2, where, "tensor \"", name,
            "\": data_offsets must be [begin, end]");
  const uint64_t begin = to_size(offsets[0], where, name, "data_offsets");
  const uint64_t end = to_size(offsets[1], where, name, "data_offsets");
  GDN_CHECK(begin <= end && end <= data.size(), where, "tensor \"", name, "\": its bytes [", begin,
            ", ", end, ") lie outside the ", data.size(),
            " bytes of data (is the file truncated?)");
  GDN_CHECK(end - begin == size, where, "tensor \"", name, "\": shape ", shape.dump(), " of ",
            known->name, " needs ", size, " bytes, data_offsets give ", end - begin);
  tensor.data = reinterpret_cast<const std::byte*>(data.data() + begin);
  tensor.bytes = size;
  return tensor;
}

// Tensors must follow each other without gap or overlap and fill the data.
void check_layout(std::vector<FileTensor>& tensors, std::string_view data,
                  const std::string& where) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const FileTensor& a, const FileTensor& b) {
    return std::pair(a.data, a.bytes) < std::pair(b.data, b.bytes);
  });
  const auto* next = reinterpret_cast<const std::byte*>(data.data());
  const std::string* previous = nullptr;
  for (const FileTensor& tensor : tensors) {
    if (previous != nullptr) {
      GDN_CHECK(tensor.data >= next, where, "tensors \"", *previous, "\" and \"", tensor.name,
                "\" overlap");
    }
    GDN_CHECK(tensor.data == next, where, "there are unused bytes before tensor \"", tensor.name,
              "\"");
    next = tensor.data + tensor.bytes;
    previous = &tensor.name;
  }
  const auto* end = reinterpret_cast<const std::byte*>(data.data() + data.size());
  GDN_CHECK(next == end, where, end - next, " bytes after the last tensor belong to none");
}

}  // namespace

const char* name_of(FileDType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }
int64_t size_of(FileDType dtype) { return kDTypes[static_cast<size_t>(dtype)].size; }

SafetensorsHeader parse_safetensors(std::string_view bytes, const std::string& label) {
  const std::string where = "[safetensors] " + label + ": ";
  GDN_CHECK(bytes.size() >= kLengthSize, where, "the file is too short (", bytes.size(),
            " bytes) to be a safetensors file");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthSize);
  GDN_CHECK(length <= kMaxHeader && length <= bytes.size() - kLengthSize, where, "a header of ",
            length, " bytes does not fit in a file of ", bytes.size(),
            " (is it truncated, or no safetensors file?)");
  const std::string_view header = bytes.substr(kLengthSize, length);
  const std::string_view data = bytes.substr(kLengthSize + length);
  GDN_CHECK(!header.empty() && header[0] == '{', where, "the header is not a JSON object");
  const Json json = parse_strict(header, where, "the header");

  SafetensorsHeader result;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") {
      GDN_CHECK(entry.is_object(), where, "__metadata__ must be an object of strings");
      for (const auto& [key, value] : entry.items()) {
        GDN_CHECK(value.is_string(), where, "__metadata__ must be an object of strings");
        result.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    result.tensors.push_back(parse_tensor(name, entry, data, where));
  }
  check_layout(result.tensors, data, where);
  return result;
}

SafetensorsReader::SafetensorsReader(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    add_file(path, nullptr);
    return;
  }
  const std::string single = path + "/model.safetensors", index = single + ".index.json";
  if (fs::exists(single, ignored)) {
    add_file(single, nullptr);
    return;
  }
  GDN_CHECK(
      fs::exists(index, ignored), "[safetensors] ", path,
      " holds neither model.safetensors nor model.safetensors.index.json (is it a model folder?)");
  const std::string where = "[safetensors] " + index + ": ";
  const Json json = parse_strict(read_text_file(index), where, "it");
  GDN_CHECK(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
            where, "it has no \"weight_map\"");
  std::map<std::string, std::string> weight_map;  // tensor -> file
  std::set<std::string> shards;
  for (const auto& [name, file] : json["weight_map"].items()) {
    GDN_CHECK(file.is_string(), where, "tensor \"", name, "\" has no file name");
    const std::string shard = file.get<std::string>();
    GDN_CHECK(
        !shard.empty() && shard != "." && shard != ".." && shard.find('/') == std::string::npos,
        where, "tensor \"", name, "\": \"", shard, "\" is not a file name in this folder");
    weight_map[name] = shard;
    shards.insert(shard);
  }
  for (const std::string& shard : shards) add_file(path + "/" + shard, &weight_map);
  for (const auto& [name, shard] : weight_map) {
    GDN_CHECK(index_.contains(name), where, "tensor \"", name, "\" is not in ", shard);
  }
}

void SafetensorsReader::add_file(const std::string& path,
                                 const std::map<std::string, std::string>* expected) {
  files_.push_back(std::make_unique<MappedFile>(path));
  SafetensorsHeader header = parse_safetensors(files_.back()->text(), path);
  const std::string file = path.substr(path.rfind('/') + 1);
  for (FileTensor& tensor : header.tensors) {
    if (expected != nullptr) {  // what the index does not name, or names elsewhere, does not belong
                                // to the model
      const auto entry = expected->find(tensor.name);
      if (entry == expected->end() || entry->second != file) continue;
    }
    index_[tensor.name] = tensors_.size();
    tensors_.push_back(std::move(tensor));
  }
  metadata_.merge(header.metadata);
}

const FileTensor* SafetensorsReader::find(std::string_view name) const {
  const auto entry = index_.find(name);
  return entry == index_.end() ? nullptr : &tensors_[entry->second];
}

void write_safetensors(const std::string& path, const std::vector<FileTensor>& tensors,
                       std::map<std::string, std::string> metadata) {
  std::vector<const FileTensor*> order;
  for (const FileTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const FileTensor* a, const FileTensor* b) {
    return std::pair(-size_of(a->dtype), a->name) < std::pair(-size_of(b->dtype), b->name);
  });
  nlohmann::ordered_json header;
  metadata.emplace("format", "pt");
  header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const FileTensor* tensor : order) {
    uint64_t bytes = static_cast<uint64_t>(size_of(tensor->dtype));
    for (const int64_t n : tensor->shape) bytes *= static_cast<uint64_t>(n);
    GDN_CHECK(bytes == tensor->bytes, "[safetensors] tensor \"", tensor->name,
              "\": its shape needs ", bytes, " bytes, got ", tensor->bytes);
    GDN_CHECK(!header.contains(tensor->name), "[safetensors] the name \"", tensor->name,
              "\" occurs twice");
    header[tensor->name] = {{"dtype", name_of(tensor->dtype)},
                            {"shape", tensor->shape},
                            {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + kLengthSize - 1) / kLengthSize * kLengthSize, ' ');
  atomic_write_file(path, [&](FileWriter& out) {
    const uint64_t length = text.size();
    out.write(&length, kLengthSize);
    out.write(text);
    for (const FileTensor* tensor : order) out.write(tensor->data, tensor->bytes);
  });
}

}  // namespace gdn
