"""The proof table of docs/benchmarks.md: four model families, on images and texts; clean, faulty and private.

    python benchmarks/proof.py data [key=value ...]

Each row is one command, printed first; a finished run is not trained again. Then the table in Markdown.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

IMAGES = ["client.epochs=1", "num_rounds=4"]
TEXTS = ["dataset.path={data}/dbpedia_14", "dataset.max_tokens=32", "client.lr=0.002", "num_rounds=10"]
BERT = "num_hidden_layers=2 hidden_size=64 num_attention_heads=2 intermediate_size=256"
GPT = "n_layer=2 n_embd=64 n_head=2"
MNIST = ["dataset.path={data}/mnist", "data_dist.max_per_client_data_size=400", "model.name=resnet18"]
FAMILIES = {
    "ResNet-18, MNIST": [*IMAGES, *MNIST],
    "DenseNet-121, digits": [*IMAGES, "model.name=densenet121"],
    "BERT (2 x 64), DBpedia": [
        *TEXTS,
        "model.name=google-bert/bert-base-cased",
        *(f"model.config.{x}" for x in BERT.split()),
    ],
    "GPT (2 x 64), DBpedia": [
        *TEXTS,
        "model.name=openai-community/openai-gpt",
        *(f"model.config.{x}" for x in GPT.split()),
    ],
}
ALL_TO_ZERO = ",".join(f"{label}:0" for label in range(1, 14))
SETTINGS = {
    "clean": [],
    "faulty": ["dirichlet_alpha=0.7", "faulty_clients_ids=[9]", f"label2flip={{{ALL_TO_ZERO}}}"],
    "private": ["noise_multiplier=0.003", "clipping_norm=15"],
}


def row(family: str, setting: str, logs: Path, data: str, extra: list[str]) -> dict[str, str]:
    words = [word.format(data=data) if "{data}" in word else word for word in FAMILIES[family]] + SETTINGS[setting]
    key = f"{family.split(',')[0].split()[0].lower()}-{setting}"
    print("python -m tracefl.main", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "tracefl.main", f"storage.dir={logs}", f"exp_key={key}", *words, *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    folder = max(logs.glob(f"{key}-*"), key=lambda path: (path / "rounds.csv").stat().st_mtime)
    rounds, timings = pd.read_csv(folder / "rounds.csv"), pd.read_csv(folder / "timings.csv").set_index("method")
    mean, seconds = rounds.mean(), timings["seconds_per_localization"]
    percent = (100 * mean).map("{:.1f}".format)
    return {
        "model, data": family,
        "setting": setting,
        "global accuracy": f"{100 * rounds['accuracy'].iloc[-1]:.1f}",
        "localization (neuron / influence)": " / ".join(
            percent[["localization_accuracy", "localization_accuracy_influence"]]
        ),
        "by chance": percent["chance_accuracy"],
        "top holder (neuron / influence)": " / ".join(
            percent[["top_holder_accuracy", "top_holder_accuracy_influence"]]
        ),
        "top holder by chance": percent["top_holder_chance"],
        "FedDebug": percent.get("feddebug_accuracy", "-"),
        "seconds per input": " / ".join(
            f"{seconds.get(method, float('nan')):.3f}" for method in ("neuron", "influence")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the folder of real datasets")
    parser.add_argument("--logs", type=Path, default=Path("logs/proof"))
    parser.add_argument("--only", default="", help="rows whose family or setting holds this word")
    arguments, extra = parser.parse_known_args()
    rows = [
        row(family, setting, arguments.logs, arguments.data, extra)
        for family in FAMILIES
        for setting in SETTINGS
        if arguments.only in f"{family} {setting}"
    ]
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for cells in rows:
        print("| " + " | ".join(cells.values()) + " |")


if __name__ == "__main__":
    main()
