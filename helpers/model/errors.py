"""The error for a model that can't be served, and its texts."""

from __future__ import annotations


class UnservableModelError(ValueError):
    """Workers can't load the model, or can't score events with it; the message has the remedy."""


def refusal(fault: str) -> UnservableModelError:
    """Return the error for a model that can't be served.

    Parameters
    ----------
    fault : str
        What is wrong with the model, and the remedy.

    Examples
    --------
    >>> refusal("it has no layers: add some")
    UnservableModelError("this model can't be served: it has no layers: add some.")
    """
    return UnservableModelError(f"this model can't be served: {fault}.")


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, without a full stop.

    Parameters
    ----------
    error : Exception
        An error whose message may have many lines, or none.

    Examples
    --------
    >>> first_line(ValueError("The shapes differ."))
    'The shapes differ'
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
