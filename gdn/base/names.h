// SPDX-License-Identifier: Apache-2.0
// "Did you mean": the nearest of a set of known names.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gdn {

// The name among `known` nearest to `word` by edit distance, or "" when none is near.
std::string nearest_name(std::string_view word, const std::vector<std::string>& known);

// " (did you mean \"x\"?)", or "" when no known name is near.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& known);

}  // namespace gdn
