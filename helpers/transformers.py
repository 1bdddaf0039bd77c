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
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.compute
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
    DecimalType,
    DoubleType,
    LongType,
    NumericType,
    StructField,
    StructType,
)

from helpers.model import (
    EPSILON,
    Interface,
    ServableModel,
    interface_of,
    model_from_bytes,
    scoring_function,
    servable_model,
)
from helpers.records import (
    ARE_PROBABILITIES,
    EXACT,
    LARGEST,
    list_array,
    named,
    vector_entries,
)
from helpers.spark import arrow_function, exact_path, exact_reader

if TYPE_CHECKING:
    import keras

_SCORES = ArrayType(DoubleType())

NO_PREDICTION = "the model has no finite prediction for its features"

Network = TypeVar("Network")


class _ExactWriter(DefaultParamsWriter):
    """Saves a stage as Spark does, to exactly the given path."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the stage."""
        super().save(exact_path(self.sparkSession, path))


class _ExactReader(DefaultParamsReader):
    """Loads a stage as Spark does, from exactly the given path."""

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
        The model: functional, sequential, or a subclass whose `call` uses Keras' layers. It has one
        input and one output. An input of several dimensions, such as (6, 5, 1), takes a list of
        30 features as `numpy.reshape` arranges it; one dimension may be None. Features are
        converted to the type of the input. The output is a number per class, or the probability of
        class 1 from a sigmoid.
    features_col : str
        A column of events from `helpers.records.parse_events` with as many features as the model
        has inputs, or a vector column with as many entries. In an event, the prediction replaces
        the features, so that neither crosses from Python to Java and back. A bad record's output is
        null.
    output_col : str
        The name of the new column, a vector with one entry per class: the model's output, or
        [1 - p, p] if that is a single probability p.
    feature_names : sequence of str, optional
        The names of the model's inputs, in order, as in a serving model's contract. If given, a
        column of events must have been parsed with these features in this order; without a column
        of events, each feature is read from the column of its name.

    Raises
    ------
    helpers.model.UnservableModelError
        If workers can't load the model or can't score events with it; the message says what to
        change. `helpers.model.servable_model` describes the rules.

    Notes
    -----
    A prediction with a NaN or an infinite value is discarded: in a column of events, the record
    becomes a bad one, with the reason; otherwise the output is null. Features that the model's
    input can't represent (infinity, or 2.5 and 3e9 as 32-bit integers) are treated in the same way,
    and so are those on which the model fails, such as an unknown category in an embedding.

    With Spark's `predict_batch_udf` in its place, reading, parsing and scoring 150,000 events takes
    1.26 times as long (31.0 instead of 24.7 microseconds per event on 2 cores), because that
    function can't share a pass through Python with the parsing.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> predictor = ModelPredictor(keras_model=build_model(), features_col="features")
    >>> predictor.transform(spark.createDataFrame([(Vectors.dense([0.5] * 30),)], ["features"]))
    DataFrame[features: vector, prediction: vector]
    """

    featureNames = Param(  # noqa: N815 (Spark ML's way to name parameters)
        Params._dummy(), "featureNames", "the names of the model's inputs",
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
        self._set(featuresCol=features_col, outputCol=output_col, featureNames=list(feature_names))
        self._model = None if keras_model is None else servable_model(keras_model)
        if self._model and feature_names:
            self._model.interface.event_shape(len(feature_names))

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
        context, servable = dataset.sparkSession.sparkContext, self._checked_model()
        model, interface, gives_probabilities = servable
        name, output = self.getFeaturesCol(), self.getOutputCol()
        names = self.getOrDefault(self.featureNames)
        if name in dataset.columns and _holds_events(dataset.schema[name].dataType):
            if names:
                _check_features(dataset, name, names)
            _check_width(dataset, name, interface)
            event_type = dataset.schema[name].dataType
            scored_type = _with_output(event_type, output)
            event = _network_function(context, model, event_type, scored_type)(named(name))
            scored, scores = dataset.withColumn(name, event), named(name)[output]
        else:
            features = _array_of(dataset, names) if names else _entries(dataset, name, interface)
            found = _network_function(context, model, _SCORES, _SCORES)(features)
            scored, scores = dataset.withColumn(output, found), named(output)
        vector = _vector(scores, output, interface.classes, gives_probabilities)
        return scored.withColumn(output, vector)

    def _checked_model(self) -> ServableModel:
        if self._model is None:
            raise ValueError("this ModelPredictor has no model: pass one as keras_model=.")
        return self._model


class _ModelPredictorWriter(_ExactWriter):
    """Saves a `ModelPredictor` wherever Spark can write: the model is a table with one cell."""

    def saveImpl(self, path: str) -> None:  # noqa: N802 (Spark's name)
        """Save the stage; Spark calls this."""
        model = [(bytearray(self.instance._checked_model().content),)]
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
        predictor._model = servable_model(model_from_bytes(bytes(saved.model)))
        return predictor


class LabelIndexTransformer(Transformer, HasInputCol, HasOutputCol, MLWritable, MLReadable):
    """Add the index of the class chosen from a prediction.

    The first class whose value reaches `activation_threshold` is chosen; otherwise the class with
    the largest value above 0; otherwise `default_index`. These rules are for probabilities: a
    `ModelPredictor` whose network returns others, such as logits, is rejected. Spark computes the
    index without Python.

    Parameters
    ----------
    output_dim : int
        The number of classes. Predictions with another number of entries are rejected, before any
        job runs if the column's metadata has the number, as the output of a `ModelPredictor` does.
    input_col : str
        The prediction, a vector column. If it is null, the index is null.
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
        Params._dummy(), "defaultIndex", "the index if no value is above 0", TypeConverters.toInt
    )
    activationThreshold = Param(  # noqa: N815
        Params._dummy(), "activationThreshold", "the sufficient value", TypeConverters.toFloat
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
        name, classes = self.getInputCol(), self.getOrDefault(self.outputDim)
        _check_vector_column(dataset, name)
        found = _width_in_metadata(dataset, name)
        if found not in (None, classes):
            raise ValueError(_wrong_output_dim(found, classes))
        if not dataset.schema[name].metadata.get(ARE_PROBABILITIES, True):
            raise ValueError(
                f"the predictions in column {name!r} are not probabilities, so no class can be "
                "chosen: end the network with a softmax over the classes, or with a single sigmoid."
            )
        threshold = self.getOrDefault(self.activationThreshold)
        default = self.getOrDefault(self.defaultIndex)
        index = _index(dataset.sparkSession.sparkContext, name, classes, threshold, default)
        return dataset.withColumn(self.getOutputCol(), index)


@functools.lru_cache(maxsize=8)
def _index(
    context: SparkContext, name: str, classes: int, threshold: float, default: int
) -> Column:
    """Return the chosen index, as an expression on a vector column.

    It is cached per context, because its fifty calls to Java would take 20 ms in each batch.
    """
    entries = vector_entries(named(name))
    # Spark treats NaN as larger than any number; a NaN must not be chosen.
    nothing = F.lit(float("-inf"))
    values = [F.nanvl(F.get(entries, index), nothing) for index in range(classes)]
    largest = F.array_max(F.array(*values))
    size = F.array_size(entries)
    wrong = F.raise_error(F.format_string(_wrong_output_dim("%d", classes), size))
    # CASE WHEN takes the first condition that is true, as the rules require.
    rules = [(size != classes, wrong)]
    rules += [(value >= threshold, index) for index, value in enumerate(values)]
    rules += [(largest <= 0, default)]
    rules += [(value == largest, index) for index, value in enumerate(values)]
    return functools.reduce(lambda case, rule: case.when(*rule), rules, F).cast("double")


@functools.lru_cache(maxsize=8)
def _network_function(
    context: SparkContext, model_bytes: bytes, takes: DataType, returns: DataType
) -> Callable[[Column], Column]:
    """Return a function from a column of lists or events to a column with predictions.

    It is cached per model, so that the model is broadcast once. It is marked
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

    return arrow_function(predict, takes, returns, deterministic=False)


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
    """Replace the events' features by predictions; a record without a prediction is bad."""
    predictions = _predict_lists(events.field("features"), digest, model)
    arrays = {field.name: events.field(place) for place, field in enumerate(events.type)}
    arrays["features"] = predictions
    bad = pyarrow.compute.and_(predictions.is_null(), arrays["reason"].is_null())
    if pyarrow.compute.any(bad).as_py():
        arrays["reason"] = pyarrow.compute.if_else(bad, NO_PREDICTION, arrays["reason"])
        event_id = next(iter(arrays))
        nothing = pyarrow.scalar(None, arrays[event_id].type)
        arrays[event_id] = pyarrow.compute.if_else(bad, nothing, arrays[event_id])
    return pyarrow.StructArray.from_arrays(list(arrays.values()), names)


def _predict_lists(
    features: pyarrow.ListArray, digest: str, model: Broadcast[bytes]
) -> pyarrow.ListArray:
    """Run the network on an Arrow batch; null stays null, and NaN becomes null."""
    scores_of = kept_network(digest, lambda: _load(model))
    scores = scores_of(features)
    finite = np.isfinite(scores).all(axis=1)
    missing = np.array(features.is_null())
    missing[~missing] = ~finite
    return list_array(scores[finite], missing)


def _load(model: Broadcast[bytes]) -> Callable[[pyarrow.ListArray], np.ndarray]:
    """Load the network, on a worker's first batch; return a function from features to scores."""
    import keras

    keras.config.set_epsilon(EPSILON)
    network = model_from_bytes(model.value)
    score, width = scoring_function(network), interface_of(network).features
    return lambda features: score(_matrix_of(features, width))


def _matrix_of(lists: pyarrow.ListArray, width: int | None) -> np.ndarray:
    """Return the lists that are not null as rows; without a width, the first list defines it."""
    lengths = lists.drop_null().value_lengths().to_numpy()
    if width is None:
        width = int(lengths[0]) if len(lengths) else 0
    if (lengths != width).any():
        wrong = lengths[lengths != width][0]
        raise ValueError(f"the model takes {width} features, but a row has {wrong}.")
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lengths), width)


def _vector(scores: Column, name: str, width: int, are_probabilities: bool) -> Column:
    """Return lists as vectors, under a name; null stays null."""
    # Spark ML's metadata for the number of entries, and the kit's own.
    metadata = {"ml_attr": {"num_attrs": width}, ARE_PROBABILITIES: are_probabilities}
    return F.when(scores.isNotNull(), array_to_vector(scores)).alias(name, metadata=metadata)


def _entries(dataset: DataFrame, name: str, interface: Interface) -> Column:
    """Return a vector column as lists; rows whose features are null fail."""
    _check_vector_column(dataset, name)
    _check_width(dataset, name, interface)
    reason = f"a row has no features (column {name!r} is null): filter out such rows."
    return F.coalesce(vector_entries(named(name)), F.raise_error(F.lit(reason)))


def _check_width(dataset: DataFrame, name: str, interface: Interface) -> None:
    """Raise `ValueError` if a column has another number of features than the model takes."""
    width = _width_in_metadata(dataset, name)
    if width is not None:
        interface.event_shape(width)


def _width_in_metadata(dataset: DataFrame, name: str) -> int | None:
    """Return the number of features or entries of a column if its metadata has it."""
    metadata = dataset.schema[name].metadata
    if "features" in metadata:
        return len(metadata["features"])
    return metadata.get("ml_attr", {}).get("num_attrs")


def _wrong_output_dim(found: object, classes: int) -> str:
    """Return the message for predictions with another number of classes than expected."""
    return (
        f"the predictions have {found} entries, but output_dim is {classes}: give "
        "LabelIndexTransformer the model's number of classes."
    )


def _holds_events(column_type: DataType) -> bool:
    """Return whether a column of this type holds events from `helpers.records.parse_events`."""
    names = column_type.names if isinstance(column_type, StructType) else []
    if "reason" in names and "features" not in names:
        raise ValueError(
            "these events already have a prediction in place of their features: for another "
            "model, call parse_events on the records again."
        )
    return {"features", "reason"} <= {*names}


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
            f"the model needs the columns {missing}, which are missing; the columns are "
            f"{dataset.columns}."
        )
    for name in names:
        found = dataset.schema[name].dataType
        if not isinstance(found, NumericType):
            raise ValueError(
                f"column {name!r} must hold numbers, not {found.simpleString()}: cast it."
            )
    columns = [named(name).cast("double") for name in names]
    # A sigmoid would make a class of what is infinite as a 32-bit float.
    known = [column.isNotNull() & (F.abs(column) <= LARGEST) for column in columns]
    # As with records: 64-bit floats don't represent all larger integers.
    known += [
        named(name).between(1 - EXACT, EXACT - 1)
        for name in names
        if isinstance(dataset.schema[name].dataType, LongType | DecimalType)
    ]
    # As with records, an event without one of the features has no prediction.
    return F.when(functools.reduce(Column.__and__, known), F.array(*columns))


def _check_features(dataset: DataFrame, name: str, expected: Sequence[str]) -> None:
    """Raise `ValueError` if events were parsed with features other than the model's inputs."""
    found = dataset.schema[name].metadata.get("features", [])
    if list(found) != list(expected):
        wrong = sorted(set(found) ^ set(expected)) or "their order"
        raise ValueError(
            f"the events in {name!r} don't have the model's features ({wrong} differs): parse them "
            "with the serving model's schema."
        )


def _check_vector_column(dataset: DataFrame, name: str) -> None:
    """Raise `ValueError` unless the column exists and holds vectors."""
    if name not in dataset.columns:
        raise ValueError(f"there is no column {name!r}; the columns are {dataset.columns}.")
    found = dataset.schema[name].dataType
    if not isinstance(found, VectorUDT):
        raise ValueError(
            f"column {name!r} must hold vectors, not {found.simpleString()}: make them with "
            "pyspark.ml.feature.VectorAssembler or pyspark.ml.functions.array_to_vector."
        )
