"""The README tells the truth: its commands run, and it names every setting, error and route."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from app.api.errors import INTERNAL, STATUS
from app.api.security import Scope, needed_scope
from app.artifacts.manifest import Capability
from app.artifacts.store import list_artifacts, read_artifact
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
REQUESTS = [command for command in COMMANDS if command.startswith(("curl", "python3 -c"))]
SCORINGS = [command for command in COMMANDS if command.startswith("python -m app score")]
TRAINING = [command for command in COMMANDS if command.startswith("python -m training")]


@pytest.fixture(scope="module")
def base_url(serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[str]:
    """Base URL of a real server over models_store/."""
    with serve(Settings(models_store=ROOT / "models_store")) as url:
        yield url


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run the README's commands in: the repository's pictures are there, and nothing of it can change."""
    scratch = tmp_path_factory.mktemp("readme")
    (scratch / "examples").symlink_to(ROOT / "examples")
    return scratch


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", REQUESTS)
def test_readme_requests_succeed(command: str, base_url: str, scratch: Path) -> None:
    """Every request of the README, run in order as it stands, succeeds against the shipped models."""
    local = command.replace("http://127.0.0.1:8000", base_url)
    if local.startswith("curl"):
        local = local.replace("curl", "curl --silent --show-error --fail-with-body", 1)
    done = subprocess.run(local, shell=True, cwd=scratch, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("command", SCORINGS)
def test_readme_scorings_succeed(command: str, scratch: Path) -> None:
    """Every scoring of the README, as it stands, scores the repository's pictures with the shipped models."""
    local = command.replace("python", sys.executable, 1)
    variables = {**os.environ, "HOURGLASS_MODELS_STORE": str(ROOT / "models_store"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        local, shell=True, cwd=scratch, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_readme_has_a_request_for_every_route() -> None:
    """Each route of the OpenAPI document that the shipped models can answer is called by an example of the README."""
    document = create_app(Settings(models_store=ROOT / "models_store")).openapi()
    manifests = [read_artifact(ref).manifest for ref in list_artifacts(ROOT / "models_store")]
    able = {f"/{capability.replace('_', '-')}" for manifest in manifests for capability in manifest.capabilities}
    unable = {f"/{capability.replace('_', '-')}" for capability in Capability} - able
    if not any(manifest.projection for manifest in manifests):
        unable.add("/models/{name}/projection")
    unable |= {f"/bulk{path}" for path in unable}
    admin = {path for path in document["paths"] if needed_scope(path) is Scope.ADMIN}  # they need a key
    assert not [path for path in admin if path.rsplit("/", 1)[1] not in README]
    for path in document["paths"].keys() - unable - admin:
        shown = path.replace("{name}", "mnist-conv").replace("/versions/{version}", "")
        assert any(re.search(rf":8000{re.escape(shown)}\b", request) for request in REQUESTS), path


@pytest.mark.parametrize("command", TRAINING)
def test_readme_training_commands_exist(command: str) -> None:
    """Every training command of the README is one, with options that it knows."""
    from typer.main import get_command

    from training.__main__ import app as cli

    _python, _m, _training, name, *arguments = shlex.split(command)
    group = get_command(cli)
    known = group.commands[name]  # type: ignore[attr-defined]
    context = known.make_context(name, arguments, resilient_parsing=False)
    assert context.command is known


def test_every_setting_is_documented() -> None:
    """The README names every environment variable and no other."""
    named = set(re.findall(r"HOURGLASS_[A-Z_]+[A-Z]", README)) - {"HOURGLASS_DATA_ROOT"}  # training's own
    assert named == {f"HOURGLASS_{name.upper()}" for name in Settings.model_fields}


def test_every_error_code_is_documented() -> None:
    """The README's table of errors has every code."""
    for code in [code for _, code in STATUS.values()] + [INTERNAL[1]]:
        assert f"`{code}`" in README, code
