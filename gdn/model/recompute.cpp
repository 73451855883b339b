// SPDX-License-Identifier: Apache-2.0
#include "gdn/model/recompute.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "gdn/base/check.h"

namespace gdn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct FnHolder : torch::CustomClassHolder {
  explicit FnHolder(TensorsFn f) : fn(std::move(f)) {}
  TensorsFn fn;
};

// Runs fn with gradients on copies of the inputs that are cut off from the graph. Both runs do the
// same: a mixer may choose another algorithm where gradients are disabled.
std::vector<at::Tensor> run_detached(const TensorsFn& fn, std::vector<at::Tensor>& inputs) {
  c10::AutoGradMode with_grad(true);
  for (at::Tensor& input : inputs) {
    if (!input.defined()) continue;
    input = input.detach().set_requires_grad(input.requires_grad());
  }
  return fn(inputs);
}

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static variable_list forward(AutogradContext* ctx, const TensorsFn& fn, int64_t num_inputs,
                               at::TensorList tensors) {
    ctx->save_for_backward(tensors.vec());
    ctx->set_materialize_grads(false);  // what an output without a gradient depends on gets none
    ctx->saved_data["fn"] = c10::IValue::make_capsule(c10::make_intrusive<FnHolder>(fn));
    ctx->saved_data["num_inputs"] = num_inputs;
    variable_list inputs(tensors.begin(), tensors.begin() + num_inputs);
    variable_list outputs = run_detached(fn, inputs);
    for (at::Tensor& output : outputs) output = output.detach();
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t num_inputs = ctx->saved_data["num_inputs"].toInt();
    const auto holder = ctx->saved_data["fn"].toCapsule();
    variable_list inputs(saved.begin(), saved.begin() + num_inputs);
    const variable_list outputs = run_detached(static_cast<const FnHolder&>(*holder).fn, inputs);

    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < saved.size(); ++i) {
      const at::Tensor& tensor = i < inputs.size() ? inputs[i] : saved[i];
      if (!tensor.defined() || !tensor.requires_grad()) continue;
      wanted.push_back(tensor);
      places.push_back(i + 2);  // after the gradients of fn and num_inputs, which are none
    }
    variable_list result(saved.size() + 2);
    if (roots.empty() || wanted.empty()) return result;
    const variable_list found =
        torch::autograd::grad(roots, wanted, root_grads, /*retain_graph=*/false,
                              /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

}  // namespace

std::vector<at::Tensor> recompute_in_backward(const TensorsFn& fn,
                                              const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& parameters) {
  if (!c10::GradMode::is_enabled()) return fn(inputs);
  variable_list tensors = inputs;
  tensors.insert(tensors.end(), parameters.begin(), parameters.end());
  return Recompute::apply(fn, static_cast<int64_t>(inputs.size()), at::TensorList(tensors));
}

}  // namespace gdn
