"""Lies of a client by name: each spoils the reply of client b, and the server must name b, and only b."""

import pickle
from typing import ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from tests.federation.own import INITIAL, OwnGrid, arrays

NET = INITIAL | {"bn.running_var": torch.ones(2), "bn.num_batches_tracked": torch.tensor(4)}


class LyingGrid(OwnGrid):
    """Every train reply of client b goes through `lie`, which gives a reply, or several."""

    def __init__(self, nodes, lie, rounds=(1, 2, 3), **changes) -> None:
        super().__init__(nodes, **changes)
        self.lie, self.rounds, self.count = lie, rounds, 0

    def pull_messages(self, message_ids):
        found = []
        for reply in super().pull_messages(message_ids):
            node = next(n for n in self.nodes if n == reply.metadata.src_node_id)
            lies = reply.metadata.message_type == "train" and self.nodes[node]["partition-id"] == "b"
            self.count += lies
            said = self.lie(reply) if lies and self.count in self.rounds else reply
            found += said if isinstance(said, list) else [said]
        return found


# --- what is changed in a reply ---------------------------------------------------------------------


def numbers(change):
    """Another model, of the same entries."""

    def lie(reply):
        state = dict(reply.content["arrays"].to_torch_state_dict())
        reply.content["arrays"] = ArrayRecord(change({name: value.clone() for name, value in state.items()}))
        return reply

    return lie


def everywhere(value):
    """All real numbers; a variance must not be negative."""

    def change(state):
        return {
            n: torch.full_like(v, abs(value) if "var" in n else value)
            for n, v in state.items()
            if v.is_floating_point()
        }

    return numbers(lambda state: state | change(state))


def only(name, value, place=0):
    def change(state):
        state[name].view(-1)[place] = value
        return state

    return numbers(change)


def raw(name="w", **fields):
    """The array of one entry, with other fields than it has."""

    def lie(reply):
        array = reply.content["arrays"][name]
        for field, value in fields.items():
            setattr(array, field, value(getattr(array, field)) if callable(value) else value)
        return reply

    return lie


def as_array(values, name="w"):
    """NumPy's values in the place of one entry."""

    def lie(reply):
        reply.content["arrays"][name] = Array(np.asarray(values))
        return reply

    return lie


class Pickled:
    """What a pickle would do when it is opened."""

    opened: ClassVar[list[str]] = []

    def __reduce__(self):
        return Pickled.opened.append, ("opened",)


class Raising(float):
    """A number that cannot be compared."""

    def __ge__(self, other):
        raise RuntimeError("compared")

    __le__ = __ge__


def metrics(**changes):
    """Other metrics; a name with _ has a - there. None: it is left out. Types that Flower refuses are forced in."""

    def lie(reply):
        record = reply.content["metrics"]
        for key, value in changes.items():
            name = key.replace("num_examples", "num-examples")
            record.__dict__["_data"].pop(name, None)
            if value is not None:
                record.__dict__["_data"][name] = value
        return reply

    return lie


def content(change):
    def lie(reply):
        change(reply.content)
        return reply

    return lie


def renamed(there, name):
    def change(records):
        records[name] = records.pop(there)

    return content(change)


def error(code, reason):
    return lambda reply: _answering(reply, Error(code, reason))


def _answering(reply, said):
    """The same reply with something else in it."""
    reply.__dict__["_content"] = said if isinstance(said, RecordDict) else None
    reply.__dict__["_error"] = said if isinstance(said, Error) else None
    return reply


def with_content(reply, said):
    reply.__dict__["_content"] = said
    return reply


def with_both(reply):
    reply.__dict__["_error"] = Error(2, "and I failed")
    return reply


def with_neither(reply):
    reply.__dict__["_content"] = None
    return reply


def set_record(name, value):
    def change(records):
        records.__dict__["_data"][name] = value

    return content(change)


OBJECTS = np.empty((2, 3), object)
PAIRS = np.zeros((2, 3), [("x", "f4"), ("y", "f4")])
NPZ = b"PK\x03\x04" + b"\0" * 200
SHAPE = r"'w' must be \(\(2, 3\), 'torch.float32'\), got "

# name -> what is changed, and words of the sentence that names client b
ARRAYS = {
    "not a number": (only("w", float("nan")), "'w' has non-finite values"),
    "infinite": (only("b", float("inf")), "'b' has non-finite values"),
    "garbage": (raw(data=b"\xff\x00 garbage"), "'w' is no .npy array"),
    "no bytes": (raw(data=b""), "'w' is no .npy array"),
    "truncated": (raw(data=lambda data: data[:-3]), "must have 24 bytes .*, got 21"),
    "truncated in the header": (raw(data=lambda data: data[:40]), "'w' is no .npy array"),
    "more bytes than it says": (raw(data=lambda data: data + b"\0" * 10_000), "must have 24 bytes .*, got 10024"),
    "a pickle": (raw(data=pickle.dumps(Pickled())), "'w' is no .npy array"),
    "pickled objects": (
        raw(dtype="object", data=lambda _: _npy("|O", "(2, 3)") + pickle.dumps(Pickled())), "got object"
    ),
    "an archive": (raw(data=NPZ), "'w' is no .npy array"),
    "code in the header": (raw(data=lambda _: _npy("<f4", "__import__('os').abort()")), "'w' is no .npy array"),
    "a deep header": (raw(data=lambda _: _npy("<f4", "(" * 3000 + ")" * 3000)), "'w' is no .npy array"),
    "a terabyte": (raw(data=lambda _: _npy("<f4", "(274877906944,)")), "bytes say|is said to be"),
    "a terabyte, and says so": (
        raw(shape=(274877906944,), data=lambda _: _npy("<f4", "(274877906944,)")), "must have 1099511627776 bytes"
    ),
    "no element, of huge lengths": (
        raw(shape=(0, 2**62), data=lambda _: _npy("<f4", "(0, 4611686018427387904)")), SHAPE
    ),
    "negative lengths": (raw(shape=(-2, -3), data=lambda _: _npy("<f4", "(-2, -3)") + b"\0" * 24), "at least 0"),
    "a shape that its bytes do not have": (raw(shape=(3, 2)), "is said to be"),
    "a type that its bytes do not have": (raw(dtype="float64"), "is said to be"),
    "a type of a megabyte": (raw(dtype="x" * 10**6), "is said to be .{200,400}$|is said to be .{200,400}\\. Rounds"),
    "another serialization": (raw(stype="torch.pickle"), "must be sent as 'numpy.ndarray'"),
    "data of another type": (raw(data="text"), "must be sent as"),
    "a larger model": (as_array(np.zeros((2000, 3), np.float32)), SHAPE),
    "another shape": (as_array(np.zeros((3, 2), np.float32)), SHAPE),
    "no dimension": (as_array(np.float32(1)), SHAPE),
    "double precision": (as_array(np.zeros((2, 3))), SHAPE),
    "extended precision": (as_array(np.zeros((2, 3), np.longdouble)), SHAPE),
    "complex numbers": (as_array(np.zeros((2, 3), np.complex64)), SHAPE),
    "truth values": (as_array(np.zeros((2, 3), bool)), SHAPE),
    "whole numbers": (as_array(np.zeros((2, 3), np.int64)), SHAPE),
    "text": (as_array(np.full((2, 3), "1.0")), "must hold numbers"),
    "bytes": (as_array(np.full((2, 3), b"1")), "must hold numbers"),
    "dates": (as_array(np.zeros((2, 3), "M8[s]")), "must hold numbers"),
    "pairs": (as_array(PAIRS), "must hold numbers"),
    "the other byte order": (as_array(np.zeros((2, 3), ">f4")), "the machine's byte order"),
    "a whole number beyond floats": (only("bn.num_batches_tracked", 2**62), "whole numbers over 2\\^53"),
    "a negative count": (only("bn.num_batches_tracked", -5), "'bn.num_batches_tracked' has .* which no count is"),
    "a count as a fraction": (as_array(np.float32(4), "bn.num_batches_tracked"), "'torch.int64'\\), got"),
    "a count of 32 bits": (as_array(np.int32(4), "bn.num_batches_tracked"), "'torch.int64'\\), got"),
    "NaN in half precision": (as_array(np.full((2, 3), np.nan, np.float16)), "'w' has non-finite values"),
    "raw bytes": (as_array(np.zeros((2, 3), "V4")), "must hold numbers"),
    "times": (as_array(np.zeros((2, 3), "m8[s]")), "must hold numbers"),
    "an array within an array": (raw(data=lambda data: _npy("(2,3)<f4", "()") + data[-24:]), "must hold numbers"),
    "a header of a later version": (raw(data=lambda data: b"\x93NUMPY\x03" + data[7:]), "'w' is no .npy array"),
    "a shape that is none": (raw(shape=None), "its reply cannot be read"),
    "a negative variance, and hardly so": (only("bn.running_var", -1e-45), "'bn.running_var' has negative values"),
    "a negative variance": (only("bn.running_var", -0.1), "'bn.running_var' has negative values"),
}  # fmt: skip

RECORDS = {
    "no entry": (content(lambda c: c["arrays"].clear()), "its model has no entry"),
    "an extra entry": (content(lambda c: c["arrays"].update({"v\n\x1b[2J": c["arrays"]["w"]})), "has extra entry '"),
    "an entry less": (content(lambda c: c["arrays"].pop("w")), "its model lacks 'w', unlike those of most"),
    "another name of the model": (renamed("arrays", "mine"), "has a record of arrays 'mine', unlike those of most"),
    "another name of the metrics": (renamed("metrics", "mine"), "has a record of metrics 'mine', unlike those of most"),
    "model and metrics under each other's name": (
        content(lambda c: c.__dict__["_data"].update(arrays=c["metrics"], metrics=c["arrays"])),
        "its reply has a record of arrays 'metrics', unlike those of most clients"),
    "a name that is no text": (
        content(lambda c: c["arrays"].__dict__["_data"].update({7: c["arrays"]["w"]})), "extra entry '7'"),
    "a name that looks alike": (
        content(lambda c: c["arrays"].update({"w\u200b": c["arrays"]["w"]})), r"extra entry 'w\?'"),
    "whole numbers alone": (
        content(lambda c: [c["arrays"].pop(name) for name in list(c["arrays"]) if "num_batches" not in name]),
        "its model lacks 'a', unlike those of most"),
    "content that is none": (lambda reply: with_content(reply, "text"), "its reply cannot be read"),
    "no model": (content(lambda c: c.pop("arrays")), "one model and one metric record, got 0 and 1"),
    "no metrics": (content(lambda c: c.pop("metrics")), "one model and one metric record, got 1 and 0"),
    "two models": (content(lambda c: c.update({"more": arrays()})), "one model and one metric record, got 2 and 1"),
    "two metric records": (content(lambda c: c.update({"more": MetricRecord({"x": 1})})), "got 1 and 2"),
    "nothing": (lambda reply: _answering(reply, RecordDict()), "got 0 and 0"),
    "settings alone": (lambda reply: _answering(reply, RecordDict({"c": ConfigRecord({"x": 1})})), "got 0 and 0"),
    "a record that is none": (set_record("arrays", "text"), "one model and one metric record, got 0 and 1"),
    "an array that is none": (content(lambda c: c["arrays"].__dict__["_data"].update(w="text")), "cannot be read"),
    "neither content nor error": (with_neither, "its reply cannot be read"),
    "both content and error": (with_both, "both an error and a model; the error: and I failed"),
}  # fmt: skip

METRICS = {
    "no num-examples": (metrics(num_examples=None), "num-examples must be a whole number of at least 1, got None"),
    "no example": (metrics(num_examples=0), "num-examples must be a whole number .* got 0"),
    "fewer than no example": (metrics(num_examples=-5), "num-examples must be a whole number .* got -5"),
    "half an example": (metrics(num_examples=3.5), "num-examples must be a whole number .* got 3.5"),
    "NaN examples": (metrics(num_examples=float("nan")), "num-examples must be a whole number .* got nan"),
    "infinitely many examples": (metrics(num_examples=float("inf")), "num-examples must be a whole number .* got inf"),
    "more examples than floats count": (metrics(num_examples=2**60), "num-examples must be a whole number .* got 1"),
    "a huge number of examples": (metrics(num_examples=10**400), "metric 'num-examples' must be a number"),
    "a list of examples": (metrics(num_examples=[12, 1]), "num-examples must be a whole number .* got"),
    "examples as text": (metrics(num_examples="12"), "metric 'num-examples' must be a number"),
    "examples as truth": (metrics(num_examples=True), "metric 'num-examples' must be a number"),
    "a metric as text": (metrics(train_loss="low"), "metric 'train_loss' must be a number"),
    "a metric as truth": (metrics(train_loss=True), "metric 'train_loss' must be a number"),
    "a metric beyond floats": (metrics(train_loss=10**400), "metric 'train_loss' must be a number"),
    "a metric of objects": (metrics(train_loss=[{}]), "metric 'train_loss' must be a number"),
    "a metric less": (metrics(train_loss=None), "its reply lacks the metric 'train_loss', unlike those of most"),
    "a metric more": (metrics(mine=1.0), "its reply has the metric 'mine', unlike those of most"),
    "no example, negative": (metrics(num_examples=-0.0), "num-examples must be a whole number .* got -0.0"),
    "fewer than infinitely few": (metrics(num_examples=-float("inf")), "num-examples must be .* got -inf"),
    "nearly no example": (metrics(num_examples=1e-9), "num-examples must be a whole number .* got 1e-09"),
    "one example more than floats count": (metrics(num_examples=2**53 + 1), "got 9007199254740993"),
    "complex examples": (metrics(num_examples=5j), "metric 'num-examples' must be a number"),
    "examples as bytes": (metrics(num_examples=b"12"), "metric 'num-examples' must be a number"),
    "an empty list of examples": (metrics(num_examples=[]), r"num-examples must be a whole number .* got \[\]"),
    "a tensor of examples": (metrics(num_examples=torch.tensor(5)), "metric 'num-examples' must be a number"),
    "a number that raises": (metrics(num_examples=Raising(5)), "its reply cannot be read .compared"),
    "an empty list for a number": (metrics(train_loss=[]), "has the metric 'train_loss', a list of 0, unlike"),
    "a list of one for a number": (metrics(train_loss=[0.1]), "has the metric 'train_loss', a list of 1, unlike"),
    "lists in a list": (metrics(train_loss=[[0.1]]), "metric 'train_loss' must be a number"),
    "a metric without end": (
        lambda reply: metrics(**{f"m{k}": 1.0 for k in range(10_000)})(reply), "has the metric 'm0', unlike"),
    "a metric's name that moves the cursor": (metrics(**{"a\x1b[2J": 1.0}), r"has the metric 'a\?\[2J', unlike"),
    "a list for a number": (metrics(train_loss=[0.1, 0.2]), "its reply .* the metric 'train_loss'.*, unlike"),
}  # fmt: skip

ERRORS = {
    "an error": (error(2, "Traceback\nValueError: no disk"), "it raised: ValueError: no disk"),
    "an error without a reason": (error(2, None), "it raised: no reason given"),
    "a blank reason": (error(2, ""), "it raised: no reason given"),
    "a reason of spaces": (error(2, " \n\t\n "), "it raised: no reason given"),
    "a reason of quotes": (error(2, "'>\n'>"), "it raised: no reason given"),
    "a reason that moves the cursor": (error(2, "\x1b[2J\x1b[1;1Hfine"), r"it raised: \?\[2J\?\[1;1Hfine"),
    "a reason of a megabyte": (error(2, "x" * 10**6), r"it raised: x{300}\.\.\."),
    "a reason that is none": (error(2, 7), "it raised: 7"),
    "a reason that is no text at all": (error(2, b"no disk"), "it raised: b'no disk'"),
    "a reason that turns the line": (error(2, "\u202eenif"), r"it raised: \?enif"),
    "a reason of half a character": (error(2, "\ud800"), r"it raised: \?"),
    "a reason with quotes": (error(2, "'x' is not there"), "it raised: 'x' is not there"),
    "a huge code": (error(10**30, "odd"), "its process died: odd"),
    "a code as text": (error("2", "odd"), "its process died: odd"),
    "a code of its own": (error(77, "odd"), "its process died: odd"),
    "a code that is none": (error(None, "odd"), "its process died: odd"),
}  # fmt: skip

PLAIN = ARRAYS | RECORDS | METRICS | ERRORS

# Finite, so that only what becomes of them can tell.
FINITE = {
    "1e38 everywhere": everywhere(1e38),
    "1e30 everywhere": everywhere(1e30),
    "3e38 everywhere": everywhere(3e38),
    "-3e38 everywhere": everywhere(-3e38),
    "1e38 in one weight": only("w", 1e38),
    "3e38 in one variance": only("bn.running_var", 3e38),
}
FINITE_IN_VALUES = {  # finite and small enough to be recorded, but the loss of the mean is not
    "1e15 everywhere": everywhere(1e15),
    "1e18 in one weight": only("w", 1e18),
}


def _npy(dtype: str, shape: str) -> bytes:
    """The header of a .npy file as somebody else writes it."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def copy_of(reply: Message, **changes) -> Message:
    """The same reply once more, of another content."""
    again = Message(changes.get("content", reply.content), reply_to=reply)
    again.__dict__["_metadata"] = reply.metadata
    return again
