"""A trained network in production: its file, its contract, and the Spark stage that serves it.

A network alone doesn't say what its inputs are called, in which order they come, how they were
scaled, or which of its outputs means signal; whoever has to guess that will guess wrong one day. A
*serving model* is a network together with its *contract*: one ``.keras`` file that has all of it,
and that is refused when its parts disagree.
"""

from helpers.serving.archive import load_serving_model, save_serving_model
from helpers.serving.contract import (
    Contract,
    ServingModel,
    ServingModelError,
    fingerprint,
    scaled_network,
)
from helpers.serving.model_file import ModelFile
from helpers.serving.transformer import ServingTransformer
