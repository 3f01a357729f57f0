"""Keys and scopes: who may infer, administer and read metrics, and what is open to all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.api.security import Keys, Scope, needed_scope, parse_keys
from app.errors import Forbidden, Unauthorized
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

GOOD = {"instances": [[0.5] * 64]}


def line(name: str, scopes: str, key: str) -> str:
    return f"{name} {scopes} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(store: Path, run_app: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one key for each scope and one for all."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    lines = [line(scope, scope, f"key-{scope}") for scope in Scope] + [line("root", "infer,admin,metrics", "key-root")]
    file.write_text("# who may what\n\n" + "".join(lines))
    with run_app(Settings(models_store=store, log_format="json", api_keys_file=file)) as service:
        yield service


PATHS = [
    ("POST", "/encode", "infer"),
    ("GET", "/models", "infer"),
    ("GET", "/models/tiny", "infer"),
    ("GET", "/nowhere", "infer"),
    ("GET", "/metrics", "metrics"),
    ("POST", "/models/nobody/load", "admin"),
    ("POST", "/models/nobody/unload", "admin"),
    ("POST", "/models/nobody/rollback", "admin"),
]


@pytest.mark.parametrize(("method", "path", "scope"), PATHS)
def test_a_route_needs_its_scope(guarded: Service, method: str, path: str, scope: str) -> None:
    """Without a key 401, with a wrong one 401, with another scope 403, with the right scope it is answered."""
    without = guarded.client.request(method, path, json=GOOD)
    assert (without.status_code, without.json()["code"]) == (401, "unauthorized")
    assert without.headers["www-authenticate"] == "Bearer"
    assert without.json()["request_id"] == without.headers["x-request-id"]
    for headers in (bearer("guessed"), {"authorization": "Basic a2V5"}, {"authorization": "Bearer"}):
        assert guarded.client.request(method, path, json=GOOD, headers=headers).status_code == 401
    for other in Scope:
        answer = guarded.client.request(method, path, json=GOOD, headers=bearer(f"key-{other}"))
        assert (answer.status_code == 403) == (other != scope)
        if other != scope:
            assert answer.json()["code"] == "forbidden"
            assert f"expected a key with scope {scope}, found {other} with {other}" in answer.json()["error"]
    assert guarded.client.request(method, path, json=GOOD, headers=bearer("key-root")).status_code not in (401, 403)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/docs", "/openapi.json", "/"])
def test_probes_and_documentation_need_no_key(guarded: Service, path: str) -> None:
    """Who restarts a service has no key to it."""
    assert guarded.client.get(path).status_code < 400


def test_without_keys_everyone_infers_and_nobody_administers(service: Service) -> None:
    """Without a keys file inference, states and metrics are open, and administration is disabled."""
    assert service.client.post("/encode", json=GOOD).status_code == 200
    assert service.client.get("/metrics").status_code == 200
    for action in ("load", "unload", "rollback"):
        answer = service.client.post(f"/models/tiny/{action}")
        assert (answer.status_code, answer.json()["code"]) == (403, "admin_disabled")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v2/health/ready", None),
        ("/v2/models/x/infer", Scope.INFER),
        ("/v2/repository/models/x/load", Scope.ADMIN),
        ("/v2/repository/models/x/unload", Scope.ADMIN),
        ("/v2/repository/index", Scope.INFER),
        ("/docs/../models", None),
        ("/livez/", Scope.INFER),
    ],
)
def test_scopes_by_path(path: str, scope: Scope | None) -> None:
    """A path has the scope that its routes need; what is not known needs a key."""
    assert needed_scope(path) == scope


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a infer md5:00", "line 1: expected name scopes sha256:"),
        ("a infer sha256:00", "line 1: expected name scopes sha256:"),
        (
            "\n#\na infer,root sha256:" + "0" * 64,
            "line 3: scopes: expected some of admin, infer, metrics; found 'root'",
        ),
        ("a sha256:" + "0" * 64, "line 1: expected name scopes sha256:"),
    ],
)
def test_a_line_that_is_none_is_named(text: str, message: str) -> None:
    """What is no key is refused by its line."""
    with pytest.raises(ValueError, match=message):
        parse_keys(text)


def test_a_changed_file_counts_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """New keys count and old ones end within a second; a file that is broken or gone leaves them as they were."""
    now = 100.0
    monkeypatch.setattr("app.api.security.time.monotonic", lambda: now)
    file = tmp_path / "keys"
    file.write_text(line("a", "infer", "first"))
    keys = Keys(file)
    first, second = ({b"authorization": f"Bearer {key}".encode()} for key in ("first", "second"))
    keys.check(first, Scope.INFER)
    file.write_text(line("b", "infer", "second"))
    os.utime(file, (5, 5))
    now += 1.1
    keys.check(second, Scope.INFER)
    with pytest.raises(Unauthorized):
        keys.check(first, Scope.INFER)
    with pytest.raises(Forbidden):
        keys.check(second, Scope.ADMIN)
    for harm in (lambda: file.write_text("broken"), file.unlink):
        harm()
        now += 1.1
        keys.check(second, Scope.INFER)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_a_keys_file_that_is_none_ends_the_start(tmp_path: Path) -> None:
    """Without the keys that were asked for the service must not start open."""
    with pytest.raises(ValueError, match=r"api_keys_file: .*absent: No such file"):
        Keys(tmp_path / "absent")
