"""Evidence beyond one answer: across coalitions, across inputs, across rounds."""

from tracefl.evidence.audit import Audit, audit
from tracefl.evidence.fusion import fuse

__all__ = ["Audit", "audit", "fuse"]
