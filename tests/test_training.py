"""Training on a Spark DataFrame: in one process, and in rounds of several workers."""

import json
import os
import signal
import threading
import tracemalloc

import keras
import numpy as np
import pandas as pd
import psutil
import pyarrow
import pytest
from processes import run_python, wait_until
from pyspark.ml.functions import array_to_vector
from sklearn.metrics import roc_auc_score

from helpers.higgs import FEATURES, LABEL, generate_events
from helpers.model import build_model, compiled_predict
from helpers.training import AveragingTrainer, SingleTrainer, TrainingError, trainers
from helpers.training.recipe import Format, format_of, recipe_of
from helpers.training.task import Replica, Rows, read_rows
from helpers.transformers import ModelPredictor


def prepared(spark, count, seed):
    """Return training events as a DataFrame and as arrays."""
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
    """Return a network for images, not for rows of a table."""
    return keras.Sequential([keras.Input((8, 8)), keras.layers.Dense(2)])


SCHEMA = "features array<double>, label int"


def rows_of(spark, numbers, partitions=1):
    """Return one row per number; its label is the number modulo 2."""
    rows = [([float(n), 1.0], n % 2) for n in numbers]
    return spark.createDataFrame(rows, SCHEMA).repartition(partitions)


def by_number(**options):
    """Return the options for labels that are numbers."""
    return {"loss": "sparse_categorical_crossentropy", "batch_size": 2, **options}


def auc_of(model, unseen):
    """Return the area under the ROC curve on events that training did not see."""
    _, features, is_signal = unseen
    return roc_auc_score(is_signal, compiled_predict(model)(features)[:, 1])


@pytest.mark.long
def test_one_process_one_worker_and_two_learn_the_same(events, unseen, capsys):
    """The AUC doesn't depend on the trainer or the number of workers; each epoch is logged."""
    recipe = {"batch_size": 128, "num_epoch": 6}
    both = [SingleTrainer(build_model(), **recipe)]
    both += [AveragingTrainer(build_model(), num_workers=n, **recipe) for n in (1, 2)]
    found = [auc_of(trainer.train(events, unseen[0]), unseen) for trainer in both]
    assert min(found) > 0.85
    assert max(found) - min(found) < 0.01
    for trainer in both:
        history = pd.DataFrame(trainer.get_history())
        assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
        assert history["loss"].iloc[-1] < history["loss"].iloc[0] - 0.1
        assert history["validation_accuracy"].iloc[-1] > 0.78
        assert trainer.get_training_time() > history["seconds"].sum()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 18
    assert all(line.startswith(f"epoch {n % 6 + 1}/6  loss 0.") for n, line in enumerate(printed))


def test_the_same_seed_gives_the_same_training(events, unseen):
    """A seed makes training repeatable, except for rounding where several threads add up."""
    small = keras.Sequential([keras.Input((30,)), keras.layers.Dense(2, "softmax")])
    recipe = {"batch_size": 100, "num_epoch": 1}
    other = SingleTrainer(small, seed=6, **recipe).train(events).get_weights()[0]
    for make in (SingleTrainer, AveragingTrainer):
        found = [make(small, seed=5, **recipe).train(events) for _ in range(2)]
        one, same = (trained.get_weights()[0] for trained in found)
        assert np.abs(one - same).max() < 1e-5
        assert np.abs(one - other).max() > 1e-4
        assert auc_of(found[0], unseen) == pytest.approx(auc_of(found[1], unseen), abs=0.005)


def drawing():
    """Return a network with unseeded dropout and a batch normalization."""
    return tiny(
        keras.layers.Dense(8, "relu", kernel_initializer=keras.initializers.GlorotUniform(2)),
        keras.layers.BatchNormalization(), keras.layers.Dropout(0.5),
    )  # fmt: skip


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.long), 3])
def test_workers_give_the_same_weights_to_the_last_bit(spark, window):
    """Weights are identical however the rows are partitioned and ordered, even with dropout."""
    recipe = by_number(num_epoch=2, batch_size=8, communication_window=window)
    rows = rows_of(spark, [*range(100), *range(10)])
    found = [
        AveragingTrainer(drawing(), **recipe).train(df).get_weights()
        for df in (rows, rows.repartition(5))
    ]
    for weights, same in zip(*found, strict=True):
        np.testing.assert_array_equal(weights, same)


def test_the_network_that_is_given_stays_as_it_is(spark):
    """Training doesn't change the given network, so a second training starts from it again."""
    model = tiny()
    before = model.get_weights()
    for make in (SingleTrainer, AveragingTrainer):
        trained = make(model, **by_number()).train(rows_of(spark, range(8)))
        assert all(map(np.array_equal, model.get_weights(), before))
        assert not np.array_equal(trained.get_weights()[0], before[0])
        assert not trained.compiled  # an optimizer would be saved with it


@pytest.mark.parametrize("numbers", [[3], [1, 2, 3]], ids=["a worker without rows", "odd parts"])
def test_workers_with_different_numbers_of_rows_use_them_all(spark, numbers):
    """Averaging by rows equals gradient descent on all rows, however unequal the parts."""
    rows = rows_of(spark, numbers)
    single = SingleTrainer(tiny(), "sgd", **by_number(batch_size=3))
    workers = AveragingTrainer(tiny(), "sgd", **by_number(batch_size=6))
    assert_same_weights(single.train(rows), workers.train(rows))
    (one,), (other,) = single.get_history(), workers.get_history()
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["accuracy"] == pytest.approx(other["accuracy"])


@pytest.mark.parametrize("window, rounds", [(None, 1), (1, 10), (4, 3), (100, 1)])
def test_a_round_has_the_updates_that_were_asked_for(spark, monkeypatch, window, rounds):
    """`communication_window` limits the updates that a worker makes between two averages."""
    rows = rows_of(spark, range(400))
    trainer = AveragingTrainer(
        tiny(), **by_number(num_workers=1, batch_size=40, communication_window=window)
    )
    sizes, average = [], trainers._average

    def note(results):
        sizes.append(int(sum(result["totals"][0] for result in results)))
        return average(results)

    monkeypatch.setattr(trainers, "_average", note)
    trainer.train(rows)
    assert len(sizes) == rounds
    assert sum(sizes) == 400


def test_equal_rows_are_spread_over_workers_and_rounds(spark, monkeypatch):
    """Categories and flags make many equal rows; each worker learns from a part of them."""
    sizes, average = [], trainers._average

    def note(results):
        sizes.append([int(result["totals"][0]) for result in results])
        return average(results)

    monkeypatch.setattr(trainers, "_average", note)
    recipe = by_number(num_workers=2, batch_size=80, communication_window=2)
    AveragingTrainer(tiny(), **recipe).train(rows_of(spark, [1] * 400))
    assert len(sizes) == 3 and all(len(workers) == 2 for workers in sizes)
    assert min(map(min, sizes)) > 30


# A loss, the number of outputs, and a label.
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
    """A worker computes each loss and its update as Keras does."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(outputs, "sigmoid")])
    label_type = pyarrow.list_(pyarrow.float32()) if isinstance(label, list) else pyarrow.float32()
    batch = pyarrow.record_batch(
        {"features": [[1.0, 2.0], [0.5, 0.1], [3.0, -1.0]],
         "label": pyarrow.array([label] * 3, label_type)}
    )  # fmt: skip
    rows = read_rows([batch], format_of(model, loss))
    copy = copy_of(model)
    copy.compile("sgd", loss)
    expected = copy.train_on_batch(*rows)
    replica = replica_of(model, "sgd", loss)
    count, total, _ = replica.train(rows, batch_size=3, key=[0])
    assert total / count == pytest.approx(float(expected), rel=1e-5)
    assert_same_weights(replica.model, copy)


def with_a_hidden_layer():
    """Return a network with a hidden layer."""
    return tiny(
        keras.layers.Dense(
            3, "tanh", kernel_regularizer=keras.regularizers.L2(0.1),
            kernel_initializer=keras.initializers.GlorotUniform(3),
        )
    )  # fmt: skip


@pytest.mark.long
def test_mixed_precision_scales_the_loss_as_keras_does(spark):
    """A network of mixed precision trains on workers that have another policy, and scaled."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = with_a_hidden_layer()
        trainer = AveragingTrainer(model, num_workers=1, **by_number(num_epoch=2))
        rows = rows_of(spark, range(8))
        trained = trainer.train(rows)
    finally:
        keras.config.set_dtype_policy("float32")
    again = AveragingTrainer(model, num_workers=1, **by_number(num_epoch=2)).train(rows)
    assert_same_weights(trained, again)
    optimizer = recipe_of(model, keras.optimizers.Adam(), keras.losses.MeanSquaredError()).optimizer
    assert optimizer["class_name"] == "LossScaleOptimizer"


OPTIMIZERS = {
    "scaled": keras.optimizers.SGD(0.5, loss_scale_factor=1_024),
    "averaged": keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5),
    "decayed": keras.optimizers.AdamW(0.1, weight_decay=0.1, global_clipnorm=0.5),
    "slower": keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)),
}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optimizer, id=name, marks=() if name == "averaged" else pytest.mark.long)
        for name, optimizer in OPTIMIZERS.items()
    ],
)
def test_rounds_go_on_with_the_optimizer_as_keras_does(spark, optimizer):
    """Rounds keep the optimizer's state: four rounds of one worker equal four epochs of `fit`."""
    model = with_a_hidden_layer()
    df = spark.createDataFrame([([1.0, 0.0], 0), ([0.0, 1.0], 1)], SCHEMA)
    rows = Rows(np.eye(2, dtype="float32"), np.array([0, 1], "float32"))
    copy = copy_of(model)
    copy.compile(
        optimizer.from_config(optimizer.get_config()), keras.losses.SparseCategoricalCrossentropy()
    )
    expected = copy.fit(*rows, batch_size=2, epochs=4, verbose=0, validation_data=tuple(rows))
    for make, options in ((SingleTrainer, {}), (AveragingTrainer, {"num_workers": 1})):
        trainer = make(model, optimizer, **by_number(num_epoch=4, **options))
        assert_same_weights(trainer.train(df, df), copy)
        history = pd.DataFrame(trainer.get_history())
        assert history["loss"].tolist() == pytest.approx(expected.history["loss"], abs=1e-5)
        validated = history["validation_loss"].tolist()
        assert validated == pytest.approx(expected.history["val_loss"], abs=1e-5)


def copy_of(model):
    """Return a copy of a network, with its weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def replica_of(model, optimizer, loss):
    """Return a worker's replica of a network."""
    return Replica(*recipe_of(model, keras.optimizers.get(optimizer), loss))


def assert_same_weights(one, other):
    """Fail if the weights of two networks differ by more than rounding."""
    for weights, others in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weights, others, atol=1e-6)


def test_what_layers_keep_is_averaged_by_rows(spark):
    """Batch normalization ends up with the means of all workers' rows."""
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.BatchNormalization(momentum=0.0), keras.layers.Dense(2)]
    )
    numbers = range(200)
    trainer = AveragingTrainer(model, "sgd", "mse", batch_size=1_000)
    df = rows_of(spark, numbers).selectExpr("features", "array(0.0D, 1.0D) AS label")
    mean = trainer.train(df).layers[0].moving_mean.numpy()
    assert mean[0] == pytest.approx(np.mean(numbers), rel=1e-5)


def test_each_worker_draws_other_numbers_in_each_round(spark):
    """Dropout differs between workers and rounds, so that different networks are averaged."""
    features = np.ones((1, 2), "float32")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5, seed=1)])
    replica = replica_of(model, "sgd", keras.losses.MeanSquaredError())
    seeds = set()
    for key in ([0, 1, 0, 0], [0, 1, 0, 1], [0, 2, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]):
        replica.train(Rows(features, features), 1, key)
        (state,) = (v for v in replica.model.non_trainable_variables if "seed" in v.name)
        seeds.add(tuple(state.numpy().tolist()))
    assert len(seeds) == 4


def worker_processes():
    """Return the Python worker processes of this test run's Spark."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "helpers.spark.daemon" in process.cmdline() and process.parent().name() != "java":
                found.append(process)
        except psutil.Error:
            continue
    return found


def in_a_thread(trainer, df):
    """Train in a thread; return the thread, and a list that receives the network."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(trainer.train(df)))
    thread.start()
    return thread, outcome


@pytest.mark.long
def test_a_worker_that_dies_is_replaced_and_nothing_changes(spark, events):
    """Spark reruns the task of a killed worker, and the weights are identical."""
    recipe = {"num_epoch": 3, "batch_size": 128}
    undisturbed = AveragingTrainer(build_model(), **recipe).train(events)
    trainer = AveragingTrainer(build_model(), **recipe)
    thread, outcome = in_a_thread(trainer, events)
    wait_until(trainer.get_history, seconds=120)
    killed = worker_processes()
    for process in killed:
        process.send_signal(signal.SIGKILL)
    assert killed
    thread.join(300)
    for weights, same in zip(undisturbed.get_weights(), outcome[0].get_weights(), strict=True):
        np.testing.assert_array_equal(weights, same)


@pytest.mark.long
def test_an_interrupt_ends_the_jobs_and_leaves_nothing(spark, events):
    """An interrupt ends the jobs and frees cached rows; the session stays usable."""
    context = spark.sparkContext
    persisted = context._jsc.sc().getPersistentRDDs().size()
    # As in a notebook's kernel, where PySpark's signal handler isn't in effect.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = AveragingTrainer(build_model(), num_epoch=100_000)

    def interrupt():
        wait_until(trainer.get_history, seconds=120)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(events)
    finally:
        signal.signal(signal.SIGINT, usual)
        thread.join()
    wait_until(lambda: not context.statusTracker().getActiveJobsIds(), seconds=60)
    assert context._jsc.sc().getPersistentRDDs().size() <= persisted  # Spark may free others
    done = len(trainer.get_history())
    assert spark.range(10).count() == 10
    assert len(trainer.get_history()) == done


def test_nothing_listens_beyond_loopback_during_a_training(spark, events):
    """During a training, workers don't listen, and Spark only on loopback."""

    def listening():
        return {
            (process.pid, connection.laddr.ip)
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    trainer = AveragingTrainer(build_model(), num_epoch=3, batch_size=64)
    thread, _ = in_a_thread(trainer, events)
    seen, workers, before, lasting = set(), set(), set(), set()
    while thread.is_alive():
        try:
            workers |= {process.pid for process in worker_processes()}
            now = listening()
            lasting |= now & before  # a new worker has its daemon's socket for a moment
            seen, before = seen | now, now
        except psutil.Error:  # a process ended meanwhile
            continue
        thread.join(0.05)
    assert len(trainer.get_history()) == 3
    assert workers and seen
    assert {address for _, address in seen} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not workers & {process for process, _ in lasting}


@pytest.mark.long
def test_more_workers_than_slots_take_turns(spark, capsys):
    """Workers beyond the number of task slots take turns instead of waiting for executors."""
    trainer = AveragingTrainer(tiny(), **by_number(num_workers=5, batch_size=10))
    trainer.train(rows_of(spark, range(50)))
    assert len(trainer.get_history()) == 1


@pytest.mark.long
def test_predictions_go_on_beside_a_training(spark, unseen):
    """Predictions and training share Python workers, and predictions don't change."""
    model = build_model()
    scored = ModelPredictor(keras_model=model).transform(unseen[0].limit(500)).cache()
    before = [row.prediction for row in scored.collect()]
    AveragingTrainer(tiny(), **by_number(num_epoch=2)).train(rows_of(spark, range(20)))
    again = ModelPredictor(keras_model=model).transform(unseen[0].limit(500))
    assert [row.prediction for row in again.collect()] == before


def test_rows_are_in_memory_once():
    """A worker needs memory for its rows once, plus a batch."""
    batch_rows, batches, width = 4_096, 100, 30
    numbers = np.random.default_rng(0).random(batch_rows * width, "float32")
    lists = pyarrow.FixedSizeListArray.from_arrays(numbers, width).cast(
        pyarrow.list_(pyarrow.float32())
    )
    batch = pyarrow.record_batch({"features": lists, "label": numbers[:batch_rows].round()})
    tracemalloc.start()
    try:
        format_ = Format(width, 2, labels="classes")
        rows = read_rows((batch for _ in range(batches)), format_)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = rows.features.nbytes + rows.labels.nbytes
    assert size == batches * batch_rows * (width + 1) * 4
    assert peak < 1.5 * size


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
@pytest.mark.parametrize(
    "rows, reason",
    [
        ([], "there are no rows to train on"),
        ([([1.0, float("nan")], 0)], "features has values that are not finite"),
        ([([1.0], 0)], "'features' has 1 entries per row, but the network has 2 inputs"),
        ([([1.0], 0), ([1.0, 2.0], 0)], "'features' has 1 .*entries per row, but the network has"),
        ([([1.0, 2.0], None)], "label has 1 nulls"),
        ([([1.0, 2.0], 2)], "label 2 is not one of the classes 0 to 1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_from_are_refused(spark, make, rows, reason):
    """Rows that can't be learned from are refused with the column and the reason."""
    df = spark.createDataFrame(rows, SCHEMA)
    with pytest.raises(ValueError, match=reason):
        make(tiny(), **by_number()).train(df)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
@pytest.mark.parametrize(
    "loss, labels, reason",
    [
        ("binary_crossentropy", [0, 2], "label 2 is not between 0 and 1, as the loss requires"),
        (keras.losses.BinaryFocalCrossentropy(name="mine"), [-1, 1], "label -1 is not between 0"),
        (keras.losses.hinge, [-1, 3], "label 3 is not between -1 and 1"),
        ("sparse_categorical_crossentropy", [0, 1], "label 1 is not one of the classes 0 to 0"),
    ],
)
def test_labels_that_the_loss_does_not_mean_are_refused(spark, make, loss, labels, reason):
    """A label outside of what the loss is defined for is refused, as it would train another."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid")])
    df = spark.createDataFrame([([1.0], label) for label in labels], SCHEMA)
    with pytest.raises(ValueError, match=reason):
        make(model, "sgd", loss).train(df)


@pytest.mark.parametrize("loss", ["mse", keras.losses.CategoricalCrossentropy(name="mine")])
def test_a_class_number_needs_a_loss_that_takes_one(spark, loss):
    """With several outputs, numbers as labels are refused unless the loss takes class numbers."""
    with pytest.raises(ValueError, match="takes an entry per class, which column 'label' doesn't"):
        SingleTrainer(tiny(), "sgd", loss, batch_size=1).train(rows_of(spark, range(4)))


@pytest.mark.parametrize(
    "loss, outputs, labels",
    [
        (keras.losses.BinaryCrossentropy(from_logits=True), [0.3, -0.3], [1, 0]),
        (keras.losses.Hinge(), [0.3, -0.3], [1, -1]),
        (keras.losses.SquaredHinge(), [0.3, -0.3], [1, 0]),
        (keras.losses.BinaryCrossentropy(), [0.6, 0.3], [1, 0]),
    ],
)
def test_accuracy_is_that_of_the_likelier_class(loss, outputs, labels):
    """A perfect network has an accuracy of 1, whatever number the loss takes for the boundary."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    rows = Rows(np.array(outputs, "float32")[:, None], np.array(labels, "float32")[:, None])
    for factor, share in ((1, 1), (-1, 0)):
        if min(outputs) < 0 or factor > 0:
            found = replica_of(model, "sgd", loss).measure(rows._replace(features=factor * rows[0]))
            assert found[2] / found[0] == share


def huber(expected, found):
    """Return a loss that isn't Keras' Huber loss."""
    return keras.ops.mean(keras.ops.abs(expected - found), axis=-1)


class Adam(keras.optimizers.Adam):
    """An optimizer that may do something else than Keras' Adam."""


def without_decay_of_biases():
    """Return an optimizer with a setting that Keras doesn't save."""
    optimizer = keras.optimizers.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def with_own_layer():
    """Return a network with a layer that workers don't know."""

    class Own(keras.layers.Layer):
        def call(self, x):
            return x

    return keras.Sequential([keras.Input((2,)), Own(), keras.layers.Dense(2)])


class Own(keras.losses.Loss):
    """A loss that workers don't know."""

    def call(self, expected, found):
        """Return the loss of each row."""
        return keras.ops.mean(keras.ops.square(expected - found), axis=-1)


def with_own_rate():
    """Return an optimizer with a learning rate that workers don't know."""

    class OwnRate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

        def get_config(self):
            return {}

    return keras.optimizers.SGD(OwnRate())


def with_one_frozen_weight():
    """Return a network with a weight that is frozen, in a layer that isn't."""
    model = tiny()
    model.layers[-1].bias.trainable = False
    return model


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"loss": huber}, "'huber' is not part of Keras, or only has the name of a part"),
        ({"loss": Own()}, "the loss 'Own' is not part of Keras"),
        ({"worker_optimizer": Adam()}, "'Adam' is not part of Keras, or only has the name"),
        ({"worker_optimizer": with_own_rate()}, "because the class 'OwnRate' is not part of Keras"),
        ({"worker_optimizer": without_decay_of_biases()}, "forget exclude_from_weight_decay"),
        ({"keras_model": with_one_frozen_weight()}, "would train other weights than the network"),
        ({"keras_model": with_own_layer()}, "the class 'Own' is not part of Keras: build it from"),
    ],
)
def test_what_a_copy_would_lose_is_refused(spark, options, reason):
    """What Keras doesn't save of a network, an optimizer or a loss is refused, as it is copied."""
    df = rows_of(spark, range(4)).selectExpr("features", "features AS label")
    with pytest.raises(ValueError, match=reason):
        SingleTrainer(**{"keras_model": tiny(), "loss": "mse", **options}).train(df)


def test_a_registered_layer_is_refused_before_workers_miss_it(spark):
    """Keras knows it in this process only: one process trains it, workers don't."""
    df = rows_of(spark, range(4)).selectExpr("features", "features AS label")
    with keras.saving.custom_object_scope({}):
        keras.saving.register_keras_serializable("tests", "Doubling")(Doubling)
        try:
            layers = [keras.Input((2,)), Doubling(), keras.layers.Dense(2)]
            model = keras.Sequential(layers)
            assert SingleTrainer(model, loss="mse").train(df)
            with pytest.raises(ValueError, match="the class 'Doubling' is not part of Keras"):
                AveragingTrainer(model, loss="mse").train(df)
        finally:
            keras.saving.get_custom_objects().pop("tests>Doubling")


class Doubling(keras.layers.Layer):
    """A layer of a program's own."""

    def call(self, x):
        """Return twice the input."""
        return 2 * x


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_a_row_on_which_the_network_fails_is_one_sentence(spark, make):
    """An embedding doesn't know the category 12."""
    layers = [keras.layers.Embedding(9, 2), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    df = spark.createDataFrame([([3.0], 0.0), ([12.0], 1.0)], ["features", "label"])
    reason = r"the network fails on a row \(indices.* = 12 is not in \[0, 9\)\): leave such rows"
    with pytest.raises(ValueError, match=reason) as failed:
        make(model, loss="mse").train(df)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_features_keep_the_digits_that_the_input_takes(spark, make):
    """A network with 64-bit inputs learns from 64-bit numbers, as it is served with them."""
    layers = [
        keras.layers.Normalization(mean=[1.7e9], variance=[100.0], dtype="float64"),
        keras.layers.Dense(1, kernel_initializer="ones"),
    ]
    model = keras.Sequential([keras.Input((1,), dtype="float64"), *layers])
    times = [1.7e9 + seconds for seconds in (-17.0, 3.0, 137.0)]
    df = spark.createDataFrame([([time], (time - 1.7e9) / 10) for time in times],
                               "features array<double>, label double")  # fmt: skip
    trainer = make(model, keras.optimizers.SGD(0.0), "mse")
    trainer.train(df)
    assert trainer.get_history()[0]["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_a_whole_number_that_would_be_rounded_is_refused(spark, make):
    """Rows come as 64-bit floats, in which 2**53 + 1 is another number; serving also refuses it."""
    layers = [keras.layers.Embedding(9, 2), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((1,), dtype="int64"), *layers])
    df = spark.createDataFrame([([2], 0.0), ([2**53 + 1], 1.0)],
                               "features array<bigint>, label double")  # fmt: skip
    with pytest.raises(ValueError, match=r"features has 9\.0\d+e\+15, but .* may be rounded"):
        make(model, "sgd", "mse").train(df)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_a_number_that_the_input_cannot_hold_is_refused(spark, make):
    """A fraction for an input of integers is refused, as it has no prediction in serving."""
    model = keras.Sequential(
        [keras.Input((1,), dtype="int32"), keras.layers.Embedding(9, 2), keras.layers.Flatten()]
    )
    df = spark.createDataFrame([([2.0], 0), ([2.5], 1)], SCHEMA)
    with pytest.raises(ValueError, match=r"features has 2\.5, but .* input is of type int32"):
        make(model, **by_number()).train(df)


@pytest.mark.long
def test_refused_rows_cost_no_worker(spark):
    """Refused rows keep the Python workers alive, so the next job needn't start new ones."""
    df = rows_of(spark, range(20_000)).repartition(2)
    AveragingTrainer(tiny(), **by_number(batch_size=2_000)).train(df)
    before = {process.pid for process in worker_processes()}
    wrong = df.selectExpr("features", "IF(features[0] = 5, 2, label) AS label")
    with pytest.raises(ValueError, match="label 2 is not one of the classes 0 to 1"):
        AveragingTrainer(tiny(), **by_number(batch_size=2_000)).train(wrong)
    assert before and before <= {process.pid for process in worker_processes()}


def test_a_column_may_have_a_dot_in_its_name(spark):
    """A column name may contain a dot."""
    df = rows_of(spark, range(4)).withColumnRenamed("label", "event.label")
    trainer = SingleTrainer(tiny(), **by_number(label_col="event.label"))
    trainer.train(df)
    assert len(trainer.get_history()) == 1


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_labels_of_another_length_are_refused(spark, make):
    """Labels that don't match the number of outputs are refused."""
    df = spark.createDataFrame([([1.0, 2.0], [1.0])], "features array<double>, label array<double>")
    with pytest.raises(ValueError, match="'label' has 1 entries per row, but the network has 2 "):
        make(tiny()).train(df)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"features_col": "inputs"}, "no column 'inputs'; the columns are"),
        ({"label_col": "name"}, "column 'name' must hold vectors or numbers, not string"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must be a whole number of at least 0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"communication_window": 0}, "communication_window is 0"),
        ({"loss": "squared"}, "squared"),
        ({"loss": keras.losses.MeanSquaredError(reduction="sum")}, "has the reduction 'sum'"),
        ({"worker_optimizer": None}, "worker_optimizer is None: name one, such as 'adam'"),
        ({"loss": "categorical_crossentropy"}, "use loss='sparse_categorical_crossentropy'"),
        ({"features_col": ["features"]}, "is not the name of a column: put several into one with"),
        ({"keras_model": keras.Sequential([keras.layers.Dense(2)])}, "has no inputs yet: begin it"),
        ({"keras_model": images()}, r"inputs have the shape \(None, 8, 8\): to train on a table"),
    ],
)
def test_wrong_options_are_refused(spark, options, reason):
    """Invalid options are refused on the driver, with the reason."""
    df = rows_of(spark, [1]).selectExpr("*", "'x' AS name")
    with pytest.raises(ValueError, match=reason):
        AveragingTrainer(**by_number(**{"keras_model": tiny(), **options})).train(df)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_a_loss_that_compares_classes_needs_more_than_one_output(spark, make):
    """With one output, its value is always 0, so nothing would be learned."""
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    with pytest.raises(ValueError, match="only one output: use loss='binary_crossentropy'"):
        make(network).train(rows_of(spark, range(4)))


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_options_are_named(make):
    """Options must be named, since Distributed Keras has them in another order."""
    with pytest.raises(TypeError, match="positional arguments"):
        make(tiny(), "adam", "mse", "features", "label", 1, 32)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_what_goes_wrong_in_spark_is_one_sentence(spark, make):
    """A failure in Spark is raised as one sentence that includes its cause."""
    fails = "CASE WHEN label >= 0 THEN raise_error('the detector is off') END"
    df = rows_of(spark, [1, 2]).selectExpr("features", f"CAST({fails} AS int) AS label")
    with pytest.raises(TrainingError, match=r"could not train: .*the detector is off") as told:
        make(tiny(), **by_number()).train(df)
    assert "\n" not in str(told.value)
    wait_until(lambda: not spark.sparkContext.statusTracker().getActiveJobsIds())


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_a_loss_that_explodes_ends_the_training(spark, make):
    """A loss that explodes ends the training, and the message names remedies."""
    df = rows_of(spark, range(100)).selectExpr("features", "array(1.0D, 0.0D) AS label")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    trainer = make(model, keras.optimizers.SGD(1e30), "mse", num_epoch=9, batch_size=2)
    with pytest.raises(TrainingError, match="scale the features, or lower the optimizer's"):
        trainer.train(df)


@pytest.mark.parametrize("make", [SingleTrainer, AveragingTrainer])
def test_weights_that_explode_in_the_last_update_are_not_returned(spark, make):
    """Weights that explode in the last update are an error, although its loss was finite."""
    df = rows_of(spark, [1]).selectExpr("features", "array(1e30D, 0.0D) AS label")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(TrainingError, match=r"not finite after the last epoch: scale the features"):
        make(model, keras.optimizers.SGD(1e30), "mae", num_epoch=1).train(
            df.selectExpr("transform(features, x -> x * 1e20) AS features", "label")
        )


def test_shuffle_of_distributed_keras_is_explained(spark):
    """Distributed Keras' `shuffle` is refused, and the message says to leave it out."""
    with pytest.raises(ValueError, match=r"True is not a DataFrame.*`shuffle`, leave it out"):
        SingleTrainer(tiny(), **by_number()).train(rows_of(spark, [1]), True)
    with pytest.raises(TypeError, match=r"train takes no shuffle: .*`shuffle`, leave it out"):
        SingleTrainer(tiny(), **by_number()).train(rows_of(spark, [1]), shuffle=True)


@pytest.mark.long
def test_a_training_survives_an_executor():
    """If an executor is killed, another one takes over, and the weights are identical."""
    run = run_python("tests/training_on_executors.py", seconds=600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {"epochs": 4, "same_weights": True, "persisted": 0}
