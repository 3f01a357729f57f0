"""Who may do what: keys with scopes from a file that is read anew when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from app.errors import AdminDisabled, Forbidden, Unauthorized

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_ADMIN_PATH = re.compile(r"/(v2/repository/)?models/[^/]+/(load|unload|rollback)/?")
# Probes, since whoever restarts a service has no key to it, and what is the same in every installation.
_OPEN_PATH = re.compile(r"/|/livez|/readyz|/startupz|/docs(/.*)?|/openapi\.json|/static-offline-docs/.*|/v2/health/\w+")


class Scope(StrEnum):
    """What a key may be for."""

    INFER = "infer"
    ADMIN = "admin"
    METRICS = "metrics"


def needed_scope(path: str) -> Scope | None:
    """The scope that a request to that path needs; None if it needs no key. What nobody thought of needs one."""
    if _OPEN_PATH.fullmatch(path):
        return None
    if _ADMIN_PATH.fullmatch(path):
        return Scope.ADMIN
    return Scope.METRICS if path == "/metrics" else Scope.INFER


class Keys:
    """The keys of a file, each with its scopes: `name scopes sha256:<hex>` a line, scopes separated by commas.

    Without a file everyone may infer and read metrics, and nobody may administer. The file is looked at once a second
    at most; one that cannot be read or understood leaves the keys as they were.

    Raises ValueError if the file cannot be read or understood in the beginning.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._looked_at_s = 0.0
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[tuple[str, frozenset[Scope], bytes]] = []
        if path is not None:
            try:
                self._seen = _stamp(path)
                self._keys = parse_keys(path.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"api_keys_file: {path}: {_reason(error)}") from error
            self._looked_at_s = time.monotonic()

    def __repr__(self) -> str:
        return f"<Keys {self._path}: {len(self._keys)}>" if self.are_set else "<Keys: none are needed>"

    @property
    def are_set(self) -> bool:
        """Whether there is a file of keys."""
        return self._path is not None

    def check(self, headers: Mapping[bytes, bytes], scope: Scope | None) -> None:
        """Nothing, for a caller who may. Raises Unauthorized, Forbidden or AdminDisabled.

        Args:
            headers: the request's, by lower-case name.
            scope: what the request needs; None if it needs no key.
        """
        if scope is None:
            return
        if self._path is None:
            if scope is Scope.ADMIN:
                raise AdminDisabled("admin: expected HOURGLASS_API_KEYS_FILE to be set, found no keys")
            return
        self._look()
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Unauthorized("authorization: expected Bearer and a key, found none")
        digest = hashlib.sha256(token.strip()).digest()
        # All of them, always: how long it takes tells nothing of which was nearly right.
        found = [key for key in self._keys if hmac.compare_digest(key[2], digest)]
        if not found:
            raise Unauthorized("authorization: the key is not known")
        if not any(scope in scopes for _, scopes, _ in found):
            name, scopes, _ = found[0]
            raise Forbidden(f"authorization: expected a key with scope {scope}, found {name} with {_words(scopes)}")

    def _look(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._looked_at_s < _LOOK_EVERY_S:
            return
        self._looked_at_s = now
        try:
            stamp = _stamp(self._path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._keys = parse_keys(self._path.read_text())
        except (OSError, ValueError) as error:
            logger.error("keys stay as they were: %s: %s", self._path, _reason(error))  # noqa: TRY400  no traceback
        else:
            logger.info("read %d keys from %s", len(self._keys), self._path)


def parse_keys(text: str) -> list[tuple[str, frozenset[Scope], bytes]]:
    """Name, scopes and SHA-256 of each key; empty lines and those that begin with # count for nothing.

    Raises ValueError, naming the line.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+(\S+)\s+sha256:([0-9a-fA-F]{64})", line.strip())
        if match is None:
            raise ValueError(f"line {number}: expected name scopes sha256:<64 hex digits>")
        names = match[2].split(",")
        if unknown := [name for name in names if name not in list(Scope)]:
            raise ValueError(f"line {number}: scopes: expected some of {_words(Scope)}; found {unknown[0]!r}")
        keys.append((match[1], frozenset(Scope(name) for name in names), bytes.fromhex(match[3])))
    return keys


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _words(scopes: Iterable[str]) -> str:
    return ", ".join(sorted(scopes))


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
