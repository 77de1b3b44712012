"""The server, with all of TraceFL."""

from tracefl.federation.deployed import app

__all__ = ["app"]
