"""One rule per layer type; importing this package registers those that come with it."""

from tracefl.provenance.layers import batchnorm, convolution, embedding, linear, normalisation
from tracefl.provenance.layers.registry import LayerRule, register, rule_for

__all__ = ["LayerRule", "batchnorm", "convolution", "embedding", "linear", "normalisation", "register", "rule_for"]
