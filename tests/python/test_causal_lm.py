# SPDX-License-Identifier: Apache-2.0
"""The C++ engine from Python, the generic mixers, and what they say about bad input."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

import gdn  # noqa: E402
from gdn import layers  # noqa: E402

CONFIG = {
    "model_type": "gated_deltanet",
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_heads": 2,
    "intermediate_size": 64,
    "attn": {"layers": [1], "num_heads": 2},
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(2)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = torch.classes.gdn.CausalLM("", json.dumps(CONFIG))
    for t in model.parameters().values():
        t.data.mul_(3)  # so that tokens differ in their likelihood
    model.save(str(tmp_path / "model"))
    return tmp_path / "model"


def test_forward_in_parts_and_states_that_are_kept(folder):
    model = gdn.CausalLM.from_pretrained(folder)
    ids = torch.randint(0, 50, (2, 30))
    whole = model(ids)
    assert whole.shape == (2, 30, 50) and whole.dtype == torch.float32
    state = model.zero_state(2)
    parts = [model(ids[:, :20], state=state)]
    kept = state.clone()
    parts += [model(ids[:, t : t + 1], state=state) for t in range(20, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    swapped = kept.select(torch.tensor([1, 0, 1]))
    again = model(ids[[1, 0, 1], 20:], state=swapped)
    torch.testing.assert_close(again, whole[[1, 0, 1], 20:], rtol=1e-4, atol=1e-5)
    assert kept.num_sequences == 2 and kept.nbytes == sum(t.nbytes for t in kept.tensors().values())
    packed = model(ids.view(1, 60), cu_seqlens=torch.tensor([0, 30, 60]))
    torch.testing.assert_close(packed.view(2, 30, 50), whole, rtol=1e-4, atol=1e-5)


def test_generation_is_greedy_and_streams(folder):
    model = gdn.CausalLM.from_pretrained(folder)
    ids = torch.randint(0, 50, (2, 5))
    out = model.generate(ids, max_new_tokens=6)
    assert out.shape == (2, 11) and torch.equal(out[:, :5], ids)
    for t in range(5, 11):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))
    assert torch.equal(torch.stack(list(model.stream(ids, max_new_tokens=6)), 1), out[:, 5:])
    drawn = [model.generate(ids, max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    state = model.zero_state(2)
    first = model.generate(ids, max_new_tokens=3, state=state)
    assert torch.equal(model.generate(first[:, -1:], max_new_tokens=3, state=state)[:, 1:], out[:, 8:])


def test_dtypes_and_weights(folder, tmp_path):
    model = gdn.CausalLM.from_pretrained(folder)
    ids = torch.randint(0, 50, (1, 20))
    exact = gdn.CausalLM.from_pretrained(folder, dtype=torch.float64)(ids)
    low = gdn.CausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids)
    assert exact.dtype == torch.float64 and low.dtype == torch.float32
    assert (model(ids) - exact).norm() < 1e-5 * exact.norm() < (low - exact).norm() < 0.05 * exact.norm()
    weights = model.state_dict()
    assert weights["model.embeddings.weight"].shape == (50, 32)
    weights["model.norm.weight"].mul_(2)  # the weights themselves
    torch.testing.assert_close(model(ids).double(), exact * 2, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(gdn.CausalLM.from_pretrained(tmp_path / "again")(ids), model(ids))


def test_bad_input_is_told(folder, tmp_path):
    model = gdn.CausalLM.from_pretrained(folder)

    def error(kind, text, f, *args, **kwargs):
        with pytest.raises(kind) as caught:
            f(*args, **kwargs)
        assert text in str(caught.value) and "\n" not in str(caught.value)

    load = gdn.CausalLM.from_pretrained
    error(ValueError, "there is no model folder", load, tmp_path / "nowhere")
    error(TypeError, "dtype must be", load, folder, dtype=torch.float16)
    error(ValueError, "ids must be in [0, 50), got 50", model, torch.tensor([[3, 50]]))
    error(ValueError, "got -1", model, torch.tensor([[3, -1]]))
    error(ValueError, "ids must be int64 [B,T]", model, torch.tensor([3]))
    error(ValueError, "ids must be int64 [B,T]", model, torch.tensor([[0.5]]))
    error(ValueError, "the state must hold 1 sequences, got 2", model, torch.tensor([[3]]), state=model.zero_state(2))
    error(ValueError, "must end with the number of tokens", model, torch.tensor([[3]]), cu_seqlens=torch.tensor([0, 2]))
    error(ValueError, "T >= 1", model.generate, torch.zeros(1, 0, dtype=torch.int64))
    error(ValueError, "temperature", model.generate, torch.tensor([[3]]), temperature=-1.0)
    error(ValueError, "max_new_tokens", model.generate, torch.tensor([[3]]), max_new_tokens=-1)
    error(ValueError, "no tokenizer", model.encode, "text")
    (folder / "tokenizer.json").write_text("{not json")
    error(ValueError, "tokenizer.json", load, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gated_deltanets"}))
    error(ValueError, "gated_deltanet", load, folder)


@pytest.mark.parametrize("name", list(layers.registry()))
def test_every_mixer_is_a_module(name):
    kind = layers.mixer.mixer_class("".join(part.capitalize() for part in name.split("_")))
    layer = kind(32, layer_idx=0)
    assert layer.name == name and kind.__doc__ and set(layer.options)
    x = torch.randn(2, 11, 32)
    y, none, cache = layer(x)
    assert y.shape == x.shape and none is None and cache is None
    (y * torch.randn_like(y)).sum().backward()  # an output projection may start at zero
    assert all(p.grad is not None for p in layer.parameters())
    before = y.detach()
    with torch.no_grad():
        cache = layers.Cache()
        parts = [layer(x[:, a:b], past_key_values=cache, use_cache=True)[0] for a, b in ((0, 8), (8, 9), (9, 11))]
        torch.testing.assert_close(torch.cat(parts, 1), before, rtol=1e-3, atol=1e-4)
        assert cache.get_seq_length() == 11
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x)[0].detach(), before)
        other.load_state_dict({k: v * 0 for k, v in other.state_dict().items()})
    torch.testing.assert_close(layer(x)[0].detach(), before)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer(x)[0].detach(), before)


def test_mixer_errors():
    with pytest.raises(ValueError, match=r'unknown mixer "atention".*attention'):
        layers.Mixer("atention", 32)
    with pytest.raises(ValueError, match='unknown option "heads"'):
        layers.Mixer("attention", 32, heads=2)
    with pytest.raises(AttributeError, match="NoSuchMixer"):
        layers.NoSuchMixer  # noqa: B018
    layer = layers.Mixer("attention", 32)
    with pytest.raises(ValueError, match=r"x must be \[B,T,D\]"):
        layer.run(torch.randn(3, 32))
    with pytest.raises(ValueError, match="layer_idx must be given"):
        layer(torch.randn(1, 3, 32), past_key_values=layers.Cache(), use_cache=True)


@pytest.mark.parametrize("kind", ["GatedDeltaNet", "DeltaNet"])
def test_python_layers_equal_libgdns(kind):
    options = {"GatedDeltaNet": dict(head_dim=16, num_heads=2, num_v_heads=4), "DeltaNet": dict(num_heads=2)}[kind]
    python = getattr(layers, kind)(hidden_size=32, **options)
    name = {"GatedDeltaNet": "gated_delta_net", "DeltaNet": "delta_net"}[kind]
    cpp = layers.Mixer(name, 32, **options)
    cpp.load_state_dict(python.state_dict())
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(python(x)[0], cpp(x)[0], rtol=1e-5, atol=1e-6)
