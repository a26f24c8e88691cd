"""The Python SDK: needs only grpcio and protobuf."""

from __future__ import annotations

from segue.client.client import Adapters, Client
from segue.client.stream import GenerateStream

__all__ = ["Adapters", "Client", "GenerateStream"]
