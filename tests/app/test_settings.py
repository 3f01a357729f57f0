"""Settings, and how `python -m app serve` says what is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.settings import Settings

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "models_store": Path("models_store"),
    "default_model": None,
    "required_models": (),
    "device": "auto",
    "max_batch_size": None,
    "max_queue_rows": 4096,
    "max_body_bytes": 33554432,
    "max_image_pixels": 40000000,
    "request_timeout_ms": 30000,
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("HOURGLASS_"):
            monkeypatch.delenv(name)


def test_defaults_are_the_contracts() -> None:
    """Without a variable every setting has its documented default."""
    settings = Settings()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS


def test_every_setting_is_documented_with_its_unit() -> None:
    """Each setting has a description; what is a time or a size has its unit in its name."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if name.startswith("max_") or "timeout" in name:
            assert name.rsplit("_", 1)[1] in ("size", "rows", "bytes", "pixels", "ms"), name


@pytest.mark.parametrize("name", [*DEFAULTS, "log_format"])
def test_every_setting_is_read_with_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOURGLASS_<NAME> sets it; without the prefix it does not."""
    text = {"device": "cpu", "log_format": "json", "port": "17", "models_store": "/store"}.get(name, "17")
    default = getattr(Settings(), name)
    monkeypatch.setenv(name.upper(), text)
    assert getattr(Settings(), name) == default
    monkeypatch.setenv(f"HOURGLASS_{name.upper()}", text)
    value = getattr(Settings(), name)
    assert value in (text, 17, Path("/store"), ("17",))


@pytest.mark.parametrize(
    ("text", "names"),
    [("", ()), ("a", ("a",)), (" a , b,", ("a", "b")), (",,", ())],
)
def test_required_models_are_a_comma_list(text: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are separated by commas; spaces and empty ones do not count."""
    monkeypatch.setenv("HOURGLASS_REQUIRED_MODELS", text)
    assert Settings().required_models == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("DEVICE", "gpu"),
        ("DEVICE", "cuda:"),
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_QUEUE_ROWS", "0"),
        ("MAX_BODY_BYTES", "32MB"),
        ("MAX_IMAGE_PIXELS", "-5"),
        ("REQUEST_TIMEOUT_MS", "600001"),
        ("REQUEST_TIMEOUT_MS", "0"),
        ("LOG_FORMAT", "xml"),
        ("DEVICE", "cuda:77"),
    ],
)
def test_bad_setting_ends_serve_by_name(name: str, value: str) -> None:
    """A bad value ends `serve` with exit code 2 and one line that names variable and value, without a traceback."""
    result = CliRunner().invoke(cli, ["serve"], env={"HOURGLASS_PORT": "0", f"HOURGLASS_{name}": value})
    assert result.exit_code == 2
    assert result.stderr.startswith(f"HOURGLASS_{name}: ")
    assert value in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_bad_option_is_named_too() -> None:
    """An option's bad value is named like its variable's."""
    result = CliRunner().invoke(cli, ["serve", "--port", "70000"])
    assert result.exit_code == 2
    assert result.stderr.startswith("HOURGLASS_PORT: ")


def test_command_line_ends_without_a_traceback() -> None:
    """As a process, too: exit code 2, one line on standard error, nothing on standard output."""
    run = subprocess.run(
        [sys.executable, "-m", "app", "serve"],
        env={**os.environ, "HOURGLASS_MAX_BODY_BYTES": "plenty"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("HOURGLASS_MAX_BODY_BYTES: ")
    assert run.stderr.count("\n") == 1


def test_settings_do_not_change() -> None:
    """Settings are read once and stay."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]
