"""What a client sends back, checked: its model, how it weighs, or what is wrong with it."""

from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.constant import ErrorCode

from tracefl.states import State, is_finite

EXAMPLES = "num-examples"
LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


class BadReplyError(Exception):
    """A reply that cannot be used; the text goes on "client 7: "."""


@dataclass(frozen=True)
class Update:
    """A client's model, its metrics, its number of examples (0: not said) and its weight."""

    state: State
    metrics: MetricRecord
    num_examples: int
    weight: float


def read_update(reply: Message, expected: State, weight_key: str | None, record: str | None, several: bool) -> Update:
    """Read a reply.

    Args:
        reply: a client's.
        expected: the model that was sent; the client's must have entries of it, of the same shapes
            and types, or half of a type's precision.
        weight_key: of the metrics, what the strategy weighs by; None: it is not known.
        record: name of the model's ArrayRecord, where there are several.
        several: whether there may be several records; Flower's strategies take one of each.

    Raises:
        BadReplyError: it cannot be used.
    """
    if reply.has_error():
        raise BadReplyError(_why(reply))
    arrays, metrics = _model(reply, record, several), _metrics(reply, weight_key, several)
    examples = _number(metrics, EXAMPLES, 1, weight_key == EXAMPLES)
    weight = _number(metrics, weight_key, 0, True) if weight_key else examples
    state = dict(arrays.to_torch_state_dict())
    if extra := sorted(state.keys() - expected.keys()):
        raise BadReplyError(f"its model has extra entry '{extra[0]}'")
    if not state:
        raise BadReplyError("its model has no entry")
    for name, value in state.items():
        wanted, sent = ((tuple(t.shape), str(t.dtype)) for t in (expected[name], value))
        half = value.dtype in (torch.float16, torch.bfloat16) and expected[name].is_floating_point()
        if sent[0] != wanted[0] or not (sent == wanted or half):
            raise BadReplyError(f"its '{name}' must be {wanted}, got {sent}")
        if not is_finite(value):
            raise BadReplyError(f"its '{name}' has non-finite values")
    return Update(state, metrics, int(examples), weight)


def _why(reply: Message) -> str:
    reason = (reply.error.reason or "no reason given").strip("'> \n").splitlines()[-1].strip()
    if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return f"it raised: {reason}"
    return f"its node is lost: {reason}" if reply.error.code in LOST else f"its process died: {reason}"


def _model(reply: Message, record: str | None, several: bool) -> ArrayRecord:
    models = reply.content.array_records
    if len(models) == 1:
        return next(iter(models.values()))
    if not several or not models:
        raise BadReplyError(
            f"it must send one model and one metric record, got {len(models)} and {len(reply.content.metric_records)}"
        )
    if record is not None and record in models:
        return models[record]
    raise BadReplyError(f"its reply holds the ArrayRecords {', '.join(models)}: name the model's by arrayrecord_key")


def _metrics(reply: Message, weight_key: str | None, several: bool) -> MetricRecord:
    records = list(reply.content.metric_records.values())
    if not several and len(records) != 1:
        raise BadReplyError(f"it must send one model and one metric record, got 1 and {len(records)}")
    with_key = [metrics for metrics in records if (weight_key or EXAMPLES) in metrics]
    return (with_key or records or [MetricRecord()])[0]


def _number(metrics: MetricRecord, key: str, least: float, needed: bool) -> float:
    value = metrics.get(key)
    if value is None and not needed:
        return 0
    if not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise BadReplyError(f"its {key} must be a number of at least {least:g}, got {value}")
    return float(value)
