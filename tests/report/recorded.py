"""A recorded run's folder without training: what the report reads, with numbers of our own."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf

from tracefl.evaluation.tracing import COLUMNS
from tracefl.record import ClientInfo
from tracefl.results import write_result, write_table
from tracefl.runs import Run
from tracefl.training import Evaluation


def record(
    folder: Path, alpha: float = 0.3, num_rounds: int = 2, faulty: bool = False, dataset: str = "digits"
) -> Path:
    """Three clients, two classes, two inputs a round; localization accuracy rises with alpha."""
    state, rng = {"w": torch.zeros(2)}, np.random.default_rng(0)
    clients = [ClientInfo(str(k), {0: 10 + k, 1: 5 * k}) for k in range(3)]
    run = Run.create(folder, initial=state, clients=clients, seed=0, class_names=["no", "yes"])
    rounds, rows = [], []
    for t in range(1, num_rounds + 1):
        shares = [run.record_client(t, c.id, state, 10, 1 / 3) for c in clients]
        run.record_round(t, shares, state, Evaluation(1.0 / t, 0.4 + 0.1 * t, torch.tensor([0, 1])), {})
        rounds.append({
            "round": t, "loss": 1.0 / t, "accuracy": 0.4 + 0.1 * t, "num_inputs": 2, "chance_accuracy": 0.5,
            "localization_accuracy": min(1, 0.5 + alpha / 2), "localization_accuracy_influence": 1.0,
            "top_holder_accuracy": 0.75, "top_holder_chance": 1 / 3,
        })  # fmt: skip
        for method in ("neuron", "influence"):
            for row, label in ((4, 0), (7, 1)):
                values = rng.normal(size=3)
                for client, value, rank in zip(clients, values, (-values).argsort().argsort() + 1, strict=True):
                    held = client.label_counts[label]
                    rows.append((t, method, row, client.id, label, label, value, 1 / 3, rank, held, None, None))
    write_result(folder, "provenance.parquet", pd.DataFrame(rows, columns=COLUMNS).to_parquet(index=False))
    table = pd.DataFrame(rounds)
    if faulty:
        table = table.assign(feddebug_accuracy=0.5, seconds_neuron=0.01, seconds_influence=0.02, seconds_feddebug=1.0)
    write_table(folder, "rounds.csv", table)
    settings = {
        "seed": 0, "dataset": {"name": dataset}, "model": {"name": "resnet18"}, "client": {"epochs": 1, "lr": 0.1},
        "dirichlet_alpha": alpha, "num_clients": 3, "clients_per_round": 3, "num_rounds": num_rounds,
        "noise_multiplier": -1.0, "clipping_norm": -1.0, "data_dist": {"dist_type": "non_iid_dirichlet"},
        "strategy": {"name": "fedavg"},
        "fault": {"kind": "label_flip"}, "faulty_clients_ids": [0] if faulty else [],
    }  # fmt: skip
    write_result(folder, "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)).encode())
    return folder
