"""A small BERT and a small GPT from scratch learn real DBpedia by the command line and are traced end to end.

    python benchmarks/text_learning.py ../shared/data/dbpedia_14

Prints each command, then accuracy of the last round, localization beside its chance level, and seconds.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

COMMON = ["dataset.max_tokens=32", "client.lr=0.002", "num_rounds=10"]
MODELS = {
    "google-bert/bert-base-cased": "num_hidden_layers=2 hidden_size=64 num_attention_heads=2 intermediate_size=256",
    "openai-community/openai-gpt": "n_layer=2 n_embd=64 n_head=2",
}
GOAL = 0.80


def learn(name: str, sizes: str, data: Path) -> pd.Series:
    """The last row of rounds.csv, and the seconds that the whole command took."""
    with tempfile.TemporaryDirectory() as logs:
        settings = [
            f"dataset.path={data}",
            *COMMON,
            f"model.name={name}",
            *(f"model.config.{size}" for size in sizes.split()),
        ]
        print("python -m tracefl.main", *settings, flush=True)
        started = time.perf_counter()
        command = [sys.executable, "-m", "tracefl.main", f"storage.dir={logs}", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        (table,) = Path(logs).glob("tracefl-*/rounds.csv")
        rounds = pd.read_csv(table)
        names = {"localization_accuracy": "neuron", "localization_accuracy_influence": "influence"}
        names |= {"top_holder_accuracy": "neuron_top", "top_holder_accuracy_influence": "influence_top"}
        wanted = ["chance_accuracy", "top_holder_chance", *names]
        mean = rounds[wanted].mean().rename(names)
        return pd.concat([pd.Series({"accuracy": rounds["accuracy"].iloc[-1], "seconds": seconds}), mean])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of dbpedia_14")
    data = parser.parse_args().data
    results = pd.DataFrame({name: learn(name, sizes, data) for name, sizes in MODELS.items()}).T
    print(results.round(3).to_string())
    if (results["accuracy"] < GOAL).any():
        sys.exit(f"a model stayed below {GOAL}")


if __name__ == "__main__":
    main()
