"""Parts of tracing and of the audit on an existing Ray cluster (ray.address)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tracefl.config import Config
from tracefl.errors import TraceFLError, require
from tracefl.provenance.spread import Spread, here

T = TypeVar("T")


@contextmanager
def spread_over(config: Config) -> Iterator[Spread]:
    """What spreads work over the cluster at `ray.address`; without one, everything is done here.

    A part takes `client_cpus` cores and, with device=cuda, `client_gpu` of a GPU, as a client does,
    and there are as many parts as have room. Workers read the run's folder: it must be on a disk
    that all machines of the cluster see.

    Args:
        config: address, device and the resources of a part.

    Raises:
        TraceFLError: no cluster answers, or it has no room for one part.
    """
    if not config.ray.address:
        yield here
        return
    import ray

    from tracefl.federation.simulation import check_cluster

    check_cluster(config.ray.address)
    needs = {"num_cpus": config.client_cpus, "num_gpus": config.client_gpu if config.device != "cpu" else 0}
    ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    try:
        total = ray.cluster_resources()
        rooms = [total.get(kind, 0) // need for kind, need in zip(("CPU", "GPU"), needs.values(), strict=True) if need]
        room = int(min(rooms, default=1))
        short = f"client_cpus={config.client_cpus:g} and client_gpu={config.client_gpu:g} leave no room for one worker"
        require(room >= 1, f"{short} on the cluster at ray.address={config.ray.address}: lower them")

        def spread(work: Callable[[Sequence[str]], T], names: Sequence[str]) -> list[T]:
            part: Any = ray.remote(_part).options(**needs, max_retries=1)
            kept, size = ray.put(work), -(-len(names) // min(room, len(names)))
            parts = [names[first : first + size] for first in range(0, len(names), size)]
            try:
                return ray.get([part.remote(kept, some, config.client_cpus) for some in parts])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, TraceFLError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                lost = f"a worker of the cluster at ray.address={config.ray.address} was lost"
                raise TraceFLError(f"{lost} ({type(error).__name__}): start again, or leave ray.address out") from error

        yield spread
    finally:
        ray.shutdown()


def _part(work: Callable[[Sequence[str]], T], names: Sequence[str], cpus: float) -> T:
    """One part, on a worker."""
    torch.set_num_threads(max(1, int(cpus)))
    return work(names)
