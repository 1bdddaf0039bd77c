"""Errors between a stream and Kafka, each as one sentence with its remedy."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException

from helpers.kafka_settings import ANSWER_SECONDS, JAAS_VALUE, is_secret
from helpers.spark import cause_message, cause_name, is_interrupt, java_causes, summary

_LOGGER = logging.getLogger(__name__)

# How long the broker, or the checkpoint's file system, may be away while a stream runs.
AWAY_SECONDS = 60

# How long to wait before a retry.
RETRY_SECONDS = 0.5

_REMEDIES = {
    "TopicAuthorizationException": "the ACLs READ and DESCRIBE on the topic are needed",
    "GroupAuthorizationException": "the ACL READ on the consumer group is needed",
    "SaslAuthenticationException": "check sasl.mechanism, and user and password in "
    "sasl.jaas.config",
    "SslAuthenticationException": "the broker's certificate isn't trusted; set "
    "ssl.truststore.location to a file with its certificate, or its authority's",
    "LoginException": "check keyTab and principal in sasl.jaas.config, and krb5.conf",
    "PBE": "Java can't decrypt this key; docs/clusters.md has the commands that convert it",
    "CommitFailedException": "another consumer has joined the group; stop it, or use another "
    "group.id",
    "long overflow": "a record's timestamp may be beyond what Spark can hold, such as one in "
    "nanoseconds. Set message.timestamp.type=LogAppendTime for the topic, and pass fromOffsets "
    "behind the record",
    "TimeoutException": "check that the broker is running and that the executors can reach it",
}

# Messages of Kafka's clients and Spark's source when a broker does not answer.
_AWAY = re.compile(
    r"kafka\.common\.errors\.(Timeout|Disconnect|Network|BrokerNotAvailable|NotCoordinator)\w*"
    r"|java\.util\.concurrent\.TimeoutException: Cannot fetch record"
    r"|Failed to (get|fetch) \w* ?offsets"
    r"|BrokerAwayError"
)

_KEY_LINE = 32  # characters; a longer line of a key can't be a word of a message
# Options of a JAAS entry that may be shown: a user's name, and those of Java's Krb5LoginModule.
_PUBLIC_OPTIONS = frozenset((
    "username", "principal", "serviceName", "keyTab", "ticketCache", "useKeyTab", "useTicketCache",
    "storeKey", "doNotPrompt", "renewTGT", "refreshKrb5Config", "isInitiator", "debug",
))  # fmt: skip
_WORD = 4  # characters; a shorter word of a login may be one of a message


class StreamError(RuntimeError):
    """The stream can't start or continue; the message says why and what to do."""


class BrokerAwayError(StreamError):
    """Kafka did not answer in time; it may answer later."""


class TopicRecreatedError(StreamError):
    """A topic was deleted and created again, so stored offsets now refer to other records.

    Parameters
    ----------
    topic : str
        The topic's name.
    found : str, optional
        The evidence, if it is not the topic's id.
    """

    def __init__(self, topic: str, found: str = "") -> None:
        shown = f" ({found})" if found else ""
        super().__init__(
            f"topic {topic!r} was deleted and created again since its offsets were stored{shown}, "
            "so they now refer to other records. Begin with a new output, checkpoint and group.id; "
            "or read the new topic from its beginning into the same output "
            "(ParquetSink(from_beginning=True), a new checkpoint)."
        )


# Errors that are raised while the broker or a file system is away.
PASSING_ERRORS = (BrokerAwayError, OSError, Py4JError, PySparkException)


def insist(action: Callable[[], Any], stopped: threading.Event) -> Any:
    """Return an action's result; retry it for 60 s while Kafka or a file system is away.

    Parameters
    ----------
    action : callable
        The action.
    stopped : threading.Event
        Set when the stream stops, which ends the retries.

    Examples
    --------
    >>> insist(lambda: "an answer", threading.Event())
    'an answer'
    """
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return action()
        except PASSING_ERRORS as error:
            if stopped.is_set() or time.monotonic() > deadline or is_interrupt(error):
                raise
            _LOGGER.warning("%s The stream tries again.", summary(error))
            stopped.wait(RETRY_SECONDS)


def remedy(error: str) -> str:
    """Return the remedy for one of Kafka's errors, as the rest of a sentence; '' if unknown.

    Parameters
    ----------
    error : str
        The name of Kafka's exception, or a line with the name in it.

    Examples
    --------
    >>> remedy("TopicAuthorizationException")
    ': the ACLs READ and DESCRIBE on the topic are needed'
    """
    for name, words in _REMEDIES.items():
        # Only Kafka's errors: not SocketTimeoutException or java.util.concurrent.TimeoutException.
        if re.search(rf"(?<![A-Za-z])(?<!concurrent\.){name}", error):
            return f": {words}"
    return ""


def is_away(text: str) -> bool:
    """Return whether an error's text means that a broker did not answer.

    Examples
    --------
    >>> is_away("org.apache.kafka.common.errors.TimeoutException: Call(callName=listOffsets ...)")
    True
    """
    return _AWAY.search(text) is not None


def explained(error: Exception, settings: Mapping[str, str]) -> StreamError:
    """Return the error that explains an exception of Kafka's Java client to the user.

    Parameters
    ----------
    error : Exception
        What a call of the client raised, one of `JAVA_ERRORS`.
    settings : mapping
        The client's settings by Kafka's names; the error does not repeat their secrets.
    """
    # KafkaConsumer's constructor wraps the cause in "Failed to construct kafka consumer".
    name = cause_name(error)
    servers = settings["bootstrap.servers"]
    if name == "TimeoutException":
        return BrokerAwayError(
            f"Kafka at {servers} gave no answer within {ANSWER_SECONDS} s: check the address, that "
            "the broker is running, and that the security settings match the broker's."
        )
    # Java does not trust the broker's certificate.
    if any("certpath" in cause.getClass().getName() for cause in java_causes(error)):
        name = "SslAuthenticationException"
    text = cause_message(error)
    for cause in java_causes(error):  # Kerberos' own errors have only a number
        if cause.getClass().getSimpleName() == "LoginException":
            name, text = "LoginException", cause.getMessage() or text
    message, what_to_do = without_secrets(text, settings).rstrip("."), remedy(name) or remedy(text)
    return StreamError(f"Kafka at {servers} refuses: {message} ({name}){what_to_do}.")


def without_secrets(text: str, settings: Mapping[str, str]) -> str:
    """Return a text without the secrets in a client's settings.

    Parameters
    ----------
    text : str
        A message, or a `repr`.
    settings : mapping
        Settings of a client by Kafka's names.

    Examples
    --------
    >>> jaas = 'ScramLoginModule required username="reader" password="swordfish";'
    >>> without_secrets("no user with swordfish", {"sasl.jaas.config": jaas})
    'no user with ***'
    """
    values = [
        value for name, value in settings.items() if is_secret(name) or "PRIVATE KEY" in value
    ]
    for secret in sorted({part for value in values for part in _parts(value)}, key=len)[::-1]:
        text = text.replace(secret, "***")
    return text


def _parts(value: str) -> set[str]:
    """Return a secret and its parts that are also secret."""
    # All values of a JAAS entry except the public ones, also unescaped; the lines of a key.
    entry = re.sub(
        rf"([\w.]+)\s*=\s*{JAAS_VALUE}",
        lambda option: "" if option[1] in _PUBLIC_OPTIONS else option[0],
        value,
    )
    parts = {
        found[1:-1] if found[0] in "\"'" else found
        for found in re.findall(rf"=\s*({JAAS_VALUE})", entry)
    }
    parts |= {re.sub(r"\\(.)", r"\1", part) for part in parts}
    # A quote inside a password ends it for Java, which may then name the rest in its error.
    login = re.split(r"\b(?:required|requisite|sufficient|optional)\b", entry)[1:]
    words = re.findall(r"""[^\s;="']+(?!\S*\s*=)""", " ".join(login))
    parts |= {word for word in words if len(word) >= _WORD}
    if "-----BEGIN" in value:
        parts |= {line for line in value.split() if len(line) > _KEY_LINE}
    return {part for part in (value, *parts) if part}
