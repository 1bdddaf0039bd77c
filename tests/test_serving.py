"""Serving: columns by name, the threshold, and replacing the model of a running stream."""

import logging
import os
import tempfile
from dataclasses import replace

import keras
import numpy as np
import pytest
from pyspark.sql import functions as F

from helpers.higgs import EVENT_ID, FEATURES, generate_events
from helpers.model import UnservableModelError
from helpers.records import MODEL_VERSION, parse_events
from helpers.serving import (
    ModelFile,
    ServingModel,
    ServingModelError,
    ServingTransformer,
    save_serving_model,
    scaled_network,
)


@pytest.fixture
def table(spark):
    """Ten events as a DataFrame."""
    return spark.createDataFrame(generate_events(10, seed=6)).coalesce(1)


def expected(serving_model):
    """Return the signal probabilities that Keras alone computes."""
    rows = generate_events(10, seed=6)[list(FEATURES)].to_numpy(dtype="float32")
    return serving_model.network.predict(rows, verbose=0)[:, 1]


def test_columns_are_taken_by_name(table, serving_model):
    """Columns are taken by name, so their order doesn't change the scores."""
    turned = table.select(*reversed(table.columns))
    scored = ServingTransformer(serving_model).transform(turned).orderBy(EVENT_ID).collect()
    np.testing.assert_allclose(
        [row.prediction[1] for row in scored], expected(serving_model), atol=1e-6
    )
    assert {row[MODEL_VERSION] for row in scored} == {serving_model.version}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_event_without_a_feature_has_no_prediction(table, serving_model, value):
    """An event with a null or NaN feature has no prediction."""
    first = table.first()[EVENT_ID]
    feature = F.when(F.col(EVENT_ID) != first, F.col("PRI_met")).otherwise(F.lit(value))
    scored = ServingTransformer(serving_model).transform(table.withColumn("PRI_met", feature))
    without = [row[EVENT_ID] for row in scored.collect() if row.predicted_index is None]
    assert without == [first]
    assert scored.where("prediction IS NULL").count() == 1


def test_a_missing_column_is_named(table, serving_model):
    """A missing column is named in the error."""
    with pytest.raises(ValueError, match=r"needs the columns \['PRI_met'\], which are missing"):
        ServingTransformer(serving_model).transform(table.drop("PRI_met"))


def test_a_column_of_texts_is_named(table, serving_model):
    """A column of strings is named in the error."""
    texts = table.withColumn("PRI_met", F.lit("high"))
    with pytest.raises(ValueError, match="'PRI_met' must hold numbers, not string: cast it"):
        ServingTransformer(serving_model).transform(texts)


def test_events_in_another_order_are_refused(table, serving_model):
    """Events parsed with another order of features are refused."""
    wrong = serving_model.schema
    wrong = type(wrong)([wrong.fields[0], *reversed(wrong.fields[1:])])
    records = table.select(F.to_json(F.struct("*")).cast("binary").alias("value"))
    with pytest.raises(ValueError, match="parse them with the serving model's schema"):
        ServingTransformer(serving_model).transform(parse_events(records, wrong))


def test_records_are_scored_as_tables_are(spark, table, serving_model, event_values):
    """Records get the same scores as rows of a table; a bad record gets none."""
    names = [EVENT_ID, *FEATURES]
    records = table.select(F.to_json(F.struct(*names)).cast("binary").alias("value"))
    records = records.union(spark.createDataFrame([(b"rubbish",)], "value binary")).coalesce(1)
    events = parse_events(records, serving_model.schema)
    scored = ServingTransformer(serving_model).transform(events)
    *good, bad = scored.orderBy(F.col(f"event.{EVENT_ID}").asc_nulls_last()).collect()
    np.testing.assert_allclose(
        [row.prediction[1] for row in good], expected(serving_model), atol=1e-6
    )
    assert bad.prediction is None and bad.predicted_index is None


@pytest.mark.parametrize("signal_index", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_the_threshold_decides(spark, make_serving_model, table, signal_index, threshold):
    """An event is signal if its signal probability reaches the contract's threshold."""
    model = make_serving_model(signal_index=signal_index, threshold=threshold)
    rows = ServingTransformer(model).transform(table).collect()
    for row in rows:
        is_signal = row.prediction[signal_index] >= threshold
        assert row.predicted_index == (signal_index if is_signal else 1 - signal_index)


@keras.saving.register_keras_serializable()
class Halving(keras.layers.Layer):
    """A layer that is registered here, but in no worker."""

    def call(self, features):
        """Return half of the features."""
        return features / 2


def of_layers(contract, *layers):
    """Return a serving model of layers behind the scaling."""
    network = keras.Sequential([keras.Input((30,)), *layers])
    return ServingModel(scaled_network(network, contract.means, contract.scales), contract)


def test_a_sigmoid_serves_two_classes(table, serving_model, tmp_path):
    """A single probability is that of the contract's second class."""
    model = of_layers(serving_model.contract, keras.layers.Dense(1, "sigmoid"))
    model = save_serving_model(model, tmp_path / "model.keras")
    rows = ServingTransformer(model).transform(table).orderBy(EVENT_ID).collect()
    found = [row.prediction.toArray() for row in rows]
    inputs = generate_events(10, seed=6)[list(FEATURES)].to_numpy(dtype="float32")
    probability = model.network.predict(inputs, verbose=0)
    np.testing.assert_allclose(found, np.hstack([1 - probability, probability]), atol=1e-5)
    assert [row.predicted_index for row in rows] == (probability[:, 0] >= 0.5).tolist()


def test_what_cannot_be_served_is_not_saved(serving_model, tmp_path):
    """Networks that can't be served, or have other classes than the contract, are refused."""
    contract, path = serving_model.contract, tmp_path / "model.keras"
    with pytest.raises(UnservableModelError, match="its only output is not a probability"):
        of_layers(contract, keras.layers.Dense(1))
    with pytest.raises(UnservableModelError, match="it has a Python lambda: build it from"):
        of_layers(contract, keras.layers.Lambda(lambda x: x), keras.layers.Dense(2))
    with pytest.raises(ServingModelError, match="distinguishes 3 classes, the contract 2"):
        save_serving_model(of_layers(contract, keras.layers.Dense(3, "softmax")), path)
    for activation in ("linear", "relu", "sigmoid"):
        with pytest.raises(ServingModelError, match="the network doesn't return probabilities"):
            save_serving_model(of_layers(contract, keras.layers.Dense(2, activation)), path)
    scaling, network = serving_model.network.layers
    network = keras.Sequential([keras.Input((30,)), scaling, Halving(), network])
    with pytest.raises(ServingModelError, match="the class 'Halving' is not part of Keras"):
        save_serving_model(replace(serving_model, network=network), path)


def test_a_model_that_was_never_saved_is_checked_as_well(serving_model):
    """Unscaled features, or a threshold in percent, would give wrong classes without an error."""
    _, network = serving_model.network.layers
    with pytest.raises(ServingModelError, match="doesn't scale its inputs with the contract's"):
        ServingTransformer(replace(serving_model, network=network))
    percent = replace(serving_model.contract, threshold=50)
    with pytest.raises(ServingModelError, match="threshold is 50, not between 0 and 1"):
        ServingTransformer(replace(serving_model, contract=percent))


def test_a_network_that_was_compiled_keeps_the_version_of_its_file(make_serving_model, tmp_path):
    """Keras saves the optimizer as well, and loads the network without it."""
    model = make_serving_model(seed=3)
    model.network.compile("adam", "sparse_categorical_crossentropy")
    saved = save_serving_model(model, tmp_path / "model.keras")
    assert ServingTransformer(saved).model is saved


def test_another_threshold_is_another_version(serving_model, table, tmp_path):
    """The version that results carry is that of the saved file, or would be its version."""
    changed = replace(serving_model, contract=replace(serving_model.contract, threshold=0.8))
    found = ServingTransformer(changed).transform(table).first()[MODEL_VERSION]
    saved = save_serving_model(changed, tmp_path / "model.keras")
    assert found == saved.version != serving_model.version


def test_a_file_that_is_rewritten_with_its_old_time_is_noticed(
    make_serving_model, serving_model, tmp_path
):
    """A copy that keeps times, such as one by rsync, doesn't hide a new version."""
    path, other = tmp_path / "model.keras", tmp_path / "other.keras"
    save_serving_model(serving_model, path)
    file, before = ModelFile(path), path.stat()
    file.current()
    second = save_serving_model(make_serving_model(seed=2), other)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    file.current()
    assert file.model.version == second.version


def test_a_new_version_serves_from_the_next_batch_on(
    make_serving_model, serving_model, table, tmp_path, caplog
):
    """A new version is used from the next batch; a damaged or unsuitable file is not."""
    path = tmp_path / "model.keras"
    first = save_serving_model(serving_model, path)
    file = ModelFile(path)
    before = file.current()
    assert file.current() is before
    save_serving_model(serving_model, path)
    assert file.current() is before  # the same version, written again
    second = save_serving_model(make_serving_model(seed=2), path)
    assert second.version != first.version
    after = file.current().transform(table)
    assert after.first()[MODEL_VERSION] == file.model.version == second.version
    # A running batch keeps its version.
    assert before.transform(table).first()[MODEL_VERSION] == first.version
    path.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert file.current().transform(table).first()[MODEL_VERSION] == second.version
        file.current()
    assert caplog.text.count(f"{second.version} keeps serving") == 1
    save_serving_model(make_serving_model(event_id="Id"), path)
    with caplog.at_level(logging.WARNING):
        assert file.current().transform(table).first()[MODEL_VERSION] == second.version
    assert "has event_id 'Id', but the results so far have 'EventId'" in caplog.text
    classes = {"class_names": ("signal", "background"), "signal_index": 0}
    save_serving_model(make_serving_model(**classes), path)
    with caplog.at_level(logging.WARNING):
        assert file.current().transform(table).first()[MODEL_VERSION] == second.version
    assert "has class_names ('signal', 'background'), but the results so far" in caplog.text
    path.unlink()
    assert file.current().transform(table).first()[MODEL_VERSION] == second.version


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(
    make_serving_model, serving_model, tmp_path, caplog
):
    """Reading a file that can't be read is retried with each batch, and logged once."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    file = ModelFile(path)
    second = save_serving_model(make_serving_model(seed=2), tmp_path / "second.keras")
    path.unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            file.current()
    assert caplog.text.count("keeps serving: there is no file") == 1
    (tmp_path / "second.keras").rename(path)
    file.current()
    assert file.model.version == second.version


def test_a_file_that_cannot_be_loaded_for_a_moment_is_tried_again(
    make_serving_model, serving_model, tmp_path, caplog, monkeypatch
):
    """A machine without space for temporary files says nothing about the model."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    file = ModelFile(path)
    second = save_serving_model(make_serving_model(seed=2), path)
    with monkeypatch.context() as context, caplog.at_level(logging.WARNING):
        context.setattr(tempfile, "tempdir", "/nowhere")
        file.current()
    assert "keeps serving: [Errno 2] No such file or directory" in caplog.text
    file.current()
    assert file.model.version == second.version


def test_there_must_be_a_model_to_begin_with(tmp_path):
    """A missing model file is an error at the start, not in the first batch."""
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ModelFile(tmp_path / "none.keras")
