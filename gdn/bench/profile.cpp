// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/profile.h"

#include <ATen/record_function.h>

#include <array>
#include <chrono>
#include <memory>
#include <string_view>
#include <vector>

namespace gdn::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Frame {
  Clock::time_point start;
  double inner = 0;  // seconds in operations that this one called
};
thread_local std::vector<Frame> stack;
thread_local std::map<std::string, Profile::Entry> recorded;

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction&) {
  stack.push_back({Clock::now()});
  return nullptr;
}

void on_end(const at::RecordFunction& function, at::ObserverContext*) {
  if (stack.empty()) return;  // began before the recording
  const Frame frame = stack.back();
  stack.pop_back();
  const double all = std::chrono::duration<double>(Clock::now() - frame.start).count();
  if (!stack.empty()) stack.back().inner += all;
  Profile::Entry& entry = recorded[function.name()];
  entry.seconds += all - frame.inner;
  ++entry.calls;
}

template <size_t N>
bool begins_with_any(std::string_view name, const std::array<std::string_view, N>& prefixes) {
  for (const std::string_view prefix : prefixes) {
    if (name.starts_with(prefix)) return true;
  }
  return false;
}

}  // namespace

const char* name_of(Part part) {
  switch (part) {
    case Part::kSequence:
      return "mixer op";
    case Part::kGemm:
      return "GEMM";
    case Part::kKernels:
      return "small kernels";
    case Part::kOptimizer:
      return "optimizer";
    case Part::kRest:
      break;
  }
  return "rest";
}

Part part_of(const std::string& operation) {
  static constexpr std::array<std::string_view, 9> kGemm = {
      "aten::mm",     "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear",
      "aten::matmul", "mkldnn::",    "aten::mv",  "gdn::linear"};
  static constexpr std::array<std::string_view, 9> kSmall = {
      "gdn::causal_conv1d", "gdn::rms_norm", "gdn::l2norm", "gdn::gdn_gate",     "gdn::kda_gate",
      "gdn::beta_sigmoid",  "gdn::swiglu",   "gdn::rope",   "gdn::cross_entropy"};
  static constexpr std::array<std::string_view, 3> kOptimizer = {
      "aten::_fused_adam", "aten::_foreach_norm", "aten::linalg_vector_norm"};
  static constexpr std::array<std::string_view, 4> kSequence = {
      "gdn::", "aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash_attention"};
  if (begins_with_any(operation, kGemm)) return Part::kGemm;
  if (begins_with_any(operation, kSmall)) return Part::kKernels;
  if (begins_with_any(operation, kOptimizer)) return Part::kOptimizer;
  return begins_with_any(operation, kSequence) ? Part::kSequence : Part::kRest;
}

Profile::Profile() {
  recorded.clear();
  stack.clear();
  handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                           .scopes({at::RecordScope::FUNCTION})
                                           .needsInputs(false));
}

Profile::~Profile() { at::removeCallback(handle_); }

const std::map<std::string, Profile::Entry>& Profile::operations() const { return recorded; }

std::map<Part, double> Profile::seconds_by_part() const {
  std::map<Part, double> parts;
  for (const auto& [name, entry] : recorded) parts[part_of(name)] += entry.seconds;
  return parts;
}

}  // namespace gdn::bench
