// SPDX-License-Identifier: Apache-2.0
// Writes scalars as TensorBoard event files: TFRecord frames around hand-encoded protocol buffers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace gdn {

class EventWriter {
 public:
  // Makes a new file in `folder`. `first_step` is the first step this file will tell about:
  // TensorBoard then forgets what older files of the folder say from that step on (a resumed run).
  EventWriter(const std::string& folder, int64_t first_step);

  void scalar(const std::string& tag, int64_t step, double value);
  void flush();
  const std::string& path() const { return path_; }

 private:
  void record(const std::string& event);

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace gdn
