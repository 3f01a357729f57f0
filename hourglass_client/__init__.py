"""A client of the service: pictures or arrays in, arrays and verdicts out. Needs httpx, numpy and pillow; no server.

with Client("http://127.0.0.1:8000") as client:
for verdict in client.anomaly_score([picture]):
print(verdict["p_value"])
"""

from hourglass_client.client import AsyncClient, Client, HourglassError, Item

__all__ = ["AsyncClient", "Client", "HourglassError", "Item"]
