// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/loop_weight.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "gdn/ops/common.h"
#include "gdn/ops/linear.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor as_rows(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }

// So many rows make a product that runs at full speed and still lies in the caches.
constexpr int64_t kRowsAtOnce = 1024;

// What the products of one call leave for the gradient of their weight.
class LoopRows : public torch::CustomClassHolder {
 public:
  void add(const Tensor& x, const Tensor& dy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Rows& rows = waiting_[torch::autograd::get_current_graph_task_id()];
    rows.x.push_back(as_rows(x));
    rows.dy.push_back(as_rows(dy));
    rows.count += rows.x.back().size(0);
    if (rows.count >= kRowsAtOnce) rows.multiply();
  }

  // dy^T x over all rows that this backward pass has added; undefined where it added none.
  Tensor take_gradient() {
    Rows rows;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      turned_ = Tensor();
      const auto found = waiting_.find(torch::autograd::get_current_graph_task_id());
      if (found == waiting_.end()) return {};
      rows = std::move(found->second);
      waiting_.erase(found);
    }
    if (!rows.x.empty()) rows.multiply();
    return rows.gradient;
  }

  // The transposed weight, dense as the products of rows want it.
  Tensor turned(const Tensor& weight) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!turned_.defined()) turned_ = weight.t().contiguous();
    return turned_;
  }

 private:
  struct Rows {
    variable_list x, dy;
    int64_t count = 0;
    Tensor gradient;  // of the rows before these

    void multiply() {
      const Tensor dys = (dy.size() == 1 ? dy[0] : at::cat(dy, 0)).t();
      const Tensor xs = x.size() == 1 ? x[0] : at::cat(x, 0);
      if (gradient.defined()) {
        gradient.addmm_(dys, xs);
      } else {
        gradient = at::mm(dys, xs);
      }
      x.clear();
      dy.clear();
      count = 0;
    }
  };
  std::mutex mutex_;
  // By backward pass: what one that failed on its way has left must not reach the next one.
  std::map<int, Rows> waiting_;
  Tensor turned_;
};

using SharedRows = c10::intrusive_ptr<torch::CustomClassHolder>;

LoopRows& rows_of(AutogradContext* ctx) {
  return static_cast<LoopRows&>(*ctx->saved_data["rows"].toCapsule());
}

// The weight itself. Every product depends on this node, so autograd runs its backward pass after
// theirs, whether or not they hand it a gradient.
struct LoopBegin : torch::autograd::Function<LoopBegin> {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const SharedRows& rows) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["rows"] = c10::IValue::make_capsule(rows);
    return weight.detach();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor gradient = rows_of(ctx).take_gradient();
    if (!gradient.defined()) return {grads[0], Tensor()};
    return {grads[0].defined() ? grads[0] + gradient : gradient, Tensor()};
  }
};

struct LoopProduct : torch::autograd::Function<LoopProduct> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const SharedRows& rows) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight});
    ctx->saved_data["rows"] = c10::IValue::make_capsule(rows);
    return ops::linear(x, weight);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& dy = grads[0];
    if (!dy.defined()) return {Tensor(), Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    Tensor dx, dweight;
    if (c10::GradMode::is_enabled()) {
      if (ctx->needs_input_grad(0)) dx = ops::linear(dy, weight.t());
      if (ctx->needs_input_grad(1)) dweight = at::mm(as_rows(dy).t(), as_rows(x));
    } else {
      if (ctx->needs_input_grad(0)) dx = ops::linear(dy, rows_of(ctx).turned(weight));
      if (ctx->needs_input_grad(1)) rows_of(ctx).add(x, dy);
    }
    return {dx, dweight, Tensor()};
  }
};

}  // namespace

LoopWeight::LoopWeight(const Tensor& weight)
    : weight_(weight), rows_(c10::make_intrusive<LoopRows>()) {
  GDN_CHECK(weight.dim() == 2, "[loop_weight] weight must be [out,in], got ", shape_str(weight));
  if (wants_grad(weight)) weight_ = LoopBegin::apply(weight, rows_);
}

Tensor LoopWeight::linear(const Tensor& x) const {
  return wants_grad(x, weight_) ? LoopProduct::apply(x, weight_, rows_) : ops::linear(x, weight_);
}

}  // namespace gdn::ops
