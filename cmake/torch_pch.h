// SPDX-License-Identifier: Apache-2.0
// Precompiled for libgdn and the tests on torch: headers of torch that most of their files include
// anyway. Each file still includes what it uses (-DGDN_PCH=OFF builds without).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/nn/module.h>

#include <nlohmann/json.hpp>
