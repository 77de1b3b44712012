"""The hash of a run covers every setting that can change a trained weight, and no other."""

import copy
from operator import attrgetter

import pytest

from tracefl.config import Config, Model, leaves
from tracefl.settings import (
    client_threads,
    data_settings,
    file_stamps,
    fingerprint,
    model_stamps,
    run_folder,
    training_settings,
    visible_files,
)

TRAINS = {key: field.metadata["trains"] for key, field in leaves()}
NOT_TRAINING = {
    *("exp_key", "storage.dir", "storage.keep", "storage.dtype", "total_cpus", "total_gpus", "client_gpu"),
    *("round_timeout", "accept_failures", "ray.address"),
    *("dry_run", "do_training", "do_provenance", "plotting", "convert_cache_to_csv", "model.arch", "tracking"),
    "report",
    *("check_dataset_cache", "check_train_cache", "check_prov_cache", "do_feddebug", "do_audit"),
    *("enable_beta", "client_weights_normalization", "parallel_processes", "neuron_activation_threshold"),
    *("provenance.scope", "provenance.proxies", "provenance.methods"),
    *("provenance.inputs_per_label", "provenance.max_mispredictions"),
    *("evaluation.coalitions", "evaluation.coalition_inputs", "faster_input_generation"),
}
# Of these every setting counts: texts, spread by Dirichlet, with faulty clients.
EVERYTHING_MATTERS = Config(model=Model("google-bert/bert-base-cased"), faulty_clients_ids=[1], label2flip={1: 0})
DATA = ("seed", "num_clients", "dirichlet_alpha", "dataset.", "data_dist.", "model.")


def another(value: object) -> object:
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {str: "other", list: [7], dict: {3: 4}, type(None): "other"}[type(value)]


def changed(config, key: str):
    """A copy of the configuration in which one setting differs."""
    config = copy.deepcopy(config)
    *path, name = key.split(".")
    group = attrgetter(".".join(path))(config) if path else config
    setattr(group, name, another(getattr(group, name)))
    return config


def test_what_does_not_train_is_what_we_think():
    assert {key for key, trains in TRAINS.items() if not trains} == NOT_TRAINING


@pytest.mark.parametrize("key", TRAINS)
def test_a_setting_gives_another_run_if_and_only_if_it_trains(key):
    before = EVERYTHING_MATTERS
    after = changed(before, key)
    assert (training_settings(after) != training_settings(before)) == TRAINS[key]
    assert (fingerprint(data_settings(after)) != fingerprint(data_settings(before))) == (
        TRAINS[key] and key.startswith(DATA)
    )


@pytest.mark.parametrize("key", ["dataset.max_tokens", "label2flip", "noise_rate", "fault.target", "dirichlet_alpha"])
def test_what_has_no_effect_beside_the_others_keeps_the_run(config, key):
    without_it = config("data_dist.dist_type=sharded-non-iid-2")
    assert run_folder(changed(without_it, key)) == run_folder(without_it)


def test_images_do_not_depend_on_the_model_and_texts_do(config):
    for name, depends in (("resnet34", False), ("gpt2", True)):
        assert (data_settings(config(f"model.name={name}")) != data_settings(config())) == depends


def test_different_faults_are_different_runs(config):
    one = ("faulty_clients_ids=[1]", "label2flip={1:0}")
    backdoor = ("faulty_clients_ids=[1]", "fault.kind=backdoor")
    commands = [
        (), one, ("faulty_clients_ids=[2]", "label2flip={1:0}"), ("faulty_clients_ids=[1]", "label2flip={1:2}"),
        (*one, "noise_rate=0.5"), (*one, "noise_rate={1:0.25}"), backdoor, (*backdoor, "noise_rate=0.5"),
        (*backdoor, "fault.target=3"),
    ]  # fmt: skip
    assert len({run_folder(config(*command)) for command in commands}) == len(commands)
    assert run_folder(config(*one, "noise_rate={1:0}")) == run_folder(config(*one))  # the artifact's "all of them"


def test_excluded_clients_are_another_run_by_who_they_are(config):
    eight = ("clients_per_round=8",)
    runs = [
        run_folder(config(*eight, f"exclude_clients={some}")) for some in ("[]", "[1,3]", "[3,1]", "[1,3,1]", "[1]")
    ]
    assert runs[1] == runs[2] == runs[3]
    assert len({run_folder(config(*eight)), *runs}) == 3
    assert run_folder(config(*eight)) == runs[0]
    assert data_settings(config(*eight, "exclude_clients=[1]")) == data_settings(config(*eight))


def test_the_default_run_keeps_its_name(config):
    assert run_folder(config()).name == "tracefl-a91c9d33"
    assert "exclude_clients" not in training_settings(config())


def test_a_fault_of_an_excluded_client_changes_nothing(config):
    out, fault = ("clients_per_round=8", "exclude_clients=[1,2]"), ("faulty_clients_ids=[2]", "label2flip={1:0}")
    assert run_folder(config(*out, *fault)) == run_folder(config(*out))
    assert run_folder(config(*out, "faulty_clients_ids=[2,4]", "label2flip={1:0}")) == run_folder(
        config(*out, "faulty_clients_ids=[4]", "label2flip={1:0}")
    )


def test_the_order_of_flips_changes_nothing(config):
    one, other = (config("faulty_clients_ids=[1]", f"label2flip={flips}") for flips in ("{1:0,2:3}", "{2:3,1:0}"))
    assert run_folder(one) == run_folder(other)


def test_a_folder_counts_by_where_it_is(config, tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "train.csv").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert run_folder(config("dataset.path=pets")) == run_folder(config(f"dataset.path={tmp_path}/pets"))


def test_other_model_files_are_another_run_and_other_tokens(config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    before = config(f"model.path={tmp_path}")
    found = run_folder(before), data_settings(before)
    (tmp_path / "model.safetensors").write_text("weights")
    assert run_folder(before) != found[0]
    assert data_settings(before) != found[1]


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer", "dataset.path", "dataset.label_column", "client.lr"])
def test_an_optional_setting_left_empty_is_one_left_out(config, key):
    assert run_folder(config(f"{key}=")) == run_folder(config())


def fill(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_stamps_leave_out_hidden_files_and_installed_packages(tmp_path):
    fill(tmp_path, "a.csv", "deep/b.csv", ".git/c", ".venv/d", "env/pyvenv.cfg", "env/lib/e", "deep/.cache/f")
    fill(tmp_path, "mini/conda-meta/history", "mini/lib/g", "deep/node_modules/h/i.json", "lib/site-packages/k.txt")
    assert [stamp[:2] for stamp in file_stamps(str(tmp_path))] == [("a.csv", 5), ("deep/b.csv", 10)]
    assert file_stamps(f"{tmp_path}/") == file_stamps(str(tmp_path))
    assert file_stamps(None) == []
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a.csv")  # as the hub's cache does
    assert sorted(file.name for file in visible_files(tmp_path)) == ["a.csv", "b.csv", "linked"]


def test_a_models_subfolders_are_not_read(tmp_path, monkeypatch):
    fill(tmp_path, "config.json", "model.safetensors", ".gitattributes", "env/lib/a", "onnx/model.onnx")
    monkeypatch.setattr("tracefl.settings.visible_files", lambda _: pytest.fail("its subfolders were listed"))
    assert [stamp[:2] for stamp in model_stamps(str(tmp_path))] == [("config.json", 11), ("model.safetensors", 17)]
    assert model_stamps(None) == []


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (1.9, 1), (3, 3)])
def test_a_client_has_a_thread_per_cpu(config, cpus, threads):
    c = config()
    c.client_cpus = cpus
    assert client_threads(c) == training_settings(c)["client_threads"] == threads


def test_the_run_folder_is_named_by_exp_key(config, tmp_path):
    c = config("exp_key=artifact_exp")
    assert run_folder(c).parent == tmp_path / "logs"
    assert run_folder(c).name == f"artifact_exp-{fingerprint(training_settings(c))}"
