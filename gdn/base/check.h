// SPDX-License-Identifier: Apache-2.0
// Errors of the torch-free part. A library never prints or exits: it throws gdn::Error, whose text
// names the operation in brackets, the rule, and the offending value, e.g. "[chunk_kda] g must be
// [B,T,HV,K], got [2,16,4]".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace gdn {

// A failure the caller can act on: bad input, a bad file, a lacking resource. what() is one line.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A mistake in how a command was called or configured; the program exits with status 2 instead
// of 1.
class UsageError : public Error {
 public:
  using Error::Error;
};

// Concatenates its arguments by operator<<.
template <typename... Args>
std::string str_cat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace gdn

// Throws gdn::Error made of the message parts unless `condition` holds.
#define GDN_CHECK(condition, ...)                      \
  do {                                                 \
    if (!(condition)) [[unlikely]]                     \
      throw ::gdn::Error(::gdn::str_cat(__VA_ARGS__)); \
  } while (false)
