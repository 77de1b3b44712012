"""Evidence beyond one answer: across coalitions, across inputs, across rounds."""

from tracefl.evidence.audit import Audit, audit

__all__ = ["Audit", "audit"]
