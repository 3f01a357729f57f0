"""What keeps a scoring from being done at all."""

from __future__ import annotations


class ScoringError(Exception):
    """Told to whoever typed the command. The message names the thing, the found and the expected."""


def import_pyarrow(path: object) -> None:
    """Raises ScoringError where Parquet files cannot be read and written: serving needs no pyarrow."""
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415  an extra, and slow to import
    except ImportError as error:
        raise ScoringError(f"{path}: Parquet needs pyarrow: pip install 'hourglass-autoencoders[parquet]'") from error
