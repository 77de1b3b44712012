"""Every impossible value is refused in one sentence that says the setting, the value and what to do."""

from operator import attrgetter

import pytest
from omegaconf import OmegaConf

from tracefl.checks import load, numbered_labels, unknown
from tracefl.config import ALIASES, Config, leaves
from tracefl.errors import TraceFLError

BERT = "model.name=google-bert/bert-base-cased"
FLIP = ["faulty_clients_ids=[1]", "label2flip={1:0}"]
BACKDOOR = ["faulty_clients_ids=[1]", "fault.kind=backdoor"]
CASES = [  # overrides, how the sentence starts, the value that it quotes, a word of what to do
    # one setting
    (["exp_key=a/b"], "exp_key must", "got a/b", "letters, digits"),
    (["seed=-1"], "seed must", "got -1", "at least 0"),
    (["seed=9223372036854775808"], "seed must", "got 9223372036854775808", "below 9223372036854775808"),
    (["num_clients=0"], "num_clients must", "got 0", "at least 1"),
    (["num_clients=-3"], "num_clients must", "got -3", "at least 1"),
    (["clients_per_round=0"], "clients_per_round must", "got 0", "at least 1"),
    (["num_rounds=0"], "num_rounds must", "got 0", "at least 1"),
    (["strategy.num_rounds=0"], "num_rounds must", "got 0", "at least 1"),
    (["batch_size=0"], "batch_size must", "got 0", "at least 1"),
    (["client.epochs=0"], "client.epochs must", "got 0", "at least 1"),
    (["client.lr=0"], "client.lr must", "got 0", "above 0"),
    (["client.lr=-0.1"], "client.lr must", "got -0.1", "above 0"),
    (["client.lr=inf"], "client.lr must", "got inf", "above 0"),
    (["client.lr=nan"], "client.lr must", "got nan", "above 0"),
    (["noise_multiplier=-0.5", "clipping_norm=15"], "noise_multiplier must", "got -0.5", "-1 for no privacy"),
    (["noise_multiplier=0.5", "clipping_norm=0"], "clipping_norm must", "got 0", "-1 for no privacy"),
    (["total_cpus=0"], "total_cpus must", "got 0", "or null"),
    (["total_gpus=0"], "total_gpus must", "got 0", "or null"),
    (["client_cpus=0"], "client_cpus must", "got 0", "above 0"),
    (["client_resources.cpus=-1"], "client_cpus must", "got -1", "above 0"),
    (["client_gpu=-1"], "client_gpu must", "got -1", "at least 0"),
    (["device=gpu"], "device must", "got gpu", "cpu, cuda or cuda:N"),
    (["device=cuda:x"], "device must", "got cuda:x", "cpu, cuda or cuda:N"),
    (["round_timeout=0"], "round_timeout must", "got 0", "above 0"),
    (["parallel_processes=0"], "parallel_processes must", "got 0", "-1 for all cores"),
    (["data_dist.dist_type=iid"], "data_dist.dist_type must", "got iid", "PathologicalPartitioner-1"),
    (["data_dist.min_examples_per_class=0"], "data_dist.min_examples_per_class must", "got 0", "at least 1"),
    (["data_dist.max_per_client_data_size=0"], "data_dist.max_per_client_data_size must", "got 0", "-1 for no limit"),
    (["data_dist.max_server_data_size=-2"], "data_dist.max_server_data_size must", "got -2", "-1 for no limit"),
    (["strategy.name=fedfoo"], "strategy.name must", "got fedfoo", "fedavg, fedprox"),
    (["dataset.num_classes=0"], "dataset.num_classes must", "got 0", "at least 2 and"),
    (["dataset.channels=2"], "dataset.channels must", "got 2", "1, 3, or null"),
    (["dataset.max_tokens=0"], "dataset.max_tokens must", "got 0", "at least 1"),
    (["dataset.path=no/such"], "dataset.path must", "got no/such", "a folder that exists"),
    (["model.path=no/such"], "model.path must", "got no/such", "config.json, as save_pretrained"),
    (["model.arch=rnn"], "model.arch must", "got rnn", "cnn, transformer"),
    (["model.tokenizer=mine"], "model.tokenizer must", "got mine", "own, trained, or null"),
    (["fault.kind=gremlin", "faulty_clients_ids=[1]"], "fault.kind must", "got gremlin", "label_flip, random_labels"),
    (["provenance.methods=[magic]"], "provenance.methods must", "got ['magic']", "neuron, influence"),
    (["provenance.methods=[]"], "provenance.methods must", "got []", "neuron, influence"),
    (["provenance.inputs_per_label=0"], "provenance.inputs_per_label must", "got 0", "at least 1"),
    (["provenance.max_mispredictions=0"], "provenance.max_mispredictions must", "got 0", "at least 1"),
    (["neuron_activation_threshold=1"], "neuron_activation_threshold must", "got 1", "below 1"),
    (["strategy=fedprox"], "strategy=fedprox sets a group", "fedprox", "such as strategy.name"),
    (["client=null"], "client=None sets a group", "None", "such as client.epochs"),
    (["faulty_clients_ids=[a]"], "faulty_clients_ids must", "got ['a']", "be a list"),
    # mappings
    (["label2flip=3"], "label2flip must", "got 3", "'{8:7,0:7}'"),
    (["label2flip={cat:dog}"], "label2flip must", "got {'cat': 'dog'}", "'{8:7,0:7}'"),
    (["model.config=3"], "model.config must", "got 3", "{NAME:VALUE}"),
    (["strategy.options=3"], "strategy.options must", "got 3", "{NAME:VALUE}"),
    # the federation
    (["clients_per_round=11"], "clients_per_round must", "got 11", "num_clients=10"),
    (["num_clients=4"], "clients_per_round must", "got 10", "num_clients=4"),
    (["dirichlet_alpha=0"], "dirichlet_alpha must", "got 0", "above 0"),
    (["dirichlet_alpha=-1"], "dirichlet_alpha must", "got -1", "above 0"),
    (["total_cpus=1", "client_cpus=4"], "client_cpus must", "got 4", "raise total_cpus"),
    # strategies
    (["strategy.options={eta: 1}"], "strategy.options.eta", "eta=1", "no options: leave it out"),
    (["strategy.name=fedadam", "strategy.options={zeta: 1}"], "strategy.options.zeta", "zeta=1", "eta_l"),
    (["strategy.name=fedadam", "strategy.options={eta: fast}"], "strategy.options.eta must", "got fast", "at least 0"),
    (["strategy.name=fedadam", "strategy.options={eta: -1}"], "strategy.options.eta must", "got -1", "at least 0"),
    (["strategy.name=fedadam", "strategy.options={tau: true}"], "strategy.options.tau must", "got True", "above 0"),
    (["strategy.name=fedadam", "strategy.options={tau: 0}"], "strategy.options.tau must", "got 0", "above 0"),
    (["provenance.scope=run", "storage.keep=last:3", "num_rounds=4"], "storage.keep must", "got last:3", "keep=all"),
    (["strategy.name=fedyogi", "strategy.options={beta_1: 1}"], "strategy.options.beta_1 must", "got 1", "below 1"),
    (["strategy.name=fedadam", "strategy.options={beta_2: -1}"], "strategy.options.beta_2 must", "got -1", "below 1"),
    (["strategy.name=fedtrimmedavg", "strategy.options={beta: 0.5}"], "strategy.options.beta must", "got 0.5", "below"),
    (["strategy.name=krum", "strategy.options={num_malicious_nodes: 0.5}"],
     "strategy.options.num_malicious_nodes must", "got 0.5", "a whole number"),
    (["strategy.name=krum", "strategy.options={num_malicious_nodes: -1}"],
     "strategy.options.num_malicious_nodes must", "got -1", "at least 0"),
    (["strategy.name=multikrum", "strategy.options={num_nodes_to_select: 0}"],
     "strategy.options.num_nodes_to_select must", "got 0", "at least 1"),
    (["strategy.name=multikrum", "strategy.options={num_nodes_to_select: 11}"],
     "strategy.options.num_nodes_to_select must", "got 11", "lower it"),
    (["strategy.name=krum", "strategy.options={num_malicious_nodes: 4}"],
     "clients_per_round must be at least 11", "got 10", "num_malicious_nodes=4"),
    (["strategy.name=multikrum", "clients_per_round=2"], "clients_per_round must be at least 3", "got 2", "multikrum"),
    (["strategy.name=bulyan", "strategy.options={num_malicious_nodes: 2}"],
     "clients_per_round must be at least 11", "got 10", "num_malicious_nodes=2"),
    (["strategy.name=fedprox"], "strategy.name=fedprox", "fedprox", "proximal_mu: set it above 0"),
    (["strategy.name=fedprox", "strategy.options={proximal_mu: 0}"], "strategy.name=fedprox", "fedprox", "proximal_mu"),
    (["strategy.name=fedavgm"], "strategy.name=fedavgm", "fedavgm", "server_momentum or server_learning_rate"),
    # clients that are left out
    (["exclude_clients=[10]"], "exclude_clients must be 0 to 9", "got [10]", "num_clients"),
    (["exclude_clients=[-1]"], "exclude_clients must be 0 to 9", "got [-1]", "num_clients"),
    (["exclude_clients=[a]"], "exclude_clients must", "got ['a']", "be a list"),
    (["exclude_clients=[0,1,1]", "num_clients=2", "clients_per_round=1"],
     "exclude_clients must leave one of num_clients=2", "got [0, 1]", "name fewer"),
    (["exclude_clients=[3,3,1]"], "clients_per_round must be at most 8", "got 10", "set clients_per_round=8 or less"),
    # privacy
    (["noise_multiplier=0.1"], "noise_multiplier and clipping_norm must", "got 0.1 and -1", "set both or neither"),
    (["clipping_norm=15"], "noise_multiplier and clipping_norm must", "got -1.0 and 15", "set both or neither"),
    (["noise_multiplier=1", "clipping_norm=1", "strategy.name=krum"], "strategy.name must", "got krum", "fedavg"),
    # data and model
    (["dataset.name=mnits"], "dataset.name must", "got mnits", "dataset.path=FOLDER"),
    (["model.name=vgg16"], "model.name must", "got vgg16", "model.path=FOLDER"),
    (["model.arch=transformer"], "model.arch must be cnn", "got transformer", "leave it out"),
    ([BERT, "model.arch=cnn"], "model.arch must be transformer", "got cnn", "leave it out"),
    (["model.tokenizer=trained", "model.name=a/b", "model.pretrained=true"],
     "model.tokenizer must", "got trained", "set model.tokenizer=own"),
    (["model.tokenizer=trained"], "model.tokenizer must", "got trained: leave it out", "resnet18"),
    (["model.config.hidden_size=8"], "model.config must", "got {'hidden_size': 8}: leave it out", "resnet18"),
    ([BERT, "model.config={vocab_size: -5}"], "model.config.vocab_size must", "got -5", "at least 1"),
    ([BERT, "model.config={vocab_size: many}"], "model.config.vocab_size must", "got many", "a whole number"),
    # faults
    (["faulty_clients_ids=[10]", "label2flip={1:0}"], "faulty_clients_ids must be 0 to 9", "got [10]", "num_clients"),
    (["faulty_clients_ids=[-1]", "label2flip={1:0}"], "faulty_clients_ids must be 0 to 9", "got [-1]", "num_clients"),
    (["faulty_clients_ids=[1]"], "faulty_clients_ids and label2flip must", "got [1] and {}", "set both or neither"),
    (["label2flip={1:0}"], "faulty_clients_ids and label2flip must", "got [] and {1: 0}", "set both or neither"),
    ([*FLIP, "noise_rate=2"], "noise_rate must", "got 2", "from 0 to 1"),
    ([*FLIP, "noise_rate=all"], "noise_rate must", "got all", "from 0 to 1"),
    ([*FLIP, "noise_rate={7:0.5}"], "noise_rate must", "got {7: 0.5}", "leave out 7"),
    ([*FLIP, "noise_rate={1:3}"], "noise_rate must", "got 3", "from 0 to 1"),
    (["fault.kind=backdoor"], "faulty_clients_ids must", "got []", "fault.kind=backdoor"),
    ([*BACKDOOR, "label2flip={1:0}"], "label2flip must", "got {1: 0}", "left out with fault.kind=backdoor"),
    ([*BACKDOOR, "noise_rate={1:0.5}"], "noise_rate must", "got {1: 0.5}", "from 0 to 1"),
    ([*BACKDOOR, BERT, "dataset.max_tokens=1"], "dataset.max_tokens must be at least 2", "got 1", "raise it"),
    # keys
    (["+answer=42"], "answer is no setting", "answer", "base.yaml"),
    (["+client.lrs=42"], "client.lrs is no setting", "client.lrs", "did you mean client.lr?"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "start", "value", "remedy"), CASES, ids=lambda case: str(case))
def test_an_impossible_value_is_refused_in_one_sentence(config, monkeypatch, overrides, start, value, remedy):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TraceFLError) as error:
        config(*overrides)
    said = str(error.value)
    assert said.startswith(start)
    assert value in said
    assert remedy in said
    assert "\n" not in said
    assert said.endswith(".")


@pytest.mark.parametrize(
    "overrides",
    [
        ["noise_multiplier=0", "clipping_norm=15"],
        ["clients_per_round=1", "num_clients=1"],
        ["strategy.name=krum", "strategy.options={num_malicious_nodes: 3}", "clients_per_round=9"],
        ["strategy.name=multikrum", "strategy.options={num_nodes_to_select: 10}"],
        ["strategy.name=fedprox", "strategy.options={proximal_mu: 0.1}"],
        [*BACKDOOR, "noise_rate=0"],
        [*BACKDOOR, BERT, "dataset.max_tokens=2"],
        [*FLIP, "noise_rate={1:1}"],
        ["client_gpu=0", "client_cpus=0.1"],
        ["model.name=gpt2"],
        ["model.name=gpt2", "model.arch=transformer", "model.tokenizer=trained", "model.config={vocab_size: 1}"],
        ["dataset.name=owner/name"],
        ["dataset.name=pathmnist"],
        ["device=cuda:1"],
    ],
    ids=str,
)
def test_what_is_just_possible_passes(config, overrides):
    config(*overrides)


def test_more_cpus_than_this_machine_has_are_for_a_cluster(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    assert config("client_cpus=10000").client_cpus == 10_000


@pytest.mark.parametrize("key", [key for key, field in leaves() if field.metadata["rule"]])
def test_a_rule_of_the_schema_admits_its_default(key):
    dict(leaves())[key].metadata["rule"].check(key, attrgetter(key)(Config()))


def test_folders_that_hold_something_else_are_refused_before_they_are_read(config, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("a checkout")
    for file in (".git/data.parquet", ".venv/lib/data.csv", "env/pyvenv.cfg", "env/data.csv", "src/main.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    with pytest.raises(
        TraceFLError, match=r"dataset\.path must hold data .* train-\*\.parquet .*, got .*: name another"
    ):
        config(f"dataset.path={tmp_path}")
    monkeypatch.setattr("tracefl.settings.visible_files", lambda _: pytest.fail("its files were listed"))
    for content in (None, "{}", "[]", "no JSON", '{"name": "a project of node"}', '{"model_type": 3}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(TraceFLError, match=r"model\.path must hold config\.json, as save_pretrained writes .*got "):
            config(f"model.path={tmp_path}")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("pyproject.toml", "a project, which has pyproject.toml"),
        ("setup.py", "a project, which has setup.py"),
        ("package.json", "a project, which has package.json"),
        ("pyvenv.cfg", "one of installed programs"),
        ("conda-meta/history", "one of installed programs"),
    ],
)
def test_a_folder_of_all_kinds_of_files_is_no_dataset_though_some_may_hold_data(config, tmp_path, file, what):
    for name in ("requirements.txt", "data/train.csv", "bin/x", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(
        TraceFLError,
        match=rf"dataset\.path must be the folder of a dataset, not {what}, got .*: name the folder of the data\.$",
    ):
        config(f"dataset.path={tmp_path}")
    assert config(f"dataset.path={tmp_path}/data").dataset.name == "data"


def test_a_home_folder_and_those_above_it_are_no_dataset(config, tmp_path, monkeypatch):
    (tmp_path / "me" / "pets").mkdir(parents=True)
    (tmp_path / "me" / "pets" / "train.csv").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    for folder in ("/", tmp_path):
        with pytest.raises(TraceFLError, match=r"dataset\.path must .*, not one that contains your home .*me, got /"):
            config(f"dataset.path={folder}")
    with pytest.raises(TraceFLError, match=r"dataset\.path must .*, not your home folder, got "):
        config(f"dataset.path={tmp_path}/me")
    config(f"dataset.path={tmp_path}/me/pets")


def test_most_of_many_files_must_hold_data(config, tmp_path, monkeypatch):
    monkeypatch.setattr("tracefl.checks.OTHER_FILES", 3)
    for name in ("train.csv", "a.o", "b.o", "c.o"):
        (tmp_path / name).write_text("")
    config(f"dataset.path={tmp_path}")
    (tmp_path / "d.o").write_text("")
    with pytest.raises(TraceFLError, match=r"dataset\.path must hold data in .*, and little else, got "):
        config(f"dataset.path={tmp_path}")
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("")
    config(f"dataset.path={tmp_path}")


def test_only_so_many_files_are_looked_at(config, tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.bin").write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train.csv").write_text("")
    config(f"dataset.path={tmp_path}")
    monkeypatch.setattr("tracefl.checks.LOOKED_AT", 20)
    with pytest.raises(TraceFLError, match=r"dataset\.path must hold data"):
        config(f"dataset.path={tmp_path}")


def test_a_reference_to_nothing_is_refused_by_its_key(config):
    for value, reason in (("${nowhere}", "Interpolation key 'nowhere' not found"), ("???", "Missing mandatory value")):
        with pytest.raises(TraceFLError) as error:
            config(f"dataset.path={value}")
        assert str(error.value).startswith(f"dataset.path cannot be read ({reason}")


@pytest.mark.parametrize("file", ["train-0.parquet", "data/train.csv", "train/cat/1.png", "train.jsonl"])
def test_a_folder_with_data_passes(config, tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    for more in (".git/config", "README.md", ".gitattributes"):  # as a clone from the hub has
        (tmp_path / more).parent.mkdir(exist_ok=True)
        (tmp_path / more).write_text("")
    assert config(f"dataset.path={tmp_path}").dataset.path == str(tmp_path)


def test_the_setting_that_was_meant_is_named():
    assert "did you mean num_clients?" in unknown("numclients")
    assert "did you mean dataset.channels?" in unknown("dataset.chanels")
    assert "did you mean" not in unknown("zzz")
    for alias, key in ALIASES.items():
        assert f"did you mean {key}?" in unknown(alias)


def test_a_groups_spelling_in_a_file_is_taken():
    config = load(
        OmegaConf.create({"strategy": {"name": "fedmedian", "num_rounds": 3}, "client_resources": {"cpus": 1}})
    )
    assert (config.num_rounds, config.strategy.name, config.client_cpus) == (3, "fedmedian", 1)
    with pytest.raises(TraceFLError, match=r"strategy\.rounds is no setting of TraceFL: did you mean"):
        load(OmegaConf.create({"strategy": {"rounds": 3}}))


def flips(config, words: str, *more: str):
    return config("faulty_clients_ids=[0]", f"label2flip={words}", *more)


def test_a_fault_leads_to_a_label_of_the_data(config):
    names = [str(label) for label in range(10)]
    c, notes = numbered_labels(flips(config, "{1:9,13:0}"), names)  # the artifact's commands list 14 labels
    assert (c.label2flip, notes) == ({1: 9}, ["label2flip: digits has no label 13, so nothing is flipped there"])
    numbered_labels(config("fault.target=10"), names)  # nobody has a backdoor
    known = "digits, 0 to 9"
    for target in (-1, 10):
        with pytest.raises(TraceFLError, match=rf"label2flip must lead to a label of {known}, got {target}: choose"):
            numbered_labels(flips(config, f"{{1:{target}}}"), names)
    with pytest.raises(TraceFLError, match=rf"label2flip must flip a label of {known}, got 10, 11: choose"):
        numbered_labels(flips(config, "{10:1,11:2}"), names)
    backdoor = config("faulty_clients_ids=[0]", "fault.kind=backdoor", "fault.target=10")
    with pytest.raises(TraceFLError, match=rf"fault\.target must lead to a label of {known}, got 10: choose"):
        numbered_labels(backdoor, names)


def test_faults_name_labels_as_the_data_write_them(config):
    written = flips(config, "{1:2,5:4}", "noise_rate={5:0.25}")
    c, notes = numbered_labels(written, ["1", "2", "4", "5"])
    assert (c.label2flip, c.noise_rate) == ({0: 1, 3: 2}, {3: 0.25})
    assert notes == [
        "label2flip: labels as the data write them: 1 is class 0, 2 is class 1, 4 is class 2, 5 is class 3"
    ]
    assert written.label2flip == {1: 2, 5: 4}  # it names the run's folder
    assert numbered_labels(flips(config, "{-1:1}"), ["-1", "1"])[0].label2flip == {0: 1}
    assert numbered_labels(flips(config, "{1:0}"), ["cat", "dog"]) == (
        flips(config, "{1:0}"),
        ["label2flip: dog to cat"],
    )
    backdoor = config("faulty_clients_ids=[0]", "fault.kind=backdoor", "fault.target=3")
    assert numbered_labels(backdoor, ["2", "3"])[0].fault.target == 1


def test_who_never_trains_is_not_faulty(config):
    nine = ("num_clients=11", "clients_per_round=9")
    some = config(*nine, "faulty_clients_ids=[9,3]", "label2flip={1:0}", "exclude_clients=[3,3]")
    assert (some.faulty_clients_ids, some.exclude_clients, some.label2flip) == ([9], [3], {1: 0})
    for faults in (FLIP, [*FLIP, "noise_rate={1:0.5}"], BACKDOOR):
        left = config(*nine, *faults, "exclude_clients=[1]")
        assert (left.faulty_clients_ids, left.label2flip, left.fault.kind) == ([], {}, "label_flip")
        assert load(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(left)))) == left  # as config.yaml has it
