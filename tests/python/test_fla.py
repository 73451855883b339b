# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention's own models on the CPU through gdn, and its checkpoints in gdn's models, where it is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("fla") is None:
    pytest.skip("flash-linear-attention is not installed", allow_module_level=True)

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, gdn
names = gdn.register_fla_backend()
assert names == gdn.register_fla_backend() and "fused_recurrent_gated_delta_rule" in names
import fla.models
from gdn import models
torch.manual_seed(0)
kind, folder = sys.argv[1:]
fields = dict(hidden_size=64, num_hidden_layers=2, vocab_size=100, num_heads=2)
if kind == "hybrid":
    kind = "GatedDeltaNet"
    fields["attn"] = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 12}
if kind != "DeltaNet":
    fields["head_dim"] = 16
theirs = getattr(fla.models, kind + "ForCausalLM")(getattr(fla.models, kind + "Config")(**fields))
with torch.no_grad():
    for p in theirs.parameters():
        if p.dim() > 1:
            p.mul_(3)
ids = torch.randint(3, 100, (2, 90))
theirs(ids, labels=ids).loss.backward()
theirs.eval().save_pretrained(folder)
ours = getattr(models, kind + "ForCausalLM").from_pretrained(folder)
ours.train()(ids, labels=ids).loss.backward()
ours.eval()
for name, p in theirs.named_parameters():
    grad = ours.get_parameter(name).grad
    assert (grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
mask = torch.ones_like(ids)
mask[0, :9] = 0
with torch.no_grad():
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)
    torch.testing.assert_close(gdn.CausalLM.from_pretrained(folder)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
generate = dict(attention_mask=mask[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)
assert torch.equal(ours.generate(ids[:, :20], **generate), theirs.generate(ids[:, :20], **generate))
"""


# Its other models of operators that gdn has: they learn, decode as they read, and skip padding.
OTHERS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, gdn
gdn.register_fla_backend()
import fla.models
from fla.layers.gdn2 import GatedDeltaNet2
from fla.layers.simple_gla import SimpleGatedLinearAttention
from fla.ops import comba, gdn2
from fla.ops.comba.naive import naive_chunk_comba
from fla.ops.gdn2.naive import naive_recurrent_gdn2

torch.manual_seed(0)
common = dict(hidden_size=64, num_hidden_layers=2, vocab_size=100)
ids = torch.randint(3, 100, (2, 90))
mask = torch.ones_like(ids)
mask[0, :9] = 0
for kind, fields in (
    ("RetNet", dict(num_heads=2)),
    ("GLA", dict(num_heads=2)),
    ("LinearAttention", dict(num_heads=2)),
    ("HGRN2", dict(expand_ratio=16)),
    ("Comba", dict(num_heads=2, head_dim=16)),
    ("GatedDeltaProduct", dict(num_heads=2, head_dim=16)),
):
    model = getattr(fla.models, kind + "ForCausalLM")(getattr(fla.models, kind + "Config")(**common, **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), kind
    model.eval()
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :80], use_cache=True)
        parts = [out.logits]
        for t in range(80, 90):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1, 9:], model(ids[:1, 9:]).logits)
        if kind == "GLA":  # libgdn reads its checkpoints
            model.save_pretrained(sys.argv[1])
            engine = gdn.CausalLM.from_pretrained(sys.argv[1])
            torch.testing.assert_close(engine(ids), whole, rtol=1e-4, atol=1e-4)
x = torch.randn(2, 90, 64)
for layer in (
    SimpleGatedLinearAttention(hidden_size=64, num_heads=2),
    GatedDeltaNet2(hidden_size=64, num_heads=2, head_dim=16, num_v_heads=4),
):
    with torch.no_grad():
        part = layer(x[:, :20])[0]
    torch.testing.assert_close(layer(x)[0][:, :20], part, rtol=1e-4, atol=1e-5)
q, k, v = (torch.randn(2, 40, 3, 8) for _ in range(3))
g, b, w = -torch.rand(2, 40, 3, 8), torch.rand(2, 40, 3, 8), torch.rand(2, 40, 3, 8)
for op in (gdn2.chunk_gdn2, gdn2.fused_recurrent_gdn2):
    expected = naive_recurrent_gdn2(q, k / 3, v, g, b, w, output_final_state=True)
    for a, e in zip(op(q, k / 3, v, g, b, w, output_final_state=True), expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
# Comba erases by the state before its decay, as fla's chunk form has it.
p, decay, beta = torch.randn(2, 64, 3, 8) / 3, -torch.rand(2, 64, 3), torch.rand(2, 64, 3)
q, k, v = (torch.randn(2, 64, 3, 8) for _ in range(3))
for op in (comba.chunk_comba, comba.fused_recurrent_comba):
    given = dict(q=q, k=k / 3, v=v, p=p, g=decay, beta=beta, scale=0.5, output_final_state=True)
    for a, e in zip(op(**given), naive_chunk_comba(**given)):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
"""


def run(*arguments):
    # A process of its own: flash-linear-attention registers the same model types as gdn.
    environment = {"PYTHONPATH": f"{ROOT / 'python'}:{':'.join(sys.path)}"}
    command = [sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["GatedDeltaNet", "hybrid", "KDA", "DeltaNet"])
def test_flas_models_run_and_their_checkpoints_load(kind, tmp_path):
    run(SCRIPT, kind, tmp_path)


def test_flas_other_models_run(tmp_path):
    run(OTHERS, tmp_path)
