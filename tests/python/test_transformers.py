# SPDX-License-Identifier: Apache-2.0
"""patch_transformers against transformers itself: the same model, the same inputs, patched and not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Where flash-linear-attention is installed, transformers takes its GPU code even for tensors on the CPU, which fails.
# It must not be found, or there is nothing to compare with.
sys.modules["fla"] = None  # type: ignore[assignment]
transformers = pytest.importorskip("transformers", minversion="5.0")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

import gdn  # noqa: E402
from gdn import _transformers  # noqa: E402

LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
BASE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts_per_tok=2, num_experts=4)
LAYERS = ["linear_attention", "full_attention"]
MLA = dict(
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    qk_nope_head_dim=16,
    moe_intermediate_size=32,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
# model type of the configuration: (its fields, the class with a language-modelling head)
MODELS: dict[str, tuple[str, dict, str]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(**BASE, **LINEAR, **MOE, head_dim=32, layer_types=LAYERS),
        "Qwen3NextForCausalLM",
    ),
    "qwen3_5": ("Qwen3_5TextConfig", dict(**BASE, **LINEAR, head_dim=32, layer_types=LAYERS), "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        dict(**BASE, **LINEAR, **MOE, head_dim=32, layer_types=LAYERS),
        "Qwen3_5MoeForCausalLM",
    ),
    "olmo_hybrid": ("OlmoHybridConfig", dict(**BASE, **LINEAR, layer_types=LAYERS), "OlmoHybridForCausalLM"),
    "kimi_linear": (
        "KimiLinearConfig",
        dict(**BASE, **MLA, num_local_experts=4, linear_head_dim=16, linear_num_heads=4, layer_types=LAYERS),
        "KimiLinearForCausalLM",
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        dict(**BASE, **MLA, num_local_experts=4, head_dim=16, layer_group_size=2, num_mtp_layers=0),
        "BailingHybridForCausalLM",
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        dict(
            {k: v for k, v in BASE.items() if k != "intermediate_size"},
            **LINEAR,
            **MOE,
            head_dim=32,
            layer_types=LAYERS,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=32,
            indexer_budget=256,
            indexer_compress_ratio=2,
            hc_count=2,
            hc_lowrank=8,
            ngram_vocab_size_base=97,
            heads_per_ngram=2,
            split_ngram_parts=1,
        ),
        "Qwen4ExpForCausalLM",
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        dict(
            BASE,
            **dict(MLA, qk_rope_head_dim=0),
            n_routed_experts=4,
            q_lora_rank=16,
            linear_head_dim=16,
            linear_num_heads=4,
            layer_types=LAYERS,
            index_topk=256,
            index_head_dim=16,
            index_n_heads=2,
            index_kpool=2,
            hc_mult=2,
        ),
        "Glm5NextTextModel",
    ),
}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    gdn.unpatch_transformers()
    torch.manual_seed(3)
    yield
    gdn.unpatch_transformers()


def build(name: str):
    config_name, fields, model_name = MODELS[name]
    try:
        config_class, model_class = getattr(transformers, config_name), getattr(transformers, model_name)
    except AttributeError:
        pytest.skip(f"this transformers has no {model_name}")
    model = model_class._from_config(config_class(**fields), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("A_log"):  # decays that let a state live for some tokens
                p.copy_(torch.randn_like(p) - 2)
            elif p.dim() > 1:  # larger than the initialiser's, so that a wrong state shows in the outputs
                p.copy_(torch.randn_like(p) * (0.3 if "conv1d" in parameter_name else p.shape[-1] ** -0.5))
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the size of what is expected."""
    scale = max(expected.abs().max().item(), 1e-6)
    worst = (actual - expected).abs().max().item() / scale
    assert worst < tolerance, f"{what} differs by {worst:.2e} of its largest value"


def scores(out) -> torch.Tensor:
    """The logits, or for a model without a head its last hidden state."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


for_all_models = pytest.mark.parametrize("name", list(MODELS))


@for_all_models
def test_outputs_and_gradients(name):
    model = build(name)
    ids = torch.randint(3, 128, (2, 100))
    weights = torch.randn(2, 100, 128)

    def run():
        model.zero_grad()
        out = scores(model(ids))
        (out * weights[..., : out.shape[-1]]).sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits, grads = run()
    assert gdn.patch_transformers()
    patched_logits, patched_grads = run()
    assert not torch.equal(logits, patched_logits), "nothing was patched"
    close(patched_logits, logits, 1e-5, "logits")
    assert grads.keys() == patched_grads.keys()
    for n, grad in grads.items():
        close(patched_grads[n], grad, 1e-4, f"the gradient of {n}")


@for_all_models
def test_prefill_and_decoding(name):
    model = build(name).eval()
    ids = torch.randint(3, 128, (2, 90))

    @torch.no_grad()
    def run():
        first = model(ids[:, :70], use_cache=True)
        outs, cache = [scores(first)], first.past_key_values
        for begin, end in ((70, 75), (75, 76), (76, 77), (77, 78)):
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            outs.append(scores(out))
            cache = out.past_key_values
        return torch.cat(outs, 1)

    expected = run()
    gdn.patch_transformers()
    actual = run()
    close(actual, expected, 1e-5)
    with torch.no_grad():
        close(actual, scores(model(ids[:, :78])), 1e-4, "decoding against one call")


def test_generate_is_the_same():
    model = build("qwen3_next").eval()
    ids = torch.randint(3, 128, (2, 20))
    kwargs = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **kwargs)
    gdn.patch_transformers()
    assert torch.equal(model.generate(ids, **kwargs), expected)


def test_padding_on_the_left():
    model = build("qwen3_5").eval()
    ids = torch.randint(3, 128, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0

    @torch.no_grad()
    def run():
        return model(ids, attention_mask=mask).logits[mask.bool()]

    expected = run()
    gdn.patch_transformers()
    close(run(), expected, 1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_packed_sequences_are_kept_apart(name):
    model = build(name)
    lengths = (30, 1, 45)
    ids = torch.randint(3, 128, (1, sum(lengths)))
    cu = torch.tensor([0, 30, 31, 76], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    separate = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    gdn.patch_transformers()
    lengths_of = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=45, max_length_k=45)
    packed = model(ids, position_ids=positions, use_cache=False, **lengths_of)
    close(packed.logits, separate, 1e-5)
    seq_idx = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    close(model(ids, position_ids=positions, use_cache=False, seq_idx=seq_idx).logits, separate, 1e-5)


def test_low_precision_and_models_built_after():
    gdn.patch_transformers()
    model = build("qwen3_5").bfloat16().eval()
    ids = torch.randint(3, 128, (1, 80))
    with torch.no_grad():
        patched = model(ids).logits.float()
        gdn.unpatch_transformers()
        expected = model(ids).logits.float()
        exact = model.float()(ids).logits
    assert (patched - exact).norm() < 1.3 * (expected - exact).norm() + 1e-3 * exact.norm()


def test_patching_twice_and_restoring():
    before = {
        (name, function): getattr(module, function)
        for name, module in _transformers._modules().items()
        for function in _transformers.FUNCTIONS[name]
    }
    assert gdn.patch_transformers() == gdn.patch_transformers()
    for (name, function), original in before.items():
        assert getattr(_transformers._modules()[name], function) is not original
    gdn.unpatch_transformers()
    gdn.unpatch_transformers()
    for (name, function), original in before.items():
        assert getattr(_transformers._modules()[name], function) is original


def test_every_installed_model_type_is_served():
    assert set(gdn.patch_transformers()) == set(_transformers._modules())


def test_an_unknown_version_is_refused_whole(monkeypatch):
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    def other(query, key, value, gate):
        raise AssertionError

    monkeypatch.setattr(qwen3_5, "torch_chunk_gated_delta_rule", other)
    before = qwen3_next.torch_chunk_gated_delta_rule
    with pytest.raises(
        RuntimeError, match=r"qwen3_5.torch_chunk_gated_delta_rule has the parameters .*nothing was changed"
    ):
        gdn.patch_transformers()
    assert qwen3_next.torch_chunk_gated_delta_rule is before
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.0")
    with pytest.raises(RuntimeError, match=r"must be 5.x, got 4.57.0"):
        gdn.patch_transformers()


def test_other_devices_go_to_the_original():
    gdn.patch_transformers()
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        qwen3_next.causal_conv1d_fn(
            torch.randn(1, 8, 6), torch.randn(8, 4), activation="gelu", seq_idx=torch.zeros(1, 6, dtype=torch.int32)
        )
    x, weight = torch.randn(1, 8, 6), torch.randn(8, 4)
    actual = qwen3_next.causal_conv1d_fn(x, weight, activation="gelu")
    gdn.unpatch_transformers()
    assert torch.equal(actual, qwen3_next.causal_conv1d_fn(x, weight, activation="gelu"))
