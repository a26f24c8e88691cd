"""The Python SDK: needs only grpcio and protobuf."""
