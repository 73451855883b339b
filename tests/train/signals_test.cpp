// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/signals.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>

namespace gdn {
namespace {

int status_of(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    work();
    _exit(7);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

TEST(StopSignals, TheFirstAsksAndTheSecondEnds) {
  for (const int number : {SIGINT, SIGTERM}) {
    const int once = status_of([number] {
      const StopSignals signals;
      if (StopSignals::received() != 0) _exit(1);
      std::raise(number);
      if (StopSignals::received() != number) _exit(2);
    });
    EXPECT_TRUE(WIFEXITED(once) && WEXITSTATUS(once) == 7) << once;
    const int twice = status_of([number] {
      const StopSignals signals;
      std::raise(number);
      std::raise(number);
    });
    EXPECT_TRUE(WIFSIGNALED(twice) && WTERMSIG(twice) == number) << twice;
  }
}

TEST(StopSignals, OutsideARunSignalsActAsEver) {
  const int status = status_of([] {
    { const StopSignals signals; }
    std::raise(SIGINT);
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT) << status;
}

}  // namespace
}  // namespace gdn
