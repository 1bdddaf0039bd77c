"""A Kafka that asks for its clients' certificates: key stores and trust stores of every type."""

import os
import subprocess

import pytest
from kafka import KafkaProducer
from processes import ROOT, run_python
from small_broker import small_broker

from helpers.broker import BrokerError, count_records, python_settings
from helpers.broker.security import make_certificate
from helpers.kafka_settings import connection_settings
from helpers.streaming import KafkaUtils, StreamError, new_streaming_context, run_stream

PRODUCER = str(ROOT / "examples" / "kafka_producer.py")
PASSWORD = "swordfish"


def run(*command):
    """Run a program with the password in its environment, and return what it prints."""
    environment = {**os.environ, "PASSWORD": PASSWORD}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the keys and certificates of a broker and a client, in files of all types."""
    folder = tmp_path_factory.mktemp("keys")
    make_certificate(folder, PASSWORD)
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=physicist", "-passout",
        "env:PASSWORD", "-keyout", folder / "key.pem", "-out", folder / "chain.pem")  # fmt: skip
    for options, name in ((["-nocrypt"], "plain.pem"), (["-v1", "PBE-SHA1-3DES"], "old.pem")):
        run("openssl", "pkcs8", "-topk8", *options, "-in", folder / "key.pem", "-passin",
            "env:PASSWORD", "-passout", "env:PASSWORD", "-out", folder / name)  # fmt: skip
    both = (folder / "plain.pem").read_text() + (folder / "chain.pem").read_text()
    (folder / "client.pem").write_text(both)
    run("openssl", "pkcs12", "-export", "-in", folder / "client.pem", "-passin", "env:PASSWORD",
        "-passout", "env:PASSWORD", "-out", folder / "client.p12")  # fmt: skip
    run("keytool", "-importkeystore", "-srckeystore", folder / "client.p12", "-srcstorepass:env",
        "PASSWORD", "-destkeystore", folder / "client.jks", "-deststoretype", "JKS",
        "-deststorepass:env", "PASSWORD")  # fmt: skip
    for kind, name in (("JKS", "trust.jks"), ("PKCS12", "trust.p12")):
        run("keytool", "-importcert", "-noprompt", "-alias", "broker", "-file",
            folder / "certificate.pem", "-keystore", folder / name, "-storetype", kind,
            "-storepass:env", "PASSWORD")  # fmt: skip
    everybody = [(folder / name).read_text() for name in ("certificate.pem", "chain.pem")]
    (folder / "everybody.pem").write_text("".join(everybody))
    return folder


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    """A broker that accepts only clients with a known certificate, and has a topic."""
    settings = {
        "ssl.client.auth": "required",
        "ssl.keystore.type": "PKCS12", "ssl.keystore.location": folder / "broker.p12",
        "ssl.keystore.password": PASSWORD,
        "ssl.truststore.type": "PEM", "ssl.truststore.location": folder / "everybody.pem",
    }  # fmt: skip
    with small_broker(tmp_path_factory.mktemp("broker"), "SSL", settings) as address:
        yield address


TRUST = {
    "PEM": {"ssl.truststore.type": "PEM", "ssl.truststore.location": "{folder}/certificate.pem"},
    "PKCS12": {
        "ssl.truststore.type": "PKCS12", "ssl.truststore.location": "{folder}/trust.p12",
        "ssl.truststore.password": PASSWORD,
    },
    "JKS": {  # Kafka's default
        "ssl.truststore.location": "{folder}/trust.jks", "ssl.truststore.password": PASSWORD,
    },
}  # fmt: skip
KEYS = {
    "PEM": {
        "ssl.keystore.type": "PEM", "ssl.keystore.location": "{folder}/client.pem",
    },
    "PEM in the settings": {
        "ssl.keystore.type": "PEM", "ssl.keystore.key": "{old}",
        "ssl.keystore.certificate.chain": "{chain}", "ssl.key.password": PASSWORD,
    },
    "PKCS12": {
        "ssl.keystore.type": "PKCS12", "ssl.keystore.location": "{folder}/client.p12",
        "ssl.keystore.password": PASSWORD,
    },
    "JKS": {
        "ssl.keystore.location": "{folder}/client.jks", "ssl.keystore.password": PASSWORD,
    },
}  # fmt: skip


@pytest.fixture
def write_config(folder, tmp_path):
    """Write a client's settings into a file, and return its path."""

    def write(settings):
        one_line = {
            part: " ".join((folder / f"{part}.pem").read_text().split("\n")).strip()
            for part in ("key", "old", "chain")
        }
        file = tmp_path / "client.properties"
        file.touch(mode=0o600)
        lines = [f"{name}={value}".format(folder=folder, **one_line)
                 for name, value in {"security.protocol": "SSL", **settings}.items()]  # fmt: skip
        file.write_text("\n".join(lines))
        return str(file)

    return write


def drained(spark, topic, settings):
    """Return how many records a stream delivers from a topic."""
    ssc, counts = new_streaming_context(spark, 0.5), []
    given = {**settings, "auto.offset.reset": "earliest"}
    stream = KafkaUtils.createDirectStream(ssc, [topic], given)
    stream.foreachBatch(lambda df, _: counts.append(df.count()))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    return sum(counts)


@pytest.mark.parametrize(
    "trust, keys",
    [
        ("PEM", "PEM"),
        pytest.param("PKCS12", "PEM in the settings", marks=pytest.mark.long),
        pytest.param("JKS", "PEM", marks=pytest.mark.long),
    ],
)
def test_one_file_serves_the_producer_and_the_stream(spark, servers, write_config, trust, keys):
    """A key as PEM, and trusted certificates of any type, work in both Kafka clients."""
    topic = f"events-{trust}"
    config = write_config({**TRUST[trust], **KEYS[keys]})
    run = run_python(
        PRODUCER, servers, "--topic", topic, "--events", "20", "--kafka-config", config
    )
    assert run.returncode == 0, run.stderr
    settings = connection_settings(servers, config)
    assert sum(count_records(settings, topic).values()) == 20
    assert drained(spark, topic, settings) == 20


@pytest.mark.parametrize("kind", ["PKCS12", "JKS"])
def test_a_stream_takes_a_key_store_of_java(spark, servers, write_config, kind):
    """Spark's Kafka clients read every type of key store; kafka-python names the remedy."""
    settings = connection_settings(servers, write_config({**TRUST["PEM"], **KEYS["PEM"]}))
    topic = f"events-for-{kind}"
    with KafkaProducer(**python_settings(settings)) as producer:
        producer.send(topic, b"{}").get(15)
    of_java = connection_settings(servers, write_config({**TRUST[kind], **KEYS[kind]}))
    assert drained(spark, topic, of_java) == 1
    with pytest.raises(ValueError, match=f"is {kind}, from which kafka-python can't read a key"):
        python_settings(of_java)


def test_a_client_without_a_certificate_is_refused_with_the_reason(spark, servers, write_config):
    """Neither client waits in vain for a broker that wants a certificate."""
    settings = connection_settings(servers, write_config(TRUST["PEM"]))
    with pytest.raises(BrokerError, match="wants a client's certificate that it trusts: set"):
        count_records(settings, "events")
    with pytest.raises(StreamError, match=r"ertificate"):
        KafkaUtils.createDirectStream(new_streaming_context(spark, 0.5), ["events"], settings)


def test_a_key_that_java_cannot_decrypt_is_refused_with_the_remedy(spark, servers, write_config):
    """OpenSSL encrypts keys in a way that Kafka's Java clients don't know."""
    keys = {**KEYS["PEM in the settings"], "ssl.keystore.key": "{key}"}
    settings = connection_settings(servers, write_config({**TRUST["PEM"], **keys}))
    with pytest.raises(StreamError, match=r"Java can't decrypt this key; docs/clusters\.md has"):
        KafkaUtils.createDirectStream(new_streaming_context(spark, 0.5), ["events"], settings)


def test_the_wrong_password_of_a_trust_store_is_named(write_config):
    """The message names the setting, and doesn't repeat the password."""
    settings = {**TRUST["JKS"], "ssl.truststore.password": "mistyped"}
    with pytest.raises(ValueError, match=r"ssl\.truststore\.location can't be read: keytool") as no:
        python_settings(connection_settings("localhost:9093", write_config(settings)))
    assert "mistyped" not in str(no.value)


def test_the_commands_of_the_documentation_convert_a_key_store(
    spark, servers, write_config, folder, tmp_path
):
    """A converted key works in both Kafka clients."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    (block,) = [text for text in page.split("```sh\n")[1:] if "-importkeystore" in text]
    commands = block.split("```")[0].replace("client.jks", str(folder / "client.jks"))
    script = tmp_path / "convert.sh"
    script.write_text(commands)
    done = subprocess.run(
        ["sh", "-e", script], cwd=tmp_path, env={**os.environ, "PASSWORD": PASSWORD},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "client.pem").stat().st_mode & 0o077 == 0
    keys = {"ssl.keystore.type": "PEM", "ssl.keystore.location": str(tmp_path / "client.pem")}
    settings = connection_settings(servers, write_config({**TRUST["PEM"], **keys}))
    with KafkaProducer(**python_settings(settings)) as producer:
        producer.send("converted", b"{}").get(15)
    assert drained(spark, "converted", settings) == 1
