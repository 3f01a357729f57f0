"""Environments for the peers, made on demand: each holds its own packages and shares the project's torch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = {
    "mosec": "mosec>=0.9,<0.10",
    "litserve": "litserve>=0.2.19,<0.3",
    "bentoml": "bentoml>=1.4,<1.5",
    "pythae": "pythae>=0.1.2,<0.2",
    "pyod": "pyod>=3.6,<4 tqdm>=4.66,<5",
}
"""What is installed for each peer."""

_INSTALL_TIMEOUT_S = 300


class PeerUnavailable(RuntimeError):
    """A peer that could not be installed, or does not use the shared torch."""


def python_of(package: str, folder: Path) -> Path:
    """The interpreter of the peer's environment below `folder`, which is made and filled if it is not there.

    The environment sees this interpreter's packages behind its own, so torch and NumPy are the very same files for
    every server, and pip installs only what the peer needs besides. Raises PeerUnavailable.
    """
    environment = folder / package
    python = environment / "bin" / "python"
    stamp = environment / f".installed-{PACKAGES[package]}"
    if not stamp.exists():
        try:
            _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)])
            packages = _site_packages(python)
            (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
            _run([*pip, "install", "--quiet", *PACKAGES[package].split()])
        except (subprocess.SubprocessError, OSError) as error:
            raise PeerUnavailable(f"cannot be installed: {_reason(error)}") from error
        stamp.touch()
    where = "import torch; print(torch.__file__)"
    found, expected = _run([str(python), "-c", where]), _run([sys.executable, "-c", where])
    if found != expected:
        raise PeerUnavailable(f"torch: expected {expected}, found {found}")
    return python


def version_of(package: str, python: Path) -> str:
    """The version that is installed there."""
    return _run([str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"])


def _site_packages(python: Path) -> Path:
    return Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
    ).stdout.strip()


def _reason(error: Exception) -> str:
    """The line of an installation's output that says most."""
    output = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in str(output).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR")]
    return (told or lines or [type(error).__name__])[-1][:200]
