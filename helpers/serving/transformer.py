"""A serving model as a Spark ML stage, also from a file that is replaced while a stream runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pyspark.ml import Transformer
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from helpers.model import UnservableModelError
from helpers.records import MODEL_VERSION, vector_entries
from helpers.serving.archive import load_serving_model, verified
from helpers.serving.contract import ServingModel, ServingModelError
from helpers.transformers import ModelPredictor

_LOGGER = logging.getLogger(__name__)


class ServingTransformer(Transformer):
    """Score events according to a serving model's contract.

    The features are those of the column ``event``, which `helpers.records.parse_events` returns for
    the model's `schema`. Without such a column, each feature is read from the column of the same
    name; if one is null, NaN or infinite, the prediction is null.

    Parameters
    ----------
    model : ServingModel
        The network and its contract.

    Attributes
    ----------
    model : ServingModel
        The network and its contract, with the version of this content.

    Raises
    ------
    ServingModelError
        If network and contract disagree.

    Examples
    --------
    >>> ServingTransformer(serving_model).transform(events).columns
    ['event', 'prediction', 'predicted_index', 'model_version']
    """

    def __init__(self, model: ServingModel) -> None:
        super().__init__()
        names = model.contract.feature_names
        self._predictor = ModelPredictor(model.network, features_col="event", feature_names=names)
        self.model = verified(model)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        scored = self._predictor.transform(dataset)
        return scored.withColumns(
            {
                "predicted_index": self._index(vector_entries(scored["prediction"])),
                MODEL_VERSION: F.lit(self.model.version),
            }
        )

    def _index(self, probabilities: Column) -> Column:
        """Return the class: signal if its probability reaches the threshold, else the other one."""
        signal = self.model.contract.signal_index
        probability = probabilities[signal]
        is_signal = probability >= self.model.contract.threshold
        index = F.when(is_signal, float(signal)).otherwise(float(1 - signal))
        # A NaN gets no index, although Spark treats NaN as larger than any number.
        return F.when(probability.isNotNull() & ~F.isnan(probability), index)


class ModelFile:
    """A serving model in a file that may be replaced while a stream runs.

    Call `current` before each batch, so that a batch is scored by one version. If a new file is
    rejected, or has another field for the event's id, other classes or another signal index, the
    previous version keeps serving, and the reason is logged. A file that can't be read is retried.

    Parameters
    ----------
    path : str or path-like
        A file written by `helpers.serving.save_serving_model`.

    Raises
    ------
    FileNotFoundError
        If there is no file at the start.
    ServingModelError
        If the first file is rejected.

    Examples
    --------
    >>> file = ModelFile(model_path)
    >>> file.current().transform(events).columns[-1]
    'model_version'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._seen, self._warning = self._state(), ""
        self.model = load_serving_model(path)
        self._transformer = ServingTransformer(self.model)

    def current(self) -> ServingTransformer:
        """Return the stage for the file's current version, and set `model` to that version."""
        state = self._state()
        if state != self._seen:
            try:
                self._replace(load_serving_model(self._path))
                self._seen, self._warning = state, ""
            except (ServingModelError, UnservableModelError) as error:
                self._seen = state
                self._warn(error)
            except OSError as error:
                self._warn(error)
        return self._transformer

    def _warn(self, error: Exception) -> None:
        """Log once why the previous version keeps serving."""
        warning = f"{self.model.version} keeps serving: {error}"
        if warning != self._warning:
            _LOGGER.warning("%s", warning)
        self._warning = warning

    def _replace(self, model: ServingModel) -> None:
        """Serve another model; raise `ServingModelError` if its results have another meaning."""
        if model.version == self.model.version:
            return  # the same one, written again
        ours, theirs = self.model.contract, model.contract
        for name in ("event_id", "class_names", "signal_index"):
            if getattr(theirs, name) != getattr(ours, name):
                raise ServingModelError(
                    f"{self._path} has {name} {getattr(theirs, name)!r}, but the results so far "
                    f"have {getattr(ours, name)!r}: give this model another output."
                )
        self.model, self._transformer = model, ServingTransformer(model)

    def _state(self) -> tuple[int, ...] | None:
        """Return the file attributes that change when it is replaced."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        # A program can set mtime back, and some file systems have no ctime.
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
