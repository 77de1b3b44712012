"""Who is responsible: every client's contribution to a prediction of the global model."""

from tracefl.provenance.contract import Dense, Gradient, Outer, Rows
from tracefl.provenance.layers import register
from tracefl.provenance.result import Provenance
from tracefl.provenance.trace import trace

__all__ = ["Dense", "Gradient", "Outer", "Provenance", "Rows", "register", "trace"]
