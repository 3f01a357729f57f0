"""The closed loop driven by wrk, where it is installed: written in C, it leaves more of the machine to the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import load
from benchmarks.load import Load

_SCRIPT = """
local function read(path)
  local file = assert(io.open(path, "rb"))
  local data = file:read("*a")
  file:close()
  return data
end
local requests = {}
for index = 1, %(count)d do requests[index] = read("%(folder)s/" .. index) end
local turn = 0
request = function()
  turn = turn %% #requests + 1
  return requests[turn]
end
done = function(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {"us": %%d, "requests": %%d, "status": %%d, "broken": %%d, "p50": %%d, "p99": %%d}\\n',
    summary.duration, summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


def available() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


def or_own_closed_loop() -> Callable[[int, Sequence[bytes], int, int], Load]:
    """`closed_loop`, or the benchmark's own where wrk is not installed."""
    return closed_loop if available() else load.closed_loop


def closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: int) -> Load:
    """As many requests as the server answers, in turn; every status above 399 counts as failed."""
    with tempfile.TemporaryDirectory(prefix="bench-wrk-") as name:
        folder = Path(name)
        for index, request in enumerate(requests, start=1):
            (folder / str(index)).write_bytes(request)
        script = folder / "load.lua"
        script.write_text(_SCRIPT % {"count": len(requests), "folder": folder})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
        output = subprocess.run(
            [*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, timeout=seconds + 30, check=True
        ).stdout
    return parse_result(output)


def parse_result(output: str) -> Load:
    """The figures in the line that the script prints."""
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    figures = json.loads(line.removeprefix("RESULT "))
    return Load(
        seconds=figures["us"] / 1e6,
        ok=figures["requests"] - figures["status"],
        shed=0,
        failed=figures["status"] + figures["broken"],
        p50_s=figures["p50"] / 1e6,
        p99_s=figures["p99"] / 1e6,
    )
