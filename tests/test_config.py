"""Command lines that users type compose to what they mean."""

import pytest
from omegaconf import OmegaConf

from tracefl.checks import load
from tracefl.config import ALIASES, DIST_TYPES, IMAGE_MODELS, STRATEGIES, Config, leaves


def test_defaults_fill_every_setting(config):
    plain = OmegaConf.structured(config())
    assert not OmegaConf.missing_keys(plain)
    assert OmegaConf.to_container(plain, throw_on_missing=True)["dataset"]["name"] == "digits"


def test_what_was_checked_is_checked_again_to_the_same(config):
    c = config("faulty_clients_ids=[1]", "label2flip={3:4}", "noise_rate={3:0.5}", "client.epochs=1")
    assert load(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(c)))) == c  # as a run's config.yaml is read


def test_two_configurations_share_no_list():
    first, second = Config(), Config()
    first.provenance.methods.append("x")
    first.faulty_clients_ids.append(1)
    assert second == Config()


@pytest.mark.parametrize("value", DIST_TYPES)
def test_every_distribution_is_accepted(config, value):
    assert config(f"data_dist.dist_type={value}").data_dist.dist_type == value


def test_the_distributions_of_the_artifact_are_known():
    assert set(DIST_TYPES) == {
        "non_iid_dirichlet", "PathologicalPartitioner-1", "PathologicalPartitioner-2", "PathologicalPartitioner-3",
        "sharded-non-iid-1", "sharded-non-iid-2", "sharded-non-iid-3",
    }  # fmt: skip


@pytest.mark.parametrize("value", IMAGE_MODELS)
def test_every_image_model_is_accepted(config, value):
    c = config(f"model.name={value}", "model.arch=cnn")
    assert (c.model.name, c.arch) == (value, "cnn")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_of_a_strategy_is_accepted(config, name):
    options = {key: 1 if rule.holds(1) else 0.25 for key, rule in STRATEGIES[name].items()}
    words = [f"strategy.options.{key}={value}" for key, value in options.items()]
    assert config(f"strategy.name={name}", *words).strategy.options == options


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_an_alias_is_read_from_its_setting(config, alias, key):
    value = {"noise_multiplier": "-1", "clipping_norm": "-1", "clients_per_round": "4"}.get(key, "10")
    value = "0.5" if key.startswith("client_") else value
    assert float(getattr(config(f"{alias}={value}"), key)) == float(value)
    assert config(f"{alias}={value}") == config(f"{key}={value}")


def test_faulty_clients_and_flips_as_the_shell_passes_them(config):
    flips = "{" + ",".join(f"{label}:0" for label in range(1, 14)) + "}"
    c = config("faulty_clients_ids=[0]", f"label2flip={flips}", 'data_dist.dist_type="PathologicalPartitioner-3"')
    assert c.faulty_clients_ids == [0]
    assert c.label2flip == dict.fromkeys(range(1, 14), 0)
    quoted = config('faulty_clients_ids=["8"]', "label2flip={8:7,0:7,1:7}", "noise_rate={8:7,0:7,1:7}")
    assert (quoted.faulty_clients_ids, quoted.noise_rate) == ([8], 1.0)
    expanded = config(
        "faulty_clients_ids=[8]", "label2flip=8:7", "label2flip=0:7", "noise_rate=8:0.5", "noise_rate=0:1"
    )
    assert (expanded.label2flip, expanded.noise_rate) == ({8: 7, 0: 7}, {8: 0.5, 0: 1})
    to_zero = config("faulty_clients_ids=[0]", "label2flip={1:0}", "noise_rate={1:0}")
    assert to_zero.noise_rate == 1.0


def test_the_paper_method_always_comes_first(config):
    assert config("provenance.methods=[influence,neuron,influence]").provenance.methods == ["neuron", "influence"]


def test_a_folder_gives_its_name(config, tmp_path):
    (tmp_path / "train.csv").write_text("")
    assert config(f"dataset.path={tmp_path}").dataset.name == tmp_path.name
    assert config(f"dataset.path={tmp_path}", "dataset.name=pets").dataset.name == "pets"


def test_the_learning_rate_follows_from_data_and_model(config, tmp_path):
    (tmp_path / "train.csv").write_text("")
    bert = ("dataset.name=dbpedia_14", "model.name=google-bert/bert-base-cased")
    assert config().client.lr == config("model.pretrained=true").client.lr == 0.0003
    assert config("dataset.name=mnist").client.lr == config(f"dataset.path={tmp_path}").client.lr == 0.001
    assert config(*bert).client.lr == 0.001
    assert config(*bert, "model.pretrained=true").client.lr == 0.00005
    assert config(*bert, "model.pretrained=true", "client.lr=0.01").client.lr == 0.01


def test_a_shard_distribution_needs_no_alpha(config):
    c = config("data_dist.dist_type=sharded-non-iid-2", "dirichlet_alpha=-1", "data_dist.max_per_client_data_size=-1")
    assert (c.dirichlet_alpha, c.data_dist.max_per_client_data_size) == (-1, -1)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_shipped_scale_composes(config, scale):
    assert config(f"+scale={scale}").num_clients == {"small": 10, "paper": 100}[scale]


def test_keys_of_groups_are_dotted():
    assert {"seed", "client.lr", "provenance.methods", "storage.dir"} <= {key for key, _ in leaves()}
    assert not {"client", "storage"} & {key for key, _ in leaves()}
