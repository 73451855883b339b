# SPDX-License-Identifier: Apache-2.0
"""gdn.models as transformers' models: gradients, generation, checkpoints in both directions, Trainer, PEFT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

import gdn  # noqa: E402
from gdn import models  # noqa: E402

HYBRID = dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=16)
BLOCKS = [{"mixer": "attention", "mixer_options": {"num_heads": 4}}, {"mixer": "delta_net", "norm_place": "post"}]
SMALL = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, intermediate_size=96)
CASES = {
    "gated_deltanet": (models.GatedDeltaNetConfig, dict(SMALL, head_dim=16, num_heads=2, num_v_heads=4)),
    "hybrid": (models.GatedDeltaNetConfig, dict(SMALL, head_dim=16, num_heads=2, attn=HYBRID, allow_neg_eigval=True)),
    "delta_net": (models.DeltaNetConfig, dict(SMALL, num_heads=2, use_gate=True, tie_word_embeddings=True)),
    "kda": (models.KDAConfig, dict(SMALL, head_dim=16, num_heads=2, safe_gate=True, lower_bound=-5.0)),
    "gdn": (models.GdnConfig, dict(vocab_size=60, hidden_size=64, intermediate_size=96, blocks=BLOCKS)),
}
every = pytest.mark.parametrize("case", list(CASES))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(4)


def build(case):
    config_class, fields = CASES[case]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)  # so that a wrong state shows in the outputs
    return model


def ids_of(*shape):
    return torch.randint(3, 60, shape)


@every
def test_decoding_equals_one_call_and_padding_is_skipped(case):
    model = build(case).eval()
    ids = ids_of(2, 80)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :70], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        kept = cache.clone()
        for begin, end in ((70, 75), *((t, t + 1) for t in range(75, 80))):
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == 80 and kept.get_seq_length() == 70
        again = model(ids[:, 70:], past_key_values=kept, use_cache=True).logits
        torch.testing.assert_close(again, whole[:, 70:], rtol=1e-4, atol=1e-5)
        packed = model(ids.view(1, 160), cu_seqlens=torch.tensor([0, 80, 160]), use_cache=False).logits
        torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-4, atol=1e-5)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        padded = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[:1, 9:], model(ids[:1, 9:]).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[1:], whole[1:], rtol=1e-4, atol=1e-5)
        short, mask = ids[:, :20], mask[:, :20]
        new = model.generate(short, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        alone = model.generate(short[:1, 9:], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(new[0, 20:], alone[0, 11:])
        again = model.generate(short[1:], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(new[1], again[0])
        # Padding on the right, read in two parts: the state is that of the tokens that are there.
        mask = torch.ones_like(ids)
        mask[0, 60:75] = 0
        out = model(ids[:, :70], attention_mask=mask[:, :70], use_cache=True)
        rest = model(ids[:, 70:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=False).logits
        there = torch.cat([ids[:1, :60], ids[:1, 75:]], 1)
        torch.testing.assert_close(rest[:1, 5:], model(there).logits[:, 60:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest[1:], whole[1:, 70:], rtol=1e-4, atol=1e-5)


@every
def test_loss_gradients_and_checkpointing(case):
    model = build(case).train()
    ids = ids_of(2, 40)
    labels = ids.clone()
    labels[0, :10] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=100).loss, expected * 69 / 100)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=labels).loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], msg=n)


@every
def test_checkpoints_go_both_ways_between_python_and_the_engine(case, tmp_path):
    model = build(case).eval()
    ids = ids_of(2, 30)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "python")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "python")
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
    engine = gdn.CausalLM.from_pretrained(tmp_path / "python")
    torch.testing.assert_close(engine(ids), expected, rtol=1e-4, atol=1e-5)
    engine.save_pretrained(tmp_path / "engine")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "engine").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_gdn_train_writes_what_the_auto_classes_read(program, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the river moves past old stones and carries small boats to town. " * 60)
    config = tmp_path / "run.toml"
    config.write_text(
        "[model]\nhidden_size = 32\nnum_layers = 2\nintermediate_size = 64\n[model.mixer]\nname = 'gated_delta_net'\n"
        "num_heads = 2\nhead_dim = 16\n[data]\nseq_len = 32\nbatch_size = 4\n[train]\nmax_iters = 3\nthreads = 1\n"
        "eval_interval = 3\neval_iters = 1\nsave_interval = 3\n"
    )
    run = [program, "train", "--config", config, "--data", text, "--out-dir", tmp_path / "run"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / "run" / "latest").resolve()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is models.GatedDeltaNetForCausalLM
    engine = gdn.CausalLM.from_pretrained(folder)
    ids = torch.tensor([engine.encode("the river moves")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, engine(ids), rtol=1e-4, atol=1e-5)
    assert engine.decode(ids[0]) == "the river moves"


@every
def test_a_model_learns_and_its_optimizer_moves_the_engines_weights(case):
    model = build(case)
    ids = ids_of(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_bfloat16_and_beams(tmp_path):
    model = build("hybrid").eval()
    ids = ids_of(2, 30)
    model.save_pretrained(tmp_path)
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert (low(ids).logits.float() - expected).norm() < 0.1 * expected.norm()
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None)
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)

    def score(tokens):
        with torch.no_grad():
            logp = model(tokens).logits[:, 29:-1].log_softmax(-1)
        return logp.gather(-1, tokens[:, 30:, None]).sum((1, 2))

    assert (score(beams) >= score(greedy) - 1e-4).all()


def test_fla_initialisation_is_kept_when_a_checkpoint_is_loaded(tmp_path):
    model = build("gated_deltanet")
    with torch.no_grad():
        for block in model.model.layers:
            block.attn.A_log.fill_(0.25)
            block.attn.dt_bias.fill_(-2)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for block in again.model.layers:
        assert (block.attn.A_log == 0.25).all() and (block.attn.dt_bias == -2).all()
    fresh = build("gated_deltanet")
    assert all(block.attn.A_log.isfinite().all() for block in fresh.model.layers)
    assert fresh.model.layers[0].attn.q_proj.weight.std().item() == pytest.approx(0.06, rel=0.2)  # 3 x 0.02


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = build("gated_deltanet")
    data = [{"input_ids": row, "labels": row} for row in ids_of(8, 24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_steps=3
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    before = model.lm_head.weight.clone()
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, model.lm_head.weight)
    assert json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())["model_type"] == "gated_deltanet"


def test_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("kda"), peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    ids = ids_of(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 8 and all("lora" in n for n in trained)


def test_configurations_refuse_what_is_not_there():
    for fields, text in (
        (dict(attnres_block_size=2), "attnres_block_size"),
        (dict(hidden_act="powlu"), "hidden_act must be 'swish', got 'powlu'"),
        (dict(attn=dict(layers=[99], num_heads=2)), "attn layers must be in"),
        (dict(attn=[HYBRID, HYBRID]), "one attn only"),
        (dict(fuse_linear_cross_entropy=True), "cannot both be True"),
    ):
        with pytest.raises(ValueError, match=text):
            models.GatedDeltaNetConfig(**fields)
    with pytest.raises(ValueError, match="needs lower_bound"):
        gdn.layers.KimiDeltaAttention(hidden_size=32, head_dim=16, num_heads=2, safe_gate=True)
    with pytest.raises(ValueError, match="num_v_heads must be a multiple of num_heads"):
        gdn.layers.GatedDeltaNet(hidden_size=32, head_dim=16, num_heads=2, num_v_heads=3)
