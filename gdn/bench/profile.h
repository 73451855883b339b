// SPDX-License-Identifier: Apache-2.0
// Where the time of a step goes: torch's dispatcher tells when each operation begins and ends, and
// what is spent in none of those that it called itself is its own.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace gdn::bench {

enum class Part : uint8_t { kSequence, kGemm, kKernels, kOptimizer, kRest };
const char* name_of(Part part);
// The sequence mixer's own operation, a matrix product, one of gdn's small kernels (norms, gates,
// convolution ...), the optimizer, or anything else.
Part part_of(const std::string& operation);

// Records the operations of this thread while it lives; one at a time.
class Profile {
 public:
  Profile();
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  struct Entry {
    double seconds = 0;
    int64_t calls = 0;
  };
  const std::map<std::string, Entry>& operations() const;
  std::map<Part, double> seconds_by_part() const;

 private:
  uint64_t handle_;
};

}  // namespace gdn::bench
