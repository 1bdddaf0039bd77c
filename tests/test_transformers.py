"""The network and the label index as Spark ML stages."""

import keras
import numpy as np
import orjson
import pyarrow
import pytest
import tensorflow
from pyspark.errors import PythonException, SparkRuntimeException
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator
from pyspark.ml.feature import Normalizer, VectorAssembler
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, LongType, StructField, StructType

from helpers import transformers
from helpers.higgs import FEATURES, generate_events
from helpers.model import UnservableModelError, build_model, normalized_network
from helpers.records import keep_bad_records, parse_events
from helpers.sinks import ParquetSink, read_bad_records, read_scored
from helpers.streaming import OffsetRange, TopicAndPartition
from helpers.transformers import LabelIndexTransformer, ModelPredictor

BATCH = 4_096  # rows per Arrow batch, as `get_spark` sets it


@pytest.fixture(scope="module")
def model():
    """The walkthrough's network."""
    return build_model()


@pytest.fixture(scope="module")
def events():
    """One event more than an Arrow batch holds."""
    return generate_events(BATCH + 1, seed=4)


@pytest.fixture(scope="module")
def vectors(spark, events):
    """The events, with their features as one vector of length 1."""
    columns = ["EventId", "Label", *FEATURES]
    df = spark.createDataFrame(events[columns]).coalesce(1)
    df = VectorAssembler(inputCols=list(FEATURES), outputCol="raw").transform(df)
    return Normalizer(inputCol="raw", outputCol="features").transform(df).cache()


def in_memory(model, events):
    """Score the events with Keras alone."""
    rows = events[list(FEATURES)].to_numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return model.predict(rows.astype("float32"), batch_size=4096, verbose=0)


def test_predictions_equal_keras_in_memory(model, events, vectors):
    """Predictions in Spark equal those of Keras, even in a last batch of one row."""
    scored = ModelPredictor(keras_model=model).predict(vectors).select("EventId", "prediction")
    assert isinstance(scored.schema["prediction"].dataType, VectorUDT)
    found = scored.toPandas().sort_values("EventId")
    np.testing.assert_allclose(
        np.stack([vector.toArray() for vector in found["prediction"]]),
        in_memory(model, events),
        atol=1e-6,
    )


@pytest.fixture(scope="module")
def records(spark, events):
    """The events as records of a topic, with one bad record among them."""
    rows = events[["EventId", *FEATURES]].to_dict("records")
    values = [bytearray(orjson.dumps(row)) for row in rows]
    values.insert(5, bytearray(b"junk"))
    return spark.createDataFrame([(value,) for value in values], "value binary").coalesce(1)


def test_events_are_scored_like_vectors(model, vectors, records):
    """Parsed events get the same scores as vectors, and a bad record gets none."""
    predictor = ModelPredictor(keras_model=normalized_network(model), features_col="event")
    scored = predictor.transform(parse_events(records))
    assert scored.columns == ["value", "event", "prediction"]
    expected = ModelPredictor(keras_model=model).transform(vectors)
    expected = {row.EventId: row.prediction for row in expected.collect()}
    rows = scored.collect()
    assert [row.prediction for row in rows if row.event.reason] == [None]
    good = {row.event.EventId: row.prediction for row in rows if not row.event.reason}
    assert good.keys() == expected.keys()
    differences = [good[key].toArray() - expected[key].toArray() for key in good]
    assert np.abs(differences).max() < 1e-6


def test_named_features_are_taken_by_name_whatever_else_is_there(spark):
    """Named features are read by name, even if the table also has a vector column."""
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    by_name = ModelPredictor(keras_model=network, feature_names=("a", "b"))
    df = spark.createDataFrame([(1.0, 2.0, Vectors.dense(2.0, 1.0))], ["a", "b", "features"])
    expected = network.predict(np.array([[1.0, 2.0]]), verbose=0)[0]
    found = by_name.transform(df).first().prediction.toArray()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_events_of_another_width_are_refused(spark, model):
    """Events with another number of features are refused."""
    events = "event struct<EventId: long, features: array<double>, reason: string>"
    df = spark.createDataFrame([((1, [1.0, 2.0], None),)], events)
    with pytest.raises(PythonException, match="takes 30 features, but a row has 2"):
        ModelPredictor(keras_model=model, features_col="event").transform(df).collect()


class Layered(keras.Model):
    """A subclass that calls Keras' layers; the class itself exists in no worker."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(8, "relu")
        self.dropout = keras.layers.Dropout(0.5)
        self.classes = keras.layers.Dense(2, "softmax")

    def call(self, features, training=True):
        """Return the probabilities."""
        return self.classes(self.dropout(self.hidden(features), training=training))


class Connected(keras.Model):
    """A functional model of a class of its own."""

    def __init__(self):
        features = keras.Input((30,))
        super().__init__(features, keras.layers.Dense(2, "softmax")(features))


class Raw(keras.Model):
    """A subclass that calls more than Keras' layers and functions."""

    def call(self, features):
        """Return probabilities."""
        return tensorflow.nn.softmax(features)


@keras.saving.register_keras_serializable()
class Doubling(keras.layers.Layer):
    """A layer that is registered here, but in no worker."""

    def call(self, features):
        """Return twice the features."""
        return 2 * features


def squared(numbers):
    """A function that exists in no worker."""
    return numbers * numbers


def sequential(*layers, shape=(30,), dtype="float32"):
    """A network of layers."""
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def dense(units, activation="softmax", **options):
    """A dense layer whose outputs are far apart."""
    return keras.layers.Dense(units, activation, kernel_initializer="random_normal", **options)


def functional(make, shape=(30,)):
    """A functional model of what a function makes of the input."""
    features = keras.Input(shape)
    return keras.Model(features, make(features))


def called(model):
    """Call a model once, which builds it."""
    model(np.zeros((5, 30), "float32"), training=False)
    return model


def listed():
    """A functional model that was made with lists of one input and one output."""
    features = keras.Input((30,))
    return keras.Model([features], [dense(2)(features)])


def test_events_with_a_prediction_are_not_predicted_again(spark, event_values):
    """Their features are gone, so the message says how to apply another model."""
    rows = spark.createDataFrame([(event_values[0],)], "value binary")
    predictor = ModelPredictor(keras_model=build_model(), features_col="event")
    scored = predictor.transform(parse_events(rows))
    with pytest.raises(ValueError, match=r"already have a prediction.*call parse_events on"):
        predictor.transform(scored)


SERVED = {
    "a sigmoid": lambda: sequential(dense(1, "sigmoid")),
    "a sigmoid of logits": lambda: functional(lambda x: keras.ops.sigmoid(dense(1, None)(x))),
    "a sigmoid inside, returned as float32": lambda: sequential(
        sequential(dense(1, "sigmoid")), keras.layers.Activation("linear", dtype="float32")
    ),
    "a sigmoid per step, for one step": lambda: sequential(
        keras.layers.Reshape((1, 30)), dense(1, "sigmoid"), keras.layers.Flatten()
    ),
    "ten classes": lambda: sequential(dense(10)),
    "an image": lambda: sequential(
        keras.layers.Conv2D(4, 3), keras.layers.Flatten(), dense(2), shape=(6, 5, 1)
    ),
    "an image of any height": lambda: sequential(
        keras.layers.Conv2D(4, 3), keras.layers.GlobalMaxPooling2D(), dense(2), shape=(None, 5, 1)
    ),
    "a sequence": lambda: sequential(keras.layers.LSTM(4), dense(2), shape=(30, 1)),
    "a sequence of any length": lambda: sequential(
        keras.layers.GRU(4), dense(2), shape=(None, 1)
    ),
    "any number of features": lambda: sequential(
        keras.layers.Reshape((-1, 1)), keras.layers.GlobalAveragePooling1D(), dense(2),
        shape=(None,),
    ),
    "float64": lambda: sequential(dense(2, dtype="float64"), dtype="float64"),
    "float16": lambda: sequential(dense(2, dtype="float16"), dtype="float16"),
    "mixed precision": lambda: sequential(
        dense(8, "relu", dtype="mixed_float16"), dense(2, dtype="mixed_float16")
    ),
    "bfloat16 within": lambda: sequential(dense(2, dtype="mixed_bfloat16")),
    "small integers": lambda: sequential(
        keras.layers.Embedding(9, 4), keras.layers.Flatten(), dense(2), dtype="uint8"
    ),
    "built by a call": lambda: called(keras.Sequential([dense(2)])),
    "a fixed batch": lambda: keras.Sequential([keras.Input(batch_shape=(4, 30)), dense(2)]),
    "a subclass": lambda: called(Layered()),
    "a functional subclass": Connected,
    "lists of one tensor": listed,
}
FILLED = {
    "an image": (6, 5, 1), "an image of any height": (6, 5, 1), "a sequence": (30, 1),
    "a sequence of any length": (30, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
def test_every_kind_of_model_is_served_as_keras_computes_it(spark, kind):
    """Predictions of every kind of model that is accepted equal those of Keras in memory."""
    keras.utils.set_random_seed(8)
    model = SERVED[kind]()
    rows = np.random.default_rng(8).integers(0, 9, (5, 30)).astype("float64")
    shape = FILLED.get(kind, (30,))
    given = rows.reshape(5, *shape).astype(getattr(model, "input_dtype", "float32"))
    expected = np.array(keras.tree.flatten(model(given, training=False))[0], "float64")
    if expected.shape[1] == 1:
        expected = np.hstack([1 - expected, expected])

    events = [((number, row.tolist(), None),) for number, row in enumerate(rows)]
    columns = "event struct<id: long, features: array<double>, reason: string>"
    df = spark.createDataFrame(events, columns)
    scored = ModelPredictor(keras_model=model, features_col="event").transform(df.coalesce(1))
    labels = LabelIndexTransformer(output_dim=expected.shape[1], activation_threshold=1.1)
    scored = labels.transform(scored).orderBy("event.id").collect()
    found = np.stack([row.prediction.toArray() for row in scored])
    assert len(np.unique(found[:, 0])) > 1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [row.predicted_index for row in scored] == found.argmax(axis=1).tolist()


@pytest.mark.parametrize("dtype, number", [("int32", 2**24 + 1), ("int64", 2**53 - 1)])
def test_integers_reach_the_model_as_integers(spark, dtype, number):
    """A model whose input is of integers gets them exactly; another number has no prediction."""
    features = keras.Input((1,), dtype=dtype)
    same = keras.ops.cast(keras.ops.equal(features, number), "float32")
    model = keras.Model(features, keras.layers.Concatenate()([1 - same, same]))
    numbers = [number, number - 1, 0.5, -1e300, float("nan")]
    df = spark.createDataFrame([(Vectors.dense(n),) for n in numbers], ["features"]).coalesce(1)
    scored = LabelIndexTransformer().transform(ModelPredictor(keras_model=model).transform(df))
    assert [row.predicted_index for row in scored.collect()] == [1, 0, None, None, None]


def lost(model):
    """Return a model whose training failed."""
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    return model


class Normalizing(keras.Model):
    """A model that uses the batch's own means and variances, in use as well."""

    def __init__(self):
        super().__init__()
        self.normalization, self.out = keras.layers.BatchNormalization(), dense(2)

    def call(self, x):
        """Return the probabilities."""
        return self.out(self.normalization(x, training=True))


def two_inputs():
    """A model with two inputs."""
    first, second = keras.Input((10,)), keras.Input((20,))
    return keras.Model({"a": first, "b": second}, dense(2)(keras.ops.hstack([first, second])))


REFUSED = {
    "two inputs": (two_inputs, "it has 2 inputs: give it a single keras.Input"),
    "two outputs": (
        lambda: functional(lambda x: [dense(2)(x), dense(2)(x)]), "it has 2 outputs: choose one"
    ),
    "outputs with names": (
        lambda: functional(lambda x: {"a": dense(2)(x), "b": dense(2)(x)}), "it has 2 outputs"
    ),
    "a sequence": (
        lambda: sequential(keras.layers.LSTM(2, return_sequences=True), shape=(2, 2)),
        r"its output has the shape \(None, 2, 2\), not \(None, classes\): end it with",
    ),
    "other rows": (
        lambda: functional(lambda x: keras.ops.reshape(dense(4)(x), (-1, 2))),
        r"returns an array of shape \(128, 2\) for 64 events",
    ),
    "a linear output": (lambda: sequential(dense(1, None)), "not a probability: end it with a sig"),
    "one softmax": (lambda: sequential(dense(1)), "not a probability: end it with a sigmoid"),
    "texts": (
        lambda: sequential(
            keras.layers.TextVectorization(output_mode="int", output_sequence_length=2,
                                           vocabulary=["a"]),
            shape=(), dtype="string",
        ),
        "its input is of type string: convert it to numbers",
    ),
    "several open sizes": (
        lambda: sequential(keras.layers.GlobalMaxPooling2D(), dense(2), shape=(None, None, 1)),
        r"the shape \(None, None, None, 1\): fix all sizes but one",
    ),
    "unbuilt": (lambda: keras.Sequential([dense(2)]), "it isn't built for one tensor of features"),
    "an unbuilt subclass": (Layered, "begin it with keras.Input, or call it on some events"),
    "a subclass with functions of TensorFlow": (
        lambda: called(Raw()), r"Keras can't copy it \(.*\): build it from keras.layers and keras"
    ),
    "an own layer": (
        lambda: sequential(Doubling(), dense(2)),
        "the class 'Doubling' is not part of Keras: build it from keras.layers and keras.ops",
    ),
    "an own layer within": (
        lambda: sequential(sequential(Doubling()), dense(2)), "'Doubling' is not part of Keras"
    ),
    "an own function": (
        lambda: sequential(dense(2, squared)), "the function 'squared' is not part of Keras"
    ),
    "a Lambda layer": (
        lambda: sequential(keras.layers.Lambda(lambda x: x), dense(2)), "it has a Python lambda"
    ),
    "weights without a number": (lambda: lost(sequential(dense(2))), "its weights are not finite"),
    "a batch's maximum": (
        lambda: functional(lambda x: dense(2)(x / keras.ops.max(keras.ops.abs(x)))),
        "an event's numbers depend on the other events of its batch",
    ),
    "an own call with training": (
        lambda: called(Normalizing()), "its call returns other numbers than the functional model"
    ),
    "no model": (lambda: "model.keras", r"it is a str, not a keras\.Model: load or build one"),
    "a layer": (lambda: dense(2), r"it is a Dense, not a keras\.Model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_when_the_stage_is_made(kind):
    """A model that can't be served is refused on the driver, in one sentence with the remedy."""
    make, reason = REFUSED[kind]
    with pytest.raises(UnservableModelError, match=reason) as refused:
        ModelPredictor(keras_model=make())
    assert str(refused.value).startswith("this model can't be served: ")
    assert "\n" not in str(refused.value) and "safe_mode" not in str(refused.value)
    assert keras.saving.get_registered_object("Custom>Doubling") is Doubling


LOGS = functional(lambda x: keras.ops.softmax(keras.ops.log(x)), shape=(2,))


def test_a_record_without_a_finite_prediction_is_bad(spark, tmp_path):
    """A record whose prediction is NaN is stored and counted as a bad one, with the reason."""
    schema = StructType().add("id", LongType()).add("x", DoubleType()).add("y", DoubleType())
    values = [{"id": 7, "x": 1, "y": 3}, {"id": 8, "x": -1, "y": 3}, {"id": 9}]
    rows = [(b"k", orjson.dumps(value), "t", 0, offset) for offset, value in enumerate(values)]
    columns = "key binary, value binary, topic string, partition int, offset long"
    records = spark.createDataFrame(rows, columns).coalesce(1)
    records = records.withColumn("timestamp", F.current_timestamp())
    predictor = ModelPredictor(keras_model=LOGS, features_col="event")
    scored = predictor.transform(parse_events(records, schema))
    scored = keep_bad_records(LabelIndexTransformer().transform(scored))
    path = str(tmp_path / "scored")
    with ParquetSink(
        spark, path, signal_index=1, event_id="id", on_bad_record="skip"
    ) as sink:
        sink.begin({TopicAndPartition("t", 0): 0}, {"t": "id"})
        counts = sink.write(scored, [OffsetRange("t", 0, 0, 3)])
    assert (counts.events, counts.signal, counts.bad) == (1, 1, 2)
    assert [row.id for row in read_scored(spark, path).collect()] == [7]
    bad = read_bad_records(spark, path).orderBy("offset").collect()
    assert [row.offset for row in bad] == [1, 2]
    assert bad[0].reason == "the model has no finite prediction for its features"
    assert orjson.loads(bytes(bad[0].value)) == values[1]


def test_vectors_without_a_finite_prediction_get_none(spark):
    """In a table without records, a prediction that is not finite is null, and so is its index."""
    rows = [(Vectors.dense(numbers),) for numbers in ([1, 3], [-1, 3], [float("inf"), 1])]
    df = spark.createDataFrame(rows, ["features"]).coalesce(1)
    scored = LabelIndexTransformer().transform(ModelPredictor(keras_model=LOGS).transform(df))
    first, *others = scored.collect()
    np.testing.assert_allclose(first.prediction.toArray(), [0.25, 0.75], atol=1e-6)
    assert first.predicted_index == 1
    assert [(row.prediction, row.predicted_index) for row in others] == [(None, None)] * 2


def test_a_wrong_width_is_said_before_anything_runs(spark, model):
    """Where a column's metadata has the number of features, a wrong one is reported at once."""
    df = spark.createDataFrame([(1.0, 2.0)], ["a", "b"])
    df = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(df)
    with pytest.raises(ValueError, match="the model takes 30 features, but a row has 2"):
        ModelPredictor(keras_model=model).transform(df)
    schema = StructType().add("id", LongType()).add("x", DoubleType())
    events = parse_events(spark.createDataFrame([(b"{}",)], "value binary"), schema)
    with pytest.raises(ValueError, match="the model takes 30 features, but a row has 1"):
        ModelPredictor(keras_model=model, features_col="event").transform(events)
    with pytest.raises(ValueError, match="the model takes 30 features, but a row has 2"):
        ModelPredictor(keras_model=model, feature_names=("a", "b"))


def test_another_number_of_classes_is_refused(spark, vectors):
    """Predictions with another number of classes are refused, before a job if that is known."""
    reason = "the predictions have 10 entries, but output_dim is 2: give LabelIndexTransformer"
    scored = ModelPredictor(keras_model=sequential(dense(10))).transform(vectors)
    with pytest.raises(ValueError, match=reason):
        LabelIndexTransformer(output_dim=2).transform(scored)
    unknown = spark.createDataFrame([(Vectors.dense([0.1] * 10),)], ["prediction"])
    with pytest.raises(SparkRuntimeException, match=reason):
        LabelIndexTransformer(output_dim=2).transform(unknown).collect()


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "log_softmax"])
def test_no_class_is_chosen_by_what_is_no_probability(spark, activation):
    """Of logits, the rules for probabilities would choose a wrong class without a word."""
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation)])
    rows = spark.createDataFrame([(Vectors.dense([1.0, 2.0]),)], ["features"])
    scored = ModelPredictor(keras_model=network).transform(rows)
    with pytest.raises(ValueError, match=r"'prediction' are not probabilities.* with a softmax"):
        LabelIndexTransformer(output_dim=2).transform(scored)


def test_sparse_vectors_are_scored_too(spark, model):
    """Sparse vectors, which VectorAssembler makes of rows with many zeros, are scored."""
    dense = [0.0] * 29 + [1.0]
    both = [(Vectors.dense(dense),), (Vectors.sparse(30, [29], [1.0]),)]
    scored = ModelPredictor(keras_model=model).transform(spark.createDataFrame(both, ["features"]))
    first, second = (row.prediction.toArray() for row in scored.collect())
    np.testing.assert_array_equal(first, second)


def test_a_pipeline_is_saved_and_loaded(spark, model, vectors, tmp_path):
    """A pipeline can be saved and loaded, and then predicts the same."""
    stages = [ModelPredictor(keras_model=model), LabelIndexTransformer(activation_threshold=0.52)]
    fitted = Pipeline(stages=stages).fit(vectors)
    fitted.save(str(tmp_path / "pipeline"))
    loaded = PipelineModel.load(str(tmp_path / "pipeline"))
    few = vectors.limit(100)
    assert loaded.transform(few).collect() == fitted.transform(few).collect()


@pytest.mark.parametrize("name", ["model[1]", "all [1]{a,b}*?\\,%20#:ü"])
def test_stages_are_saved_at_exactly_their_path(model, vectors, tmp_path, name):
    """A stage is saved and loaded at a path that Spark would take for a pattern."""
    stages = ModelPredictor(keras_model=model), LabelIndexTransformer(default_index=1)
    found = vectors.limit(10)
    expected = vectors.limit(10)
    for number, stage in enumerate(stages):
        path = tmp_path / name / str(number)
        stage.save(path)
        stage.write().overwrite().save(str(path))
        loaded = type(stage).load(path)
        assert loaded.uid == stage.uid
        found, expected = loaded.transform(found), stage.transform(expected)
    assert found.collect() == expected.collect()


def test_evaluators_of_spark_ml_take_the_prediction(model, vectors):
    """Spark ML's evaluators accept the prediction and the index."""
    scored = ModelPredictor(keras_model=model).predict(vectors)
    scored = LabelIndexTransformer().transform(scored)
    scored = scored.withColumn("label", (F.col("Label") == "s").cast("double"))
    area = BinaryClassificationEvaluator(rawPredictionCol="prediction").evaluate(scored)
    accuracy = MulticlassClassificationEvaluator(
        predictionCol="predicted_index", metricName="accuracy"
    ).evaluate(scored)
    assert 0 < area < 1
    assert 0 < accuracy < 1


@pytest.mark.parametrize(
    "column, reason",
    [("nowhere", "there is no column 'nowhere'"), ("EventId", "must hold vectors, not bigint")],
)
def test_a_wrong_input_column_is_said_before_anything_runs(model, vectors, column, reason):
    """A wrong input column is reported before any job runs."""
    with pytest.raises(ValueError, match=reason):
        ModelPredictor(keras_model=model, features_col=column).transform(vectors)
    with pytest.raises(ValueError, match=reason):
        LabelIndexTransformer(input_col=column).transform(vectors)


def test_a_predictor_without_model_is_refused(vectors):
    """A predictor without a model is refused before any job runs."""
    with pytest.raises(ValueError, match="has no model: pass one as keras_model="):
        ModelPredictor().transform(vectors)


def test_vectors_of_a_wrong_length_are_refused(spark, model):
    """Vectors of wrong lengths are refused, even if together they fill whole rows."""
    rows = [(Vectors.dense([0.5] * length),) for length in (29, 31)]
    df = spark.createDataFrame(rows, ["features"]).coalesce(1)
    with pytest.raises(PythonException, match="the model takes 30 features, but a row has 29"):
        ModelPredictor(keras_model=model).transform(df).collect()


def test_rows_without_features_are_refused(spark, model):
    """A row whose features are null is refused, and the column is named."""
    schema = StructType([StructField("features", VectorUDT())])
    rows = spark.createDataFrame([(Vectors.dense([0.5] * 30),), (None,)], schema).coalesce(1)
    with pytest.raises(SparkRuntimeException, match=r"has no features \(column 'features' is null"):
        ModelPredictor(keras_model=model).transform(rows).collect()


def test_a_stream_whose_model_is_replaced_keeps_the_last_ones_only(spark, vectors):
    """Workers keep only the latest models of a stream that replaces them."""
    for _ in range(5):
        network = keras.Sequential([keras.Input((30,)), keras.layers.Dense(2, "softmax")])
        ModelPredictor(keras_model=network).transform(vectors).collect()

    def kept(_batches):
        yield pyarrow.record_batch({"kept": [len(transformers._KEPT)]})

    found = spark.range(8).mapInArrow(kept, "kept long").collect()
    assert 1 <= max(row.kept for row in found) <= 3


def reference_index(vector, output_dim, default, threshold):
    """Return the index by Distributed Keras' rules, one value after the other."""
    largest, index = 0.0, default
    for i in range(output_dim):
        if vector[i] >= threshold:
            return float(i)
        if vector[i] > largest:
            largest, index = vector[i], i
    return float(index)


@pytest.mark.parametrize("output_dim, default, threshold", [(3, 0, 0.55), (3, 2, 0.3), (2, 1, 2.0)])
def test_label_index_follows_the_rules_of_distributed_keras(spark, output_dim, default, threshold):
    """The label index equals Distributed Keras', even for ties, zeros and NaN."""
    generator = np.random.default_rng(5)
    every = [*generator.uniform(-1, 1, (200, 3)).round(1).tolist(), [0.0, 0.0, 0.0], [-1, -1, -1],
             [0.6, 0.9, 0.7], [0.2, 0.2, 0.1], [float("nan"), 0.1, 0.2], [float("nan")] * 3]
    cases = [case[:output_dim] for case in every]
    df = spark.createDataFrame([(Vectors.dense(case),) for case in cases], ["prediction"])
    stage = LabelIndexTransformer(
        output_dim=output_dim, default_index=default, activation_threshold=threshold
    )
    found = [row.predicted_index for row in stage.transform(df).collect()]
    assert found == [reference_index(case, output_dim, default, threshold) for case in cases]


def test_the_network_runs_once_however_often_its_result_is_used(spark, model, vectors):
    """Keeping the prediction, its index and a filter on it run the network once."""
    scored = LabelIndexTransformer().transform(ModelPredictor(keras_model=model).predict(vectors))
    used = scored.filter("predicted_index == 0").drop("raw", "features")
    plan = used._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 1
    assert plan.count("predict(") == 1
