"""The network of the walkthrough, and any other Keras model: as bytes, checked, and called.

`build_model` builds the network, `model_to_bytes` makes the bytes that workers get, and
`scoring_function` calls a model. `servable_model` checks before a job runs whether a model can be
sent and called. The functions import Keras only when they are called, because the import takes
seconds, and a program that only parses its options does not need it.

`network` has the walkthrough's network, `copies` models as bytes and as workers load them,
`prediction` what a model takes and returns and its compiled call, `servable` the checks, and
`errors` what they raise.
"""

from helpers.model.copies import (
    as_on_worker,
    missing_code,
    model_from_bytes,
    model_on_worker,
    model_to_bytes,
    needs_code,
)
from helpers.model.errors import UnservableModelError, first_line
from helpers.model.network import SEED, build_model, normalized_network
from helpers.model.prediction import Interface, compiled_predict, interface_of, scoring_function
from helpers.model.servable import (
    EPSILON,
    ServableModel,
    are_probabilities,
    check_copy,
    dependence,
    servable_model,
    worker_copy,
)
