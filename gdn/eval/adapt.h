// SPDX-License-Identifier: Apache-2.0
// What a model's memory is worth at test time: the loss along one document with the memory carried
// on, reset, and frozen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gdn/model/causal_lm.h"

namespace gdn {

// Mean loss in nats over the tokens that positions [begin, end) predict. Whole windows of tokens:
// carried reads the document from its start; reset begins every window with an empty memory; frozen
// begins every window after the first with what the first left.
struct AdaptBucket {
  int64_t begin = 0, end = 0;
  double carried = 0, reset = 0, frozen = 0;
};

// `buckets` parts of the document of nearly equal length, cut between windows where there are
// enough, and the whole of it in the last entry.
std::vector<AdaptBucket> adapt_losses(CausalLM& model, const std::vector<int64_t>& ids,
                                      int64_t window, int64_t buckets);

std::string adapt_table(const std::vector<AdaptBucket>& losses);

}  // namespace gdn
