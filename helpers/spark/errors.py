"""Java's errors in Python: how to catch them, and how to find the reason in them."""

from __future__ import annotations

import re
from itertools import pairwise

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

# The exceptions that a call to Java may raise. Once a session exists, PySpark converts some of
# py4j's errors.
JAVA_ERRORS = (Py4JJavaError, PySparkException)

# The text before each exception in an error's text. Exceptions of Java and Python can wrap each
# other several times; if Spark can't serialize a task's exception, only its text is left.
_BEFORE_AN_EXCEPTION = re.compile(
    r"^Caused by: |^: |Traceback \(most recent call last\):\n(?:[ \t].*\n)+"
    r"|Lost task \S+ in stage \S+ \(TID \d+\) \([^)]*\): ",
    re.MULTILINE,
)

# Exceptions that only wrap another one: a class name of Java without a message, or py4j's message.
_ONLY_WRAPS = re.compile(
    r"((\w+\.)+[\w$]+(: null)?|.*An error occurred while calling \S+"
    r"|.*An exception was raised by (the )?Python.*)?"
)


def java_causes(error: Exception) -> list[JavaObject]:
    """Return the Java exceptions of an error, the innermost last; none if it isn't from Java.

    Examples
    --------
    >>> try:
    ...     spark._jvm.java.lang.Integer.parseInt("ten")
    ... except JAVA_ERRORS as error:
    ...     len(java_causes(error))
    1
    """
    cause = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    causes = []
    while cause is not None:
        causes.append(cause)
        cause = cause.getCause()
    return causes


def cause_name(error: Exception) -> str:
    """Return the simple class name of the innermost Java exception; '' if there is none.

    Examples
    --------
    >>> try:
    ...     spark._jvm.java.lang.Integer.parseInt("ten")
    ... except JAVA_ERRORS as error:
    ...     cause_name(error)
    'NumberFormatException'
    """
    causes = java_causes(error)
    return causes[-1].getClass().getSimpleName() if causes else ""


def is_interrupt(error: Exception) -> bool:
    """Return whether a thread of Java was interrupted, as when Spark stops a query.

    Examples
    --------
    >>> is_interrupt(ValueError("not from Java"))
    False
    """
    return cause_name(error) in ("InterruptedException", "InterruptException")  # the 2nd is Kafka's


def cause_message(error: Exception) -> str:
    """Return the message of the innermost Java exception that has one; '' if there is none.

    Examples
    --------
    >>> try:
    ...     spark._jvm.java.lang.Integer.parseInt("ten")
    ... except JAVA_ERRORS as error:
    ...     cause_message(error)
    'For input string: "ten"'
    """
    messages = (cause.getMessage() for cause in reversed(java_causes(error)))
    return next(filter(None, messages), "")


def summary(error: Exception | str) -> str:
    """Return the reason for an error: the line of the innermost exception that has a message.

    Parameters
    ----------
    error : Exception or str
        An exception, or its text, which may include stack traces of Java and Python.

    Examples
    --------
    >>> lines = ["Traceback (most recent call last):", "  1 / 0", "ZeroDivisionError: by zero"]
    >>> summary(chr(10).join(lines))
    'ZeroDivisionError: by zero'
    >>> summary(OSError("the disk is full"))
    'the disk is full'
    """
    # PySpark's exceptions drop Java's causes, but keep the text that contains them.
    text = error if isinstance(error, str) else getattr(error, "_stackTrace", None) or str(error)
    bounds = [0, *(found.end() for found in _BEFORE_AN_EXCEPTION.finditer(text)), len(text)]
    exceptions = [_reason(text[start:end]) for start, end in pairwise(bounds)]
    return next(
        (reason for reason in reversed(exceptions) if not _ONLY_WRAPS.fullmatch(reason)),
        exceptions[-1],
    )


def _reason(exception: str) -> str:
    """Return the line with the reason from an exception's text."""
    # Spark's Kafka source begins with general remarks on lost data.
    _, _, given = exception.partition("\nReason:\n")
    first_line, _, _ = (given or exception).strip().partition("\n")
    return first_line.rstrip("; ")
