// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/options.h"

#include <cmath>

#include "gdn/kernels/short_conv.h"

namespace gdn {

Options::Options(std::string_view mixer, const MixerArgs& args)
    : mixer_(mixer), options_(args.options), resolved_(args.resolved) {}

void Options::fail(const std::string& text) const {
  throw UsageError(str_cat("[", mixer_, "] ", text));
}

const nlohmann::json& Options::value(const char* name) const { return options_.at(name); }

bool Options::flag(const char* name) const {
  check(value(name).is_boolean(), name, " must be true or false, got ", value(name).dump());
  return value(name).get<bool>();
}

int64_t Options::positive(const char* name) const {
  check(value(name).is_number_integer() && value(name).get<int64_t>() >= 1, name,
        " must be an integer of at least 1, got ", value(name).dump());
  return value(name).get<int64_t>();
}

int64_t Options::positive_or(const char* name, int64_t derived) const {
  return value(name).is_null() ? note(name, derived) : positive(name);
}

int64_t Options::conv_size() const {
  const int64_t width = positive("conv_size");
  check(width <= kMaxConvWidth, "conv_size must be at most ", kMaxConvWidth, ", got ", width);
  return width;
}

double Options::number(const char* name) const {
  check(value(name).is_number() && std::isfinite(value(name).get<double>()), name,
        " must be a finite number, got ", value(name).dump());
  return value(name).get<double>();
}

double Options::number_or(const char* name, double derived) const {
  return value(name).is_null() ? note(name, derived) : number(name);
}

std::string Options::text(const char* name, std::initializer_list<const char*> choices) const {
  std::string list;
  for (const char* choice : choices) {
    if (value(name) == choice) return choice;
    list += (list.empty() ? "" : ", ") + std::string(choice);
  }
  fail(str_cat(name, " must be one of ", list, ", got ", value(name).dump()));
}

}  // namespace gdn
