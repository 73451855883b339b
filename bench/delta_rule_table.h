// SPDX-License-Identifier: Apache-2.0
// The engine's rows of the table of goals (docs/performance.md), measured and printed.
#pragma once

#include <string>

namespace gdn::bench {

// Prints a Markdown table, and writes its rows to `json_file` unless that is empty: name, goal,
// goal_is, figure, unit, met, threads, simd, alone (the share of calls that had their cores alone),
// note. `filter`: only groups whose name contains it (speed, decode, family, bf16, sizes, lengths,
// packed, few, avx2). Returns the exit status. Throws where the file can't be written.
int print_delta_rule_table(const std::string& filter, const std::string& json_file);

}  // namespace gdn::bench
