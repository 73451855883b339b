// SPDX-License-Identifier: Apache-2.0
// SIGINT and SIGTERM ask a run to stop after the current step; a second one ends the process at
// once.
#pragma once

namespace gdn {

// While one of these lives, the signals only set a flag. SIGXFSZ is ignored too, so that a limit on
// file sizes is a failed write, which leaves the last checkpoint intact, instead of the end of the
// process.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  static int received();  // SIGINT, SIGTERM, or 0
};

}  // namespace gdn
