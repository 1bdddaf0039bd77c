"""Serve a trained network: its file, its contract, and the Spark stage that applies it.

A network alone doesn't say what its inputs are called, in which order they come, how they were
scaled, or which output means signal; sooner or later, somebody guesses wrong. A *serving model* is
a network together with its *contract* in one ``.keras`` file, which is rejected if the two
disagree.

`contract` says what the file records and which values are valid, `archive` writes and reads the
file, and `transformer` applies it and follows its replacements while a stream runs.
"""

from helpers.serving.archive import load_serving_model, save_serving_model
from helpers.serving.contract import (
    Contract,
    ServingModel,
    ServingModelError,
    fingerprint,
    scaled_network,
)
from helpers.serving.transformer import ModelFile, ServingTransformer
