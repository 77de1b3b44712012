"""Command lines that users type compose to what they mean."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from tracefl.config import (
    DIST_TYPES,
    IMAGE_MODELS,
    MIRRORED,
    NOT_TRAINING,
    Config,
    data_settings,
    fault_settings,
    flip_rates,
    run_folder,
    training_settings,
)


def test_defaults_fill_every_setting(config):
    plain = OmegaConf.structured(config())
    assert not OmegaConf.missing_keys(plain)
    assert OmegaConf.to_container(plain, throw_on_missing=True)["dataset"]["name"] == "digits"


@pytest.mark.parametrize("value", DIST_TYPES)
def test_every_distribution_is_accepted(config, value):
    assert config(f"data_dist.dist_type={value}").data_dist.dist_type == value


@pytest.mark.parametrize("value", IMAGE_MODELS)
def test_every_image_model_is_accepted(config, value):
    assert config(f"model.name={value}").model.name == value


def test_top_level_keys_reach_the_groups_that_read_them(config):
    c = config(
        "num_clients=7", "clients_per_round=4", "num_rounds=2", "dirichlet_alpha=1", "batch_size=8", "client_cpus=1",
        "client_gpu=0.5", "noise_multiplier=-1",
    )  # fmt: skip
    assert (c.data_dist.num_clients, c.strategy.clients_per_round, c.strategy.num_rounds) == (7, 4, 2)
    assert (c.data_dist.dirichlet_alpha, c.data_dist.batch_size) == (1.0, 8)
    assert (c.client_resources.cpus, c.client_resources.gpus) == (1.0, 0.5)
    assert config("client_resources.cpus=0.5", "client_resources.gpus=0.25").client_resources.gpus == 0.25


def test_faulty_clients_and_flips_as_the_shell_passes_them(config):
    flips = "{" + ",".join(f"{label}:0" for label in range(1, 14)) + "}"
    c = config("faulty_clients_ids=[0]", f"label2flip={flips}", 'data_dist.dist_type="PathologicalPartitioner-3"')
    assert c.faulty_clients_ids == [0]
    assert c.label2flip == dict.fromkeys(range(1, 14), 0)
    quoted = config('faulty_clients_ids=["8"]', "label2flip={8:7,0:7,1:7}", "noise_rate={8:7,0:7,1:7}")
    assert quoted.faulty_clients_ids == [8]
    assert flip_rates(quoted) == {8: 1.0, 0: 1.0, 1: 1.0}
    to_zero = config("faulty_clients_ids=[0]", "label2flip={1:0}", "noise_rate={1:0}")
    assert flip_rates(to_zero) == {1: 1.0}


def test_the_paper_method_always_comes_first(config):
    assert config("provenance.methods=[influence,neuron,influence]").provenance.methods == ["neuron", "influence"]


def test_a_folder_gives_its_name_and_the_usual_learning_rate(config, tmp_path):
    c = config(f"dataset.path={tmp_path}")
    assert (c.dataset.name, c.client.lr, config().client.lr) == (tmp_path.name, 0.001, 0.0003)
    tuned = config("dataset.name=dbpedia_14", "model.name=google-bert/bert-base-cased", "model.pretrained=true")
    assert tuned.client.lr == 0.00005


def test_noise_rate_is_a_share_for_all_labels_or_per_label(config):
    faults = ("faulty_clients_ids=[1]", "label2flip={3:4,5:6}")
    assert flip_rates(config(*faults, "noise_rate=0.5")) == {3: 0.5, 5: 0.5}
    assert flip_rates(config(*faults, "noise_rate={3:0.25}")) == {3: 0.25, 5: 1.0}


def test_a_shard_distribution_needs_no_alpha(config):
    c = config("data_dist.dist_type=sharded-non-iid-2", "dirichlet_alpha=-1", "data_dist.max_per_client_data_size=-1")
    assert run_folder(c) == run_folder(
        config("data_dist.dist_type=sharded-non-iid-2", "data_dist.max_per_client_data_size=-1")
    )


TRAINING = [
    "seed=1", "num_clients=11", "clients_per_round=9", "num_rounds=3", "dirichlet_alpha=0.5", "batch_size=8",
    "client.epochs=1", "client.lr=0.01", "model.name=resnet34", "model.pretrained=true", "dataset.name=mnist",
    "dataset.path=.", "dataset.num_classes=12", "dataset.channels=3", "client_resources.cpus=2",
    "data_dist.max_per_client_data_size=100", "data_dist.max_server_data_size=100", "dataset.label_column=label",
    "data_dist.dist_type=sharded-non-iid-1", "device=cuda", "strategy.name=fedadam", "strategy.name=fedadam",
]  # fmt: skip
OF_TEXT = [
    "model.config={hidden_size: 64}", "dataset.max_tokens=64", "model.tokenizer=own", "model.name=gpt2",
    "model.pretrained=true", "model.path=.",
]  # fmt: skip
OTHER = [
    "do_provenance=false", "do_training=false", "plotting=true", "enable_beta=false", "provenance.inputs_per_label=5",
    "check_train_cache=false", "total_cpus=1", "accept_failures=true",
    "client_weights_normalization=true", "parallel_processes=1",
]  # fmt: skip


@pytest.mark.parametrize("override", TRAINING)
def test_a_training_setting_gives_another_run(config, override):
    assert run_folder(config(override)) != run_folder(config())


@pytest.mark.parametrize("override", OF_TEXT)
def test_a_training_setting_of_a_text_model_gives_another_run_and_other_tokens(config, override):
    bert = "model.name=google-bert/bert-base-cased"
    assert run_folder(config(bert, override)) != run_folder(config(bert))
    assert data_settings(config(bert, override)) != data_settings(config(bert))


def test_images_do_not_depend_on_what_concerns_texts(config):
    assert run_folder(config("dataset.max_tokens=64")) == run_folder(config())


def test_fault_settings_give_another_run(config):
    one = config("faulty_clients_ids=[1]", "label2flip={1:0}")
    folders = {
        run_folder(c)
        for c in (
            config(),
            one,
            config("faulty_clients_ids=[2]", "label2flip={1:0}"),
            config("faulty_clients_ids=[1]", "label2flip={1:2}"),
            config("faulty_clients_ids=[1]", "label2flip={1:0}", "noise_rate=0.5"),
        )
    }
    assert len(folders) == 5
    backdoor = ("faulty_clients_ids=[1]", "fault.kind=backdoor")
    options = ([], ["noise_rate=0.5"], ["fault.target=3"])
    assert len({run_folder(config(*backdoor, *extra)) for extra in options}) == 3


def test_the_order_of_flips_changes_nothing(config):
    one, other = (config("faulty_clients_ids=[1]", f"label2flip={flips}") for flips in ("{1:0,2:3}", "{2:3,1:0}"))
    assert run_folder(one) == run_folder(other)
    assert fault_settings(one, 10) == fault_settings(other, 10)


@pytest.mark.parametrize("override", OTHER)
def test_another_setting_keeps_the_run(config, override):
    assert run_folder(config(override)) == run_folder(config())


def test_every_setting_is_either_hashed_or_declared_as_not_training(config):
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields >= NOT_TRAINING
    hashed = training_settings(config()).keys()
    assert fields - NOT_TRAINING - MIRRORED - hashed == {"dataset", "data_dist", "client_resources"}


def test_the_run_folder_is_named_by_exp_key(config):
    assert run_folder(config("exp_key=artifact_exp")).name.startswith("artifact_exp-")
