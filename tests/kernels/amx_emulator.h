// SPDX-License-Identifier: Apache-2.0
// Runs AMX's tiles and bf16 products on x86-64 CPUs with AVX-512 that lack them: there each of
// these instructions raises SIGILL, whose handler does what Intel's manual says the instruction
// does, with configuration and tiles of the thread that executes it. What would fault on a CPU with
// AMX ends the program with one line: "amx_emulator: <instruction>: <why>". Linux only.
#pragma once

#include <cstdint>

namespace gdn::amx_emulator {

// Emulates from now on, in all threads. False where that is not possible, or not needed because the
// CPU has AMX. Other illegal instructions reach the handler that was there before.
bool install();

// Instructions executed so far by all threads.
struct Counts {
  uint64_t configurations, releases, loads, stores, zeros, products;
};
Counts counts();

// Threads whose tiles are configured at present.
int configured_threads();

}  // namespace gdn::amx_emulator
