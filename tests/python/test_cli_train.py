# SPDX-License-Identifier: Apache-2.0
"""gdn train end to end: a tiny model learns, is stopped in every way, resumes to the last bit; bad input is told."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

CONFIG = """
[model]
hidden_size = 32
num_layers = 2
intermediate_size = 64
tie_word_embeddings = true

[model.mixer]
name = "gated_delta_net"
num_heads = 2
head_dim = 16
expand_v = 1.0

[data]
seq_len = 32
batch_size = 4

[train]
lr = 3e-3
min_lr = 3e-4
warmup_iters = 5
max_iters = 12
log_interval = 1
eval_interval = 6
eval_iters = 2
final_eval_iters = 4
save_interval = 4
threads = 1
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text with words to learn."""
    words = ["the", "river", "moves", "past", "old", "stones", "and", "carries", "small", "boats", "to", "town", "sea"]
    draw = random.Random(7)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(draw.choice(words) + draw.choice([" ", " ", " ", ".\n"]) for _ in range(3000)))
    return path


@pytest.fixture
def cli(program, text, tmp_path, monkeypatch):
    """Runs gdn in a folder of its own; `cli.train` fills in configuration, text and run folder."""
    for name in [name for name in os.environ if name.startswith("GDN_") and name != "GDN_LIBRARY"]:
        monkeypatch.delenv(name)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    environment = {**os.environ, "GDN_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    class Cli:
        folder = tmp_path
        run_folder = tmp_path / "run"

        def command(self, *args, out="run"):
            return [
                str(program), "train", "--config", "tiny.toml", "--data", str(text), "--out-dir", out, *map(str, args),
            ]  # fmt: skip

        def run(self, *args, env=(), **more):
            return subprocess.run(
                [str(program), *map(str, args)], cwd=tmp_path, env={**environment, **dict(env)},
                capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, **more,
            )  # fmt: skip

        def train(self, *args, out="run", **more):
            return self.run(*self.command(*args, out=out)[1:], **more)

        def start(self, *args, out="run"):
            return subprocess.Popen(
                self.command(*args, out=out), cwd=tmp_path, env=environment, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    return Cli()


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict:
    """What must be the same in two equal runs: everything but times."""
    keys = ("loss", "val_loss", "lr", "grad_norm")
    return {row["step"]: {key: row[key] for key in keys if key in row} for row in rows(run)}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def fails(result, status: int, *parts: str) -> None:
    """One line of error with these parts, and this exit status."""
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("gdn: error:")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in result.stderr and "terminate called" not in result.stderr


def test_a_run_and_what_it_leaves(cli):
    result = cli.train("--json", "--max-iters", 60, "--save_interval=20", "--keep-checkpoints", 2)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["step"] == 60
    run = cli.run_folder
    assert checkpoints(run) == ["step-000040", "step-000060"]
    assert os.readlink(run / "latest") == "step-000060"
    assert summary["checkpoint"] == "run/step-000060"
    names = {path.name for path in (run / "latest").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "state.json"} <= names
    assert not list(run.glob(".saving*"))

    table = rows(run)
    assert [row["step"] for row in table] == list(range(61))
    assert set(table[0]) == {"step", "val_loss", "seconds"}
    assert set(table[1]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert set(table[6]) == set(table[1]) | {"val_loss"}
    assert table[0]["val_loss"] == pytest.approx(5.545, abs=0.1)  # ln 256: nothing is known yet
    assert table[60]["val_loss"] == summary["val_loss"] < 3.3
    assert table[1]["lr"] == pytest.approx(3e-3 / 5)
    assert [row["seconds"] for row in table] == sorted(row["seconds"] for row in table)
    assert "step 60/60 | loss " in result.stderr and " | eta 0s" in result.stderr
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))

    saved = (run / "config.toml").read_text()
    assert "max_iters = 60" in saved and 'name = "gated_delta_net"' in saved and "hidden_size = 32" in saved


def test_settings_defaults_file_environment_flags(cli):
    env = {"GDN_MAX_ITERS": "2", "GDN_LR": "0.5", "GDN_EVAL_ITERS": "1"}
    result = cli.train("--lr", "1e-3", env=env.items())
    assert result.returncode == 0, result.stderr
    saved = (cli.run_folder / "config.toml").read_text()
    for line in ("lr = 0.001", "max_iters = 2", "eval_iters = 1", "hidden_size = 32", "beta1 = 0.9"):
        assert line in saved.splitlines()


def test_resume_after_kill_9_is_exact(cli):
    steps = ("--max-iters", 400, "--save-interval", 100, "--eval-interval", 150)
    assert cli.train(*steps, out="whole").returncode == 0
    process = cli.start(*steps)
    wait_for(cli.run_folder / "step-000100", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoints(cli.run_folder)[-1] < "step-000400"
    # The configuration is taken from the run.
    result = cli.run("train", "--out-dir", "run", "--resume")
    assert result.returncode == 0, result.stderr
    assert "resuming run/step-000" in result.stderr
    whole = cli.folder / "whole"
    assert losses(cli.run_folder) == losses(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (cli.run_folder / "latest" / name).read_bytes() == (whole / "latest" / name).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_end(cli, number, status):
    process = cli.start("--max-iters", 100000, "--save-interval", 0)
    wait_for(cli.run_folder / "metrics.jsonl", process)
    while len(rows(cli.run_folder)) < 5:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "--resume goes on from run/step-" in err
    step = rows(cli.run_folder)[-1]["step"]
    assert checkpoints(cli.run_folder) == [f"step-{step:06d}"]
    assert f"step        {step}\n" in out
    result = cli.train("--resume", "--max-iters", step + 2)
    assert result.returncode == 0, result.stderr
    assert rows(cli.run_folder)[-1]["step"] == step + 2


def test_a_second_run_in_the_folder(cli):
    process = cli.start("--max-iters", 100000)
    wait_for(cli.run_folder / "metrics.jsonl", process)
    fails(cli.train("--resume"), 1, f"run is in use by another run (process {process.pid})", "--out-dir")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    fails(cli.train(), 2, "run holds a run already", "--resume", "--out-dir")


def test_resume_skips_damaged_checkpoints(cli):
    assert cli.train().returncode == 0
    whole = losses(cli.run_folder)
    assert checkpoints(cli.run_folder) == ["step-000004", "step-000008", "step-000012"]
    newest = cli.run_folder / "step-000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (cli.run_folder / "step-000008" / "optimizer.safetensors").unlink()
    result = cli.train("--resume")
    assert result.returncode == 0, result.stderr
    assert "skipping the damaged checkpoint run/step-000012" in result.stderr
    assert "skipping the damaged checkpoint run/step-000008" in result.stderr
    assert "resuming run/step-000004 at step 4" in result.stderr
    assert losses(cli.run_folder) == whole
    for name in checkpoints(cli.run_folder):
        (cli.run_folder / name / "state.json").write_text("{")
    fails(cli.train("--resume"), 1, "checkpoints in run are damaged", "start again")


def test_resume_needs_a_run_of_the_same_shape(cli):
    fails(cli.train("--resume"), 2, "no run to resume in run", "without --resume")
    assert cli.train("--max-iters", 2).returncode == 0
    fails(cli.train("--resume", "--hidden-size", 48), 2, "another shape", "--out-dir")


def test_a_full_disk_leaves_the_last_checkpoint(cli):
    assert cli.train("--max-iters", 4).returncode == 0
    before = (cli.run_folder / "latest" / "model.safetensors").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    result = cli.train("--resume", "--max-iters", 12, preexec_fn=limit)
    fails(result, 1, "saving run/step-000008 failed", "run/step-000004 is the newest whole one")
    assert checkpoints(cli.run_folder) == ["step-000004"]
    assert not list(cli.run_folder.glob(".saving*"))
    assert (cli.run_folder / "latest" / "model.safetensors").read_bytes() == before
    assert cli.train("--resume", "--max-iters", 12).returncode == 0
    assert rows(cli.run_folder)[-1]["step"] == 12


def test_bad_numbers_stop_the_run_and_are_named(cli):
    result = cli.train("--lr", "1e30", "--warmup-iters", 0, "--grad-clip", 0, "--save-interval", 1)
    fails(result, 1, "] step 2: ", "the first bad tensor is ", "nan", "--resume from run/step-000001")
    assert checkpoints(cli.run_folder) == ["step-000001"]


def test_gradient_checkpointing_changes_no_loss(cli):
    assert cli.train(out="plain").returncode == 0
    assert cli.train("--gradient-checkpointing", out="again").returncode == 0
    plain, again = losses(cli.folder / "plain"), losses(cli.folder / "again")
    assert plain.keys() == again.keys()
    for step in range(1, 13):
        assert plain[step]["loss"] == pytest.approx(again[step]["loss"], rel=1e-4)


def test_overfitting_one_batch(cli):
    result = cli.train(
        "--overfit-one-batch", "--max-iters", 200, "--lr", "1e-2", "--weight-decay", 0, "--eval-interval", 0,
        "--save-interval", 0, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["loss"] < 0.2


def test_bf16_accumulation_and_time_limit(cli):
    result = cli.train(
        "--dtype", "bf16", "--grad-accum", 3, "--max-iters", 1e6, "--max-seconds", 1, "--json", "--tensorboard=false",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert 1 <= summary["step"] < 1e6
    table = rows(cli.run_folder)
    assert table[-1]["loss"] < table[1]["loss"]
    assert table[-1]["lr"] < 1.5e-3, "the learning rate must follow the clock"
    assert "/~" in result.stderr
    assert not (cli.run_folder / "tensorboard").exists()


def test_dtype_auto_is_resolved_once(cli):
    assert cli.train("--dtype", "auto", "--max-iters", 4).returncode == 0
    saved = (cli.run_folder / "config.toml").read_text()
    chosen = [dtype for dtype in ("fp32", "bf16") if f'dtype = "{dtype}"' in saved]
    assert len(chosen) == 1, saved
    other = "bf16" if chosen == ["fp32"] else "fp32"
    (cli.run_folder / "config.toml").write_text(saved.replace(f'"{chosen[0]}"', f'"{other}"'))
    assert cli.train("--dtype", "auto", "--max-iters", 6, "--resume").returncode == 0
    assert f'dtype = "{other}"' in (cli.run_folder / "config.toml").read_text(), "a resumed run keeps its dtype"


def test_dry_run_trains_nothing(cli):
    result = cli.train("--dry-run")
    assert result.returncode == 0, result.stderr
    assert "model.embeddings.weight [256, 32]" in result.stdout
    assert "128 tokens per step" in result.stdout and "tok/s" in result.stdout
    assert not cli.run_folder.exists()


def test_every_mixer_trains(cli):
    listing = cli.run("mixers", "--json")
    assert listing.returncode == 0, listing.stderr
    names = [mixer["name"] for mixer in json.loads(listing.stdout)]
    assert "gated_delta_net" in names
    for name in names:
        result = cli.train("--mixer", name, "--max-iters", 30, "--save-interval", 0, out=name)
        assert result.returncode == 0, f"{name}: {result.stderr}"
        table = rows(cli.folder / name)
        assert table[-1]["val_loss"] < table[0]["val_loss"] - 0.5, name


def test_starting_from_weights(cli):
    assert cli.train("--max-iters", 30, out="first").returncode == 0
    first = rows(cli.folder / "first")[-1]["val_loss"]
    result = cli.train("--init-from", "first/latest", "--max-iters", 1, "--eval-iters", 4)
    assert result.returncode == 0, result.stderr
    assert rows(cli.run_folder)[0]["val_loss"] == pytest.approx(first, rel=1e-6)
    fails(cli.train("--init-from", "nowhere", out="third"), 1, "nowhere")


def test_generate_from_a_run(cli):
    assert cli.train("--max-iters", 4).returncode == 0
    args = ("generate", "--model", "run/latest", "--prompt-ids", "104,105", "--max-new-tokens", 5, "--json")
    result = cli.run(*args)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["prompt_ids"] == [104, 105] and len(answer["ids"]) == 5


def test_plot_draws_a_png(cli):
    assert cli.train().returncode == 0
    result = cli.run("plot", "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "run/loss.png"
    assert (cli.run_folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    fails(cli.run("plot", "nowhere"), 1, "nowhere is not the folder of a run")


@pytest.mark.parametrize(
    ("args", "status", "parts"),
    [
        (("--lr", "fast"), 2, ("--lr must be a number", "fast")),
        (("--batchsize", 3), 2, ("--batchsize", "--batch-size")),
        (("--dtype", "fp17"), 2, ("--dtype must be one of fp32, bf16",)),
        (("--mixer", "gated_delta"), 2, ("gated_delta", "gated_delta_net")),
        (("--mixer-option", "num_head=2"), 2, ("num_head", "num_heads")),
        (("--mixer-option", "num_v_heads=3"), 2, ("num_v_heads",)),
        (("--mixer", "attention", "--mixer-option", "num_kv_heads=3"), 2, ("num_kv_heads",)),
        (("--data", "missing.txt"), 1, ("missing.txt",)),
        (("--data", "empty.txt"), 1, ("empty.txt",)),
        (("--data", "latin1.txt"), 1, ("latin1.txt", "UTF-8")),
        (("--data", "short.txt"), 1, ("short.txt", "seq_len")),
        (("--config", "missing.toml"), 2, ("missing.toml",)),
        (("--config", "key.toml"), 2, ("key.toml", "batchsize", "batch_size")),
        (("--config", "broken.toml"), 2, ("broken.toml:2",)),
        (("--min-lr", 1), 2, ("min_lr",)),
        (("--out-dir", "empty.txt/run"), 1, ("empty.txt/run",)),
        (("--vocab-size", 100), 2, ("vocab_size", "256", "100")),
    ],
)
def test_bad_input(cli, args, status, parts):
    (cli.folder / "empty.txt").write_bytes(b"")
    (cli.folder / "latin1.txt").write_bytes("Caf\u00e9 au lait. ".encode("latin-1") * 100)
    (cli.folder / "short.txt").write_text("too short")
    (cli.folder / "key.toml").write_text("[data]\nbatchsize = 3\n")
    (cli.folder / "broken.toml").write_text("[data]\nbatch_size = = 3\n")
    command = cli.command("--quiet")[1:]
    for flag, value in zip(args[::2], args[1::2], strict=True):
        if flag in command:
            command[command.index(flag) + 1] = str(value)
        else:
            command += [flag, str(value)]
    fails(cli.run(*command), status, *parts)
    assert not checkpoints(cli.run_folder)
