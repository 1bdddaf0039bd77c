"""A Kafka with Kerberos: a real key distribution centre and broker, the job, and the producer."""

import os
import subprocess

import pytest
from processes import ROOT, end, run_python, wait_until
from small_broker import small_broker

from helpers.sinks import read_bad_records
from helpers.spark import fetch_jars, java_command

pytestmark = pytest.mark.cluster

MINIKDC = "org.apache.hadoop:hadoop-minikdc:3.5.0"
JOB = str(ROOT / "examples" / "streaming_job.py")
PRODUCER = str(ROOT / "examples" / "kafka_producer.py")
MODULE = "com.sun.security.auth.module.Krb5LoginModule required useKeyTab=true storeKey=true"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
SECONDS = 600


@pytest.fixture(scope="module")
def realm(tmp_path_factory):
    """A folder with the krb5.conf and the keytab of a running key distribution centre."""
    folder = tmp_path_factory.mktemp("kdc")
    (folder / "kdc.properties").write_text("kdc.bind.address=127.0.0.1\nkdc.port=0\n")
    class_path = os.pathsep.join(map(str, fetch_jars(MINIKDC)))
    command = [java_command(), "-cp", class_path, "org.apache.hadoop.minikdc.MiniKdc", folder]
    command += [folder / "kdc.properties", folder / "keytab"]
    with (folder / "kdc.log").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command), "physicist", "kafka/localhost"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        wait_until(lambda: "Standalone MiniKdc Running" in (folder / "kdc.log").read_text(), 60)
        yield folder
    finally:
        end(process)


def java_option(realm):
    """Return the option with which Java finds the key distribution centre."""
    return f"-Djava.security.krb5.conf={realm / 'krb5.conf'}"


def jaas(realm, principal):
    """Return the value of `sasl.jaas.config` for a principal in the keytab."""
    return f'{MODULE} keyTab="{realm / "keytab"}" principal="{principal}@EXAMPLE.COM";'


@pytest.fixture(scope="module")
def servers(realm, tmp_path_factory):
    """A broker that authenticates its clients with Kerberos."""
    settings = {
        "sasl.enabled.mechanisms": "GSSAPI,SCRAM-SHA-512", "sasl.kerberos.service.name": "kafka",
        "sasl.mechanism.inter.broker.protocol": "GSSAPI",
        "listener.name.sasl_plaintext.gssapi.sasl.jaas.config": jaas(realm, "kafka/localhost"),
        "listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config": f"{SCRAM} required;",
        "delegation.token.secret.key": "swordfish",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("broker")
    with small_broker(folder, "SASL_PLAINTEXT", settings, java_option(realm)) as address:
        yield address


@pytest.fixture
def config(realm, tmp_path):
    """Write the settings of a principal into a file, and return its path."""

    def write(principal="physicist"):
        file = tmp_path / "client.properties"
        file.touch(mode=0o600)
        file.write_text(
            "security.protocol=SASL_PLAINTEXT\nsasl.mechanism=GSSAPI\n"
            f"sasl.kerberos.service.name=kafka\nsasl.jaas.config={jaas(realm, principal)}\n"
        )
        return str(file)

    return write


@pytest.fixture
def environment(realm):
    """The environment in which Spark's Java finds the key distribution centre."""
    options = f"{os.environ.get('SPARK_SUBMIT_OPTS', '')} {java_option(realm)}"
    return {**os.environ, "SPARK_SUBMIT_OPTS": options}


PRODUCE = """
import sys
from helpers.kafka_settings import read_config
from helpers.spark import get_spark
from helpers.streaming import spark_options
servers, config, topic = sys.argv[1:]
spark = get_spark(cores=1)
options = spark_options({**read_config(config), "bootstrap.servers": servers})
values = spark.createDataFrame([(b"rubbish",)] * 7, "value binary")
values.write.format("kafka").options(**options, topic=topic).save()
"""


@pytest.mark.parametrize("engine", ["dstream", "structured"])
def test_a_job_scores_a_topic_with_a_keytab(
    spark, servers, config, environment, tmp_path, engine
):
    """`--kafka-config` with a keytab is enough for either engine, and for Spark's Kafka sink."""
    topic = f"events-{engine}"
    run = run_python("-c", PRODUCE, servers, config(), topic, env=environment, seconds=SECONDS)
    assert run.returncode == 0, run.stderr
    run = run_python(
        JOB, "--engine", engine, "--bootstrap-servers", servers, "--topic", topic, "--output",
        str(tmp_path / "scored"), "--checkpoint", str(tmp_path / "checkpoint"), "--kafka-config",
        config(), "--on-bad-record", "skip", "--available-now", env=environment, seconds=SECONDS,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert read_bad_records(spark, str(tmp_path / "scored")).count() == 7


def test_a_principal_that_is_not_in_the_keytab_is_named(servers, config, environment, tmp_path):
    """The job ends with the reason, and what to check."""
    run = run_python(
        JOB, "--bootstrap-servers", servers, "--topic", "t", "--output", str(tmp_path / "scored"),
        "--checkpoint", str(tmp_path / "checkpoint"), "--kafka-config", config("nobody"),
        env=environment, seconds=SECONDS,
    )  # fmt: skip
    assert run.returncode == 1
    assert "refuses" in run.stderr.splitlines()[-1]
    assert "keyTab and principal in sasl.jaas.config" in run.stderr.splitlines()[-1]


USE_TOKENS = """
import sys
from helpers.kafka_settings import connection_settings
from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, OffsetRange
servers, config, keytab, topic = sys.argv[1:]
cluster = "spark.kafka.clusters.main"
spark = get_spark(cores=1, config={
    "spark.kerberos.keytab": keytab, "spark.kerberos.principal": "physicist@EXAMPLE.COM",
    "spark.hadoop.hadoop.security.authentication": "kerberos",
    f"{cluster}.auth.bootstrap.servers": servers,
    f"{cluster}.security.protocol": "SASL_PLAINTEXT",
})
options = {"kafka.bootstrap.servers": servers, "kafka.security.protocol": "SASL_PLAINTEXT"}
values = spark.createDataFrame([(b"rubbish", 0)] * 7, "value binary, partition int")
values.write.format("kafka").options(**options, topic=topic).save()
print(spark.read.format("kafka").options(**options, subscribe=topic).load().count())
settings = connection_settings(servers, config)
print(KafkaUtils.createRDD(spark.sparkContext, settings, [OffsetRange(topic, 0, 0, 1)]).count())
"""


def test_tasks_sign_in_with_a_delegation_token(realm, servers, config, environment):
    """With the settings of docs/clusters.md, tasks need no keytab: Spark gives them a token."""
    arguments = [servers, config(), str(realm / "keytab"), "for-tokens"]
    run = run_python("-c", USE_TOKENS, *arguments, env=environment, seconds=SECONDS)
    assert run.stdout == "7\n1\n", run.stderr


@pytest.fixture
def python_environment(realm, environment, tmp_path):
    """The environment in which kafka-python also finds the key distribution centre and a keytab."""
    pytest.importorskip("gssapi")
    return {
        **environment, "KRB5_CONFIG": str(realm / "krb5.conf"),
        "KRB5_CLIENT_KTNAME": str(realm / "keytab"), "KRB5CCNAME": f"FILE:{tmp_path}/tickets",
    }  # fmt: skip


def test_the_producer_signs_in_with_a_keytab(servers, config, python_environment):
    """With the package gssapi, the producer takes the file for Kafka's Java clients."""
    run = run_python(
        PRODUCER, servers, "--topic", "produced", "--events", "20", "--kafka-config", config(),
        env=python_environment,
    )  # fmt: skip
    assert run.stdout.startswith("20 events acknowledged by produced"), run.stderr


def test_a_missing_ticket_is_named(servers, config, python_environment):
    """The producer says that Kerberos is the reason, not that no broker answers."""
    nowhere = {**python_environment, "KRB5_CLIENT_KTNAME": "/no/keytab"}
    run = run_python(PRODUCER, servers, "--kafka-config", config(), env=nowhere)
    assert run.returncode == 1
    assert "check your Kerberos ticket with klist" in run.stderr
