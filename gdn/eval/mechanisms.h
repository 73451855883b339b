// SPDX-License-Identifier: Apache-2.0
// What the memories of linear-recurrent mixers can do before any training: recall of random pairs
// of keys and values by additive, decayed, delta-rule and gated delta-rule memories, and parity by
// negative eigenvalues. The memories are those of the delta-rule engine.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace gdn {

struct MechanismTable {
  std::string name;      // "overwrite"
  std::string question;  // what happens and what is asked
  std::string column;    // what the sizes count: "keys"
  std::vector<int64_t> sizes;
  // Per memory, the share of right answers at each size.
  std::vector<std::pair<std::string, std::vector<double>>> rows;
};

// Keys and values have 64 numbers; values are 512 random codes, of which the answer is the nearest
// to what is read. Takes a few seconds; the same figures for the same seed.
std::vector<MechanismTable> run_mechanisms(uint64_t seed);

std::string mechanisms_text(const std::vector<MechanismTable>& tables);

}  // namespace gdn
