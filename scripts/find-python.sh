#!/bin/sh
# Prints the path of a Python that the project runs on: the one named as the argument, else the newest found.
#
# Each candidate is run, not only looked up: version managers leave shims on the path that exist and fail.
# ensurepip is asked for because Debian ships it apart from Python, and without it there is no pip in a venv.

suitable='
import ensurepip, sys, venv
if not (3, 11) <= sys.version_info < (3, 14):
    sys.exit(1)
print(sys.executable)
'

for candidate in ${1:-python3.13 python3.12 python3.11 python3 python}; do
    if found=$("$candidate" -c "$suitable" 2>/dev/null) && [ -n "$found" ]; then
        printf '%s\n' "$found"
        exit 0
    fi
done

if [ -n "${1:-}" ]; then
    printf 'PYTHON: %s does not run, or is not Python 3.11, 3.12 or 3.13 with venv and pip.\n' "$1" >&2
else
    printf 'No Python 3.11, 3.12 or 3.13 with venv and pip found on the path.\n' >&2
fi
printf 'Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3.12\n' >&2
exit 1
