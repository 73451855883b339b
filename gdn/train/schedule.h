// SPDX-License-Identifier: Apache-2.0
// The learning rate: linear warm-up, then a cosine down to min_lr. With a time limit the cosine
// follows whichever of steps and clock is further on, so a run ends at min_lr on a machine of any
// speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace gdn {

struct Schedule {
  double lr = 1e-3, min_lr = 1e-4;
  int64_t warmup_iters = 0, max_iters = 1000;
  double max_seconds = 0;  // 0: no limit

  // How much of the run is over after `step` steps and `seconds`, in [0,1].
  double progress(int64_t step, double seconds) const {
    const double by_steps =
        max_iters > 0 ? static_cast<double>(step) / static_cast<double>(max_iters) : 1.0;
    const double by_clock = max_seconds > 0 ? seconds / max_seconds : 0.0;
    return std::clamp(std::max(by_steps, by_clock), 0.0, 1.0);
  }

  bool done(int64_t step, double seconds) const {
    return step >= max_iters || (max_seconds > 0 && seconds >= max_seconds);
  }

  // The learning rate of the step that follows `step` finished ones.
  double lr_at(int64_t step, double seconds) const {
    if (step < warmup_iters)
      return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_iters);
    const double by_steps = max_iters > warmup_iters
                                ? static_cast<double>(step - warmup_iters) /
                                      static_cast<double>(max_iters - warmup_iters)
                                : 1.0;
    const double by_clock = max_seconds > 0 ? seconds / max_seconds : 0.0;
    const double p = std::clamp(std::max(by_steps, by_clock), 0.0, 1.0);
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + std::cos(std::numbers::pi * p));
  }
};

}  // namespace gdn
