"""Evidence beyond one answer: across coalitions, across inputs, across rounds."""

from tracefl.evidence.answers import AnswerSets, answer_sets
from tracefl.evidence.audit import Audit, audit
from tracefl.evidence.fusion import fuse

__all__ = ["AnswerSets", "Audit", "answer_sets", "audit", "fuse"]
