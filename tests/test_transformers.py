"""The network and the label index as Spark ML stages."""

import keras
import numpy as np
import orjson
import pyarrow
import pytest
from pyspark.errors import PythonException, SparkRuntimeException
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator
from pyspark.ml.feature import Normalizer, VectorAssembler
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from helpers import transformers
from helpers.higgs import FEATURES, generate_events
from helpers.model import build_model, normalized_network
from helpers.records import parse_events
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
    with pytest.raises(ValueError, match="has no model: give it one as keras_model="):
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
    cases = [*generator.uniform(-1, 1, (200, 3)).round(1).tolist(), [0.0, 0.0, 0.0], [-1, -1, -1],
             [0.6, 0.9, 0.7], [0.2, 0.2, 0.1], [float("nan"), 0.1, 0.2], [float("nan")] * 3]
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
