from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from training.__main__ import app
from training.presets import PRESETS

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "HOURGLASS_DATA_ROOT": ""})


def test_train_ends_with_the_next_steps(tmp_path: Path) -> None:
    """One command makes an artifact, prints its figures beside PCA's, and says how to serve it."""
    arguments = ("--data", "digits", "--name", "mine", "--store", str(tmp_path), "--epochs", "1")
    arguments = (*arguments, "--run-dir", str(tmp_path / ".run"))
    result = run("train", "basic", *arguments, "--set", "hidden_sizes=[16]", "--batch-size", "100")
    assert result.exit_code == 0, result.output
    for part in ("epoch 1/1", "test_mse", "pca", "python -m app serve", "curl", "model=mine"):
        assert part in result.output
    assert (tmp_path / "mine" / "1" / "manifest.json").is_file()
    verified = run("verify", "mine", "--store", str(tmp_path))
    assert verified.exit_code == 0
    assert "passed" in verified.output
    evaluated = run("evaluate", "mine:1", "--data", "digits", "--store", str(tmp_path))
    assert evaluated.exit_code == 0
    assert "manifest" in evaluated.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bsic", "--data", "digits"), "error: preset: expected one of basic-tutorial"),
        (("basic", "--data", "digits", "--set", "depth=3"), "error: set: expected one of architecture.hidden_sizes"),
        (("basic", "--data", "nowhere"), "error: data: expected one of digits, mnist"),
        (("basic", "--data", "digits", "--device", "tpu"), "error: device: expected auto, cpu, cuda"),
        (("basic", "--data", "digits", "--image-size", "8x8"), "error: image size and channels: only for folders"),
        (("unet-denoiser", "--data", "digits", "--default-for", "sample"), "error: default-for: preset unet-denoiser"),
        (("basic", "--data", "digits", "--name", "../up"), "error: name: expected a-z"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """A mistake is answered with one line that names it, without traceback, before anything is trained."""
    names = () if "--name" in arguments else ("--name", "mine")
    result = run("train", *arguments, *names, "--store", str(tmp_path))
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_verify_fails_with_exit_code_1(tiny_store: Path) -> None:
    """An artifact that is not there, like one that fails, is exit code 1."""
    result = run("verify", "nothing", "--store", str(tiny_store))
    assert result.exit_code == 1
    assert "error: artifact: expected one of tiny-denoising:1" in result.output


def test_list_shows_every_preset() -> None:
    """The table has each preset with what it can do."""
    result = run("list")
    assert result.exit_code == 0
    assert all(name in result.output for name in PRESETS)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    """Every command explains itself."""
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_models_refuses_unknown_names(tmp_path: Path) -> None:
    """`models --only` knows the shipped names."""
    result = run("models", "--only", "mnist-huge", "--store", str(tmp_path))
    assert result.exit_code == 2
    assert "expected one of mnist-basic, mnist-conv, mnist-denoising, mnist-variational" in result.output


ROOT = Path(__file__).parents[2]


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    environment = os.environ | {"HOURGLASS_DATA_ROOT": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        **options,
    )


def train_arguments(folder: Path, *more: str) -> tuple[str, ...]:
    """A run in `folder` that takes some seconds and saves a checkpoint after each of many short epochs."""
    where = ("--store", str(folder / "store"), "--run-dir", str(folder / "run"), "--name", "mine")
    return ("train", "basic", "--data", "digits", *where, "--threads", "1", "--set", "hidden_sizes=[64]", *more)


def model_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "store" / "mine" / "1" / "model.pt").read_bytes()).hexdigest()


def wait_for_epochs(folder: Path, count: int) -> None:
    """Until the run has logged so many epochs."""
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "no epoch ended within a minute"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_a_killed_run_resumes_to_the_same_weights(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    """Ended by a signal in mid-training and resumed, the model is the uninterrupted run's to the last bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*train_arguments(whole, "--epochs", "60")).exit_code == 0
    process = python("-m", "training", *train_arguments(broken, "--epochs", "60"))
    wait_for_epochs(broken, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == exit_code, output
    assert not (broken / "store" / "mine").exists()
    if number != signal.SIGKILL:
        assert f"{number.name}: checkpoint written; go on with `python -m training resume" in output
    resumed = run("resume", str(broken / "run"))
    assert resumed.exit_code == 0, resumed.output
    assert model_sha256(broken) == model_sha256(whole)
    lines = [json.loads(line) for line in (broken / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(1, 61))
    again = run("resume", str(broken / "run"))
    assert again.exit_code == 2
    assert "finished, its artifact is mine:1" in again.output


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Under torchrun with two processes the loss of every epoch is that of one process within 1e-6."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    more = ("--epochs", "3", "--set", "gaussian_sigma_max=0.3")
    assert run(*train_arguments(alone, *more)).exit_code == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training")
    process = python(*torchrun, *train_arguments(together, *more))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("Written to") == 1
    one, two = (
        [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, together)
    )
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6
        assert abs(a["validation_loss"] - b["validation_loss"]) <= 1e-6


def test_dry_run_tells_the_cost_and_writes_nothing(tmp_path: Path) -> None:
    """Parameters, memory and minutes are told after a few steps; neither run nor store exists afterwards."""
    result = run(*train_arguments(tmp_path, "--dry-run"))
    assert result.exit_code == 0, result.output
    for part in ("parameters", "memory", "minutes", "Nothing was trained or written"):
        assert part in result.output
    assert not list(tmp_path.iterdir())


def test_a_toml_file_changes_the_preset(tmp_path: Path) -> None:
    """Tables of a TOML file are settings, --set comes on top, and an unknown key in it is an error."""
    config = tmp_path / "config.toml"
    config.write_text("[optimisation]\nepochs = 7\nbatch_size = 100\n\n[bottleneck]\nlatent_dim = 5\n")
    result = run(*train_arguments(tmp_path, "--dry-run", "--config", str(config), "--set", "latent_dim=6"))
    assert result.exit_code == 0, result.output
    assert "epochs=7, batch_size=100" in result.output
    assert "latent_dim=6" in result.output
    config.write_text("[optimisation]\nepoch = 7\n")
    result = run(*train_arguments(tmp_path, "--dry-run", "--config", str(config)))
    assert result.exit_code == 2
    assert "found 'optimisation.epoch'" in result.output


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    """With --tensorboard the run's folder has an event file with each epoch's figures."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ("--data", "digits", "--name", "mine", "--store", str(tmp_path / "store"), "--epochs", "2")
    folder = tmp_path / "run"
    result = run("train", "basic", *arguments, "--set", "hidden_sizes=[16]", "--run-dir", str(folder), "--tensorboard")
    assert result.exit_code == 0, result.output
    events = accumulators.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "validation_mse", "learning_rate"} <= set(events.Tags()["scalars"])
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("validation_mse")]
    assert shown == [(epoch["number"], pytest.approx(epoch["validation_mse"])) for epoch in logged]


def test_runs_are_compared_and_exported(tmp_path: Path) -> None:
    """`compare` shows where runs differ; `export` makes an artifact of a checkpoint; a run is not begun twice."""
    for seed in ("0", "1"):
        result = run(*train_arguments(tmp_path / seed, "--epochs", "2", "--seed", seed))
        assert result.exit_code == 0, result.output
    compared = run("compare", str(tmp_path / "0" / "run"), str(tmp_path / "1" / "run"))
    assert compared.exit_code == 0, compared.output
    for part in ("seed", "validation MSE", "test_mse", "mine:1"):
        assert part in compared.output
    exported = run("export", str(tmp_path / "0" / "run"))
    assert exported.exit_code == 0, exported.output
    store = tmp_path / "0" / "store" / "mine"
    assert (store / "1" / "model.pt").read_bytes() == (store / "2" / "model.pt").read_bytes()
    again = run(*train_arguments(tmp_path / "0", "--epochs", "2"))
    assert again.exit_code == 2
    assert "there is one already" in again.output


def test_recalibration_keeps_the_model(tiny_store: Path, tmp_path: Path) -> None:
    """`calibrate` writes the next version: other scores, the same bytes of model.pt, still sound."""
    store = shutil.copytree(tiny_store, tmp_path / "store")
    result = run("calibrate", "tiny-variational", "--data", "digits", "--store", str(store))
    assert result.exit_code == 0, result.output
    first, second = (store / "tiny-variational" / version for version in ("1", "2"))
    assert (first / "model.pt").read_bytes() == (second / "model.pt").read_bytes()
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (first, second))
    assert before["calibration"]["id"] != after["calibration"]["id"]
    assert after["calibration"]["count"] == 1797
    assert run("verify", "tiny-variational", "--store", str(store)).exit_code == 0


def test_inspect_and_data_describe(tiny_store: Path) -> None:
    """`inspect` tells what an artifact cannot do and why; `data` tells parts, hashes and presets that fit."""
    inspected = run("inspect", "tiny-variational", "--store", str(tiny_store))
    assert inspected.exit_code == 0, inspected.output
    assert "cannot denoise" in inspected.output
    described = run("data", "digits")
    assert described.exit_code == 0, described.output
    for part in ("1,797 pictures of 1 × 8 × 8", "SHA-256", "calibration", "unet-denoiser"):
        assert part in described.output
