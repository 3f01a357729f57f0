#!/bin/sh
# Writes constraints.txt anew: what pip resolves today from the ranges of pyproject.toml, in a fresh environment.
#
# It runs on the oldest Python of the range, because a release that supports 3.11 supports the newer ones too, while
# the newest numpy or SciPy may not support 3.11.
set -eu

python=$(sh scripts/find-python.sh "${PYTHON:-python3.11}")
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

"$python" -m venv "$fresh/venv"
"$python" scripts/requirements.py train dev tensorboard quality > "$fresh/requirements.txt"
"$fresh/venv/bin/python" -m pip install --disable-pip-version-check --requirement "$fresh/requirements.txt"

{
    printf '# What the project installs, exactly: pip install -c constraints.txt. Regenerate it with `make lock`.\n'
    printf '# The CUDA libraries that torch brings on Linux are missing on purpose: each torch pins its own.\n'
    # A local label (2.14.1+cpu) names one build of a release; any build of it will do.
    "$fresh/venv/bin/python" -m pip list --disable-pip-version-check --format=freeze --exclude pip |
        grep -viE '^(nvidia|cuda|triton)([-_]|==)' | sed 's/+[^+]*$//' | LC_ALL=C sort -f
} > "$fresh/constraints.txt"
mv "$fresh/constraints.txt" constraints.txt
