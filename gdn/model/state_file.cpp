// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/state_file.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "gdn/base/check.h"
#include "gdn/model/checkpoint.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

constexpr const char* kFormat = "1";

uint64_t mix(uint64_t hash, const void* data, size_t bytes) {  // FNV-1a
  const auto* p = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3ULL;
  return hash;
}

// Of the names, shapes and some values of all weights: a few hundred of each, so that a large model
// takes no time.
std::string fingerprint(const CausalLM& model) {
  constexpr int64_t kValues = 256;
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const auto& parameter : model.named_parameters()) {
    const at::Tensor flat = parameter.value().detach().reshape({-1});
    const int64_t size = flat.numel(), stride = std::max<int64_t>(1, size / kValues);
    const at::Tensor some = flat.slice(0, 0, size, stride).contiguous();
    hash = mix(hash, parameter.key().data(), parameter.key().size());
    hash = mix(hash, &size, sizeof size);
    hash = mix(hash, some.const_data_ptr(), some.nbytes());
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

template <typename Visit>
void visit_entries(const ModelState& state, const Visit& visit) {
  for (const auto& [part, states] :
       {std::pair("mixer", &state.mixer), std::pair("feed_forward", &state.feed_forward)}) {
    for (size_t i = 0; i < states->size(); ++i) {
      for (const auto& [name, value] : (*states)[i].entries())
        visit(str_cat(part, ".", i, ".", name), name, value, part[0] == 'm', i);
    }
  }
}

}  // namespace

void save_state(const std::string& path, const CausalLM& model, const SavedState& saved) {
  NamedTensors tensors;
  visit_entries(saved.state,
                [&](const std::string& key, const std::string&, const at::Tensor& value, bool,
                    size_t) { tensors.emplace_back(key, value); });
  tensors.emplace_back("logits", saved.logits);
  save_tensors(path, tensors,
               {{"gdn_state", kFormat},
                {"weights", fingerprint(model)},
                {"config", to_json(model.config()).dump()}});
}

SavedState load_state(const std::string& path, const CausalLM& model) {
  LoadedTensors file = load_tensors(path);
  const auto meta = [&](const char* key) {
    const auto found = file.metadata.find(key);
    return found != file.metadata.end() ? found->second : std::string();
  };
  GDN_CHECK(meta("gdn_state") == kFormat, "[state] ", path,
            " is not a saved state (gdn generate --state-out makes them)");
  GDN_CHECK(meta("config") == to_json(model.config()).dump(), "[state] ", path,
            " was left by a model of another configuration");
  const std::string weights = fingerprint(model);
  GDN_CHECK(meta("weights") == weights, "[state] ", path,
            " was left by a model with other weights (", meta("weights"), ", these are ", weights,
            ")");
  std::map<std::string, at::Tensor> entries;
  for (auto& [name, tensor] : file.tensors) entries[name] = tensor;
  const auto take = [&](const std::string& key) {
    const auto found = entries.find(key);
    GDN_CHECK(found != entries.end(), "[state] ", path, " has no entry ", key);
    const at::Tensor tensor = found->second;
    entries.erase(found);
    return tensor;
  };
  SavedState result;
  result.logits = take("logits");
  GDN_CHECK(result.logits.dim() == 2 && result.logits.size(1) == model.config().vocab_size,
            "[state] ", path, ": logits must be [N,", model.config().vocab_size, "], got ",
            ops::shape_str(result.logits));
  result.state = model.zero_state(result.logits.size(0));
  ModelState& state = result.state;
  const ModelState zero = state;
  visit_entries(zero, [&](const std::string& key, const std::string& name, const at::Tensor& value,
                          bool mixer, size_t i) {
    const at::Tensor tensor = take(key);
    // A dimension that is empty in a state that has seen nothing grows with the tokens.
    bool same = tensor.dim() == value.dim();
    for (int64_t d = 0; same && d < tensor.dim(); ++d)
      same = tensor.size(d) == value.size(d) || (d > 0 && value.size(d) == 0);
    GDN_CHECK(same, "[state] ", path, ": ", key, " must be ", ops::shape_str(value), ", got ",
              ops::shape_str(tensor));
    (mixer ? state.mixer : state.feed_forward)[i].set(name, tensor.to(value.scalar_type()));
  });
  GDN_CHECK(entries.empty(), "[state] ", path, " has an unexpected entry ", entries.begin()->first);
  return result;
}

}  // namespace gdn
