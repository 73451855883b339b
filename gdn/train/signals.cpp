// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/signals.h"

#include <csignal>

namespace gdn {
namespace {

volatile std::sig_atomic_t received_signal = 0;
struct sigaction old_int, old_term, old_xfsz;

void on_signal(int number) {
  if (received_signal != 0) {
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
  received_signal = number;
}

}  // namespace

StopSignals::StopSignals() {
  received_signal = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, &old_int);
  sigaction(SIGTERM, &action, &old_term);
  action.sa_handler = SIG_IGN;
  sigaction(SIGXFSZ, &action, &old_xfsz);
}

StopSignals::~StopSignals() {
  received_signal = 0;
  sigaction(SIGINT, &old_int, nullptr);
  sigaction(SIGTERM, &old_term, nullptr);
  sigaction(SIGXFSZ, &old_xfsz, nullptr);
}

int StopSignals::received() { return received_signal; }

}  // namespace gdn
