// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/tensorboard.h"

#include <unistd.h>

#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "gdn/base/check.h"
#include "gdn/train/crc32c.h"

namespace gdn {
namespace {

// --- protocol buffers: a field is (number << 3 | wire type), then its value
// -----------------------------------------

void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

template <typename T>
void put_raw(std::string& out, T value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void put_int(std::string& out, uint32_t field, int64_t value) {
  put_varint(out, field << 3 | 0);
  put_varint(out, static_cast<uint64_t>(value));
}
void put_double(std::string& out, uint32_t field, double value) {
  put_varint(out, field << 3 | 1);
  put_raw(out, value);
}
void put_float(std::string& out, uint32_t field, float value) {
  put_varint(out, field << 3 | 5);
  put_raw(out, value);
}
void put_bytes(std::string& out, uint32_t field, const std::string& value) {
  put_varint(out, field << 3 | 2);
  put_varint(out, value.size());
  out += value;
}

// tensorflow.Event: wall_time 1, step 2, and one of file_version 3, summary 5, session_log 7.
std::string event(int64_t step, uint32_t what, const std::string& content) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string out;
  put_double(out, 1, now.count());
  if (step != 0) put_int(out, 2, step);
  put_bytes(out, what, content);
  return out;
}

uint32_t masked(uint32_t crc) { return std::rotr(crc, 15) + 0xa282ead8u; }

}  // namespace

EventWriter::EventWriter(const std::string& folder, int64_t first_step) {
  std::filesystem::create_directories(folder);
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  // Readers take the files of a folder in the order of their names: time first, in nanoseconds
  // since a resumed run may follow within the second.
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  char stamp[64];
  std::snprintf(stamp, sizeof stamp, "%010lld.%09lld",
                static_cast<long long>(nanoseconds / 1000000000),
                static_cast<long long>(nanoseconds % 1000000000));
  path_ = str_cat(folder, "/events.out.tfevents.", stamp, ".", host, ".", getpid());
  file_.reset(std::fopen(path_.c_str(), "wbe"));
  GDN_CHECK(file_, "[tensorboard] cannot write ", path_, ": ", std::strerror(errno));
  record(event(0, 3, "brain.Event:2"));
  std::string start;
  put_int(start, 1, 1);  // SessionLog.status = START
  if (first_step > 0) record(event(first_step, 7, start));
  flush();
}

void EventWriter::scalar(const std::string& tag, int64_t step, double value) {
  std::string item, summary;
  put_bytes(item, 1, tag);
  put_float(item, 2, static_cast<float>(value));
  put_bytes(summary, 1, item);
  record(event(step, 5, summary));
}

void EventWriter::record(const std::string& bytes) {
  std::string length, out;
  put_raw(length, static_cast<uint64_t>(bytes.size()));
  out = length;
  put_raw(out, masked(crc32c(length)));
  out += bytes;
  put_raw(out, masked(crc32c(bytes)));
  GDN_CHECK(std::fwrite(out.data(), 1, out.size(), file_.get()) == out.size(),
            "[tensorboard] cannot write ", path_, ": ", std::strerror(errno));
}

void EventWriter::flush() {
  GDN_CHECK(std::fflush(file_.get()) == 0, "[tensorboard] cannot write ", path_, ": ",
            std::strerror(errno));
}

}  // namespace gdn
