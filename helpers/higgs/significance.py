"""The metric of the challenge: how significantly a selection of events shows the Higgs boson."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXPECTED_SIGNAL, EXPECTED_BACKGROUND = 692.0, 411_000.0
"""Number of events of each class that the challenge expects: the sums of the weights in Kaggle's
training file."""


def significance(signal: ArrayLike, background: ArrayLike) -> NDArray[np.float64]:
    """Return the approximate median significance (AMS) of a selection of events.

    Parameters
    ----------
    signal, background : array_like
        The summed weights of the selected events of each class, which is how many the detector
        would see.

    Returns
    -------
    numpy.ndarray
        The AMS, in standard deviations.

    References
    ----------
    The metric of the challenge, equation 7 of [1]_, with its regularisation of 10 events.

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
    """Return the AMS at each threshold, which selects the events that score at least that much.

    Parameters
    ----------
    scores : array_like, shape (n,)
        The network's signal probability for each event.
    is_signal : array_like of bool, shape (n,)
        Whether each event is signal.
    weights : array_like, shape (n,)
        The weight of each event in its class. They are scaled so that each class sums to the number
        that the challenge expects, whatever part of its events is given.

    Returns
    -------
    thresholds, significances : numpy.ndarray
        The distinct scores in descending order, and the AMS at each.

    Raises
    ------
    ValueError
        If a score or a weight is not finite, `is_signal` is not boolean, the lengths differ, a
        class has no weight, or the selected weights of one have a negative sum at some threshold.

    Examples
    --------
    >>> thresholds, values = significance_curve([0.9, 0.2, 0.4], [True, True, False], [1, 1, 1])
    >>> thresholds.tolist(), values.round(1).tolist()
    ([0.9, 0.4, 0.2], [43.0, 0.5, 1.1])
    """
    scores, weights = np.asarray(scores, float), np.asarray(weights, float)
    if not (np.isfinite(scores).all() and np.isfinite(weights).all()):
        raise ValueError("a score or a weight is not a finite number: leave these events out.")
    is_signal = np.asarray(is_signal)
    if is_signal.dtype != bool:
        raise ValueError(f"is_signal has {is_signal.dtype}: give it as booleans, as labels == 's'.")
    if not scores.shape == is_signal.shape == weights.shape == (scores.size,):
        raise ValueError(
            f"the shapes are {scores.shape}, {is_signal.shape} and {weights.shape}: give one "
            "score, one boolean and one weight per event."
        )
    order = np.argsort(scores)[::-1]
    scores, is_signal, weights = scores[order], is_signal[order], weights[order]
    # Events with equal scores are selected together.
    last = np.append(np.diff(scores) != 0, True)
    selected = []
    for chosen, expected in ((is_signal, EXPECTED_SIGNAL), (~is_signal, EXPECTED_BACKGROUND)):
        given = np.where(chosen, weights, 0)
        sums = np.cumsum(given)
        # By rounding, the sum of weights that cancel out can be a bit above or below 0.
        sums[np.abs(sums) < 1e-12 * np.abs(given).sum()] = 0
        if not sums.size or not sums[-1]:
            raise ValueError("one class has no weight: the AMS needs events of both.")
        if (sums[last] < 0).any():
            raise ValueError(
                "the weights selected at some threshold have a negative sum, for which the AMS has "
                "no meaning: take more events, so that positive weights outweigh negative ones."
            )
        selected.append(expected * sums[last] / sums[-1])
    return scores[last], significance(*selected)
