"""The coalition game of a round: what would the prediction be if only some clients were fused?

    v_n(S) = y_n of the model    W_S = Σ_{k in S} p_k W_k / Σ_{k in S} p_k,
    v_n(∅) = y_n of the incoming model

and so is any S whose weights are all 0. Fused are the floating-point entries that clients send;
the others stay as in the model. W_S is a mean with positive weights, so that a running variance
stays positive. N explained inputs, K clients, a set is a row of bool [K].
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, batch_size, copied, explained, kept_bytes, output_of, take, uses_batch_statistics
from tracefl.errors import TraceFLError, require
from tracefl.provenance.clients import States
from tracefl.provenance.passes import check_same
from tracefl.provenance.state import traced_state
from tracefl.states import State, as_real, is_continuous

TILE = 1 << 22  # bytes of clients' tensors that are multiplied at a time: they stay in the cache
ROWS = 1 << 15  # numbers that are worked on at a time in double precision, for the same reason
FUSED_AT_ONCE = 16  # from states in memory; more at a time save nothing


class Explained:
    """A model whose weights change, and the inputs that are explained; use it within `exact(work)`.

    Args:
        work: the model, in full precision.
        inputs: N inputs, as the model takes them.
        targets: explained classes [N]; None: those of the first model that is evaluated.
        output: "logit" or "log_odds".
        scratch_bytes: memory, of which activations take an eighth.
    """

    def __init__(self, work: nn.Module, inputs: Batch, targets: Tensor | None, output: str, scratch_bytes: int):
        self.work, self.inputs, self.targets, self.output = work, inputs, targets, output
        self.N, self.scratch_bytes, self.at_once = batch_size(inputs), scratch_bytes, 0

    @torch.no_grad()
    def of_model(self) -> Tensor:
        """y of the model itself, [N]; its predictions are the targets if there are none yet."""
        self.at_once = _inputs_at_once(self.work, self.inputs, self.output, self.scratch_bytes // 8)
        return self.y("the model", lambda: None)

    @torch.no_grad()
    def y(self, whose: str, check: Callable[[], None]) -> Tensor:
        """y [N], float64, of the model as it is now; `check` is asked why, if one is not finite."""
        ys, classes = list[Tensor](), list[Tensor]()
        for first in range(0, self.N, self.at_once):
            some = slice(first, first + self.at_once)
            targets = None if self.targets is None else self.targets[some]
            y, found = explained(output_of(self.work, take(self.inputs, some)).double(), targets, self.output)
            ys.append(y.cpu())
            classes.append(found)
        y, self.targets = torch.cat(ys), torch.cat(classes)
        for n in torch.nonzero(~torch.isfinite(y)).flatten().tolist():
            check()
            raise TraceFLError(f"the output of {whose} for input {n} is not finite; check the states and the input")
        return y


class Game(Explained):
    """Plays coalitions on a copy of the model; use it within `exact(game.work)`.

    Args:
        model: in full precision; gives the architecture and the entries that nobody sends.
        clients: client id -> state, K of them.
        p: weights of the clients, float64 [K].
        reference: the incoming model's state.
        inputs: N inputs, as the model takes them.
        targets: explained classes [N]; None: those that the model predicts.
        output: "logit" or "log_odds".
        layers: which of them are fused, as in `trace`.
        scratch_bytes: memory for activations, and for models that are fused at once.

    Raises:
        TraceFLError: a state does not fit the model, or no client sends anything to fuse.
    """

    def __init__(
        self, model: nn.Module, clients: Mapping[str, State], p: Tensor, reference: State, inputs: Batch,
        targets: Tensor | None, output: str, layers: str | Sequence[str], scratch_bytes: int,
    ):  # fmt: skip
        super().__init__(copied(model), inputs, targets, output, scratch_bytes)
        self.ids, self.p = list(clients), p
        sent, entries = frozenset[str]().union(*clients.values()), model.state_dict()
        state = traced_state(self.work, layers, True, sent)
        self.states = States({f"client {who!r}": of for who, of in clients.items()}, entries, state.aliases)
        self.tensors = state.tensors
        require(self.tensors, "no client sends a floating-point tensor of the chosen layers: there is nothing to fuse")
        self.reference = States({"reference": reference}, entries, state.aliases)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())

    @torch.no_grad()
    def of_nobody(self) -> Tensor:
        """v(∅) [N]."""
        for name, tensor in self.tensors.items():
            as_real(tensor).copy_(self.reference.tensors([name], 0, 1)[0])
        return self.y("the reference", self.reference.check_finite)

    @torch.no_grad()
    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """v(all) [N], v of every client alone [K, N] and of all without it [K, N].

        A client in a file is read twice: to be added up, and to be taken out of the sum again.
        """
        if self.states.in_memory:
            one = torch.eye(len(self.ids), dtype=torch.bool)
            v = self.play(torch.cat([one.any(0, keepdim=True), one, ~one]), torch.empty(self.N, dtype=torch.float64))
            return v[0], v[1 : len(one) + 1], v[len(one) + 1 :]
        total = {name: self._sum(name) for name in self.tensors}
        for name, tensor in self.tensors.items():
            as_real(tensor).copy_(total[name])
        everyone = self.y("the model fused from all clients", self.states.check_finite)
        alone, without = torch.empty(2, len(self.ids), self.N, dtype=torch.float64)
        for k, who in enumerate(self.ids):
            for name, tensor in self.tensors.items():
                as_real(tensor).copy_(self._read(name, k))
            alone[k] = self.y(f"the model of client {who!r}", self.states.check_finite)
            for name, tensor in self.tensors.items():
                _take_out(as_real(tensor), total[name], float(self.p[k]))
            without[k] = self.y(f"the model fused without client {who!r}", self.states.check_finite)
        return everyone, alone, without

    @torch.no_grad()
    def play(self, sets: Tensor, nobody: Tensor) -> Tensor:
        """v of these sets, float64 [M, N].

        Fuses as many sets at once as fit into most of `scratch_bytes`; each time the members are
        read once. Sets that are alike come together, so that few clients are read.

        Args:
            sets: bool [M, K].
            nobody: v(∅) [N].
        """
        weight = sets.double() @ self.p
        v = nobody.repeat(len(sets), 1)
        order = sorted(
            weight.nonzero()[:, 0].tolist(), key=lambda i: (int(sets[i].sum()), sets[i].logical_not().tolist())
        )
        most = max(1, self.scratch_bytes // 4 * 3 // max(1, self.nbytes))
        most = min(most, FUSED_AT_ONCE) if self.states.in_memory else most
        groups = max(1, math.ceil(len(order) / most))
        at_once = max(1, math.ceil(len(order) / groups))  # groups of one size: fresh memory is slow
        real = {name: as_real(tensor) for name, tensor in self.tensors.items()}
        room = {name: tensor.new_empty(at_once, *tensor.shape) for name, tensor in real.items()}
        for group in [order[first : first + at_once] for first in range(0, len(order), at_once)]:
            fused = self._fuse(sets[group] * self.p / weight[group, None], room)
            for row, i in enumerate(group):
                for name, tensor in self.tensors.items():
                    of_set = fused[name][row]  # to copy it would take half as long as to fuse it
                    tensor.data = torch.view_as_complex(of_set) if tensor.is_complex() else of_set
                members = [who for who, takes_part in zip(self.ids, sets[i].tolist(), strict=True) if takes_part]
                v[i] = self.y(f"the model fused from {', '.join(members)}", self.states.check_finite)
        return v

    def _read(self, name: str, k: int) -> Tensor:
        return self.states.tensors([name], k, k + 1)[0]

    def _sum(self, name: str) -> Tensor:
        """Σ_k p_k θ_k in double precision."""
        like = as_real(self.tensors[name])
        total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float64))
        for k, p in enumerate(self.p.tolist()):
            theta = self._read(name, k)
            for into, part in zip(_parts(total), _parts(theta), strict=True):
                into.add_(part.to(total.dtype), alpha=p)
        return total

    def _fuse(self, coefficients: Tensor, room: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> Σ_k c_ik θ_k of every row i of the coefficients [M, K], written into `room`."""
        used = coefficients.any(0).nonzero()[:, 0].tolist()
        for name, tensor in ((name, as_real(tensor)) for name, tensor in self.tensors.items()):
            found = room[name][: len(coefficients)].view(len(coefficients), -1)
            at_once = len(used) if self.states.in_memory else max(1, self.scratch_bytes // 8 // max(1, tensor.nbytes))
            for first in range(0, len(used), at_once):
                some = used[first : first + at_once]
                c, thetas = coefficients[:, some].to(found), [self._read(name, k).reshape(-1) for k in some]
                columns = max(1, min(tensor.numel(), TILE // (len(some) * tensor.element_size())))
                room_of_tile = tensor.new_empty(len(some), columns)  # fresh memory is slow
                for part in [slice(start, start + columns) for start in range(0, tensor.numel(), columns)]:
                    into = found[:, part]
                    tile = torch.stack([theta[part] for theta in thetas], out=room_of_tile[:, : into.shape[1]])
                    torch.addmm(into, c, tile, beta=min(first, 1), out=into)  # with 0, whatever was there
        return room


def _take_out(theta: Tensor, total: Tensor, p: float) -> None:
    """θ <- (total - p θ) / (1 - p), in place and in double precision."""
    for into, part in zip(_parts(theta), _parts(total), strict=True):
        into.copy_(torch.lerp(part, into.to(part.dtype), -p / (1 - p)))


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a tensor's rows, as many at a time as stay in the cache."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return [tensor]
    return tensor.split(max(1, ROWS * len(tensor) // tensor.numel()))


def _inputs_at_once(model: nn.Module, inputs: Batch, output: str, most: int) -> int:
    """How many inputs go through the model at a time.

    What autograd would keep of an input bounds what a pass without it takes. A model that takes no
    batch, or in which inputs of a batch see or move each other, gets one at a time.
    """
    one = take(inputs, slice(0, 1))
    with torch.enable_grad():
        for tensor in model.parameters():
            tensor.requires_grad_(is_continuous(tensor))
        alone, nbytes = kept_bytes(model, lambda: output_of(model, one), lambda logits: [logits])
        for tensor in model.parameters():
            tensor.requires_grad_(False)
        explained(alone, None, output)  # refuses probabilities, which only a graph tells from logits
    check_same(output_of(model, one), alone)
    n = min(batch_size(inputs), max(1, most // max(1, nbytes)))
    if n == 1 or uses_batch_statistics(model):
        return 1
    try:
        together = output_of(model, take(inputs, slice(0, n)))
    except RuntimeError:  # a model may take one input where it takes no batch
        return 1
    near = (together[0] - alone[0]).abs().max() <= 0.01 * alone[0].abs().max()
    return n if near else 1
