// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/train/crc32c.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kPrefix[] = "step-";
constexpr char kTemporary[] = ".saving-";

std::string step_name(int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "%s%06lld", kPrefix, static_cast<long long>(step));
  return name;
}

void sync_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  GDN_CHECK(fd >= 0, "[train] cannot open ", path, ": ", std::strerror(errno));
  const int result = fsync(fd);
  const int error = errno;
  close(fd);
  GDN_CHECK(result == 0, "[train] cannot sync ", path, ": ", std::strerror(error));
}

void point_latest(const std::string& run_folder, const std::string& name) {
  const std::string temporary = run_folder + "/" + kTemporary + "latest";
  std::error_code ignored;
  fs::remove(temporary, ignored);
  fs::create_symlink(name, temporary);
  fs::rename(temporary, run_folder + "/latest");  // replaces the old link in one step
  sync_folder(run_folder);
}

}  // namespace

RunLock::RunLock(const std::string& run_folder) {
  std::error_code error;
  fs::create_directories(run_folder, error);
  GDN_CHECK(!error, "[train] cannot make the run folder ", run_folder, ": ", error.message());
  const std::string path = run_folder + "/.lock";
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  GDN_CHECK(fd_ >= 0, "[train] cannot write into the run folder ", run_folder, ": ",
            std::strerror(errno));
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    char owner[32] = {};
    const ssize_t n = pread(fd_, owner, sizeof owner - 1, 0);
    close(fd_);
    throw Error(str_cat("[train] ", run_folder, " is in use by another run (process ",
                        n > 0 ? owner : "unknown",
                        "): wait for it, stop it, or choose another --out-dir"));
  }
  const std::string pid = std::to_string(getpid());
  if (ftruncate(fd_, 0) != 0 || pwrite(fd_, pid.data(), pid.size(), 0) < 0) {
    // The number only makes the message above more helpful.
  }
}

RunLock::~RunLock() {
  if (fd_ >= 0) close(fd_);
}

bool has_run(const std::string& run_folder) {
  return fs::exists(run_folder + "/config.toml") || fs::exists(run_folder + "/metrics.jsonl") ||
         !list_checkpoints(run_folder).empty();
}

std::vector<CheckpointEntry> list_checkpoints(const std::string& run_folder) {
  std::vector<CheckpointEntry> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run_folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix) || !entry.is_directory()) continue;
    const char* const digits = name.data() + sizeof kPrefix - 1;
    const char* const end = name.data() + name.size();
    int64_t step = 0;
    const auto r = std::from_chars(digits, end, step);
    if (r.ec == std::errc() && r.ptr == end) found.push_back({step, entry.path().string()});
  }
  std::sort(found.begin(), found.end(),
            [](const CheckpointEntry& a, const CheckpointEntry& b) { return a.step > b.step; });
  return found;
}

std::string write_checkpoint(const std::string& run_folder, int64_t step, json state,
                             const std::function<void(const std::string&)>& fill) {
  const std::string name = step_name(step), path = run_folder + "/" + name;
  const std::string temporary = run_folder + "/" + kTemporary + name;
  try {
    fs::remove_all(temporary);
    fs::create_directory(temporary);
    fill(temporary);
    json files = json::object();
    for (const auto& entry : fs::directory_iterator(temporary)) {
      const MappedFile file(entry.path().string());
      files[entry.path().filename().string()] = {{"bytes", file.size()},
                                                 {"crc32c", crc32c(file.text())}};
      sync_file(entry.path().string());
    }
    state["step"] = step;
    state["files"] = std::move(files);
    atomic_write_file(temporary + "/state.json", state.dump(1) + "\n");
    sync_folder(temporary);
    if (fs::exists(path)) {  // saved before, e.g. damaged since: out of the way first
      const std::string old = run_folder + "/" + kTemporary + "old";
      fs::remove_all(old);
      fs::rename(path, old);
    }
    fs::rename(temporary, path);
    sync_folder(run_folder);
    point_latest(run_folder, name);
  } catch (const std::exception& e) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    const auto kept = list_checkpoints(run_folder);
    throw Error(str_cat("[train] saving ", path, " failed: ", e.what(), "; ",
                        kept.empty() ? "there is no earlier checkpoint"
                                     : kept.front().path + " is the newest whole one"));
  }
  return path;
}

json verify_checkpoint(const std::string& checkpoint) {
  const std::string path = checkpoint + "/state.json";
  json state = json::parse(read_text_file(path), nullptr, /*allow_exceptions=*/false);
  GDN_CHECK(state.is_object() && state.contains("step") && state["step"].is_number_integer() &&
                state.contains("files") && state["files"].is_object(),
            "[train] ", path, " is not the state of a checkpoint");
  for (const auto& [name, expected] : state["files"].items()) {
    GDN_CHECK(name.find('/') == std::string::npos && expected.is_object(), "[train] ", path,
              " is not the state of a checkpoint");
    const MappedFile file(checkpoint + "/" + name);
    const auto bytes = expected.value("bytes", uint64_t{0});
    GDN_CHECK(file.size() == bytes, "[train] ", file.path(), " must have ", bytes, " bytes, got ",
              file.size());
    GDN_CHECK(crc32c(file.text()) == expected.value("crc32c", uint32_t{0}), "[train] ", file.path(),
              " is not as it was written (its checksum differs)");
  }
  return state;
}

void prune_checkpoints(const std::string& run_folder, int64_t keep) {
  std::error_code ignored;
  std::vector<fs::path> rubbish;
  for (const auto& entry : fs::directory_iterator(run_folder, ignored))
    if (entry.path().filename().string().starts_with(kTemporary)) rubbish.push_back(entry.path());
  const auto checkpoints = list_checkpoints(run_folder);
  if (keep > 0)
    for (size_t i = static_cast<size_t>(keep); i < checkpoints.size(); ++i)
      rubbish.emplace_back(checkpoints[i].path);
  for (const fs::path& path : rubbish) fs::remove_all(path, ignored);
}

}  // namespace gdn
