"""Impossible values are quoted with their remedy."""

import pytest

from tracefl.errors import TraceFLError


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_clients=0"], "num_clients=0"),
        (["clients_per_round=11"], "clients_per_round=11"),
        (["num_rounds=0"], "num_rounds=0"),
        (["dirichlet_alpha=0"], "dirichlet_alpha=0"),
        (["dirichlet_alpha=-1"], "dirichlet_alpha=-1"),
        (["client.lr=0"], "client.lr=0"),
        (["batch_size=0"], "batch_size=0"),
        (["client.epochs=0"], "client.epochs=0"),
        (["data_dist.max_per_client_data_size=0"], "max_per_client_data_size=0"),
        (["data_dist.dist_type=iid"], "dist_type=iid"),
        (["model.name=vgg16"], "model.name=vgg16"),
        (["dataset.name=mnits"], "dataset.name=mnits"),
        (["dataset.path=no/such/folder"], "dataset.path=no/such/folder"),
        (["strategy.name=fedfoo"], "strategy.name=fedfoo"),
        (["device=gpu"], "device=gpu"),
        (["exp_key=a/b"], "exp_key=a/b"),
        (["faulty_clients_ids=[10]", "label2flip={1:0}"], "faulty_clients_ids=\\[10\\]"),
        (["faulty_clients_ids=[1]"], "label2flip"),
        (["faulty_clients_ids=[1]", "label2flip={1:0}", "noise_rate=2"], "noise_rate=2"),
        (["faulty_clients_ids=[1]", "label2flip={1:0}", "noise_rate={7:0.5}"], "noise_rate={7: 0.5}"),
        (["total_cpus=1", "client_cpus=4"], "client_cpus=4"),
        (["client_gpu=-1"], "client_gpu=-1"),
        (["dataset.channels=2"], "dataset.channels=2"),
        (["dataset.num_classes=0"], "dataset.num_classes=0"),
        (["provenance.methods=[magic]"], "provenance.methods=magic"),
        (["provenance.methods=[]"], "provenance.methods"),
        (["label2flip=3"], "label2flip=3"),
        (["+answer=42"], "answer is no setting"),
        (["noise_multiplier=0.1"], "clipping_norm"),
        (["noise_multiplier=-0.5", "clipping_norm=15"], "clipping_norm"),
        (["noise_multiplier=1", "clipping_norm=1", "strategy.name=krum"], "strategy.name=krum"),
        (["strategy.options=3"], "strategy.options=3"),
        (["strategy.name=fedprox"], "strategy.name=fedprox"),
        (["strategy.name=krum", "strategy.options={num_malicious_nodes: 0.5}"], "num_malicious_nodes=0.5"),
        (["strategy.name=multikrum", "strategy.options={num_nodes_to_select: 0}"], "num_nodes_to_select=0"),
        (["strategy.name=fedadam", "strategy.options={beta_1: 1}"], "beta_1=1"),
        (["model.name=openai-community/openai-gpt", "model.config={vocab_size: -5}"], "vocab_size=-5"),
        (["strategy.options={eta: 1}"], "strategy.options.eta=1"),
        (["strategy.name=fedadam", "strategy.options={eta: fast}"], "strategy.options.eta=fast"),
        (["strategy.name=bulyan", "strategy.options={num_malicious_nodes: 2}"], "clients_per_round=10"),
        (["strategy.name=fedtrimmedavg", "strategy.options={beta: 0.5}"], "strategy.options.beta=0.5"),
        (["model.config=3"], "model.config=3"),
        (["model.path=no/such"], "model.path=no/such"),
        (["model.arch=transformer"], "model.arch=transformer"),
        (["model.tokenizer=mine"], "model.tokenizer=mine"),
        (["model.tokenizer=trained", "model.name=a/b", "model.pretrained=true"], "model.tokenizer=trained"),
        (["model.tokenizer=trained"], "resnet18 is an image model"),
        (["++model.config.hidden_size=8"], "resnet18 is an image model"),
        (["dataset.max_tokens=0"], "dataset.max_tokens=0"),
        (["fault.kind=gremlin", "faulty_clients_ids=[1]"], "fault.kind=gremlin"),
        (["fault.kind=backdoor"], "fault.kind=backdoor"),
        (["fault.kind=backdoor", "faulty_clients_ids=[1]", "label2flip={1:0}"], "label2flip"),
        (["fault.kind=backdoor", "faulty_clients_ids=[1]", "noise_rate={1:0.5}"], "noise_rate={1: 0.5}"),
        (["neuron_activation_threshold=1"], "neuron_activation_threshold=1"),
    ],
)
def test_an_impossible_value_is_quoted_with_its_remedy(config, overrides, words):
    with pytest.raises(TraceFLError, match=words):
        config(*overrides)
