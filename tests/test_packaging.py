"""What installs, builds and runs the project agrees with itself: Makefile, constraints, images, compose file."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.settings import Settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# Read by training and the tests, not by the service.
OTHER_VARIABLES = {"HOURGLASS_DATA_ROOT"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Stage name → its instructions in order; what stands before the first FROM is under the empty name."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stage, stages = "", {"": []}
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            stage = rest.split()[-1]
            stages[stage] = []
        stages[stage].append((instruction, rest.strip()))
    return stages


def instruction_of(stage: str, name: str) -> str:
    (found,) = [rest for instruction, rest in dockerfile()[stage] if instruction == name]
    return found


def services() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_targets_exist(document: Path):
    """Every make target that a document names in code is one of the Makefile."""
    text = document.read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)
    named = {target for snippet in code for target in re.findall(r"(?:^|`|\s)make ([a-z][a-z-]*)", snippet)}
    assert named <= TARGETS


def test_help_lists_every_target():
    """`make help` prints each target, with what it does."""
    answer = run("make", "help")
    assert answer.returncode == 0, answer.stderr
    described = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", answer.stdout, re.MULTILINE))
    assert described.keys() == TARGETS


def test_first_requests_use_a_picture_of_the_repository():
    """The pictures in the requests that `make run` prints exist."""
    pictures = set(re.findall(r"examples/[\w.-]+", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture).is_file()] == []


def test_failing_shims_are_passed_over(tmp_path: Path):
    """A python3.13 that exists but fails, as version managers leave it, does not hide a Python that works."""
    shim = tmp_path / "python3.13"
    shim.write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    shim.chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)
    found = run("/bin/sh", "scripts/find-python.sh", PATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.mark.parametrize("named", [(), ("no-such-python",)], ids=["searched", "named"])
def test_without_a_python_the_message_says_which_are_needed(tmp_path: Path, named: tuple[str, ...]):
    """Where no suitable Python is found, setup fails with the versions that would do."""
    answer = run("/bin/sh", "scripts/find-python.sh", *named, PATH=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "Python 3.11, 3.12 or 3.13" in answer.stderr


def test_ci_entry_point_can_be_run():
    """`.ci/run` is an executable, well-formed script."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["dev"]])
def test_constraints_pin_every_requirement_within_its_range(requirement: str):
    """Each declared requirement has an exact version in constraints.txt, and its range admits it."""
    parsed = Requirement(requirement)
    assert parsed.specifier.contains(pins()[canonicalize_name(parsed.name)])


def test_constraints_leave_what_torch_pins_itself():
    """No CUDA package is pinned, so that any build of torch can be installed under the constraints."""
    assert [name for name in pins() if name.startswith(("nvidia-", "cuda-")) or name == "triton"] == []


def test_image_arguments_default_to_the_constraints():
    """The image's torch and torchvision are those of constraints.txt unless its builder says otherwise."""
    arguments = dict(
        rest.split("=", 1) for stage in dockerfile().values() for instruction, rest in stage if instruction == "ARG"
    )
    assert arguments["TORCH_REQUIREMENT"] == f'"torch=={pins()["torch"]}"'
    assert arguments["TORCHVISION_REQUIREMENT"] == f'"torchvision=={pins()["torchvision"]}"'
    assert arguments["BASE_IMAGE"].startswith("python:3.11")


def test_serving_is_the_default_image():
    """A build without a target ends in the serving stage."""
    assert list(dockerfile())[-1] == "serving"


@pytest.mark.parametrize("stage", ["serving", "training"])
def test_images_run_as_a_fixed_user_who_is_not_root(stage: str):
    """The images name their user by number, so that an orchestrator can tell that it is not root."""
    user, _, group = instruction_of(stage, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_commands_are_in_exec_form():
    """No shell stands between the container's stop signal and the service, and none is needed for its health check."""
    assert json.loads(instruction_of("serving", "CMD")) == ["python", "-m", "app", "serve"]
    assert json.loads(instruction_of("training", "ENTRYPOINT")) == ["python", "-m", "training"]
    health = json.loads(instruction_of("serving", "HEALTHCHECK").partition(" CMD ")[2])
    assert health[:2] == ["python", "-c"]
    compile(health[2], "health check", "exec")


def test_serving_image_has_no_training_code():
    """Nothing but app/, the models and the licence is copied into the serving image."""
    copied = {rest.split()[-2] for instruction, rest in dockerfile()["serving"] if instruction == "COPY"}
    assert copied == {"/opt/venv", "pyproject.toml", "app", "models_store"}


def test_build_context_holds_what_is_copied():
    """Each file that the Dockerfile copies is let in by .dockerignore, and exists."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    copied = {
        source
        for stage in dockerfile().values()
        for instruction, rest in stage
        if instruction == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert copied == let_in
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_every_variable_is_a_setting():
    """Each HOURGLASS_ variable in the images, the compose file and the Makefile is one that the project reads."""
    settings = {f"HOURGLASS_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for name in ("Dockerfile", "docker-compose.yml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"HOURGLASS_[A-Z_]+", text)) <= settings, name


def test_compose_serves_the_store_read_only():
    """Both services publish port 8000, mount models_store/ read-only and run with no privilege to gain."""
    for name in ("hourglass", "hourglass-gpu"):
        service = services()[name]
        assert [port.rpartition(":")[2] for port in service["ports"]] == ["8000"]
        assert service["volumes"] == ["./models_store:/srv/hourglass/models_store:ro"]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_profiles_are_opt_in():
    """Only the plain service starts without a profile; training writes the store that the others serve."""
    profiles = {name: service.get("profiles") for name, service in services().items()}
    assert profiles == {"hourglass": None, "hourglass-gpu": ["gpu"], "training": ["training"]}
    assert "./models_store:/srv/hourglass/models_store" in services()["training"]["volumes"]
    (device,) = services()["hourglass-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_compose_targets_are_stages():
    """Each service is built from a stage that the Dockerfile has."""
    assert {service["build"]["target"] for service in services().values()} <= dockerfile().keys()


IMPORT_THE_SERVICE = """
import importlib, pkgutil, sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BARRED:
            raise ModuleNotFoundError(f"{name} is not in the serving image", name=name)

sys.meta_path.insert(0, Barred())
import app
for module in pkgutil.walk_packages(app.__path__, "app."):
    importlib.import_module(module.name)
"""


def test_the_service_needs_no_training_package():
    """Every module of app/ imports where only the base requirements are installed and training/ is missing."""
    barred = {"training", "sklearn", "scipy", "joblib", "torchvision", "triton", "pytest", "httpx", "importlinter"}
    answer = run(sys.executable, "-c", f"BARRED = {barred}\n{IMPORT_THE_SERVICE}")
    assert answer.returncode == 0, answer.stderr
