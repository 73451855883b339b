// SPDX-License-Identifier: Apache-2.0
// A weight that a loop over parts of a sequence multiplies by few rows, again and again.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

namespace gdn::ops {

// One call's products x weight^T. Autograd alone takes the weight's gradient once per product: a
// product of few rows that writes and adds up something as large as the weight. Here each product
// leaves its rows behind, and many of them are multiplied at once, the last ones after the last
// product's backward pass. Also what the products' backward passes share is made once. Gradients of
// gradients (create_graph) are taken product by product, as autograd would.
class LoopWeight {
 public:
  explicit LoopWeight(const at::Tensor& weight /* [out,in] */);
  at::Tensor linear(const at::Tensor& x /* [...,in], of the weight's dtype */) const;  // [...,out]

 private:
  at::Tensor weight_;  // the call's own alias: its node in the graph follows all products' nodes
  c10::intrusive_ptr<torch::CustomClassHolder> rows_;
};

}  // namespace gdn::ops
