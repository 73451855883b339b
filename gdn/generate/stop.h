// SPDX-License-Identifier: Apache-2.0
// Stop strings in a stream of text, wherever the stream's pieces begin and end.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace gdn {

class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);  // empty ones are ignored

  // What can be shown for sure: text that cannot become part of a stop string any more. Nothing
  // follows the earliest stop string.
  std::string push(std::string_view text);
  std::string flush();  // what was held back, at the end of the stream
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace gdn
