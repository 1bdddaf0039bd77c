"""A stream on a secured Kafka: one dictionary of settings, clear refusals, and no password told."""

import re
import time
import uuid

import psutil
import pytest
from kafka import KafkaProducer
from processes import wait_until

from helpers.broker import BrokerError, LocalKafka, python_settings
from helpers.spark import log_file
from helpers.streaming import (
    KafkaQuery,
    KafkaUtils,
    StreamError,
    new_streaming_context,
    run_stream,
)

TOPIC = "secret-events"
SECONDS = 15


@pytest.fixture(scope="module")
def secure_kafka():
    """A secured broker with a topic that has 100 records."""
    with LocalKafka(security="SASL_SSL") as broker:
        broker.create_topic(TOPIC, partitions=1)
        with KafkaProducer(**python_settings(broker.settings)) as producer:
            for number in range(100):
                producer.send(TOPIC, str(number).encode()).get(10)
        yield broker


@pytest.fixture
def ssc(spark):
    """A streaming context with a short interval, stopped at the end."""
    context = new_streaming_context(spark, 0.5)
    yield context
    context.stop(stopSparkContext=False, stopGraceFully=False)


@pytest.fixture
def reader(secure_kafka):
    """The settings of a user who may read the topic, in one group."""
    name = f"reader-{uuid.uuid4()}"
    settings = secure_kafka.add_user(name)
    secure_kafka.allow(name, ["READ", "DESCRIBE"], topic=TOPIC)
    secure_kafka.allow(name, ["READ"], group=name)
    return {**settings, "group.id": name, "auto.offset.reset": "earliest"}


def processes():
    """Return the processes that run, with their command lines."""
    return psutil.process_iter(["cmdline"])


def password_of(settings):
    """Return the password of a client's settings."""
    return re.search('password="([^"]+)"', settings["sasl.jaas.config"])[1]


def drain(ssc, settings):
    """Return the values that a stream with these settings delivers."""
    found = []
    stream = KafkaUtils.createDirectStream(ssc, [TOPIC], settings)
    stream.foreachBatch(lambda df, _: found.extend(int(bytes(row.value)) for row in df.collect()))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)
    return found


def refusal(ssc, settings):
    """Return how a stream with these settings is refused, at its start and within 15 s."""
    started = time.monotonic()
    with pytest.raises(StreamError) as refused:
        KafkaUtils.createDirectStream(ssc, [TOPIC], settings)
    assert time.monotonic() - started < SECONDS + 60  # the deadline is Kafka's, the rest is slack
    assert password_of(settings) not in str(refused.value)
    return str(refused.value)


def test_one_dictionary_is_enough_to_read_and_to_commit(ssc, spark, reader):
    """Planner, executors and commits take the same settings."""
    assert drain(ssc, reader) == list(range(100))
    assert drain(new_streaming_context(spark, 0.5), reader) == []  # the offsets were committed


def test_no_password_is_told(ssc, spark, secure_kafka, reader):
    """No log, error or list of processes has the password."""
    drain(ssc, reader)
    plans = spark._jsparkSession.sharedState().statusStore().executionsList()
    plans = [plans.apply(index).physicalPlanDescription() for index in range(plans.size())]
    lines = [" ".join(process.info["cmdline"] or ()) for process in processes()]
    texts = [log_file().read_text(), secure_kafka.log_file.read_text(), repr(secure_kafka)]
    for password in (password_of(reader), password_of(secure_kafka.settings)):
        assert not any(password in text for text in [*texts, *plans, *lines])


def test_a_wrong_password_is_named(ssc, reader):
    """The error says to check user and password, not the network."""
    wrong = reader["sasl.jaas.config"].replace(password_of(reader), "swordfish")
    message = refusal(ssc, {**reader, "sasl.jaas.config": wrong})
    assert "(SaslAuthenticationException): check sasl.mechanism, and user and password" in message


def test_a_certificate_that_is_not_trusted_is_named(ssc, reader):
    """The error says which setting makes the client trust it."""
    untrusting = {name: value for name, value in reader.items() if "truststore" not in name}
    message = refusal(ssc, untrusting)
    assert "the broker's certificate isn't trusted; set ssl.truststore.location to a" in message


def test_a_missing_acl_of_the_topic_is_named(ssc, secure_kafka):
    """The error says what the administrator must allow."""
    name = f"nobody-{uuid.uuid4()}"
    message = refusal(ssc, secure_kafka.add_user(name))
    assert "(TopicAuthorizationException): the ACLs READ and DESCRIBE on the topic" in message


def test_a_missing_acl_of_the_group_is_named(ssc, reader):
    """The error comes before a batch is scored that can't be committed."""
    message = refusal(ssc, {**reader, "group.id": "somebody-else's"})
    assert "(GroupAuthorizationException): the ACL READ on the consumer group" in message


def test_a_query_reads_without_the_acl_of_its_group(spark, reader, tmp_path, caplog):
    """A query only shows its progress in the group, so a missing ACL is reported once."""
    settings, counts = {**reader, "group.id": "somebody-else's"}, []
    with KafkaQuery(spark, [TOPIC], settings, tmp_path / "checkpoint", max_offsets=50) as query:
        query.foreachBatch(lambda df, batch_id: counts.append(df.count()))
        query.run(timeout=600)
    assert counts == [50, 50]
    (warning,) = [text for text in caplog.messages if "can't be committed to group" in text]
    assert "the ACL READ on the consumer group is needed" in warning
    assert password_of(reader) not in caplog.text


def test_a_setting_that_kafka_does_not_know_is_named(ssc, reader):
    """A typo in a security setting is an error with its name."""
    with pytest.raises(ValueError, match=r"no setting 'ssl\.trustore.*did you mean 'ssl\.trusts"):
        KafkaUtils.createDirectStream(ssc, [TOPIC], {**reader, "ssl.trustore.location": "x"})


def test_there_is_no_way_in_without_a_password(secure_kafka):
    """Neither the clients' port nor the controller's accepts anybody without one."""
    properties = str(secure_kafka.log_file.parent / "server.properties")
    started = [p for p in processes() if properties in (p.info["cmdline"] or ())]
    (broker,) = (process for process in started if process.name() == "java")  # and its watcher
    addresses = [c.laddr for c in broker.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(addresses) == 2  # for clients, and the controller's
    for address in addresses:
        assert address.ip.removeprefix("::ffff:") == "127.0.0.1"
        plain = f"127.0.0.1:{address.port}"
        with pytest.raises(Exception, match="bootstrap"):
            KafkaProducer(bootstrap_servers=plain, bootstrap_timeout_ms=2_000)


def test_users_outlive_a_restart(secure_kafka, ssc, reader):
    """After a restart of the broker, its users can log in."""
    secure_kafka.stop()
    secure_kafka.start()
    assert wait_until(lambda: TOPIC in secure_kafka.topics())
    assert drain(ssc, reader) == list(range(100))


def test_another_security_is_refused():
    """A typo doesn't start a broker without security."""
    with pytest.raises(ValueError, match="security is 'SSL': it must be 'SASL_SSL', or None"):
        LocalKafka(security="SSL")


def test_a_user_that_cannot_be_added_is_said(secure_kafka):
    """A password that the broker would not accept is not handed out."""
    with pytest.raises(BrokerError, match="user '' can't be added"):
        secure_kafka.add_user("")


def test_no_key_is_shown_in_plans(spark, reader, secure_kafka):
    """A PEM key in the settings is for Kafka alone: not for Spark's page, nor for `explain`."""
    key = "".join(("-----BEGIN PRIVATE KEY", "-----MIIswordfish", "-----END PRIVATE KEY-----"))
    options = {f"kafka.{name}": value for name, value in reader.items() if "." in name}
    options |= {"kafka.ssl.keystore.key": key, "subscribe": TOPIC}
    for name in ("kafka.group.id", "kafka.auto.offset.reset"):
        options.pop(name)
    batch = spark.read.format("kafka").options(**options).load()._jdf.queryExecution()
    stream = spark.readStream.format("kafka").options(**options).load()._jdf.queryExecution()
    texts = [plan.toString() for plan in (batch.logical(), batch.analyzed(), stream)]
    frame = spark.createDataFrame([(b"x",)], "value binary")
    with pytest.raises(Exception, match=r"(?i)key|kafka"):  # the key isn't one
        frame.write.format("kafka").options(**options, topic=TOPIC).save()
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty(600_000)  # for late reports
    executions = spark._jsparkSession.sharedState().statusStore().executionsList()
    texts += [executions.apply(n).physicalPlanDescription() for n in range(executions.size())]
    assert any("SaveIntoDataSourceCommand" in text for text in texts)
    assert not any("swordfish" in text or password_of(reader) in text for text in texts)
