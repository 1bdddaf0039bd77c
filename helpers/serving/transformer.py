"""A serving model as a Spark ML stage."""

from __future__ import annotations

from pyspark.ml import Transformer
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from helpers.records import MODEL_VERSION, vector_entries
from helpers.serving.archive import verified
from helpers.serving.contract import ServingModel
from helpers.transformers import ModelPredictor


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
