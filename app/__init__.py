"""The service: loads artifacts from a store and answers over HTTP. Never imports `training`."""

import os
from importlib.metadata import PackageNotFoundError, version

# Read by OpenMP's runtime once, when torch loads it. Its threads otherwise spin while they wait for each other, and
# where anything else wants a core, this process's own event loop included, a forward pass of 0.3 ms takes 60.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    __version__ = version("hourglass-autoencoders")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
