# SPDX-License-Identifier: Apache-2.0
"""The test-time memory ops, as PyTorch sees them: schema, fake tensors, gradients by differences, the step."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
torch.ops.load_library(os.environ.get("GDN_LIBRARY", str(ROOT / "build" / "libgdn.so")))
gdn = torch.ops.gdn
T, H, D, HIDDEN = 7, 1, 3, 2
# rule, activation, [depth, hidden, bias, chunk, sequential, read_before], [norm_eps, loss_scale, clip]
TTT_MLP = ("ttt", "gelu", [2, HIDDEN, 1, 4, 0, 0], [1e-6, 1.0, 0.0])
LMM_DEEP = ("lmm", "silu", [2, HIDDEN, 0, 4, 0, 0], [1e-6, 2.0, 0.8])
LMM_LINEAR = ("lmm", "silu", [1, 0, 0, 1, 1, 0], [1e-6, 2.0, 0.0])


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64).requires_grad_()


def inputs(config: tuple, T: int = T) -> list:
    """The list of the schema, in fp64, from the middle of a chunk."""
    torch.manual_seed(0)
    rule, (depth, hidden, bias, chunk, sequential, _) = config[0], config[2]
    size = D * D if depth == 1 else (D + bias) * hidden + (hidden + bias) * D
    q, k, v = (leaf(torch.randn(1, T, H, D)) for _ in range(3))
    rate = leaf(torch.rand(1, T, H) * 0.2)
    eta = alpha = tau = anchor = gain = offset = gradient_at = None
    weights = [leaf(torch.randn(1, H, size) * 0.5) for _ in range(3)]
    memory, momentum = weights[:2]
    if rule == "ttt":
        tau = leaf(1 / torch.arange(1.0, chunk + 1))
        gain, offset = leaf(torch.rand(H, D) + 0.5), leaf(torch.randn(H, D) * 0.1)
    else:
        eta, alpha = leaf(torch.rand(1, T, H)), leaf(torch.rand(1, T, H) * 0.5)
        if not sequential:
            anchor, gradient_at = leaf(torch.randn(H, size) * 0.5), weights[2]
    position = torch.tensor([2])
    return [q, k, v, rate, eta, alpha, tau, anchor, gain, offset, memory, momentum, gradient_at, position, None]


CONFIGS = pytest.mark.parametrize("config", [TTT_MLP, LMM_DEEP, LMM_LINEAR], ids=["ttt_mlp", "lmm", "lmm_sequential"])


@CONFIGS
def test_gradients_equal_differences(config):
    full = inputs(config)
    leaves = [x for x in full if x is not None and x.requires_grad]

    def run(*tensors):
        rest = iter(tensors)
        values = [next(rest) if x is not None and x.requires_grad else x for x in full]
        return tuple(x for x in gdn.test_time_memory(values, *config, True)[:4] if x.numel() > 0)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6)


@CONFIGS
def test_opcheck(config):
    detached = [x.detach() if x is not None else None for x in inputs(config)]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gdn.test_time_memory.default, (detached, *config, True), test_utils=utils)


def test_what_backward_needs_has_no_size_without_data():
    without_data = [x.detach().to("meta") if x is not None else None for x in inputs(TTT_MLP)]
    o, *_, saved = gdn.test_time_memory(without_data, *TTT_MLP)
    assert o.shape == (1, T, H, D) and saved.numel() == 0
    with pytest.raises(RuntimeError, match="save=True is not for tensors without data"):
        gdn.test_time_memory(without_data, *TTT_MLP, False, True)


@CONFIGS
def test_steps_equal_the_whole(config):
    full = [x.detach() if x is not None else None for x in inputs(config)]
    o, memory, momentum, gradient_at, _ = gdn.test_time_memory(full, *config, True)
    pools = [x.clone() if x is not None else torch.empty(0, dtype=torch.float64) for x in full[10:13]]
    position = full[13].clone()
    outs = []
    for t in range(T):
        token = [x[:, t : t + 1] if x is not None else None for x in full[:6]]
        outs.append(
            gdn.test_time_memory_step_([*token, *full[6:10], None, None, None, position, None], *pools, None, *config)
        )
        position += 1
    torch.testing.assert_close(torch.cat(outs, 1), o)
    for pool, final in zip(pools, (memory, momentum, gradient_at)):
        torch.testing.assert_close(pool, final)
