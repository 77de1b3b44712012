"""TraceFL: which client is responsible for a federated model's prediction?"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tracefl.errors import TraceFLError

if TYPE_CHECKING:
    from tracefl.evidence.answers import AnswerSets, answer_sets
    from tracefl.evidence.audit import Audit, audit
    from tracefl.evidence.fusion import fuse
    from tracefl.evidence.verdict import Verdict, audit_run, judge
    from tracefl.evidence.whatif import WhatIf, whatif
    from tracefl.evidence.whole_run import trace_run
    from tracefl.provenance.result import Provenance
    from tracefl.provenance.trace import trace
    from tracefl.runs import Run

__all__ = [
    "AnswerSets",
    "Audit",
    "Provenance",
    "Run",
    "TraceFLError",
    "Verdict",
    "WhatIf",
    "__version__",
    "answer_sets",
    "audit",
    "audit_run",
    "fuse",
    "judge",
    "trace",
    "trace_run",
    "whatif",
]
_HOMES = {
    "Run": "tracefl.runs",
    **dict.fromkeys(("AnswerSets", "Audit", "answer_sets", "audit", "fuse"), "tracefl.evidence"),
    **dict.fromkeys(("Verdict", "audit_run", "judge"), "tracefl.evidence.verdict"),
    **dict.fromkeys(("WhatIf", "whatif"), "tracefl.evidence.whatif"),
    "trace_run": "tracefl.evidence.whole_run",
}
__version__ = version("tracefl")


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: the command line answers a wrong value before that."""
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "tracefl.provenance")), name)
    raise AttributeError(f"module 'tracefl' has no attribute '{name}'")
