"""What a classifier says: its logits, and the log-odds of one class."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tracefl.errors import TraceFLError


def logits_of(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """Logits [N, classes] of a model that returns them or an object with `.logits`.

    Args:
        inputs: Tensor [N, ...], or the model's keyword arguments.

    Raises:
        TraceFLError: the output is something else.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TraceFLError(
            f"the model's output must be logits [N, classes] or have them as .logits, got {found}: pass a classifier"
        )
    return logits


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] the target's logit minus the log-sum-exp of the others; logits [N, classes], targets [N]."""
    others = logits.scatter(1, targets[:, None], -math.inf).logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - others
