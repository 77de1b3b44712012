"""States, data and tables of another form than a run has, with hashes that fit: a sentence wherever they are read."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.damage.tiny import command, numbers, the_run, use_tiny_models
from tests.rewriting import rewrite
from tracefl.commands.removing import whatif
from tracefl.data.prepared import digest_of, read_info
from tracefl.errors import TraceFLError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        patch.chdir(tmp_path_factory.mktemp("forged"))
        command(Path("logs"), "convert_cache_to_csv=false")()
        yield the_run(Path("logs").resolve())


def forge(file: Path, **changes) -> str:
    """Other tensors in a file; None: none. Its SHA-256."""
    state = {name: value for name, value in {**load_file(file), **changes}.items() if value is not None}
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def in_round(name: str, key: str, **changes):
    def change(run: Path) -> None:
        sha256 = forge(run / "rounds/0002" / name, **changes)
        rewrite(run / "run.json", lambda header: header["rounds"][1].update({key: sha256}))

    return change


def of_predictions(**changes):
    return in_round("predictions.safetensors", "predictions_sha256", **changes)


def of_client(**changes):
    def change(run: Path) -> None:
        sha256 = forge(run / "rounds/0002/clients/1.safetensors", **changes)
        rewrite(run / "run.json", lambda header: header["rounds"][1]["clients"][1].update(sha256=sha256))

    return change


def of_data(**changes):
    def change(run: Path) -> None:
        (data,) = (run.parent / "data").iterdir()
        sha256 = forge(data / "server.safetensors", **changes)
        rewrite(data / "data.json", lambda info: info["sha256"].update({"server.safetensors": sha256}))
        rewrite(run / "run.json", lambda header: header.update(data_sha256=digest_of(read_info(data)["sha256"])))

    return change


W, B = torch.zeros(3, 48), torch.zeros(10)
FORGED = {  # what is changed -> what is refused
    "predictions of nothing": (of_predictions(predictions=None, x=B), "predictions 2"),
    "predictions in rows": (of_predictions(predictions=torch.zeros(1, 10, dtype=torch.int64)), "predictions 2"),
    "predictions as fractions": (of_predictions(predictions=B), "predictions 2"),
    "a client of complex numbers": (of_client(**{"2.weight": W.to(torch.complex64)}), "whatif"),
    "a client of another shape": (of_client(**{"2.weight": W[:2]}), "trace"),
    "a model without an entry": (in_round("global.safetensors", "global_sha256", **{"2.weight": None}), "whatif"),
    "a model of truth values": (in_round("global.safetensors", "global_sha256", **{"2.weight": W > 0}), "whatif"),
    "a model of another shape": (in_round("global.safetensors", "global_sha256", **{"4.bias": B[:0]}), "trace"),
    "labels of no class": (of_data(labels=torch.full((10,), 10)), "trace"),
    "negative labels": (of_data(labels=torch.full((10,), -1)), "trace"),
    "fewer labels than images": (of_data(labels=torch.zeros(9, dtype=torch.int64)), "trace"),
    "small images": (of_data(pixels=torch.zeros(10, 1, 16, 16, dtype=torch.uint8)), "trace"),
    "no images": (of_data(pixels=None), "trace"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGED)
def test_what_has_another_form_is_one_sentence(run, name):
    files = [file for file in run.parent.rglob("*") if file.is_file()]
    before = {file: file.read_bytes() for file in files}
    change, refused = FORGED[name]
    try:
        change(run)
        found = numbers(run)  # a traceback ends it
        try:
            found["whatif"] = whatif(run, ["1"], None, None, 1.0)
        except TraceFLError as error:
            found["whatif"] = error
        assert isinstance(found[refused], TraceFLError), found[refused]
        assert len(str(found[refused])) < 600
    finally:
        for file, content in before.items():
            file.write_bytes(content)
