"""A recorded run with everything that a page shows, without training: numbers drawn at random."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence

from tracefl.config import Config
from tracefl.evaluation.tracing import COLUMNS, LAYER_COLUMNS
from tracefl.evidence.verdict import COLUMNS as AUDITED
from tracefl.evidence.verdict import Judgement, Verdict, class_by_client, verdict_json
from tracefl.record import ClientInfo
from tracefl.results import write_result, write_table
from tracefl.runs import Run
from tracefl.sealed import sealed
from tracefl.training import Evaluation

LAYERS = [f"layer{n}.conv" for n in range(12)]
REMOVAL = {
    "without": ["1"], "since": 1, "round": 2, "rounds": [1, 2], "accuracy_before": 0.5, "loss_before": 1.5,
    "accuracy_after": 0.75, "loss_after": 1.0, "examples": 40, "mispredictions": 20, "righted": 12, "wronged": 2,
}  # fmt: skip


def record_page(
    folder: Path,
    clients: Sequence[str] = ("0", "1", "2", "3", "4"),
    class_names: Sequence[str] = ("cat", "dog", "bird"),
    *,
    num_inputs: int = 8,
    num_rounds: int = 2,
    faulty: Sequence[str] = (),
    coalitions: bool = False,
    colours: int = 1,
    texts: Sequence[str] = (),
    settings: dict[str, object] | None = None,
) -> Path:
    """A run of faulty and honest clients, traced by both methods; half of its predictions are wrong."""
    rng, state, C = np.random.default_rng(0), {"w": torch.zeros(2)}, len(class_names)
    infos = [
        ClientInfo(
            who,
            {c: int(n) for c, n in enumerate(rng.integers(0, 50, C))},
            fault="label_flip" if who in faulty else None,
        )
        for who in clients
    ]
    run = Run.create(
        folder, initial=state, clients=infos, seed=0, class_names=list(class_names), data_folder="data",
        versions={"tracefl": "0.1.0"},
    )  # fmt: skip
    labels = torch.arange(num_inputs) % C
    (folder / "data").mkdir()
    pixels = torch.from_numpy(rng.integers(0, 256, (num_inputs, colours, 32, 32), dtype=np.uint8))
    inputs = _encoded(texts, folder / "data" / "tokenizer.json") if texts else {"pixels": pixels}
    save_file({**inputs, "labels": labels}, folder / "data" / "server.safetensors")
    _write_info(folder / "data", class_names)
    predicted = torch.where(torch.arange(num_inputs) % 2 == 0, labels, (labels + 1) % C)
    for t in range(1, num_rounds + 1):
        parts = [run.record_client(t, who, state, 10, 1 / len(clients)) for who in clients]
        run.record_round(t, parts, state, Evaluation(1.5 / t, 0.5, predicted), {})
    _write_answers(folder, infos, labels.numpy(), predicted.numpy(), num_rounds, coalitions)
    _write_verdict(folder, infos, faulty, num_rounds, class_names)
    rounds = {"round": range(1, num_rounds + 1), "loss": 1.5, "accuracy": 0.5, "num_inputs": num_inputs}
    rounds |= {"localization_accuracy": 0.9, "localization_accuracy_influence": 0.8, "chance_accuracy": 0.3}
    write_table(folder, "rounds.csv", pd.DataFrame(rounds))
    config = OmegaConf.structured(Config)
    write_result(folder, "config.yaml", OmegaConf.to_yaml(OmegaConf.merge(config, settings or {})).encode())
    return folder


def _write_info(folder: Path, class_names: Sequence[str]) -> None:
    """data.json of prepared data, of the server alone."""
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    info = {"settings": {}, "sha256": hashes, "class_names": list(class_names), "label_counts": {}, "left_out": {}}
    (folder / "data.json").write_bytes(sealed(json.dumps({**info, "text_model": None, "notes": []}, indent=1)))


def _encoded(texts: Sequence[str], file: Path) -> dict[str, torch.Tensor]:
    """Texts by a tokenizer of whole words, which is written too."""
    words = {"[PAD]": 0} | {
        word: n for n, word in enumerate(sorted({word for text in texts for word in text.split()}), 1)
    }
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))
    ids = [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in tokenizer.encode_batch(list(texts))]
    lengths = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int32)
    return {"input_ids": pad_sequence(ids, batch_first=True), "lengths": lengths}


def _write_answers(
    folder: Path, clients: Sequence[ClientInfo], labels: np.ndarray, predicted: np.ndarray, num_rounds: int, truth: bool
) -> None:
    rng, ids = np.random.default_rng(1), [client.id for client in clients]
    tables, through = [], []
    for t in range(1, num_rounds + 1):
        for method in ("neuron", "influence", *(["shapley"] if truth else [])):
            values = rng.normal(size=(len(labels), len(ids)))
            ranks = (-values).argsort(1).argsort(1) + 1
            row = np.repeat(np.arange(len(labels)), len(ids))
            table = {
                "round": t, "method": method, "input": row, "client": ids * len(labels), "label": labels[row],
                "predicted": predicted[row], "contribution": values.ravel(), "score": 0.5, "rank": ranks.ravel(),
                "label_examples": 1, "server": 0.25 if method == "influence" else np.nan, "noise": 0.125,
                "standard_error": 0.01 if method == "shapley" else np.nan,
            }  # fmt: skip
            tables.append(pd.DataFrame(table)[[*COLUMNS, *(["standard_error"] if truth else [])]])
            if method != "shapley":
                row, place = np.repeat(np.arange(len(labels)), len(LAYERS)), np.tile(range(len(LAYERS)), len(labels))
                first = np.array(ids, dtype=object)[values.argmax(1)]
                layers = {
                    "round": t, "method": method, "input": row, "client": first[row], "place": place,
                    "layer": np.array(LAYERS)[place], "contribution": rng.normal(size=len(row)),
                }  # fmt: skip
                through.append(pd.DataFrame(layers)[LAYER_COLUMNS])
    for name, some in (("provenance.parquet", tables), ("layers.parquet", through)):
        write_result(folder, name, pd.concat(some).to_parquet(index=False))


def _write_verdict(
    folder: Path, clients: Sequence[ClientInfo], faulty: Sequence[str], num_rounds: int, class_names: Sequence[str]
) -> None:
    rng, rows = np.random.default_rng(2), num_rounds * len(clients)
    numbers = {name: rng.normal(size=rows) for name in AUDITED} | {
        f"value_{c}": rng.normal(size=rows) for c in range(len(class_names))
    }
    who = {"round": np.repeat(range(1, num_rounds + 1), len(clients)), "client": [c.id for c in clients] * num_rounds}
    audited = pd.DataFrame(numbers | who)
    write_result(folder, "audit.parquet", audited.to_parquet(index=False))
    write_table(folder, "class_by_client.csv", class_by_client(audited, class_names).reset_index())
    why = {True: "sends back what it received", False: "does not stand apart"}
    judged = {c.id: Judgement(5.0 if c.id in faulty else 0.1, num_rounds, why[c.id in faulty]) for c in clients}
    verdict = verdict_json(Verdict(list(faulty), judged), REMOVAL if faulty else None)
    write_result(folder, "verdict.json", verdict)
