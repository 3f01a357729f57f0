from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from training.__main__ import app
from training.presets import PRESETS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "HOURGLASS_DATA_ROOT": ""})


def test_train_ends_with_the_next_steps(tmp_path: Path) -> None:
    """One command makes an artifact, prints its figures beside PCA's, and says how to serve it."""
    arguments = ("--data", "digits", "--name", "mine", "--store", str(tmp_path), "--epochs", "1")
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
        (("basic", "--data", "digits", "--set", "depth=3"), "error: set: expected one of network.hidden_sizes"),
        (("basic", "--data", "nowhere"), "error: data: expected one of digits, mnist"),
        (("basic", "--data", "digits", "--device", "tpu"), "error: device: expected auto, cpu, cuda"),
        (("basic", "--data", "digits", "--image-size", "8x8"), "error: image size and channels: only for folders"),
        (("basic", "--data", "digits", "--default-for", "sample"), "error: default-for: preset basic cannot sample"),
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


@pytest.mark.parametrize("command", [(), ("train",), ("models",), ("verify",), ("evaluate",)])
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
