"""What a client sends back, checked: its model, how it weighs, or what is wrong with it.

A client may send anything, so whatever goes wrong here is that client's failure, by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.constant import ErrorCode
from torch import Tensor

from tracefl.federation.arrays import BadArrayError, read_header, read_values
from tracefl.states import State, is_continuous, is_finite

EXAMPLES = "num-examples"
LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
DIED = (ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_CRASHED)  # the process that the client ran in
UNREADABLE = 1000  # our code for a reply that Flower itself cannot put together
LARGEST = 2**53  # up to it, every whole number is a float: shares add up
LONGEST = 300  # characters of what a client says, in a message
NOT_NEGATIVE = {"running_var": "variance", "num_batches_tracked": "count"}  # of torch's normalization


class BadReplyError(Exception):
    """A reply that cannot be used; the text goes on "client 7: "."""


class NotFiniteError(BadReplyError):
    """A model that is as it should be, but for values that are not finite."""


@dataclass(frozen=True)
class Expected:
    """What a reply is held against.

    Attributes:
        state: the model that was sent; the client's must have entries of it, of the same shapes
            and types, or narrower real types.
        weight_key: of the metrics, what the strategy weighs by; None: it is not known.
        record: name of the model's ArrayRecord, where there are several.
        several: whether there may be several records; Flower's strategies take one of each.
        counted: whether num-examples must be there, whatever the strategy weighs by.
    """

    state: State
    weight_key: str | None = EXAMPLES
    record: str | None = None
    several: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Update:
    """A client's model, its metrics, its number of examples (0: not said) and its weight.

    `records` are what the reply holds, "arrays" or "metrics", and under which name.
    """

    state: State
    metrics: MetricRecord
    num_examples: int
    weight: float
    records: tuple[tuple[str, str], ...] = ()


def read_update(reply: Message, expected: Expected, held: int | None = None) -> Update:
    """Read a reply.

    Args:
        reply: a client's.
        expected: what it must be.
        held: how many examples the server knows that the client holds: its num-examples must be
            this number. None: that is not known.

    Raises:
        NotFiniteError: its model has values that are not finite.
        BadReplyError: it cannot be used.
    """
    try:
        return _read(reply, expected, held)
    except BadReplyError:
        raise
    except Exception as error:  # of any type: nothing that a client sends may end the server
        raise BadReplyError(f"its reply cannot be read ({as_line(error)})") from error


def read_evaluation(reply: Message, weight_key: str | None) -> Update:
    """Read what a client found in evaluating a model: an update without a model.

    Args:
        reply: a client's, without an error.
        weight_key: of the metrics, what the strategy weighs by; None: it takes any metrics.

    Raises:
        BadReplyError: it cannot be used.
    """
    try:
        records = reply.content.metric_records
        for metrics in records.values():
            check_numbers(metrics)
        if weight_key is None:
            return Update({}, MetricRecord(), 0, 0)
        if len(records) != 1:
            raise BadReplyError(f"it must send one metric record, got {len(records)}")
        ((name, metrics),) = records.items()
        if (weight := number_in(metrics, weight_key, 0)) is None:
            raise BadReplyError(f"its {weight_key} must be a number of at least 0, got None")
        return Update({}, metrics, 0, weight, (("metrics", name),))
    except BadReplyError:
        raise
    except Exception as error:
        raise BadReplyError(f"its reply cannot be read ({as_line(error)})") from error


def put_in_order(reply: Message, sent: State) -> None:
    """Put a reply's entries in the order of the model sent: some strategies pair by place."""
    for key, arrays in list(reply.content.array_records.items()):
        order = [name for name in sent if name in arrays]
        if len(order) == len(arrays) and order != list(arrays):
            reply.content[key] = ArrayRecord({name: arrays[name] for name in order})


def as_line(text: object) -> str:
    """The last line of what somebody else says, to quote: printable and not long.

    Example:
        >>> as_line("Traceback:\\nValueError: out of \\x1b[31mdata'>\\n"), as_line(" \\n")
        ('ValueError: out of ?[31mdata', 'no reason given')
    """
    said = "" if text is None else str(text)[-10_000:]
    lines = [line.strip().removesuffix("'>").removesuffix('">').strip() for line in said.splitlines()]
    last = next((line for line in reversed(lines) if line), "no reason given")
    shown = "".join(c if c.isprintable() else "?" for c in last)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def number_in(metrics: Mapping[str, Any], key: str, least: float, whole: bool = False) -> float | None:
    """The number that a client gives under this name; None if it gives none.

    Raises:
        BadReplyError: it is no number from `least` to 2^53, or no whole one.
    """
    value = metrics.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= LARGEST
    if not number or (whole and value != int(value)):
        kind = f"a {'whole ' * whole}number of at least {least:g}"
        raise BadReplyError(f"its {key} must be {kind} and at most 2^53, got {as_line(repr(value))}")
    return float(value)


def check_numbers(metrics: Mapping[str, Any]) -> None:
    """See that every metric is a number or a list of numbers, so that they can be averaged.

    Raises:
        BadReplyError: one is something else.
    """
    for name, value in metrics.items():
        for one in value if isinstance(value, list) else [value]:
            real = isinstance(one, float) or (isinstance(one, int) and abs(one) < 2**1000)
            if isinstance(one, bool) or not real:
                must = "must be a number or a list of numbers"
                raise BadReplyError(f"its metric '{as_line(name)}' {must}, got {as_line(repr(one))}")


def _read(reply: Message, expected: Expected, held: int | None) -> Update:
    if reply.has_error():
        raise BadReplyError(_why(reply))
    arrays, metrics = _model(reply, expected), _metrics(reply, expected)
    examples = number_in(metrics, EXAMPLES, 1, whole=True)
    if examples is None and (expected.counted or expected.weight_key == EXAMPLES):
        raise BadReplyError(f"its {EXAMPLES} must be a whole number of at least 1, got None")
    weight = number_in(metrics, expected.weight_key, 0) if expected.weight_key else examples or 0
    if weight is None:
        raise BadReplyError(f"its {expected.weight_key} must be a number of at least 0, got None")
    if held is not None and examples is not None and examples != held:
        raise BadReplyError(f"its {EXAMPLES} must be {held}, as many as the server knows it to hold, got {examples:g}")
    models, others = reply.content.array_records, reply.content.metric_records
    records = (*(("arrays", name) for name in models), *(("metrics", name) for name in others))
    return Update(_state(arrays, expected.state), metrics, int(examples or 0), weight, records)


def _why(reply: Message) -> str:
    code, said = reply.error.code, as_line(reply.error.reason)
    reason = said if said.endswith("...") else said.rstrip(".")
    if reply.has_content():
        return f"it sent both an error and a model; the error: {reason}"
    if code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return f"it raised: {reason}"
    if code == UNREADABLE:
        return f"its reply cannot be read ({reason})"
    return f"its node is lost: {reason}" if code in LOST else f"its process died: {reason}"


def _state(arrays: ArrayRecord, sent: State) -> dict[str, Tensor]:
    """The client's model, of which every entry is one of the model that it was sent."""
    if extra := sorted(arrays.keys() - sent.keys()):
        raise BadReplyError(f"its model has extra entry '{as_line(extra[0])}'")
    if not arrays:
        raise BadReplyError("its model has no entry")
    state = {}
    for name, array in arrays.items():
        try:
            state[name] = read_values(array, sent[name])
        except BadArrayError as problem:
            raise BadReplyError(f"its '{name}' {str(problem)[:LONGEST]}") from None
        what = NOT_NEGATIVE.get(name.rpartition(".")[2])
        if what and (state[name] < 0).any() and not (sent[name] < 0).any():
            raise BadReplyError(f"its '{name}' has negative values, which no {what} is")
        if not is_continuous(state[name]) and _most(state[name]) > max(LARGEST, _most(sent[name])):
            raise BadReplyError(f"its '{name}' has whole numbers over 2^53, of which there is no exact mean")
    for name, value in state.items():
        if not is_finite(value):
            raise NotFiniteError(f"its '{name}' has non-finite values")
    return state


def _most(whole: Tensor) -> int:
    """The largest of whole numbers, whatever their signs."""
    values = whole.numpy()  # torch has no order of its unsigned types
    return max(abs(int(values.min())), abs(int(values.max()))) if values.size else 0


def _model(reply: Message, expected: Expected) -> ArrayRecord:
    models = reply.content.array_records
    if len(models) == 1:
        return next(iter(models.values()))
    if not expected.several or not models:
        raise BadReplyError(
            f"it must send one model and one metric record, got {len(models)} and {len(reply.content.metric_records)}"
        )
    for key, record in models.items():
        for name, array in record.items():
            try:
                read_header(array)
            except BadArrayError as problem:
                raise BadReplyError(f"its '{as_line(name)}' of '{as_line(key)}' {str(problem)[:LONGEST]}") from None
    if expected.record is not None and expected.record in models:
        return models[expected.record]
    names = as_line(", ".join(models))
    raise BadReplyError(f"its reply holds the ArrayRecords {names}: name the model's by arrayrecord_key")


def _metrics(reply: Message, expected: Expected) -> MetricRecord:
    records = list(reply.content.metric_records.values())
    if not expected.several and len(records) != 1:
        raise BadReplyError(f"it must send one model and one metric record, got 1 and {len(records)}")
    for record in records:
        check_numbers(record)
    with_key = [metrics for metrics in records if (expected.weight_key or EXAMPLES) in metrics]
    return (with_key or records or [MetricRecord()])[0]
