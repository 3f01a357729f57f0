"""Prints the requirements that pyproject.toml declares, one a line: the base, then those of each extra named."""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The base requirements of a project followed by those of `extras`. Raises KeyError for an unknown extra."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    declared: list[str] = list(project["dependencies"])
    for extra in extras:
        declared += project["optional-dependencies"][extra]
    return declared


if __name__ == "__main__":
    print(*requirements(Path("pyproject.toml"), sys.argv[1:]), sep="\n")
