"""The client, with torch and Flower."""

from tracefl.federation.client_app import app

__all__ = ["app"]
