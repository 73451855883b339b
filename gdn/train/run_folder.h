// SPDX-License-Identifier: Apache-2.0
// The folder of a run on disk:
//   config.toml          the resolved configuration        .lock                held while a
//   process trains here metrics.jsonl        one object per line               tensorboard/ event
//   files step-000500/         a checkpoint, made under another name, synced, then renamed: it is
//   whole or not there latest               a link to the newest checkpoint
// state.json of a checkpoint holds the size and CRC-32C of its other files, so that a damaged one
// is found out.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gdn {

// Keeps a second process out of a run folder for as long as it lives. Makes the folder.
class RunLock {
 public:
  explicit RunLock(const std::string& run_folder);  // throws when another process holds it
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

// Whether the folder holds (the beginning of) a run.
bool has_run(const std::string& run_folder);

struct CheckpointEntry {
  int64_t step = 0;
  std::string path;
};

// The checkpoints of a run, newest first; nothing is said about their health.
std::vector<CheckpointEntry> list_checkpoints(const std::string& run_folder);

// Makes checkpoint `step`: `fill` writes files into the folder it is given, `state` becomes
// state.json. Points `latest` to it. On any failure the folder is as it was before.
std::string write_checkpoint(const std::string& run_folder, int64_t step, nlohmann::json state,
                             const std::function<void(const std::string& folder)>& fill);

// state.json of a checkpoint whose files are all as they were written; otherwise throws an Error
// that says what is wrong.
nlohmann::json verify_checkpoint(const std::string& checkpoint);

// Removes all but the newest `keep` checkpoints (0: keeps all) and what an interrupted save left
// behind.
void prune_checkpoints(const std::string& run_folder, int64_t keep);

}  // namespace gdn
