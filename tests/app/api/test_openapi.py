"""The OpenAPI document against the service that serves it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Service

ROOT = Path(__file__).parents[3]


def test_the_document_is_true(service: Service) -> None:
    """What schemathesis makes up from the document is answered as it says, and never with a 5xx; `make fuzz` does more.

    Model control is left out: it would unload the models that other routes are tried on.
    """
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.client.base_url}/openapi.json"),
        *("--checks", f"{checks},response_schema_conformance,unsupported_method", "--max-examples", "2"),
        *("--phases", "examples,fuzzing", "--header", "X-Request-Timeout-Ms: 60000", "--seed", "1"),
        *("--exclude-path-regex", "/(load|unload|rollback)$"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
