# SPDX-License-Identifier: Apache-2.0
"""gdn.layers: padding, caches and parts of a sequence, for every layer and every mixer of the registry."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from gdn import layers  # noqa: E402

D = 32
SMALL = dict(hidden_size=D, head_dim=8, num_heads=2, layer_idx=0)
LAYERS = {
    "GatedDeltaNet": lambda: layers.GatedDeltaNet(**SMALL, num_v_heads=4),
    "GatedDeltaNet by token": lambda: layers.GatedDeltaNet(**SMALL, mode="fused_recurrent", use_gate=False),
    "KimiDeltaAttention": lambda: layers.KimiDeltaAttention(**SMALL, allow_neg_eigval=True),
    "DeltaNet": lambda: layers.DeltaNet(hidden_size=D, num_heads=2, layer_idx=0, use_gate=True),
    "Attention": lambda: layers.Attention(hidden_size=D, num_heads=2, num_kv_heads=1, layer_idx=0),
    "Attention in a window": lambda: layers.Attention(hidden_size=D, num_heads=2, window_size=4, layer_idx=0),
    **{name: lambda name=name: layers.Mixer(name, D, layer_idx=0) for name in layers.registry()},
}
every = pytest.mark.parametrize("name", list(LAYERS))
T = 16
# Left, right, inside, nothing and everything masked: where a 0 is there is no token.
MASK = torch.tensor(
    [[0] * 5 + [1] * 11, [1] * 9 + [0] * 7, [1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1], [1] * 16, [0] * 16]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def build(name):
    layer = LAYERS[name]()
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() > 1:
                p.mul_(2)  # so that a wrong state shows
    return layer


def alone(layer, x):
    """Each row's tokens in a call of their own, put back where they were."""
    out = torch.zeros_like(x)
    for row, mask in enumerate(MASK.bool()):
        if mask.any():
            out = out.index_put((torch.tensor(row), mask.nonzero().flatten()), layer(x[row : row + 1, mask])[0][0])
    return out


@every
def test_masked_tokens_are_not_there(name):
    layer, x = build(name), torch.randn(5, T, D, requires_grad=True)
    expected, (y, _, cache) = alone(layer, x), layer(x, attention_mask=MASK)
    assert cache is None
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    (grad,), (wanted,) = (torch.autograd.grad((side * weights).sum(), x) for side in (y, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)


@every
@torch.no_grad()
def test_masked_tokens_are_not_there_in_parts(name):
    layer, x = build(name).eval(), torch.randn(5, T, D)
    cache, parts = layers.Cache(), []
    for begin, end in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 15), (15, 16)):
        y, _, same = layer(x[:, begin:end], MASK[:, :end], cache, use_cache=True)
        assert same is cache
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), alone(layer, x), rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length(0) == T


@every
@torch.no_grad()
def test_a_call_that_does_not_keep_the_state_leaves_it_alone(name):
    layer, x = build(name).eval(), torch.randn(2, 12, D)
    whole, cache = layer(x)[0], layers.Cache()
    layer(x[:, :9], None, cache, use_cache=True)
    for end in (10, 12, 10, 12):
        y = layer(x[:, 9:end], None, cache, use_cache=False)[0]
        torch.testing.assert_close(y, whole[:, 9:end], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length(0) == 9


@pytest.mark.parametrize("name", ["GatedDeltaNet", "Attention", "mamba"])
def test_errors_name_the_rule(name):
    layer, x = build(name), torch.randn(2, 4, D)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B,S\].*got \[2, 3\]"):
        layer(x, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"attention_mask must be \[B,S\] of 0 and 1, got \[2, 4, 4\]"):
        layer(x, attention_mask=torch.ones(2, 4, 4))
    layer.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx must be given"):
        layer(x, past_key_values=layers.Cache(), use_cache=True)
