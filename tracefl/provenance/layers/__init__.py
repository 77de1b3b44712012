"""One rule per layer type; importing this package registers those that come with it."""

from tracefl.provenance.layers import batchnorm, convolution, embedding, linear, normalisation
from tracefl.provenance.layers.registry import Rule, register, rule_for

__all__ = ["Rule", "batchnorm", "convolution", "embedding", "linear", "normalisation", "register", "rule_for"]
