// SPDX-License-Identifier: Apache-2.0
// What the machine gives: its speed at matrix products, and memory.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace gdn {

// FLOP/s of at::mm on square matrices of this type: the peak that MFU is measured against. Takes
// about 0.1 s.
double measure_gemm_peak(c10::ScalarType dtype);

int64_t resident_memory();       // bytes of RAM this process holds
int64_t peak_resident_memory();  // the most it has held since reset_peak_memory
void reset_peak_memory();

}  // namespace gdn
