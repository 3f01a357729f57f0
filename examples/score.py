"""Scores pictures: python examples/score.py [picture …], with the service on 127.0.0.1:8000."""

import sys
from pathlib import Path

from hourglass_client import Client

paths = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.png"))
with Client() as client:
    for answer in client.bulk("anomaly-score", paths):
        name = paths[answer["index"]].name
        if "error" in answer:
            print(f"{name:20} {answer['error']}")
        else:
            print(f"{name:20} p = {answer['p_value']:.4f} {'anomaly' if answer['is_anomaly'] else ''}")
