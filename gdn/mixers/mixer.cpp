// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/mixer.h"

#include <ATen/ops/index_select.h>

#include "gdn/base/check.h"
#include "gdn/base/names.h"

namespace gdn {
namespace {

template <typename Map>
State map_entries(const State& state, const Map& map) {
  State result;
  for (const auto& [name, value] : state.entries()) result.set(name, map(value));
  return result;
}

const char* kind_of(const nlohmann::json& value) {
  if (value.is_boolean()) return "true or false";
  if (value.is_number_integer()) return "an integer";
  if (value.is_number()) return "a number";
  return value.is_string() ? "a string" : "a list or table";
}

// Whether `given` may stand where `default_value` does; a null default is derived and its type is
// the mixer's to check, and null asks for a derived value.
bool fits(const nlohmann::json& given, const nlohmann::json& default_value) {
  if (default_value.is_null() || given.is_null()) return true;
  if (default_value.is_boolean()) return given.is_boolean();
  if (default_value.is_number_integer()) return given.is_number_integer();
  if (default_value.is_number()) return given.is_number();
  return given.type() == default_value.type();
}

}  // namespace

bool State::has(std::string_view name) const {
  for (const auto& entry : entries_)
    if (entry.first == name) return true;
  return false;
}

const at::Tensor& State::operator[](std::string_view name) const {
  for (const auto& entry : entries_)
    if (entry.first == name) return entry.second;
  std::string known;
  for (const auto& entry : entries_) known += (known.empty() ? "" : ", ") + entry.first;
  throw Error(str_cat("[state] there is no entry \"", name, "\", only: ", known));
}

at::Tensor& State::operator[](std::string_view name) {
  return const_cast<at::Tensor&>(static_cast<const State&>(*this)[name]);
}

void State::set(std::string name, at::Tensor value) {
  for (auto& entry : entries_) {
    if (entry.first == name) {
      entry.second = std::move(value);
      return;
    }
  }
  entries_.emplace_back(std::move(name), std::move(value));
}

int64_t State::num_sequences() const {
  return entries_.empty() ? 0 : entries_.front().second.size(0);
}

int64_t State::bytes() const {
  int64_t sum = 0;
  for (const auto& entry : entries_) sum += static_cast<int64_t>(entry.second.nbytes());
  return sum;
}

State State::clone() const {
  return map_entries(*this, [](const at::Tensor& t) { return t.clone(); });
}

State State::detach() const {
  return map_entries(*this, [](const at::Tensor& t) { return t.detach(); });
}

State State::index(const at::Tensor& sequences) const {
  return map_entries(*this, [&](const at::Tensor& t) { return at::index_select(t, 0, sequences); });
}

const MixerInfo& find_mixer(std::string_view name) {
  std::vector<std::string> names;
  std::string list;
  for (const MixerInfo& info : mixers()) {
    if (info.name == name) return info;
    names.push_back(info.name);
    list += (list.empty() ? "" : ", ") + info.name;
  }
  throw UsageError(
      str_cat("unknown mixer \"", name, "\"", did_you_mean(name, names), "; known mixers: ", list));
}

std::shared_ptr<Mixer> make_mixer(std::string_view name, MixerArgs args) {
  const MixerInfo& info = find_mixer(name);
  if (args.options.is_null()) args.options = nlohmann::json::object();
  if (!args.options.is_object()) {
    throw UsageError(str_cat("[", info.name, "] options must be a table of names and values, got ",
                             args.options.dump()));
  }
  if (args.hidden_size < 1) {
    throw UsageError(
        str_cat("[", info.name, "] hidden_size must be at least 1, got ", args.hidden_size));
  }
  std::vector<std::string> names;
  for (const MixerOption& option : info.options) names.push_back(option.name);
  for (const auto& [key, value] : args.options.items()) {
    const MixerOption* known = nullptr;
    for (const MixerOption& option : info.options)
      if (option.name == key) known = &option;
    if (known == nullptr) {
      throw UsageError(
          str_cat("[", info.name, "] unknown option \"", key, "\"", did_you_mean(key, names)));
    }
    if (!fits(value, known->default_value)) {
      throw UsageError(str_cat("[", info.name, "] ", key, " must be ",
                               kind_of(known->default_value), ", got ", value.dump()));
    }
  }
  for (const MixerOption& option : info.options) {
    nlohmann::json& value = args.options[option.name];
    if (value.is_null()) value = option.default_value;
  }
  args.resolved = std::make_shared<nlohmann::json>(args.options);
  std::shared_ptr<Mixer> mixer = info.make(args);
  mixer->options_ = std::move(*args.resolved);
  return mixer;
}

}  // namespace gdn
