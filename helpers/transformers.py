"""Spark ML stages that apply a Keras network and choose a class from its prediction."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow
from pyspark import SparkContext
from pyspark.broadcast import Broadcast
from pyspark.ml import Transformer
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasFeaturesCol, HasInputCol, HasOutputCol
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLWritable,
)
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DoubleType,
    NumericType,
    StructField,
    StructType,
)

from helpers.model import compiled_predict, model_from_bytes, model_to_bytes
from helpers.records import list_array, matrix_of, named, vector_entries
from helpers.spark import exact_path, exact_reader

if TYPE_CHECKING:
    import keras

_SCORES = ArrayType(DoubleType())

Network = TypeVar("Network")


class _ExactWriter(DefaultParamsWriter):
    """Saves a stage as Spark does, at exactly the path that it is given."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the stage."""
        super().save(exact_path(self.sparkSession, path))


class _ExactReader(DefaultParamsReader):
    """Loads a stage as Spark does, from exactly the path that it is given."""

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Return the saved stage."""
        path = exact_path(self.sparkSession, path)
        saved = exact_reader(self.sparkSession).text(f"{path}/metadata").first()
        metadata = json.loads(saved.value)
        stage = self.cls()
        stage._resetUid(metadata["uid"])
        self.getAndSetParams(stage, metadata)
        return stage


class ModelPredictor(Transformer, HasFeaturesCol, HasOutputCol, MLWritable, MLReadable):
    """Add a Keras model's output to a DataFrame, as a vector column.

    Each worker process loads the model once, on its first batch, and uses one thread per task.

    Parameters
    ----------
    keras_model : keras.Model
        The model, with one input of shape (features,) and one output of shape (classes,).
    features_col : str
        A column of events from `helpers.records.parse_events` with as many features as the model
        has inputs, or a vector column with as many entries. In an event, the prediction replaces
        the features, so that neither crosses from Python to Java and back. A bad record's output is
        null.
    output_col : str
        The name of the new column, a vector with one entry per class.
    feature_names : sequence of str, optional
        The names of the model's inputs, in order, as in a serving model's contract. If given, the
        table has a column of each name, in any order, and `features_col` may only be a column of
        events; events parsed with other features, or in another order, are rejected.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> predictor = ModelPredictor(keras_model=build_model(), features_col="features")
    >>> predictor.transform(spark.createDataFrame([(Vectors.dense([0.5] * 30),)], ["features"]))
    DataFrame[features: vector, prediction: vector]
    """

    featureNames = Param(  # noqa: N815 (Spark ML's way to name parameters)
        Params._dummy(), "featureNames", "what the model's inputs are called",
        TypeConverters.toListString,
    )  # fmt: skip

    def __init__(
        self,
        keras_model: keras.Model | None = None,
        features_col: str = "features",
        output_col: str = "prediction",
        feature_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._set(
            featuresCol=features_col, outputCol=output_col, featureNames=list(feature_names)
        )
        self._model_bytes = None if keras_model is None else model_to_bytes(keras_model)

    def predict(self, dataset: DataFrame) -> DataFrame:
        """Return `transform(dataset)`, under the name that Distributed Keras used."""
        return self.transform(dataset)

    def write(self) -> _ExactWriter:
        """Return a writer that saves the parameters as Spark does, and the model next to them."""
        return _ModelPredictorWriter(self)

    @classmethod
    def read(cls) -> _ExactReader:
        """Return a reader that loads a saved stage."""
        return _ModelPredictorReader(cls)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        context, model = dataset.sparkSession.sparkContext, self._checked_model_bytes()
        name, output = self.getFeaturesCol(), self.getOutputCol()
        names = self.getOrDefault(self.featureNames)
        has_events = name in dataset.columns and _holds_events(dataset.schema[name].dataType)
        if names and not has_events:
            scores = _network_function(context, model, _SCORES)(_array_of(dataset, names))
            return _with_vector(dataset.withColumn(output, scores), output)
        features_type = _column_type(dataset, name)
        if not has_events:
            _check_vector_column(dataset, name)
            features = F.coalesce(vector_entries(named(name)), _no_features(name))
            scores = _network_function(context, model, _SCORES)(features)
            return dataset.withColumn(output, array_to_vector(scores))
        if names:
            _check_features(dataset, name, names)
        scored_type = _with_output(features_type, output)
        event = _network_function(context, model, scored_type)(named(name))
        scored = dataset.withColumn(name, event)
        return _with_vector(scored.withColumn(output, named(name)[output]), output)

    def _checked_model_bytes(self) -> bytes:
        if self._model_bytes is None:
            raise ValueError("this ModelPredictor has no model: give it one as keras_model=.")
        return self._model_bytes


class _ModelPredictorWriter(_ExactWriter):
    """Saves a `ModelPredictor` wherever Spark can write: the model is a table with one cell."""

    def saveImpl(self, path: str) -> None:  # noqa: N802 (Spark's name)
        """Save the stage; Spark calls this."""
        model = [(bytearray(self.instance._checked_model_bytes()),)]
        super().saveImpl(path)
        schema = StructType().add("model", BinaryType())
        table = self.sparkSession.createDataFrame(model, schema).coalesce(1)
        table.write.parquet(f"{path}/model")


class _ModelPredictorReader(_ExactReader):
    """Loads what `_ModelPredictorWriter` saved."""

    def load(self, path: str | os.PathLike[str]) -> ModelPredictor:
        """Return the saved stage."""
        predictor = super().load(path)
        folder = f"{exact_path(self.sparkSession, path)}/model"
        saved = exact_reader(self.sparkSession).parquet(folder).first()
        predictor._model_bytes = bytes(saved.model)
        return predictor


class LabelIndexTransformer(Transformer, HasInputCol, HasOutputCol, MLWritable, MLReadable):
    """Add the index of the class chosen from a prediction.

    The first class whose value reaches `activation_threshold` is chosen; otherwise the class with
    the largest value above 0; otherwise `default_index`. Spark computes the index without Python.

    Parameters
    ----------
    output_dim : int
        The number of classes: how many entries of the prediction are considered.
    input_col : str
        The prediction, a vector column.
    output_col : str
        The name of the new column. It is a double, as Spark ML's evaluators expect.
    default_index : int
        The index if no value is above 0.
    activation_threshold : float
        The value at which a class is chosen even if a later one has a larger value.

    References
    ----------
    The semantics are those of ``LabelIndexTransformer`` in Distributed Keras,
    https://github.com/cerndb/dist-keras.

    Examples
    --------
    >>> from pyspark.ml.linalg import Vectors
    >>> scored = spark.createDataFrame([(Vectors.dense([0.3, 0.7]),)], ["prediction"])
    >>> LabelIndexTransformer(output_dim=2).transform(scored).first().predicted_index
    1.0
    """

    outputDim = Param(  # noqa: N815 (Spark ML's way to name parameters)
        Params._dummy(), "outputDim", "the number of classes", TypeConverters.toInt
    )
    defaultIndex = Param(  # noqa: N815
        Params._dummy(), "defaultIndex", "the index where no value is above 0", TypeConverters.toInt
    )
    activationThreshold = Param(  # noqa: N815
        Params._dummy(), "activationThreshold", "the value that is enough", TypeConverters.toFloat
    )

    def __init__(
        self,
        output_dim: int = 2,
        input_col: str = "prediction",
        output_col: str = "predicted_index",
        default_index: int = 0,
        activation_threshold: float = 0.55,
    ) -> None:
        super().__init__()
        self._set(
            outputDim=output_dim, inputCol=input_col, outputCol=output_col,
            defaultIndex=default_index, activationThreshold=activation_threshold,
        )

    def write(self) -> _ExactWriter:
        """Return a writer that saves the parameters as Spark does."""
        return _ExactWriter(self)

    @classmethod
    def read(cls) -> _ExactReader:
        """Return a reader that loads a saved stage."""
        return _ExactReader(cls)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        _check_vector_column(dataset, self.getInputCol())
        return dataset.withColumn(self.getOutputCol(), self._index(named(self.getInputCol())))

    def _index(self, prediction: Column) -> Column:
        """Return the chosen index, as an expression on a vector column."""
        entries = vector_entries(prediction)
        indices = range(self.getOrDefault(self.outputDim))
        # Spark treats NaN as larger than any number; a NaN must not be chosen.
        nothing = F.lit(float("-inf"))
        values = [F.nanvl(F.get(entries, i), nothing) for i in indices]
        largest = F.array_max(F.array(*values))
        threshold = self.getOrDefault(self.activationThreshold)
        default = self.getOrDefault(self.defaultIndex)
        # CASE WHEN takes the first condition that is true, as the rules require.
        rules = [(value >= threshold, index) for index, value in zip(indices, values, strict=True)]
        rules += [(largest <= 0, default)]
        rules += [(value == largest, index) for index, value in zip(indices, values, strict=True)]
        choice = functools.reduce(lambda case, rule: case.when(*rule), rules, F)
        return choice.cast("double")


@functools.lru_cache(maxsize=8)
def _network_function(
    context: SparkContext, model_bytes: bytes, returns: DataType
) -> Callable[[Column], Column]:
    """Return a function from a column of lists or events to a column with predictions.

    It is created once per model, so that the model is broadcast once. It is marked
    nondeterministic because Spark's optimizer copies a deterministic function into each expression
    and filter that uses its result, and each copy would run the network again.
    """
    model = context.broadcast(model_bytes)
    digest = hashlib.sha256(model_bytes).hexdigest()
    names = returns.names if isinstance(returns, StructType) else None

    def predict(column: pyarrow.Array) -> pyarrow.Array:
        if names is not None:
            return _predict_events(column, names, digest, model)
        return _predict_lists(column, digest, model)

    return F.arrow_udf(predict, returns).asNondeterministic()


class _Loaded(NamedTuple):
    """A network in a worker's memory."""

    predict: Callable[[np.ndarray], np.ndarray]
    width: int


# On a worker: the most recently used networks, by the digest of their bytes or by the name of the
# training. A stream whose model is replaced repeatedly needs the current one and, briefly, the
# previous one.
_KEPT: OrderedDict[str, Any] = OrderedDict()
_MOST_KEPT = 3


def kept_network(name: str, make: Callable[[], Network]) -> Network:
    """Return the network cached on a worker under a name, or make it (an LRU cache).

    Parameters
    ----------
    name : str
        A name that is unique to the network.
    make : callable
        Makes the network, or an object that holds it. TensorFlow is limited to one thread first.
    """
    if name not in _KEPT:
        _use_one_thread()
        _KEPT[name] = make()
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
            gc.unfreeze()  # a network has reference cycles, so only a collection frees it
            gc.collect()
        # Spark's worker collects garbage after each task, and traversing TensorFlow's objects takes
        # 0.15 s of processor time; frozen objects are skipped.
        gc.freeze()
    _KEPT.move_to_end(name)
    return _KEPT[name]


def _predict_events(
    events: pyarrow.StructArray, names: list[str], digest: str, model: Broadcast[bytes]
) -> pyarrow.StructArray:
    """Replace the events' features by predictions, on a worker."""
    predictions = _predict_lists(events.field("features"), digest, model)
    return _replace_features(events, predictions, names)


def _predict_lists(
    features: pyarrow.ListArray, digest: str, model: Broadcast[bytes]
) -> pyarrow.ListArray:
    """Run the network on an Arrow batch, on a worker; null stays null."""
    network = _loaded(digest, model)
    matrix = matrix_of(features, network.width)
    predictions = network.predict(matrix.astype("float32")).astype("float64")
    return list_array(predictions, features.is_null().to_numpy(zero_copy_only=False))


def _loaded(digest: str, model: Broadcast[bytes]) -> _Loaded:
    """Return the network, which a worker loads on the first batch."""

    def load() -> _Loaded:
        network = model_from_bytes(model.value)
        return _Loaded(compiled_predict(network), network.input_shape[-1])

    return kept_network(digest, load)


def _replace_features(
    events: pyarrow.StructArray, features: pyarrow.ListArray, names: list[str]
) -> pyarrow.StructArray:
    """Return events with their features replaced by other lists, and with new field names."""
    place = events.type.get_field_index("features")
    arrays = [events.field(index) for index in range(len(events.type))]
    arrays[place] = features
    return pyarrow.StructArray.from_arrays(arrays, names)


def _with_vector(dataset: DataFrame, name: str) -> DataFrame:
    """Return a table with a column of lists converted to vectors; null stays null."""
    vector = F.when(named(name).isNotNull(), array_to_vector(named(name)))
    return dataset.withColumn(name, vector)


def _no_features(name: str) -> Column:
    """Return an expression that fails, for rows whose features are null."""
    reason = f"a row has no features (column {name!r} is null): filter such rows out."
    return F.raise_error(F.lit(reason))


def _column_type(dataset: DataFrame, name: str) -> DataType:
    """Return a column's type, or raise `ValueError` if there is no such column."""
    if name not in dataset.columns:
        raise ValueError(f"there is no column {name!r}; the columns are {dataset.columns}.")
    return dataset.schema[name].dataType


def _holds_events(column_type: DataType) -> bool:
    """Return whether a column of this type holds events from `helpers.records.parse_events`."""
    return isinstance(column_type, StructType) and "features" in column_type.names


def _with_output(event_type: StructType, output: str) -> StructType:
    """Return the type of events whose features are replaced by a prediction."""
    prediction = StructField(output, ArrayType(DoubleType()))
    return StructType([prediction if f.name == "features" else f for f in event_type])


def _use_one_thread() -> None:
    """Limit TensorFlow to one thread, because Spark runs as many tasks as there are cores."""
    import tensorflow

    with contextlib.suppress(RuntimeError):  # TensorFlow is already initialized, as in the driver
        tensorflow.config.threading.set_intra_op_parallelism_threads(1)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)


def _array_of(dataset: DataFrame, names: Sequence[str]) -> Column:
    """Return numeric columns as one array column, in the order of the names."""
    missing = [name for name in names if name not in dataset.columns]
    if missing:
        raise ValueError(
            f"the model needs the columns {missing}, which aren't there; the columns are "
            f"{dataset.columns}."
        )
    for name in names:
        found = dataset.schema[name].dataType
        if not isinstance(found, NumericType):
            raise ValueError(
                f"column {name!r} must hold numbers, not {found.simpleString()}: cast it."
            )
    columns = [named(name).cast("double") for name in names]
    known = [column.isNotNull() & ~F.isnan(column) for column in columns]
    # As with records, an event that lacks a feature has no prediction.
    return F.when(functools.reduce(Column.__and__, known), F.array(*columns))


def _check_features(dataset: DataFrame, name: str, expected: Sequence[str]) -> None:
    """Raise `ValueError` if events were parsed with features other than the model's inputs."""
    found = dataset.schema[name].metadata.get("features", [])
    if list(found) != list(expected):
        wrong = sorted(set(found) ^ set(expected)) or "their order"
        raise ValueError(
            f"the events in {name!r} don't have the model's features ({wrong} differs): parse them "
            "with the serving model's own schema."
        )


def _check_vector_column(dataset: DataFrame, name: str) -> None:
    """Raise `ValueError` unless the column exists and holds vectors."""
    found = _column_type(dataset, name)
    if not isinstance(found, VectorUDT):
        raise ValueError(
            f"column {name!r} must hold vectors, not {found.simpleString()}: make them with "
            "pyspark.ml.feature.VectorAssembler or pyspark.ml.functions.array_to_vector."
        )
