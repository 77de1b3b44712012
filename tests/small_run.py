"""A run that is small, and what is read of one."""

from pathlib import Path

SMALL = [
    "exp_key=small", "num_clients=3", "clients_per_round=2", "num_rounds=3", "client.epochs=1",
    "data_dist.max_per_client_data_size=40", "data_dist.max_server_data_size=60", "dirichlet_alpha=1",
]  # fmt: skip


def the_run(storage: Path) -> Path:
    (folder,) = storage.glob("logs/small-*")
    return folder


def weights(storage: Path) -> dict[str, bytes]:
    folder = the_run(storage)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
