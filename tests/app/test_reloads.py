"""Reloads under load: nobody notices, and nothing is left behind. `make soak` does hundreds of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.artifacts.manifest import Capability
from app.artifacts.store import ArtifactRef

RELOADS = int(os.environ.get("RELOADS", "200"))
FROM = min(50, RELOADS // 4)
MAX_SLOPE_BYTES = 20 * 1024
ITEM = ((np.arange(64) % 7) / 8).astype(np.float32)
BODY = json.dumps({"instances": [ITEM.tolist()]}).encode()
ONLY = frozenset(Capability) - {Capability.ENCODE, Capability.ANOMALY_SCORE}

BARE = """
import gc, io, json, sys, warnings
from pathlib import Path
import torch
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
models, count = [Path(path).read_bytes() for path in sys.argv[2:]], int(sys.argv[1])
x, resident = torch.rand(1, 1, 8, 8), []
gc.collect(); gc.freeze()
for number in range(count):
    module = torch.jit.load(io.BytesIO(models[number % len(models)]))
    module = torch.jit.freeze(module.eval(), preserved_attrs=["encode", "anomaly_score"])
    with torch.inference_mode():
        for _ in range(4):
            for size in (1, 2, 4, 8, 16):
                batch = x.expand(size, 1, 8, 8)
                module.encode(batch), module.anomaly_score(batch)
    del module
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
print(json.dumps(resident))
"""


def slope_bytes(resident: list[int]) -> float:
    """Growth for each reload, by least squares, from `FROM` on."""
    late = np.asarray(resident[FROM:], dtype=np.float64)
    return float(np.polyfit(np.arange(len(late)), late, 1)[0])


def test_reloads_under_load(
    tmp_path: Path,
    load: type,
    running: Callable[..., AbstractContextManager[Any]],
    write_artifact_named: Callable[..., ArtifactRef],
    record_property: Callable[[str, object], None],
) -> None:
    """Each of many reloads under 64 clients fails no request, each answer is its version's within 1e-5, and
    memory grows by at most 20 KB a reload beyond what torch itself leaks.
    """
    made = [write_artifact_named(tmp_path / "made", "tiny", seed=seed, without=ONLY) for seed in range(3)]
    weights = [np.asarray(_weight(seed)) for seed in range(3)]
    store = tmp_path / "store"

    def publish(version: int) -> None:
        source = made[version % 3].path
        target = store / "tiny" / f".writing-{version}"
        shutil.copytree(source, target)
        manifest = json.loads((source / "manifest.json").read_text()) | {"version": version}
        (target / "manifest.json").write_text(json.dumps(manifest))
        target.rename(store / "tiny" / str(version))
        if version > 4:
            shutil.rmtree(store / "tiny" / str(version - 4))

    def check(status: int, headers: dict[str, str], body: bytes) -> str | None:
        if status != 200:
            return f"{status} {body[:200]!r}"
        answer = json.loads(body)
        off = np.abs(np.asarray(answer["results"][0]["latent"]) - weights[answer["version"] % 3] @ ITEM).max()
        return None if off <= 1e-5 else f"version {answer['version']} is off by {off}"

    publish(1)
    resident: list[int] = []
    environment = {"MALLOC_ARENA_MAX": "2", "HOURGLASS_TORCH_THREADS": "1", "HOURGLASS_STORE_POLL_SECONDS": "0.02"}
    with running(store, tmp_path / "log", **environment) as service:
        with load(service.port, "/encode?model=tiny", BODY, check, pause_s=0.1) as clients:
            for version in range(2, RELOADS + 2):
                publish(version)
                service.until(lambda v=version: _default(service.port) == v, f"version {version}")
                statm = Path(f"/proc/{service.process.pid}/statm").read_text()
                resident.append(int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        log = (tmp_path / "log").read_text()
    assert clients.failures == []
    assert clients.answers > RELOADS
    assert "refused" not in log
    files = [str(ref.path / "model.pt") for ref in made]
    bare = subprocess.run(
        [sys.executable, "-c", BARE, str(RELOADS), *files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=True,
    )
    own, torchs = slope_bytes(resident), slope_bytes(json.loads(bare.stdout))
    record_property("measured", f"{RELOADS} reloads under {clients.answers} requests, {len(clients.failures)} failed")
    record_property(
        "measured",
        f"memory from reload {FROM} on: {own / 1024:.1f} KB a reload, a bare loop of torch {torchs / 1024:.1f} KB",
    )
    assert own - torchs <= MAX_SLOPE_BYTES


def _default(port: int) -> int | None:
    version: int | None = httpx.get(f"http://127.0.0.1:{port}/models/tiny").json()["default_version"]
    return version


def _weight(seed: int) -> Any:
    torch = pytest.importorskip("torch")
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) / 8
