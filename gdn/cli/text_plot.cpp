// SPDX-License-Identifier: Apache-2.0
#include "gdn/cli/text_plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace gdn {
namespace {

struct Bounds {
  double low = std::numeric_limits<double>::infinity(),
         high = -std::numeric_limits<double>::infinity();

  void add(double x) { low = std::min(low, x), high = std::max(high, x); }
  // Where x lies on a scale of n places.
  int place(double x, int n) const {
    if (high <= low) return 0;
    return std::clamp(static_cast<int>(std::lround((x - low) / (high - low) * (n - 1))), 0, n - 1);
  }
};

// One y per column; NaN left of the first and right of the last point.
std::vector<double> columns_of(const TextCurve& curve, const Bounds& xs, int width) {
  std::vector<double> sum(width, 0), y(width, std::numeric_limits<double>::quiet_NaN());
  std::vector<int> count(width, 0);
  for (const auto& [px, py] : curve.points) {
    const int column = xs.place(px, width);
    sum[column] += py;
    ++count[column];
  }
  int last = -1;
  for (int column = 0; column < width; ++column) {
    if (count[column] == 0) continue;
    y[column] = sum[column] / count[column];
    for (int between = last + 1; last >= 0 && between < column; ++between) {
      y[between] = y[last] + (y[column] - y[last]) * (between - last) / (column - last);
    }
    last = column;
  }
  return y;
}

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.4g", x);
  return text;
}

}  // namespace

std::string plot_text(const std::vector<TextCurve>& curves, const std::string& x_name, int width,
                      int height) {
  Bounds xs, ys;
  for (const TextCurve& curve : curves) {
    for (const auto& [x, y] : curve.points) xs.add(x);
  }
  if (xs.high < xs.low) return "";
  std::vector<std::vector<double>> columns;
  for (const TextCurve& curve : curves) {
    columns.push_back(columns_of(curve, xs, width));
    for (const double y : columns.back()) {
      if (!std::isnan(y)) ys.add(y);
    }
  }
  std::vector<std::string> rows(height, std::string(width, ' '));
  for (size_t i = curves.size(); i-- > 0;) {
    for (int column = 0; column < width; ++column) {
      const double y = columns[i][column];
      if (!std::isnan(y)) rows[height - 1 - ys.place(y, height)][column] = curves[i].mark;
    }
  }
  std::string text;
  for (int row = 0; row < height; ++row) {
    char label[32];
    std::snprintf(label, sizeof(label), "%8.3f |",
                  ys.high - (ys.high - ys.low) * row / (height - 1));
    text += label + rows[row].substr(0, rows[row].find_last_not_of(' ') + 1) + "\n";
  }
  const std::string left = number(xs.low), right = number(xs.high);
  const int gap = width - static_cast<int>(left.size() + x_name.size() + right.size());
  text += std::string(9, ' ') + "+" + std::string(width, '-') + "\n" + std::string(10, ' ') + left +
          std::string(std::max(1, gap / 2), ' ') + x_name +
          std::string(std::max(1, gap - gap / 2), ' ') + right + "\n";
  for (const TextCurve& curve : curves)
    text += std::string(10, ' ') + curve.mark + " " + curve.name + "\n";
  return text;
}

}  // namespace gdn
