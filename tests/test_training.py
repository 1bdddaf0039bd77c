"""Training on a Spark DataFrame: by one process, and by several Spark tasks in step."""

import contextlib
import json
import signal
import socket
import threading
import time
from pathlib import Path

import keras
import numpy
import pandas as pd
import psutil
import pyarrow
import pytest
import tensorflow
from processes import run_python, wait_until
from pyspark.ml.functions import array_to_vector
from sklearn.metrics import roc_auc_score

from helpers import training
from helpers.higgs import FEATURES, LABEL, generate_events
from helpers.model import build_model, compiled_predict
from helpers.training import SingleTrainer, SynchronousTrainer, TrainingError, fingerprint
from helpers.training_process import Replica, parts
from helpers.training_task import Rows, split_rows


def prepared(spark, count, seed):
    """Return events as Spark has them for training, and as arrays."""
    events = generate_events(count, seed=seed)
    features = events[list(FEATURES)].to_numpy()
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    is_signal = (events[LABEL] == "s").to_numpy()
    labels = [[1.0 - s, float(s)] for s in is_signal]
    rows = pd.DataFrame({"features": list(features), "label": labels})
    df = spark.createDataFrame(rows, "features array<double>, label array<double>")
    df = df.withColumns({name: array_to_vector(name) for name in df.columns})
    return df, features.astype("float32"), is_signal


@pytest.fixture(scope="module")
def events(spark):
    """4,000 events to train on."""
    return prepared(spark, 4_000, seed=21)[0].cache()


@pytest.fixture(scope="module")
def unseen(spark):
    """4,000 other events."""
    return prepared(spark, 4_000, seed=22)


def tiny(*layers):
    """Return a network with two inputs and two classes."""
    return keras.Sequential(
        [keras.Input((2,)), *layers,
         keras.layers.Dense(2, "softmax", kernel_initializer=keras.initializers.GlorotUniform(1))]
    )  # fmt: skip


def images():
    """Return a network for what isn't a table."""
    return keras.Sequential([keras.Input((8, 8)), keras.layers.Dense(2)])


def rows_of(spark, numbers, partitions=1):
    """Return a row a number, whose class is whether it is even."""
    rows = [([float(n), 1.0], n % 2) for n in numbers]
    return spark.createDataFrame(rows, "features array<double>, label int").repartition(partitions)


def by_number(**options):
    """Return a recipe for labels that are numbers."""
    return {"loss": "sparse_categorical_crossentropy", "batch_size": 2, **options}


def auc_of(model, unseen):
    """Return the area under the ROC curve on events that training did not see."""
    _, features, is_signal = unseen
    return roc_auc_score(is_signal, compiled_predict(model)(features)[:, 1])


def test_one_process_one_worker_and_two_learn_the_same(events, unseen, capsys):
    """Otherwise the number of machines would decide what a network is worth."""
    recipe = {"batch_size": 128, "num_epoch": 3}
    trainers = [SingleTrainer(build_model(), **recipe)]
    trainers += [SynchronousTrainer(build_model(), num_workers=n, **recipe) for n in (1, 2)]
    found = [auc_of(trainer.train(events, unseen[0]), unseen) for trainer in trainers]
    assert min(found) > 0.85
    assert max(found) - min(found) < 0.01
    for trainer in trainers:
        history = pd.DataFrame(trainer.get_history())
        assert history["epoch"].tolist() == [1, 2, 3]
        assert history["loss"].is_monotonic_decreasing
        assert history["validation_accuracy"].iloc[-1] > 0.78
        assert trainer.get_training_time() > history["seconds"].sum()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 9
    assert all(line.startswith(f"epoch {n % 3 + 1}/3  loss 0.") for n, line in enumerate(printed))


def test_the_same_seed_gives_the_same_training(events, unseen):
    """Otherwise nobody could repeat what somebody has published."""
    small = keras.Sequential([keras.Input((30,)), keras.layers.Dense(2, "softmax")])
    recipe = {"batch_size": 100, "num_epoch": 1}
    other = SingleTrainer(small, seed=6, **recipe).train(events).get_weights()[0]
    for make in (SingleTrainer, SynchronousTrainer):
        found = [make(small, seed=5, **recipe).train(events) for _ in range(2)]
        one, same = (trained.get_weights()[0] for trained in found)
        # Sums may be in another order; another order of rows shows much more.
        assert numpy.abs(one - same).max() < 1e-5
        assert numpy.abs(one - other).max() > 1e-4
        assert auc_of(found[0], unseen) == pytest.approx(auc_of(found[1], unseen), abs=0.005)


def test_the_network_that_is_given_stays_as_it_is(spark):
    """Otherwise a second training would go on from the first one without saying so."""
    model = tiny()
    before = model.get_weights()
    trained = SingleTrainer(model, **by_number()).train(rows_of(spark, range(8)))
    assert all(map(numpy.array_equal, model.get_weights(), before))
    assert not numpy.array_equal(trained.get_weights()[0], before[0])
    assert not trained.compiled  # an optimizer would go into each file


@pytest.mark.parametrize("numbers", [[3], [1, 2, 3]], ids=["a worker without rows", "odd parts"])
def test_workers_with_different_numbers_of_rows_use_them_all(spark, numbers, capsys):
    """Otherwise the last rows would be left out, or the workers wait for each other for ever."""
    recipe = by_number(batch_size=3)
    trainers = [make(tiny(), "sgd", **recipe) for make in (SingleTrainer, SynchronousTrainer)]
    # One update of all rows, by one or by two: the same, but for the order of sums.
    assert_same_weights(*(trainer.train(rows_of(spark, numbers)) for trainer in trainers))


# A loss, as many outputs as it is used with, and a label.
LOSSES = [
    (keras.losses.CategoricalCrossentropy(), 2, [1.0, 0.0]),
    (keras.losses.SparseCategoricalCrossentropy(), 2, 1),
    (keras.losses.MeanSquaredError(), 1, 0.5),
    (keras.losses.BinaryCrossentropy(), 1, [1.0]),
    (keras.losses.categorical_hinge, 2, [0.0, 1.0]),
    (keras.losses.sparse_categorical_crossentropy, 2, 1),
    (keras.losses.hinge, 1, 1),
    (keras.losses.mean_squared_error, 1, 0.5),
]


@pytest.mark.parametrize("loss, outputs, label", LOSSES)
def test_a_worker_takes_losses_as_keras_does(loss, outputs, label):
    """Otherwise the same loss would mean something else to one trainer than to the other."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(outputs, "sigmoid")])
    label_type = pyarrow.list_(pyarrow.float32()) if isinstance(label, list) else pyarrow.float32()
    table = pyarrow.table(
        {"features": [[1.0, 2.0], [0.5, 0.1], [3.0, -1.0]],
         "label": pyarrow.array([label] * 3, label_type), "validates": [False] * 3}
    )  # fmt: skip
    rows = split_rows(table, 2, outputs)[0]
    copy = copy_of(model)
    copy.compile("sgd", loss)
    expected = copy.train_on_batch(*rows)
    total, _ = replica_of(model, "sgd", loss, rows).update(*rows, numpy.float32(3))
    assert float(total) / 3 == pytest.approx(float(expected), rel=1e-5)
    assert_same_weights(model, copy)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.5, loss_scale_factor=1_024),
        keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5),
        keras.optimizers.AdamW(0.1, weight_decay=0.1, global_clipnorm=0.5),
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)),
    ],
    ids=["scaled", "averaged", "decayed", "slower and slower"],
)
def test_a_worker_takes_optimizers_as_keras_does(optimizer):
    """Otherwise the same optimizer would do something else for one trainer than for the other."""
    model = tiny(keras.layers.Dense(3, "tanh", kernel_regularizer=keras.regularizers.L2(0.1)))
    rows = Rows(numpy.eye(2, dtype="float32"), numpy.array([0, 1], "float32"))
    loss = keras.losses.SparseCategoricalCrossentropy()
    copy = copy_of(model)
    copy.compile(optimizer.from_config(optimizer.get_config()), loss)
    history = copy.fit(*rows, batch_size=2, epochs=10, verbose=0, validation_data=tuple(rows))
    replica = replica_of(model, optimizer, loss, rows)
    for epoch in range(10):
        trained, measured = (
            float(total) / 2
            for total, _ in (replica.update(*rows, numpy.float32(2)), replica.measure(*rows))
        )
        assert trained == pytest.approx(history.history["loss"][epoch], abs=1e-5)
        assert measured == pytest.approx(history.history["val_loss"][epoch], abs=1e-5)
    replica.finish()
    assert_same_weights(model, copy)


def copy_of(model):
    """Return a network of the same layers and weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def replica_of(model, optimizer, loss, rows):
    """Return what trains a network as the only worker."""
    plan = {"optimizer": keras.optimizers.serialize(keras.optimizers.get(optimizer)),
            "loss": keras.losses.serialize(loss), "label_shape": rows.labels.shape[1:],
            "inputs": 2, "workers": [{}]}  # fmt: skip
    return Replica(model, plan, tensorflow.distribute.get_strategy())


def assert_same_weights(one, other):
    """Fail if the weights of two networks differ by more than rounding."""
    for weights, others in zip(one.get_weights(), other.get_weights(), strict=True):
        numpy.testing.assert_allclose(weights, others, atol=1e-6)


def test_what_layers_count_themselves_is_the_same_everywhere(spark):
    """Otherwise a batch normalisation would serve with the numbers of one worker's rows."""
    model = tiny(keras.layers.BatchNormalization())
    trainer = SynchronousTrainer(model, **by_number(num_epoch=2))
    trained = trainer.train(rows_of(spark, range(20)))  # which compares the workers' weights
    mean = trained.layers[0].moving_mean.numpy()
    assert mean[0] != 0 and numpy.isfinite(mean).all()


@pytest.mark.parametrize(
    "victim_of, reason",
    [
        (lambda worker: worker, "its process was ended by SIGKILL"),
        (lambda worker: worker.parent(), "its Spark task has died"),
    ],
    ids=["its process", "its Spark worker"],
)
def test_a_worker_that_dies_fails_the_training_soon(spark, events, victim_of, reason):
    """Otherwise the others would wait for it, and nobody would know."""
    trainer = SynchronousTrainer(build_model(), num_epoch=1_000, batch_size=128)
    outcome = []

    def train():
        try:
            trainer.train(events)
        except TrainingError as error:
            outcome.append((time.monotonic(), str(error)))

    thread = threading.Thread(target=train)
    thread.start()
    wait_until(trainer.get_history, seconds=120)
    workers = training_processes()
    assert len(workers) == 2
    victim = victim_of(workers[0])
    killed = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    thread.join(60)
    failed, message = outcome[0]
    assert failed - killed < 30
    assert reason in message and message.startswith("worker ")
    wait_until(lambda: not any(worker.is_running() for worker in workers), seconds=30)
    wait_until(lambda: not any(Path(worker.folder).exists() for worker in workers), seconds=30)


def training_processes():
    """Return the workers' processes that this test run has started, and each one's folder."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if "helpers.training_process" in command:
                process.folder = command[-1]
                found.append(process)
    return found


def test_more_workers_than_slots_are_refused_at_once(spark, events):
    """Otherwise Spark would try for ten minutes."""
    with pytest.raises(ValueError, match="num_workers is 3, but Spark runs 2 tasks at a time"):
        SynchronousTrainer(build_model(), num_workers=3).train(events)


@pytest.mark.parametrize("make", [SingleTrainer, SynchronousTrainer])
@pytest.mark.parametrize(
    "rows, reason",
    [
        ([], "there are no rows to train on"),
        ([([1.0, float("nan")], 0)], "features has values that are not finite"),
        ([([1.0], 0)], "'features' has 1 entries a row, but the network has 2 inputs"),
        ([([1.0], 0), ([1.0, 2.0], 0)], "'features' has 1 .*entries a row, but the network has 2"),
        ([([1.0, 2.0], None)], "label has 1 nulls"),
        ([([1.0, 2.0], 2)], "label 2 is none of the classes 0 to 1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_from_are_refused(spark, make, rows, reason):
    """Otherwise the weights would become NaN, or TensorFlow's error name a tensor."""
    df = spark.createDataFrame(rows, "features array<double>, label int")
    with pytest.raises(ValueError, match=reason):
        make(tiny(), **by_number()).train(df)


def test_a_column_may_have_a_dot_in_its_name(spark):
    """Otherwise Spark would look for a field of a struct, and say so."""
    df = rows_of(spark, range(4)).withColumnRenamed("label", "event.label")
    trainer = SingleTrainer(tiny(), **by_number(label_col="event.label"))
    trainer.train(df)
    assert len(trainer.get_history()) == 1


@pytest.mark.parametrize("make", [SingleTrainer, SynchronousTrainer])
def test_labels_of_another_length_are_refused(spark, make):
    """Otherwise a loss would compare each row with the labels of all."""
    df = spark.createDataFrame([([1.0, 2.0], [1.0])], "features array<double>, label array<double>")
    with pytest.raises(ValueError, match="'label' has 1 entries a row, but the network has 2 outp"):
        make(tiny()).train(df)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"features_col": "inputs"}, "no column 'inputs'; the columns are"),
        ({"label_col": "name"}, "column 'name' must hold vectors or numbers, not string"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"loss": "squared"}, "squared"),
        ({"loss": keras.losses.MeanSquaredError(reduction="sum")}, "has the reduction 'sum'"),
        ({"worker_optimizer": None}, "worker_optimizer is None: name one, such as 'adam'"),
        ({"loss": "categorical_crossentropy"}, "use loss='sparse_categorical_crossentropy'"),
        ({"features_col": ["features"]}, "is not the name of a column: put several into one with"),
        ({"keras_model": keras.Sequential([keras.layers.Dense(2)])}, "has no inputs yet: let it"),
        ({"keras_model": images()}, r"inputs have the shape \(None, 8, 8\): to train on a table"),
    ],
)
def test_wrong_options_are_refused(spark, options, reason):
    """Otherwise the error would come from a worker."""
    df = rows_of(spark, [1]).selectExpr("*", "'x' AS name")
    with pytest.raises(ValueError, match=reason):
        SynchronousTrainer(**by_number(**{"keras_model": tiny(), **options})).train(df)


@pytest.mark.parametrize("make", [SingleTrainer, SynchronousTrainer])
def test_options_are_named(make):
    """Otherwise a call of Distributed Keras, whose order is another, would swap two numbers."""
    with pytest.raises(TypeError, match="positional arguments"):
        make(tiny(), "adam", "mse", "features", "label", 1, 32)


def test_what_goes_wrong_in_a_worker_is_told(spark):
    """Otherwise one would have to look for it in the logs of Spark's workers."""
    with pytest.raises(TrainingError, match=r"ValueError: the loss gives values of shape \(\),"):
        SynchronousTrainer(tiny(), loss=keras.losses.Dice(), batch_size=2).train(
            rows_of(spark, [1, 2]).selectExpr("features", "array(0.0, 1.0) AS label")
        )


def test_a_loss_that_explodes_ends_the_training(spark):
    """Otherwise the network would be useless, and only its users would find out."""
    df = rows_of(spark, range(100)).selectExpr("features", "array(1.0D, 0.0D) AS label")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    trainer = SingleTrainer(model, keras.optimizers.SGD(1e30), "mse", num_epoch=9, batch_size=2)
    with pytest.raises(TrainingError, match="scale the features, or lower the optimizer's"):
        trainer.train(df)


@pytest.mark.parametrize("counts", [[7, 3], [1, 1], [5, 0], [0, 9], [4, 4, 4]])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_each_row_is_in_one_step_of_an_epoch(counts, batch_size):
    """Otherwise some rows would count twice or not at all, or the workers lose step."""
    rows = [Rows(numpy.zeros((n, 2)), numpy.arange(n)) for n in counts]
    steps = [list(parts(mine, counts, batch_size)) for mine in rows]
    assert len({tuple(count for _, count in mine) for mine in steps}) == 1
    for number, mine in enumerate(steps):
        assert numpy.concatenate([part.labels for part, _ in mine]).tolist() == list(
            range(counts[number])
        )
    for together in zip(*steps, strict=True):
        assert sum(len(part.labels) for part, _ in together) == together[0][1] > 0


def test_the_order_of_rows_does_not_matter():
    """Otherwise the same rows would give another training whenever Spark shuffles them."""
    columns = {"features": [[1.0], [2.0], [3.0]], "label": [0, 1, 0], "validates": [False] * 3}
    table = pyarrow.table(columns)
    turned = table.take([2, 0, 1])
    for part, other in zip(split_rows(table, 1, 2)[0], split_rows(turned, 1, 2)[0], strict=True):
        numpy.testing.assert_array_equal(part, other)


def test_a_fingerprint_tells_data_apart(spark):
    """Otherwise nobody could say later on which events a model was trained."""
    df = spark.createDataFrame([(1, "s"), (2, "b")], "EventId int, Label string")
    assert fingerprint(df) == fingerprint(df.orderBy("Label").select("Label", "EventId"))
    assert fingerprint(df) != fingerprint(df.withColumnRenamed("Label", "label"))
    assert fingerprint(df) != fingerprint(df.limit(1))
    assert fingerprint(df) != fingerprint(df.replace("s", "b"))
    one, other = (spark.createDataFrame([row], "a int, b int") for row in ((1, None), (None, 1)))
    assert fingerprint(one) != fingerprint(other)


def test_silence_is_an_error_in_time(spark, events, monkeypatch):
    """Otherwise a training whose slots others have would wait for ever."""
    monkeypatch.setattr(training, "SILENT_SECONDS", 0.01)
    with pytest.raises(TrainingError, match=r"said nothing for 0\.01 s: see whether"):
        SynchronousTrainer(tiny(), **by_number()).train(rows_of(spark, [1, 2]))


@pytest.mark.parametrize(
    "last, reason",
    [(None, "it has said nothing for 0.5 s"), (b'{"epo', "its Spark task has died")],
    ids=["silence", "half a line"],
)
def test_a_worker_that_is_lost_is_named(spark, monkeypatch, last, reason):
    """Otherwise nobody would know on which machine to look."""
    monkeypatch.setattr(training, "SILENT_SECONDS", 0.5)
    with training._Reports(spark) as reports, socket.create_connection(reports.address) as worker:
        worker.sendall(json.dumps({"token": reports.token, "rank": 3}).encode() + b"\n")
        if last:
            worker.sendall(last)
            worker.close()
        report = wait_until(reports.next, seconds=10)
    assert report["died"] and report["failed"].startswith(f"worker 3: {reason}")


def test_what_is_no_worker_is_passed_over(spark, capfd):
    """Otherwise whoever tries a port could end a training, or write into a notebook."""
    with training._Reports(spark) as reports:
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"token": "guessed", "rank": 0}\n'):
            with socket.create_connection(reports.address) as somebody:
                somebody.sendall(said)
                assert somebody.recv(1) == b""  # and so it was read, and the connection closed
        assert reports.next() is None and reports.first_came is None
    assert "Traceback" not in capfd.readouterr().err


def test_the_port_for_reports_can_be_chosen(spark):
    """Otherwise no worker would reach a driver of which only some ports are open."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spark.conf.set("spark.helpers.training.port", port)
    try:
        with training._Reports(spark) as reports:
            assert reports.address[1] == port
            with pytest.raises(TrainingError, match=r"training\.port to a port that is free"):
                training._Reports(spark)
    finally:
        spark.conf.unset("spark.helpers.training.port")


def test_a_proxy_is_not_between_the_workers(spark, monkeypatch):
    """Otherwise no training would begin where a proxy leads to the internet."""
    monkeypatch.setitem(spark.sparkContext.environment, "http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(training, "SILENT_SECONDS", 60)
    trainer = SynchronousTrainer(tiny(), **by_number())
    trainer.train(rows_of(spark, [1, 2]))
    assert len(trainer.get_history()) == 1


@pytest.mark.long
def test_an_executor_that_dies_leaves_nothing_and_is_waited_for():
    """Otherwise events would lie on a cluster's machines, and the next try would be refused."""
    run = run_python("tests/training_on_executors.py", seconds=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["seconds"] < 30
    assert found["error"].startswith("worker ")
    assert found["left"] == []
    assert found["epochs_afterwards"] == 1
