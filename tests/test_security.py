"""Kafka client settings: read from a file as Java does, and converted for kafka-python."""

import logging
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import KafkaConsumer, KafkaProducer
from processes import run_python

from helpers.broker import LocalKafka, python_settings
from helpers.broker.security import jaas, make_certificate
from helpers.kafka_settings import (
    ClientSettings,
    connection_settings,
    is_secret,
    properties,
    read_config,
    setting_option,
)
from helpers.streaming.errors import without_secrets
from helpers.streaming.settings import modern_settings

PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"


def read(text):
    """Return the settings in a properties file's text."""
    return {name: value for _, name, value in properties(text)}


def java_reads(spark, text):
    """Return the settings that Java's `Properties` reads from a text."""
    found = spark._jvm.java.util.Properties()
    found.load(spark._jvm.java.io.StringReader(text))
    return {name: found.getProperty(name) for name in found.stringPropertyNames()}


FILES = [
    "a=b", "a:b", "a b", "a\tb", "  a  =  b  ", "a", "a=", "=b", "a==b", "a = = b", "a:=b",
    "# a=b", "! a=b", "  # a=b", "a=b#c", "a=b \\\n   c", "a=b\\\\\nc=d", "a=b\\\\\\\nc=d",
    "a\\ b=c", "a\\=b=c", "a\\:b c", "a=\\u00fc\\t\\n\\x", "a=\\ud83d\\ude00", "a=b\r\nc=d\re=f",
    "a=b\\\r\n c", "a=1\na=2", "\\\na=b", "a=b\\", "a=\\\n#b", "#a\\\nb=c", "a=b\\\n\nc=d",
    "\fa\f=\fb", "a=\xfc",
    'sasl.jaas.config=x required username="u" \\\n  password="p\\"w";', "\\\n\\\n#a", "a\\\n =b",
]  # fmt: skip


@pytest.mark.parametrize("text", FILES)
def test_a_config_file_is_read_as_java_reads_it(spark, text):
    """A properties file of Kafka's tools is read as Java reads it."""
    assert read(text) == java_reads(spark, text)


@settings(deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab=: \t\f\\#!\n\r", max_size=30))
def test_any_config_file_is_read_as_java_reads_it(spark, text):
    """Any properties file is read as Java reads it, whatever its separators and escapes."""
    found, expected = read(text), java_reads(spark, text)
    expected.pop("", None)  # Java reads an empty name after a final backslash
    found.pop("", None)
    assert found == expected


def test_a_config_file_that_java_refuses_is_refused(tmp_path):
    """A malformed escape is reported with the file's name."""
    (tmp_path / "c.properties").write_text("a=\\u12x4")
    with pytest.raises(ValueError, match=r"c\.properties: \\u is not followed by four hexa"):
        read_config(tmp_path / "c.properties")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_in_a_config_file_is_named(tmp_path, encoding):
    """A file saved by an editor on Windows is refused with what to change, not for its line 1."""
    (tmp_path / "c.properties").write_text("security.protocol=SSL", encoding=encoding)
    with pytest.raises(ValueError, match=r"c\.properties: it begins with a byte-order mark: save"):
        read_config(tmp_path / "c.properties")


@pytest.mark.parametrize(
    "text, line",
    [
        ("# a key\nssl.keystore.key=-----BEGIN PRIVATE KEY-----\nMIGHAgEAswordfish\n", 3),
        ('sasl.jaas.config=x \\\n required\nusername="me" password="swordfish";\n', 3),
        ("client.id=a\n  swordfish\n", 2),
    ],
)
def test_a_value_that_goes_on_without_a_backslash_is_named_by_its_line(tmp_path, text, line):
    """The rest of a secret is no setting, and isn't shown."""
    (tmp_path / "c.properties").write_text(text)
    with pytest.raises(ValueError, match=f"line {line} doesn't begin with the name of") as told:
        read_config(tmp_path / "c.properties")
    assert "swordfish" not in str(told.value)


def test_a_login_that_stands_under_another_name_is_not_shown():
    """A value that holds a password is hidden, whatever its name is."""
    assert "swordfish" not in repr(ClientSettings({"username": 'me password="swordfish"'}))


def test_a_login_in_a_file_of_confluents_is_not_shown(tmp_path):
    """The login of a schema registry is hidden when a cell shows the settings in a file."""
    (tmp_path / "c.properties").write_text("basic.auth.user.info=me:swordfish")
    assert "swordfish" not in repr(read_config(tmp_path / "c.properties"))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"security_protocol": "ssl"}, "has no setting 'security_protocol'"),
        ({"security.protocol": "SSL", "ssl_check_hostname": "false"}, "'ssl_check_hostname'"),
        ({"ssl.truststore.type": "PEM"}, "'ssl.truststore.type' is set, but not 'security.proto"),
        ({"sasl.mechanism": "PLAIN"}, "'sasl.mechanism' is set, but not 'security.protocol'"),
    ],
)
def test_no_client_connects_in_plain_text_by_mistake(settings, reason):
    """Settings for a secure connection that would have no effect are refused."""
    with pytest.raises(ValueError, match=reason):
        python_settings({"bootstrap.servers": "127.0.0.1:9092", **settings})
    if "_" not in "".join(settings):
        with pytest.raises(ValueError, match=reason):
            modern_settings({"bootstrap.servers": "127.0.0.1:9092", **settings})


@pytest.mark.parametrize(
    "entry, login",
    [
        ("""x required username='me' password='swordfish it';""", ("me", "swordfish it")),
        ("""x required username="me" password="it\\"s";""", ("me", 'it"s')),
        ("x required username=me password=swordfish;", ("me", "swordfish")),
    ],
)
def test_a_login_is_read_as_java_reads_it(entry, login):
    """Values in either kind of quotes, or without, are the same for both clients, and hidden."""
    settings = {"security.protocol": "SASL_SSL", "sasl.jaas.config": entry}
    settings["sasl.mechanism"] = "PLAIN"
    found = python_settings({"bootstrap.servers": "127.0.0.1:9092", **settings})
    assert (found["sasl_plain_username"], found["sasl_plain_password"]) == login
    assert without_secrets(f"no {login[1]} for me", settings) == "no *** for me"


def test_the_rest_of_a_password_with_a_quote_is_hidden():
    """Java names what comes after an unescaped quote, which is a part of the password."""
    entry = 'x.ScramLoginModule required username="me" password="sword"fish123";'
    told = without_secrets("no value for key 'fish123' of me", {"sasl.jaas.config": entry})
    assert told == "no value for key '***' of me"


def test_what_kerberos_needs_is_shown():
    """An error about a keytab names it, and the principal; only passwords are hidden."""
    entry = (
        'com.sun.security.auth.module.Krb5LoginModule required useKeyTab=true storeKey=true '
        'serviceName="kafka" keyTab="/etc/scoring.keytab" principal="scoring@EXAMPLE.ORG";'
    )
    told = "Kafka at kafka.example.org: true, no key for scoring@EXAMPLE.ORG in /etc/scoring.keytab"
    assert without_secrets(told, {"sasl.jaas.config": entry}) == told


@pytest.mark.parametrize("option", ["password", "refreshToken", "storePassword"])
def test_what_a_login_keeps_secret_is_hidden_whole(option):
    """Any other option may be a secret, also one that has the form of an option inside."""
    entry = f'some.Module required username="me" {option}="abc/useKeyTab=true/isX1==";'
    told = without_secrets("wrong: abc/useKeyTab=true/isX1== of me", {"sasl.jaas.config": entry})
    assert told == "wrong: *** of me"


def test_a_file_with_secrets_that_others_can_read_is_warned_of(tmp_path, caplog):
    """A file with secrets that others can read causes a warning with the `chmod` command."""
    file = tmp_path / "c.properties"
    for text, mode, warned in [
        ("ssl.key.password=x", 0o644, True),
        ("ssl.key.password=x", 0o600, False),
        ("client.id=x", 0o644, False),
    ]:
        file.write_text(text)
        file.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read_config(file)
        assert (f"chmod 600 {file}" in caplog.text) == warned


def test_a_file_with_settings_needs_an_address():
    """A notebook's `kafka_config` without `bootstrap_servers` is an error with the remedy."""
    with pytest.raises(ValueError, match="also give the brokers' addresses, as bootstrap_servers"):
        connection_settings("", "/etc/client.properties")


def test_a_file_with_settings_that_is_missing_is_named():
    """The message names the file, and what to give instead."""
    with pytest.raises(ValueError, match=r"^nowhere can't be read \(No such file or directory\):"):
        connection_settings("127.0.0.1:9092", "nowhere")


def test_whatever_kafka_calls_a_password_is_a_secret(spark):
    """Every setting that Kafka types as a password is secret, except certificates."""
    clients = spark._jvm.org.apache.kafka.clients
    password = spark._jvm.org.apache.kafka.common.config.ConfigDef.Type.PASSWORD
    for config in (
        clients.consumer.ConsumerConfig,
        clients.producer.ProducerConfig,
        clients.admin.AdminClientConfig,
    ):
        keys = config.configDef().configKeys()
        secret = [name for name in keys if keys[name].type().equals(password)]
        assert "sasl.jaas.config" in secret
        assert [name for name in secret if not is_secret(name)] == [
            "ssl.keystore.certificate.chain", "ssl.truststore.certificates",
        ]  # public, although Kafka types them as passwords


@pytest.mark.parametrize(
    "text",
    ["sasl.jaas.config=xyz", "ssl.key.password=xyz", "ssl.keystore.key=xyz", "a=PRIVATE KEY"],
)
def test_a_secret_on_the_command_line_is_refused(text):
    """A secret on the command line is refused, and the message doesn't repeat it."""
    with pytest.raises(Exception, match="--kafka-config") as refused:
        setting_option(text)
    assert text.partition("=")[2] not in str(refused.value)


def test_settings_become_arguments_of_the_client_that_knows_them():
    """One set of settings serves producers and consumers; each gets the ones it knows."""
    given_settings = {
        "bootstrap.servers": "a:1, b:2", "acks": "all", "compression.type": "none",
        "linger.ms": "5", "enable.idempotence": "true", "group.id": "g", "max.poll.records": "7",
        "security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "client.id": "c",
        "sasl.jaas.config": f'{PLAIN} required username=me password="a\\"b c";',
        "send.buffer.bytes": "4096", "isolation.level": "read_committed",
    }  # fmt: skip
    common = {
        "bootstrap_servers": ["a:1", "b:2"], "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN", "client_id": "c", "sasl_plain_username": "me",
        "sasl_plain_password": 'a"b c', "send_buffer_bytes": 4096,
    }  # fmt: skip
    assert python_settings(given_settings) == common
    assert python_settings(given_settings, KafkaProducer) == {
        **common, "acks": "all", "compression_type": None, "linger_ms": 5,
        "enable_idempotence": True,
    }  # fmt: skip
    assert python_settings(given_settings, KafkaConsumer) == {
        **common, "group_id": "g", "max_poll_records": 7, "isolation_level": "read_committed",
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"no.such": "x"}, "no setting 'no.such': leave it out"),
        ({"ssl.no.such": "x"}, "no setting 'ssl.no.such': leave it out"),
        ({"selector": "x"}, "no setting 'selector'"),
        ({"key.serializer": "x"}, "no setting 'key.serializer'"),
        ({"linger.ms": "soon"}, "'linger.ms' is 'soon': it must be a whole number"),
        ({"enable.idempotence": "1"}, "must be true or false"),
        ({"ssl.keystore.location": __file__}, "is JKS, from which kafka-python can't read a key"),
        ({"ssl.truststore.location": "nowhere"}, "'nowhere': name a file that you can read"),
        ({"ssl.truststore.location": "/"}, "'/': name a file that you can read"),
        ({"ssl.keystore.location": "-----BEGIN PRIVATE KEY-----a"}, "is '\\*\\*\\*': name a file"),
        ({"security.protocol": "TLS"}, "'TLS': it must be one of PLAINTEXT, SSL, SASL_"),
        ({"sasl.mechanism": "GSSAPI"}, "needs a package: pip install gssapi"),
        ({"security.protocol": "sasl_ssl"}, "GSSAPI, Kafka's default, for which"),
        ({"ssl.keystore.key": "-----BEGIN X-----a-----END X-----"}, "can't be read"),
    ],
)
def test_what_kafka_python_cannot_take_is_named(settings, reason):
    """A setting that kafka-python can't use is named in the error."""
    with pytest.raises(ValueError, match=reason):
        python_settings(settings, KafkaProducer)


@pytest.mark.parametrize("text", ["SASL_SSL ", "sasl_ssl", "Sasl_Ssl"])
def test_a_protocol_is_read_as_java_reads_it(text):
    """Case and blanks don't matter; an unknown protocol is refused, not taken for plain text."""
    settings = {"security.protocol": text, "compression.type": " gzip "}
    settings["sasl.mechanism"] = "PLAIN"
    assert python_settings(settings, KafkaProducer) == {
        "security_protocol": "SASL_SSL", "compression_type": "gzip", "sasl_mechanism": "PLAIN",
    }  # fmt: skip


def test_a_key_without_its_password_is_refused_at_once(tmp_path):
    """A missing `ssl.key.password` is an error; nothing asks for it at the terminal."""
    run = run_python(
        "-c", "from subprocess import run; import sys; run(sys.argv[1:], check=True)",
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:swordfish", "-subj",
        "/CN=x", "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "chain.pem"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    file = tmp_path / "client.pem"
    file.write_text("".join((tmp_path / f"{part}.pem").read_text() for part in ("key", "chain")))
    with pytest.raises(ValueError, match=r"keys in ssl\.\* can't be read"):
        python_settings({"ssl.keystore.type": "PEM", "ssl.keystore.location": str(file)})


def test_keys_in_the_settings_are_loaded(tmp_path):
    """PEM keys and certificates on one line, as in properties files, are loaded."""
    openssl = "from subprocess import run; import sys; run(sys.argv[1:], check=True)"
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    run = run_python(
        "-c", openssl, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj",
        "/CN=x", "-keyout", str(key), "-out", str(chain),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    one_line = {path: " ".join(path.read_text().split("\n")) for path in (key, chain)}
    context = python_settings(
        {
            "security.protocol": "SSL",
            "ssl.keystore.type": "PEM", "ssl.keystore.key": one_line[key],
            "ssl.keystore.certificate.chain": one_line[chain],
            "ssl.truststore.certificates": one_line[chain], "ssl.truststore.type": "PEM",
            "ssl.endpoint.identification.algorithm": "",
        }
    )["ssl_context"]  # fmt: skip
    assert isinstance(context, ssl.SSLContext) and not context.check_hostname
    assert [ca["subject"] for ca in context.get_ca_certs()] == [((("commonName", "x"),),)]


def test_a_users_settings_are_enough():
    """The settings that a secured broker issues for a user work in kafka-python."""
    kafka = LocalKafka(security="SASL_SSL")
    make_certificate(kafka.log_file.parent, "swordfish")
    settings = kafka.settings | {"sasl.jaas.config": jaas("reader", "secret")}
    arguments = python_settings(settings, KafkaProducer)
    assert arguments["sasl_plain_password"] == "secret"
    assert arguments["ssl_context"].check_hostname
