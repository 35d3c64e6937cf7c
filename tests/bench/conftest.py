"""The server that the load test is tried on is the one of tests/serve."""

from tests.serve.conftest import serve, served, tiny

__all__ = ["serve", "served", "tiny"]
