// SPDX-License-Identifier: Apache-2.0
#include "gdn/cli/text_plot.h"

#include <gtest/gtest.h>

namespace gdn {
namespace {

TEST(TextPlot, DrawsCurvesWithTheirScales) {
  const std::vector<TextCurve> curves = {{"falling", '*', {{0, 3}, {2, 1}, {4, 1}}},
                                         {"flat", 'o', {{0, 3}, {4, 3}}}};
  EXPECT_EQ(plot_text(curves, "step", 9, 3),
            "   3.000 |**ooooooo\n"
            "   2.000 |  **\n"
            "   1.000 |    *****\n"
            "         +---------\n"
            "          0 step  4\n"
            "          * falling\n"
            "          o flat\n");
}

TEST(TextPlot, AColumnIsTheMeanOfItsPoints) {
  const std::vector<TextCurve> curves = {{"noise", '*', {{0, 0}, {0.1, 4}, {10, 4}, {10, 8}}}};
  EXPECT_EQ(plot_text(curves, "x", 3, 3),
            "   6.000 |  *\n"
            "   4.000 | *\n"
            "   2.000 |*\n"
            "         +---\n"
            "          0 x 10\n"
            "          * noise\n");
}

TEST(TextPlot, HasNothingToDrawWithoutPoints) {
  EXPECT_EQ(plot_text({}, "x"), "");
  EXPECT_EQ(plot_text({{"empty", '*', {}}}, "x"), "");
  EXPECT_NE(plot_text({{"one", '*', {{1, 1}}}}, "x"), "");
}

}  // namespace
}  // namespace gdn
