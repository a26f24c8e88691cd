"""The protobuf messages and gRPC services of Segue, generated from proto/ by scripts/proto."""
