// SPDX-License-Identifier: Apache-2.0
// Trains a language model as a RunConfig says: resumable to the last bit, stopped cleanly by SIGINT
// and SIGTERM.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>

#include "gdn/model/causal_lm.h"
#include "gdn/text/dataset.h"
#include "gdn/train/config.h"

namespace gdn {

struct TrainResult {
  int64_t step = 0;                // optimizer steps of the run so far
  std::optional<double> loss;      // of the last step's batch
  std::optional<double> val_loss;  // of the last validation
  double seconds = 0;              // of training, resumed parts included
  int64_t parameters = 0;
  std::string checkpoint;  // the last one
  int stopped_by = 0;      // SIGINT or SIGTERM, or 0
};

// The source of batches that the configuration asks for.
std::unique_ptr<BatchSource> make_source(const RunConfig& config);

// Mean cross-entropy over `batches` validation batches spread over the validation part (0: all of
// it), in nats per token; nothing when there is no validation part.
std::optional<double> validation_loss(CausalLM& model, const BatchSource& source,
                                      int64_t batches = 0);

// Trains, or goes on with the newest good checkpoint of config.train.out_dir when `resume`.
// Progress lines go to `log`.
TrainResult train(const RunConfig& config, bool resume, std::ostream& log);

// What train() would do: blocks, parameters, memory and time of one real forward and backward pass,
// tokens per step.
void dry_run(const RunConfig& config, std::ostream& out);

}  // namespace gdn
