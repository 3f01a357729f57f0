"""The service: loads artifacts from a store and answers over HTTP. Never imports `training`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hourglass-autoencoders")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
