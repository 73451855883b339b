// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/checkpoint.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/mixers/common/modules.h"
#include "gdn/model/safetensors.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr std::pair<FileDType, at::ScalarType> kDTypes[] = {
    {FileDType::kF64, at::kDouble},    {FileDType::kF32, at::kFloat}, {FileDType::kF16, at::kHalf},
    {FileDType::kBF16, at::kBFloat16}, {FileDType::kI64, at::kLong},  {FileDType::kI32, at::kInt},
    {FileDType::kI16, at::kShort},     {FileDType::kI8, at::kChar},   {FileDType::kU8, at::kByte},
    {FileDType::kBool, at::kBool}};

at::ScalarType scalar_type(FileDType dtype) {
  for (const auto& [file, torch] : kDTypes) {
    if (file == dtype) return torch;
  }
  throw Error(str_cat("[safetensors] dtype ", name_of(dtype), " has no torch type"));
}

FileDType file_dtype(const std::string& name, at::ScalarType dtype) {
  for (const auto& [file, torch] : kDTypes) {
    if (torch == dtype) return file;
  }
  throw Error(str_cat("[safetensors] tensor \"", name, "\" has dtype ", dtype,
                      ", which the format has no name for"));
}

at::Tensor copy_of(const FileTensor& tensor) {
  at::Tensor result = at::empty(tensor.shape, scalar_type(tensor.dtype));
  if (tensor.bytes > 0) std::memcpy(result.mutable_data_ptr(), tensor.data, tensor.bytes);
  return result;
}

// "3 tensors (a, b, c)", shortened after four names.
std::string list_names(const std::vector<std::string>& names) {
  constexpr size_t kShown = 4;
  std::string text = str_cat(names.size(), names.size() == 1 ? " tensor (" : " tensors (");
  for (size_t i = 0; i < names.size() && i < kShown; ++i) text += (i == 0 ? "" : ", ") + names[i];
  return text + (names.size() > kShown ? ", ...)" : ")");
}

nlohmann::json read_json(const std::string& path) {
  const std::string text = read_text_file(path);
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception&) {
    throw Error(str_cat("[load_model] ", path, " is not valid JSON"));
  }
}

}  // namespace

void save_tensors(const std::string& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<FileTensor> list;
  std::vector<at::Tensor> kept;  // contiguous copies on the host, where one is needed
  for (const auto& [name, tensor] : tensors) {
    kept.push_back(tensor.detach().to(at::kCPU).contiguous());
    const at::Tensor& t = kept.back();
    list.push_back({name, file_dtype(name, t.scalar_type()), t.sizes().vec(),
                    static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()});
  }
  write_safetensors(path, list, metadata);
}

LoadedTensors load_tensors(const std::string& path) {
  const SafetensorsReader reader(path);
  LoadedTensors result;
  result.metadata = reader.metadata();
  for (const FileTensor& tensor : reader.tensors())
    result.tensors.emplace_back(tensor.name, copy_of(tensor));
  return result;
}

void save_model(const std::string& folder, const CausalLM& model, const Tokenizer* tokenizer) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  GDN_CHECK(!error, "[save_model] cannot make the folder ", folder, ": ", error.message());
  NamedTensors tensors;
  for (const auto& item : model.named_parameters()) tensors.emplace_back(item.key(), item.value());
  save_tensors(folder + "/model.safetensors", tensors);

  const nlohmann::json config = to_json(model.config());
  nlohmann::json generation = {{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    generation[key] = config.at(key);
  atomic_write_file(folder + "/generation_config.json", generation.dump(2) + "\n");
  if (tokenizer != nullptr) tokenizer->save(folder);
  atomic_write_file(folder + "/config.json", config.dump(2) + "\n");
}

ModelConfig load_model_config(const std::string& folder) {
  const std::string path = folder + "/config.json";
  GDN_CHECK(std::filesystem::is_directory(folder), "[load_model] there is no model folder ",
            folder);
  GDN_CHECK(std::filesystem::exists(path), "[load_model] ", folder,
            " holds no config.json; a model folder has config.json and model.safetensors");
  try {
    return model_config_from_json(read_json(path));
  } catch (const UsageError& wrong) {  // the file is at fault, not how the program was called
    throw Error(str_cat("[load_model] ", path, ": ", wrong.what()));
  }
}

void load_weights(CausalLM& model, const std::string& path) {
  const SafetensorsReader reader(path);
  auto parameters = model.named_parameters();
  std::vector<std::string> missing, unexpected;
  std::string misfit;  // the first tensor of another shape or kind
  std::set<std::string> known;
  for (const auto& item : parameters) {
    known.insert(item.key());
    const FileTensor* tensor = reader.find(item.key());
    if (tensor == nullptr) {
      missing.push_back(item.key());
    } else if (misfit.empty() && item.value().sizes() != at::IntArrayRef(tensor->shape)) {
      misfit = str_cat(item.key(), " is ", at::IntArrayRef(tensor->shape), ", the model needs ",
                       item.value().sizes());
    } else if (misfit.empty() && !at::isFloatingType(scalar_type(tensor->dtype))) {
      misfit = str_cat(item.key(), " has dtype ", name_of(tensor->dtype),
                       ", the model needs a floating one");
    }
  }
  // Files with a tied head may repeat the embedding under the head's name.
  if (model.config().tie_word_embeddings) known.insert("lm_head.weight");
  for (const FileTensor& tensor : reader.tensors()) {
    if (!known.contains(tensor.name)) unexpected.push_back(tensor.name);
  }
  std::string faults;
  const auto add = [&](const std::string& fault) {
    faults += (faults.empty() ? "" : "; ") + fault;
  };
  if (!missing.empty()) add("it lacks " + list_names(missing));
  if (!unexpected.empty())
    add("it has " + list_names(unexpected) + " that the model does not know");
  if (!misfit.empty()) add(misfit);
  GDN_CHECK(faults.empty(), "[load_model] ", path, " does not fit the model: ", faults,
            "; use the config.json that was saved with these weights");

  const c10::NoGradGuard no_grad;
  for (auto& item : parameters) item.value().copy_(copy_of(*reader.find(item.key())));
}

LoadedModel load_model(const std::string& folder) {
  LoadedModel loaded;
  ModelConfig config = load_model_config(folder);
  try {
    const SkipInitialization skip;  // load_weights below fills every parameter, or throws
    loaded.model = std::make_shared<CausalLM>(std::move(config));
  } catch (const UsageError& wrong) {
    throw Error(str_cat("[load_model] ", folder, "/config.json: ", wrong.what()));
  }
  load_weights(*loaded.model, folder);
  if (std::filesystem::exists(folder + "/tokenizer.json"))
    loaded.tokenizer = load_tokenizer(folder);
  return loaded;
}

}  // namespace gdn
