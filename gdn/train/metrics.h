// SPDX-License-Identifier: Apache-2.0
// What a run tells while it trains: one progress line per interval for people, metrics.jsonl for
// programs, event files for TensorBoard.
#pragma once

#include <cstdint>
#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include "gdn/train/tensorboard.h"

namespace gdn {

// What is known after `step` optimizer steps; what was not measured is absent.
struct Metrics {
  int64_t step = 0;
  std::optional<double> loss =
      std::nullopt;  // of the step's batch, before its update, nats per token
  std::optional<double> val_loss = std::nullopt;  // nats per token
  std::optional<double> lr = std::nullopt;
  std::optional<double> grad_norm = std::nullopt;  // before clipping
  std::optional<double> tokens_per_second = std::nullopt;
  double seconds = 0;  // of training so far, resumed parts included
};

// What the progress line says besides.
struct Progress {
  int64_t max_iters = 0;
  bool estimated = false;  // max_iters is a guess from the time limit
  double step_seconds = 0;
  double mfu = 0;      // model FLOP/s over the measured GEMM peak; 0: not known
  int64_t memory = 0;  // bytes
  double eta_seconds = 0;
};

// "step 120/5000 | loss 3.2145 | norm 0.83 | lr 6.0e-4 | 412 ms | 159k tok/s | mfu 38.1% | mem 2.3
// GiB | eta 33m"
std::string progress_line(const Metrics& metrics, const Progress& progress);
// "step 120/5000 | val loss 3.1010"
std::string validation_line(const Metrics& metrics, const Progress& progress);

std::string format_count(double x);          // 950, 12.3k, 1.35M, 2.10G
std::string format_bytes(double bytes);      // 2.3 GiB
std::string format_seconds(double seconds);  // 42s, 33m, 2h05m, 3d04h

// RUN/metrics.jsonl and RUN/tensorboard.
class MetricsWriter {
 public:
  // Of a resumed run, lines after `resumed_step` are dropped (they will be written again); -1: a
  // new run.
  MetricsWriter(const std::string& run_folder, int64_t resumed_step, bool tensorboard);
  void write(const Metrics& metrics);

 private:
  std::string path_;
  std::ofstream file_;
  std::unique_ptr<EventWriter> events_;
};

}  // namespace gdn
