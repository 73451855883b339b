// SPDX-License-Identifier: Apache-2.0
// Curves drawn with characters, for terminals.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace gdn {

struct TextCurve {
  std::string name;
  char mark = '*';
  std::vector<std::pair<double, double>> points;  // x, y; x rising, both finite
};

// The curves in one frame of width x height characters, with labelled axes and a legend; the first
// curve is drawn on top. A column shows the mean of its points, or the line between its neighbours'
// where it has none. Empty without points.
std::string plot_text(const std::vector<TextCurve>& curves, const std::string& x_name,
                      int width = 64, int height = 14);

}  // namespace gdn
