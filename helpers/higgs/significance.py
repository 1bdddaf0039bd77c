"""How well a selection of events would show the Higgs boson: the measure of the challenge."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXPECTED_SIGNAL, EXPECTED_BACKGROUND = 692.0, 411_000.0
"""How many events of each class the challenge expects in its data: the sums of the weights in
Kaggle's training file."""


def significance(signal: ArrayLike, background: ArrayLike) -> NDArray[np.float64]:
    """Return the approximate median significance (AMS) of a selection of events.

    Parameters
    ----------
    signal, background : array_like
        The summed weights of the events of each class that are selected: how many of them the
        detector would see.

    Returns
    -------
    numpy.ndarray
        In standard deviations.

    References
    ----------
    The challenge's own measure, equation 7 of [1]_, with its regularisation of 10 events.

    Examples
    --------
    >>> significance([100.0, 200.0], 4_000.0).round(2).tolist()
    [1.57, 3.13]
    """
    signal, background = np.asarray(signal, float), np.asarray(background, float) + 10
    return np.sqrt(2 * ((signal + background) * np.log1p(signal / background) - signal))


def significance_curve(
    scores: ArrayLike, is_signal: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the AMS of selecting the events that score at least a threshold, for each threshold.

    Parameters
    ----------
    scores : array_like, shape (n,)
        The probability of signal that a network gives each event.
    is_signal : array_like of bool, shape (n,)
        What each event is.
    weights : array_like, shape (n,)
        How much each event counts for its class. They are scaled so that each class sums up to what
        the challenge expects of it, whatever part of its events is here.

    Returns
    -------
    thresholds, significances : numpy.ndarray
        The scores that occur, falling, and the AMS at each.

    Examples
    --------
    >>> thresholds, values = significance_curve([0.9, 0.2, 0.4], [True, True, False], [1, 1, 1])
    >>> thresholds.tolist(), values.round(1).tolist()
    ([0.9, 0.4, 0.2], [43.0, 0.5, 1.1])
    """
    order = np.argsort(scores)[::-1]
    scores, is_signal = np.asarray(scores)[order], np.asarray(is_signal, bool)[order]
    weights = np.asarray(weights, float)[order]
    selected = []
    for chosen, expected in ((is_signal, EXPECTED_SIGNAL), (~is_signal, EXPECTED_BACKGROUND)):
        sums = np.cumsum(np.where(chosen, weights, 0))
        selected.append(expected * sums / sums[-1])
    # Events of equal scores are selected together.
    last = np.append(np.diff(scores) != 0, True)
    return scores[last], significance(*selected)[last]
