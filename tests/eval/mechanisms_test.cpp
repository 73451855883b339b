// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/mechanisms.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace gdn {
namespace {

// Lowest and highest share of right answers.
using Bounds = std::vector<std::pair<double, double>>;

std::pair<double, double> near(double value, double tolerance = 0.06) {
  return {value - tolerance, value + tolerance};
}
constexpr std::pair<double, double> kAll = {0.97, 1.0}, kNone = {0.0, 0.05};

// Every figure that `gdn eval mechanisms` prints.
const std::map<std::string, std::map<std::string, Bounds>>& expected() {
  static const std::map<std::string, std::map<std::string, Bounds>> all = {
      {"once",
       {{"additive", {kAll, kAll, kAll, near(0.95)}},
        {"additive, decay 0.98", {kAll, kAll, near(0.92), near(0.51)}},
        {"delta", {kAll, kAll, near(0.89), near(0.49)}},
        {"gated delta, decay 0.98", {kAll, near(0.96), near(0.68), near(0.33)}}}},
      {"overwrite",
       {{"additive", {near(0.36), near(0.36), near(0.32), near(0.31)}},
        {"additive, decay 0.98", {near(0.81), near(0.95), near(0.98), near(0.90)}},
        {"delta", {kAll, kAll, kAll, near(0.83)}},
        {"gated delta, decay 0.98", {kAll, kAll, near(0.96), near(0.64)}}}},
      {"repeated_filler",
       {{"additive", {kNone, kNone, kNone, kNone}},
        {"additive, decay 0.998", {kNone, kNone, kNone, kNone}},
        {"delta", {near(0.97), near(0.97), near(0.97), near(0.97)}},
        {"gated delta, decay 0.998", {near(0.72, 0.1), kNone, kNone, kNone}},
        {"gated delta, decay 0.9999", {kAll, near(0.95), near(0.86, 0.1), near(0.42, 0.12)}}}},
      {"distinct_filler",
       {{"delta", {kAll, near(0.53, 0.1), near(0.17, 0.1)}},
        {"gated delta, decay 0.99", {kAll, near(0.42, 0.1), near(0.12, 0.1)}},
        {"delta, filler written at 0.1", {kAll, kAll, kAll}},
        {"gated delta, decay 0.998, filler at 0.1", {kAll, kAll, kAll}}}},
      {"stale_context",
       {{"additive", {near(0.63), near(0.09)}},
        {"additive, reset between", {kAll, kAll}},
        {"delta", {kAll, kAll}},
        {"gated delta, reset between", {kAll, kAll}}}},
      {"parity",
       {{"delta, beta = 2 bit (eigenvalue -1)", {{1, 1}, {1, 1}, {1, 1}}},
        {"delta, beta = bit (eigenvalue 0)", {{0.4, 0.6}, {0.45, 0.55}, {0.45, 0.55}}},
        {"delta, beta = bit / 2 (eigenvalue 0.5)", {{0.4, 0.6}, {0.45, 0.55}, {0.45, 0.55}}}}},
  };
  return all;
}

TEST(Mechanisms, EveryFigureLiesWithinItsBounds) {
  const auto tables = run_mechanisms(/*seed=*/1);
  ASSERT_EQ(tables.size(), expected().size());
  for (const MechanismTable& table : tables) {
    ASSERT_TRUE(expected().contains(table.name)) << table.name;
    const auto& rows = expected().at(table.name);
    ASSERT_EQ(table.rows.size(), rows.size()) << table.name;
    for (const auto& [memory, recall] : table.rows) {
      ASSERT_TRUE(rows.contains(memory)) << memory;
      const Bounds& bounds = rows.at(memory);
      ASSERT_EQ(recall.size(), table.sizes.size());
      ASSERT_EQ(bounds.size(), table.sizes.size());
      for (size_t i = 0; i < recall.size(); ++i) {
        EXPECT_GE(recall[i], bounds[i].first)
            << table.name << ", " << memory << ", size " << table.sizes[i];
        EXPECT_LE(recall[i], bounds[i].second)
            << table.name << ", " << memory << ", size " << table.sizes[i];
      }
    }
  }
}

TEST(Mechanisms, TheTextNamesEveryFigure) {
  const std::vector<MechanismTable> tables = {
      {"once", "All are asked.", "pairs", {16, 128}, {{"delta", {1.0, 0.493}}, {"none", {0, 0}}}}};
  EXPECT_EQ(mechanisms_text(tables),
            "once: All are asked.\n"
            "  pairs      16     128\n"
            "  delta    1.00    0.49\n"
            "  none     0.00    0.00\n\n");
}

}  // namespace
}  // namespace gdn
