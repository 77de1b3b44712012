"""A model's folder, looked at before transformers opens a file of it.

Nothing in a folder is run: weights are safetensors, never pickles, all files lie in the folder, and
no entry of its JSON files asks for code of its own, for kernels or for another folder.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from tracefl.errors import TraceFLError, require

INDEX = "model.safetensors.index.json"
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # by transformers
LARGEST_JSON = 200 * 2**20  # bytes; the largest tokenizers have 35 MB
# Entries that make transformers run or fetch what is not in the folder.
CODE = (
    *("auto_map", "custom_pipelines", "trust_remote_code", "transformers_weights", "quantization_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels", "kernel_config"),
)
LAYERS, LARGEST = 1000, 2**31 - 1  # of a model; of any other number in its config


def check_folder(folder: Path) -> None:
    """Refuse a folder with anything but a model's configuration, weights and tokenizer.

    Raises:
        TraceFLError: The message names the file, what is wrong with it, and the remedy.
    """
    require(not (folder / "adapter_config.json").exists(), _says(folder / "adapter_config.json", "names another model"))
    for file in sorted(file for pattern in READ for file in folder.glob(pattern)):
        _check_file(file, folder)
    for name in ("config.json", "tokenizer_config.json", INDEX):
        if (folder / name).exists():
            content = _read(folder / name)
            check_index(content, folder / name) if name == INDEX else check_entries(content, folder / name)


def check_entries(content: Any, file: Path) -> None:
    """Refuse a configuration that asks for code, or has sizes that no model has.

    Args:
        content: Of the JSON file.
        file: Named in the message.
    """
    asked = [entry for entry in CODE if isinstance(content, dict) and content.get(entry)]
    require(not asked, _says(file, f"has the entry {', '.join(asked)}, which asks for more than is in the folder"))
    check_sizes(content, str(file))


def check_sizes(entries: Any, where: str) -> None:
    """Refuse numbers in a configuration with which a model could not be built in any memory.

    Raises:
        TraceFLError: The message names the entry.
    """
    for name, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(value, dict):
            check_sizes(value, where)
        if isinstance(value, int) and not name.endswith("_id"):
            most = LAYERS if "layer" in name and not name.startswith("layer") else LARGEST
            must = f"{where}: {name} must be at most {most}, got {value}"
            require(abs(value) <= most or name.endswith("max_length"), f"{must}: correct it.")


def check_index(content: Any, file: Path) -> None:
    """Refuse a list of shards that names anything but safetensors beside it.

    Args:
        content: Of model.safetensors.index.json.
        file: Named in the message; the shards lie beside it.

    Raises:
        TraceFLError: The message names the shard.
    """
    shards = content.get("weight_map") if isinstance(content, dict) else None
    told = isinstance(shards, dict) and shards and isinstance(content.get("metadata", {}), dict)
    require(told, _says(file, "has no weight_map from tensors to files"))
    for name in sorted(set(map(str, shards.values()))):  # type: ignore[union-attr]
        plain = name.endswith(".safetensors") and name == Path(name).name and "\\" not in name
        require(plain, _says(file, f"names {name!r}, which is no safetensors file in the folder"))


def _check_file(file: Path, folder: Path) -> None:
    target = Path(os.path.realpath(file))
    of_the_hub = folder.resolve().parents[1] / "blobs" if len(folder.resolve().parts) > 2 else folder
    inside = target.is_relative_to(folder.resolve()) or target.parent == of_the_hub
    require(inside, _says(file, f"is a link to {target}, outside of the folder"))
    regular = target.exists() and stat.S_ISREG(target.stat().st_mode)
    require(regular, _says(file, "is no file"))
    large = file.suffix == ".json" and target.stat().st_size > LARGEST_JSON
    require(not large, _says(file, f"has more than {LARGEST_JSON // 2**20} MB"))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TraceFLError(_says(file, f"is no JSON that can be read ({type(error).__name__})")) from error


def _says(file: Path, what: str) -> str:
    remedy = "give a folder of your own as save_pretrained(..., safe_serialization=True) leaves it"
    return f"model.path: {file} {what}, so that nothing of the folder is read: {remedy}."
