// SPDX-License-Identifier: Apache-2.0
// Reading a mixer's options, which make_mixer has completed with their defaults.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gdn/mixers/mixer.h"

namespace gdn {

class Options {
 public:
  Options(std::string_view mixer, const MixerArgs& args);

  // Each throws a UsageError naming the mixer, the option and the value where the type is wrong.
  // The first form is for options that have a default, the second for derived ones (null).
  bool flag(const char* name) const;
  bool given(const char* name) const { return !value(name).is_null(); }
  int64_t positive(const char* name) const;  // an integer >= 1
  int64_t positive_or(const char* name, int64_t derived) const;
  double number(const char* name) const;
  double number_or(const char* name, double derived) const;
  int64_t conv_size() const;  // a width that the short convolution's kernel has
  std::string text(const char* name, std::initializer_list<const char*> choices) const;

  // Throws a UsageError "[mixer] ..." of these parts unless `condition` holds.
  template <typename... Parts>
  void check(bool condition, const Parts&... parts) const;

 private:
  const nlohmann::json& value(const char* name) const;
  [[noreturn]] void fail(const std::string& text) const;

  template <typename T>
  T note(const char* name, T derived) const {
    if (resolved_) (*resolved_)[name] = derived;
    return derived;
  }

  std::string mixer_;
  nlohmann::json options_;
  std::shared_ptr<nlohmann::json> resolved_;
};

}  // namespace gdn

#include "gdn/base/check.h"

template <typename... Parts>
void gdn::Options::check(bool condition, const Parts&... parts) const {
  if (!condition) fail(str_cat(parts...));
}
