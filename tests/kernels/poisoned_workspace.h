// SPDX-License-Identifier: Apache-2.0
// A test program that includes this runs all of its tests on workspace full of NaN.
#pragma once

#include <gtest/gtest.h>

#include "gdn/kernels/scratch.h"

namespace gdn::testing {

class PoisonedWorkspace : public ::testing::Environment {
 public:
  void SetUp() override { poison_scratch(true); }
};

inline const ::testing::Environment* const poisoned_workspace =
    ::testing::AddGlobalTestEnvironment(new PoisonedWorkspace);

}  // namespace gdn::testing
