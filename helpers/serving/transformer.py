"""A serving model as a Spark ML stage."""

from __future__ import annotations

from pyspark.ml import Transformer
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from helpers.records import MODEL_VERSION, vector_entries
from helpers.serving.contract import ServingModel
from helpers.transformers import ModelPredictor


class ServingTransformer(Transformer):
    """Score events as a serving model's contract says.

    Parameters
    ----------
    model : ServingModel
        The network and its contract.
    features_col : str
        Events that `helpers.records.parse_events` made with the model's `schema`. Where there is no
        such column, the features are taken from the columns that have their names. An event of
        which one is null or NaN has no prediction: it is null.

    Attributes
    ----------
    model : ServingModel
        The network and its contract.

    Examples
    --------
    >>> ServingTransformer(serving_model).transform(events).columns
    ['event', 'prediction', 'predicted_index', 'model_version']
    """

    def __init__(self, model: ServingModel, features_col: str = "event") -> None:
        super().__init__()
        self.model = model
        self._predictor = ModelPredictor(
            keras_model=model.network, features_col=features_col,
            feature_names=model.contract.feature_names,
        )  # fmt: skip

    def _transform(self, dataset: DataFrame) -> DataFrame:
        scored = self._predictor.transform(dataset)
        return scored.withColumns(
            {
                "predicted_index": self._index(vector_entries(scored["prediction"])),
                MODEL_VERSION: F.lit(self.model.version),
            }
        )

    def _index(self, probabilities: Column) -> Column:
        """Return the class: signal from the threshold on, otherwise the other one."""
        signal = self.model.contract.signal_index
        probability = probabilities[signal]
        is_signal = probability >= self.model.contract.threshold
        index = F.when(is_signal, float(signal)).otherwise(float(1 - signal))
        # No number is no answer; Spark would hold it for the largest of all.
        return F.when(probability.isNotNull() & ~F.isnan(probability), index)
