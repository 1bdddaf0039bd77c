"""The walkthrough: the original's calls in the original's order, and its exercises."""

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from kafka import KafkaConsumer
from notebook_cells import solution

from helpers.higgs import EVENT_ID, FEATURES, generate_events
from helpers.model import build_model
from helpers.notebook import definitions, find_notebook

PATH = find_notebook("1_walkthrough")
CELLS = nbformat.read(PATH, as_version=4).cells

# The notebook of 2016, cell by cell, without what Spark 4, Kafka 4 and Keras 3 rule out.
ORIGINAL = """
nb_features = 30
nb_classes = 2
model = Sequential()
model.add(Dense(500))
model.add(Activation("relu"))
model.add(Dropout(0.4))
model.add(Dense(1000))
model.add(Activation("relu"))
model.add(Dropout(0.4))
model.add(Dense(500))
model.add(Activation("relu"))
model.add(Dense(nb_classes))
model.add(Activation("softmax"))
model.summary()
kafka_producer.py
application_name = "Distributed Keras Kafka Pipeline"
using_spark_2 =
local =
if local:
num_cores =
num_executors =
else:
num_executors =
consumer_name =
conf = SparkConf()
conf.set("spark.app.name", application_name)
conf.set("spark.master", master)
conf.set("spark.executor.cores",
conf.set("spark.executor.instances",
conf.set("spark.serializer", "org.apache.spark.serializer.KryoSerializer")
if using_spark_2:
sc = SparkContext(conf=conf)
ssc =
kafkaStream = KafkaUtils.createStream(
ssc, brokers, consumer_name, {sample_topic: 3}
def predict(df):
keras_model=model, features_col="features_normalized", output_col="prediction"
predictor.predict(df)
def post_process(df):
output_dim=2, input_col="prediction", output_col="predicted_index"
transformer.transform(df)
def prepare_dataframe(df):
features = df.columns
features.remove("EventId")
vector_assembler = VectorAssembler(inputCols=features, outputCol="features")
df = vector_assembler.transform(df)
normalizer = Normalizer(inputCol="features", outputCol="features_normalized", p=2.0)
normalizer.transform(df)
def process_instances(rdd):
if not rdd.isEmpty():
df = rdd.toDF()
df = prepare_dataframe(df)
df = predict(df)
df = post_process(df)
df = df.filter(df["predicted_index"] == 0)
df.count()
raw_instances = kafkaStream.map(lambda x: x[1])
instances = raw_instances.map(json_to_dataframe_row)
instances.foreachRDD(process_instances)
ssc.start()
""".strip().splitlines()


def code_of_the_original():
    """Return the code cells from the original's model to the end of its stream."""
    sources, inside = [], False
    for cell in CELLS:
        if cell.cell_type == "code" and inside:
            sources.append(cell.source)
        inside |= "### Pretrained model" in cell.source
        if "## The stream, as it should be" in cell.source.splitlines():
            return sources
    raise AssertionError("the section on the original has no end")


def cell_with(text):
    """Return the source of the only code cell with a text."""
    (source,) = [cell.source for cell in CELLS if cell.cell_type == "code" and text in cell.source]
    return source


def test_the_originals_calls_are_there_in_its_order():
    """Each call of the notebook of 2016 follows the one before it."""
    code, place = "\n".join(code_of_the_original()), 0
    for call in ORIGINAL:
        found = code.find(call, place)
        assert found >= 0, f"{call!r} is missing, or in another place"
        place = found + len(call)


@pytest.mark.long
def test_the_original_runs_as_a_plain_script(kafka, tmp_path):
    """The original's cells run outside Jupyter, and with the branch that makes a SparkContext."""
    given = f"""
bootstrap_servers, topic = {kafka.bootstrap_servers!r}, "original"
events = sample_events = 500
cores = 1
"""
    cells = [cell_with("sample_events = 2_000"), given, *code_of_the_original()]
    source = "\n\n\n".join([*cells, "print('signal:', sum(counts))"])
    script = tmp_path / "original.py"
    script.write_text(source.replace("using_spark_2 = True", "using_spark_2 = False"))
    run = subprocess.run(
        [sys.executable, script], cwd=PATH.parent, capture_output=True, text=True, timeout=1_800,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    expected = signal_in_memory(kafka, "original_sample")
    assert run.stdout.splitlines()[-1] == f"signal: {expected}"


def signal_in_memory(kafka, topic):
    """Return how many events of a topic get class 0 from Keras alone."""
    with KafkaConsumer(
        topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest",
        consumer_timeout_ms=5_000,
    ) as consumer:  # fmt: skip
        events = [json.loads(record.value) for record in consumer]
    assert len(events) == 500
    features = np.array([[event[name] for name in FEATURES] for event in events])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    probabilities = build_model().predict(features.astype("float32"), verbose=0)
    return int((probabilities.argmax(axis=1) == 0).sum())


def test_the_model_written_out_is_the_kits():
    """The model that is written out layer by layer predicts what `build_model` predicts."""
    features = np.random.default_rng(0).random((10, 30), dtype="float32")
    model = definitions("1_walkthrough", "pipeline")["model"]
    expected = build_model().predict(features, verbose=0)
    np.testing.assert_allclose(model.predict(features, verbose=0), expected, atol=1e-6)


@pytest.fixture(scope="module")
def notebook_names(spark, kafka, produce):
    """The names of the notebook that the exercises use, with 20 events in the topic."""
    kafka.create_topic("exercises", partitions=1)
    events = generate_events(20, seed=0)[[EVENT_ID, *FEATURES]]
    record, *_ = produce("exercises", [line.encode() for line in lines_of(events)])
    names = definitions("1_walkthrough", "pipeline")
    exec(cell_with("def prepare_dataframe"), names)
    kafka_records = (
        spark.read.format("kafka")
        .option("kafka.bootstrap.servers", kafka.bootstrap_servers)
        .option("subscribe", record.topic)
        .load()
    )
    return {
        **names, "spark": spark, "kafka_records": kafka_records, "FEATURES": FEATURES,
        "record": kafka_records.first(),
    }  # fmt: skip


def lines_of(events):
    """Return events as JSON, one per line."""
    return events.to_json(orient="records", lines=True).splitlines()


def test_a_lower_threshold_takes_the_first_class(notebook_names):
    """Class 0 is asked first, so with 0.45 each event gets it."""
    at_055, at_045 = solution("1_walkthrough", 1, notebook_names)
    assert 0 < at_055 < at_045 == 20


def test_a_feature_is_added(notebook_names):
    """`prepare_dataframe` takes the new column, and the model has an input for it."""
    assert solution("1_walkthrough", 2, notebook_names) == (31, (None, 31))


def test_a_broken_record_has_its_reason(notebook_names):
    """Each broken record names the field that breaks it."""
    reasons = solution("1_walkthrough", 3, notebook_names)
    fields = ("PRI_jet_num", "EventId", "PRI_met")
    assert all(name in reason for name, reason in zip(fields, reasons, strict=True))
