"""What the machine lacks is one sentence, before anything is prepared or trained."""

import os

import pytest
import torch

from tracefl.errors import TraceFLError
from tracefl.machine import check_device, check_storage
from tracefl.settings import run_folder


@pytest.fixture
def built_for_gpus(monkeypatch):
    monkeypatch.setattr("tracefl.machine.version", lambda _: "2.9.0+cu128")


def test_a_gpu_is_asked_for_only_where_there_is_one(config, monkeypatch, built_for_gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device(config())
    with pytest.raises(TraceFLError, match=r"device must be cpu .*, got cuda:1: set device=cpu"):
        check_device(config("device=cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device(config("device=cuda"))
    check_device(config("device=cuda:1", "total_gpus=2"))
    with pytest.raises(TraceFLError, match=r"device must name one of the 2 GPUs .*, got cuda:2: set device=cuda:1"):
        check_device(config("device=cuda:2"))
    for key in ("total_gpus", "client_gpu"):
        with pytest.raises(TraceFLError, match=rf"{key} must be at most 2, of the 2 GPUs .*, got 3"):
            check_device(config("device=cuda", f"{key}=3"))


def test_a_torch_without_gpus_is_known_by_its_version(config, monkeypatch):
    monkeypatch.setattr("tracefl.machine.version", lambda _: "2.9.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    with pytest.raises(TraceFLError, match=r"device must be cpu where torch sees no GPU, got cuda: set device=cpu"):
        check_device(config("device=cuda"))


def in_the_way(where, what: str) -> str:
    """A storage.dir at which nothing can be stored."""
    place = where / "there"
    if what == "file":
        place.write_text("")
    elif what == "dangling":
        place.symlink_to(where / "nowhere")
    elif what == "loop":
        place.symlink_to(place)
    elif what == "data":
        place.mkdir()
        (place / "data").write_text("")
    return {"null": "/dev/null", "long": "x" * 300, "proc": "/proc/1/logs"}.get(what, str(place))


@pytest.mark.parametrize("what", ["file", "dangling", "loop", "data", "null", "long", "proc"])
def test_a_place_that_keeps_nothing_is_refused(config, tmp_path, what):
    settings = config(f"storage.dir={in_the_way(tmp_path, what)}")
    with pytest.raises(TraceFLError, match=r"storage\.dir=.*: .*(remove|name another|shorten|put it there)"):
        check_storage(settings)


def test_a_file_where_the_runs_folder_belongs_is_named(config, tmp_path):
    settings = config()
    run_folder(settings).parent.mkdir(parents=True)
    run_folder(settings).write_text("")
    with pytest.raises(TraceFLError, match=rf"{run_folder(settings).name} is no folder: remove it"):
        check_storage(settings)


def test_a_finished_run_may_lie_where_nothing_is_written(config, monkeypatch):
    settings = config()
    run_folder(settings).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TraceFLError, match="nothing can be written to"):
        check_storage(settings)
    (run_folder(settings) / "run.json").write_text("{}")
    check_storage(settings)
