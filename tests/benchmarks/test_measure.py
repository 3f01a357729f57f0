"""A server that fails is reported, and the run goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import Plan, Run
from benchmarks.servers import Contender

ANSWERS_WRONGLY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.do_GET()
        self.wfile.write(b'{"score": 123}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def failing(name: str, program: str) -> Contender:
    return Contender(name, command=lambda launch: [sys.executable, "-c", program, str(launch.port)])


def plan(folder: Path, groups: Sequence[str]) -> Plan:
    return Plan(
        groups, rounds=1, seconds=1, workers=1, folder=folder, use_wrk=False, every_server=False, idle_s=1, tries=1,
        limit_s=60,
    )  # fmt: skip


def test_the_run_goes_on_without_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server does not start, one answers wrongly: both are named with the reason, and no figure comes of them."""
    servers = [failing("absent", "raise SystemExit('no module')"), failing("wrong", ANSWERS_WRONGLY)]
    monkeypatch.setitem(measure._COMPARED, "reconstruct", servers)
    monkeypatch.setitem(measure._COMPARED, "score", servers)
    said: list[str] = []
    run = Run(plan(tmp_path, ["score", "reconstruct"]), said.append)
    run.carry_out()
    assert "no module" in run.results.failures["absent"]
    assert "expected" in run.results.failures["wrong"]
    assert run.results.cells == {}
    assert any("reconstruct" in line for line in said)
