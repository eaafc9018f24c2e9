"""The wire contract: protobuf messages and their conversion to values."""
