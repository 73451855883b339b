// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/metrics.h"

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "gdn/base/check.h"
#include "gdn/base/file.h"

namespace gdn {
namespace {

template <typename... Args>
std::string printed(const char* format, Args... args) {
  char buffer[128];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

// 6.0e-4: printf writes the exponent with two digits.
std::string short_exponent(double x) {
  std::string text = printed("%.1e", x);
  const size_t digits = text.find('e') + 2;
  while (text.size() > digits + 1 && text[digits] == '0') text.erase(digits, 1);
  return text;
}

std::string step_of(const Metrics& m, const Progress& p) {
  return str_cat("step ", m.step, "/", p.estimated ? "~" : "", p.max_iters);
}

// The whole lines of metrics.jsonl up to a step; a line cut short by a crash is dropped.
std::string lines_up_to(const std::string& path, int64_t last_step) {
  std::string kept;
  if (!std::filesystem::exists(path)) return kept;
  const std::string text = read_text_file(path);
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!row.is_object() || !row.contains("step") || !row["step"].is_number_integer()) continue;
    if (row["step"].get<int64_t>() <= last_step) kept += line + "\n";
  }
  return kept;
}

}  // namespace

std::string format_count(double x) {
  if (x < 999.5) return printed("%.0f", x);
  for (const char* unit : {"k", "M", "G"}) {
    x /= 1000;
    if (x < 9.995) return printed("%.2f", x) + unit;
    if (x < 99.95) return printed("%.1f", x) + unit;
    if (x < 999.5) return printed("%.0f", x) + unit;
  }
  return printed("%.2f", x / 1000) + "T";
}

std::string format_bytes(double bytes) {
  if (bytes < 1024) return printed("%.0f B", bytes);
  for (const char* unit : {" KiB", " MiB", " GiB"}) {
    bytes /= 1024;
    if (bytes < 1024) return printed(bytes < 10 ? "%.1f" : "%.0f", bytes) + unit;
  }
  return printed("%.1f TiB", bytes / 1024);
}

std::string format_seconds(double seconds) {
  const auto s = static_cast<long long>(std::llround(std::max(0.0, seconds)));
  if (s < 100) return printed("%llds", s);
  const long long m = (s + 30) / 60;
  if (m < 60) return printed("%lldm", m);
  if (m < 48 * 60) return printed("%lldh%02lldm", m / 60, m % 60);
  return printed("%lldd%02lldh", m / 1440, m / 60 % 24);
}

std::string progress_line(const Metrics& m, const Progress& p) {
  std::string line = step_of(m, p);
  if (m.loss) line += printed(" | loss %.4f", *m.loss);
  if (m.grad_norm) line += printed(" | norm %.2f", *m.grad_norm);
  if (m.lr) line += " | lr " + short_exponent(*m.lr);
  line += p.step_seconds < 10 ? printed(" | %.0f ms", 1e3 * p.step_seconds)
                              : printed(" | %.1f s", p.step_seconds);
  if (m.tokens_per_second) line += " | " + format_count(*m.tokens_per_second) + " tok/s";
  if (p.mfu > 0) line += printed(" | mfu %.1f%%", 100 * p.mfu);
  line += " | mem " + format_bytes(static_cast<double>(p.memory));
  return line + " | eta " + format_seconds(p.eta_seconds);
}

std::string validation_line(const Metrics& m, const Progress& p) {
  return step_of(m, p) + printed(" | val loss %.4f", m.val_loss.value_or(std::nan("")));
}

MetricsWriter::MetricsWriter(const std::string& run_folder, int64_t resumed_step, bool tensorboard)
    : path_(run_folder + "/metrics.jsonl") {
  atomic_write_file(path_, resumed_step < 0 ? std::string() : lines_up_to(path_, resumed_step));
  file_.open(path_, std::ios::app);
  GDN_CHECK(file_, "[train] cannot write ", path_);
  if (tensorboard)
    events_ = std::make_unique<EventWriter>(run_folder + "/tensorboard", resumed_step + 1);
}

void MetricsWriter::write(const Metrics& m) {
  nlohmann::ordered_json row = {{"step", m.step}};
  const auto add = [&](const char* key, const char* tag, const std::optional<double>& value) {
    if (!value) return;
    row[key] = *value;
    if (events_) events_->scalar(tag, m.step, *value);
  };
  add("loss", "train/loss", m.loss);
  add("val_loss", "val/loss", m.val_loss);
  add("lr", "train/lr", m.lr);
  add("grad_norm", "train/grad_norm", m.grad_norm);
  add("tokens_per_second", "speed/tokens_per_second", m.tokens_per_second);
  row["seconds"] = std::round(m.seconds * 1e3) / 1e3;
  file_ << row.dump() << "\n" << std::flush;
  GDN_CHECK(file_, "[train] cannot write ", path_, ": is the disk full?");
  if (events_) events_->flush();
}

}  // namespace gdn
