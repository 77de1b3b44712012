"""FedDebug (ICSE 2023), for comparison: find faulty clients by differential testing.

The models of all clients see the same random images. In every Conv2d and Linear layer a neuron z of
client k is active on an image if relu(z), scaled to [0, 1] by the layer's minimum and maximum on
that image, exceeds a threshold. Neurons active in all clients say nothing. Of the subsets of K - 1
clients the one with the most neurons active in common is taken for the benign one; the client left
out is the suspect. With c_j the number of clients in which neuron j is active, the subset without k
has in common

    A_k = #{j : c_j = K - 1 and j is not active in k},

so one pass over the clients gives all K agreements. For F faulty clients the suspect is removed and
the others are searched again. Of several suspects with the same A_k one is drawn at random, instead
of always the first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracefl.classifier import exact
from tracefl.config import Config
from tracefl.data.examples import IMAGE_SIZE, MEAN, STD
from tracefl.evaluation.metrics import Metric
from tracefl.evaluation.selection import faulty_clients
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.judged import NAN
from tracefl.models import load_exchanged_state
from tracefl.runs import Run
from tracefl.states import State

IMAGES = 10  # one vote each
PICKY_FROM, SAME_CLASS = 10, 3  # from 10 clients on, at least 3 have to agree on an image's class
CANDIDATES = 30  # images that are drawn to choose such ones from
COLUMNS = ["round", "image", "vote", "client"]  # vote 1 is the first suspect of F

Array = np.ndarray


def debug_round(config: Config, run: Run, model: nn.Module, number: int, watch: Stopwatch) -> pd.DataFrame:
    """Search a round for as many suspects as faulty clients took part.

    Args:
        config: neuron_activation_threshold; faster_input_generation=false prefers, with ten clients
            or more, images on whose class at least three agree; of the faulty clients only how many
            took part is used.
        run: the recorded run.
        model: of the run's architecture, on the device to compute on; its weights are overwritten.
        number: of the round, from 1.
        watch: measures the search as "FedDebug".

    Returns:
        A table with `COLUMNS`, one row per (image, vote): the suspects. No rows if no faulty client
        took part.
    """
    seed, ids = [run["seed"], number], [client.id for client in run.round(number).clients]
    faults = len(faulty_clients(config) & set(ids))
    if faults == 0:
        return pd.DataFrame(columns=COLUMNS)
    states = list(run.client_states(number).values())  # checked before the clock runs
    picky = not config.faster_input_generation and len(ids) >= PICKY_FROM
    with watch.measure("FedDebug", IMAGES):
        active = observe(model, states, config.neuron_activation_threshold, picky=picky, seed=seed)
        rng = np.random.default_rng(seed)
        named = [suspects(np.unpackbits(active[:, image], axis=1), faults, rng) for image in range(IMAGES)]
    rows = [(number, image, vote, ids[k]) for image, ks in enumerate(named) for vote, k in enumerate(ks, start=1)]
    return pd.DataFrame(rows, columns=COLUMNS)


def suspects(active: Array, faults: int, rng: np.random.Generator) -> list[int]:
    """The clients that agree least with the others, the most suspect one first.

    Args:
        active: 1 where a client's neuron is active on the image, otherwise 0, [K, neurons].
        faults: how many suspects are wanted, at most K - 1.
        rng: chooses among clients that agree equally little.

    Returns:
        The places of the suspects among the K clients.

    Example:
        >>> active = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
        >>> suspects(active, 1, np.random.default_rng(0))  # the others share neurons 1 and 2
        [1]
    """
    left, found = list(range(len(active))), []
    count = active.sum(axis=0, dtype=np.int32)
    for _ in range(faults):
        in_all_but_one = count == len(left) - 1
        agreement = np.array([(in_all_but_one & (active[k] == 0)).sum() for k in left])
        k = left[rng.choice(np.flatnonzero(agreement == agreement.max()))]
        count -= active[k]
        left.remove(k)
        found.append(k)
    return found


def observe(model: nn.Module, states: Sequence[State], threshold: float, *, picky: bool, seed: list[int]) -> Array:
    """Which neurons are active in each of K clients on each image.

    Returns bits, uint8 [K, IMAGES, neurons / 8 rounded up]. If `picky`, images on whose class
    enough clients agree are taken first. Every client is read once, for all images.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    images = random_images(CANDIDATES if picky else IMAGES, generator).to(next(model.parameters()).device)
    bits, classes = [], []
    for state in states:
        load_exchanged_state(model, dict(state))
        active, predicted = active_neurons(model, images, threshold)
        bits.append(np.packbits(active.cpu().numpy(), axis=1))
        classes.append(predicted)
    agreeing = F.one_hot(torch.stack(classes)).sum(0).amax(1)  # of an image
    chosen = (agreeing < SAME_CLASS).to(torch.uint8).argsort(stable=True)[:IMAGES].cpu().numpy()
    return np.stack([client[chosen] for client in bits])


def random_images(count: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform noise through the dataset's normalisation, [count, 3, 32, 32]."""
    noise = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    for image in noise:
        nn.init.kaiming_uniform_(image, generator=generator)
    return (noise - MEAN) / STD


@torch.no_grad()
def active_neurons(model: nn.Module, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Active neurons, bool [N, neurons], and the predicted classes [N].

    A layer whose outputs are all the same has none active.
    """
    outputs: list[Tensor] = []  # copies, as a ReLU may work in place
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output.clone())

    with exact(model, lambda: [layer.register_forward_hook(keep) for layer in layers]):
        predicted = model(images).argmax(1)
    active = []
    for output in outputs:
        z = output.flatten(1).relu()
        low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
        active.append((z - low > threshold * (high - low)) & (high > low))
    return torch.cat(active, 1), predicted


def judge_votes(run: Run, votes: pd.DataFrame, faulty: set[str]) -> list[Metric]:
    """Per round, the share of the faulty participants that was found, mean over images.

    NaN where no faulty client took part, nothing where the clients' states are gone; chance finds
    their share of the participants.
    """
    rows = []
    for record in run.kept_rounds:
        faults = sum(client.id in faulty for client in record.clients)
        hits = votes.loc[votes["round"] == record.number, "client"].isin(faulty).sum()
        judged = (hits / (IMAGES * faults), faults / len(record.clients)) if faults else (NAN, NAN)
        rows.append(Metric(record.number, "FedDebug", "found", *judged))
    return rows
