"""The contract of a trained network: what must be true wherever it serves."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DoubleType, LongType, StructType

from helpers.higgs import EVENT_ID
from helpers.model import worker_copy
from helpers.records import name_faults, named

if TYPE_CHECKING:
    import keras

# Keras' Normalization divides by no less than the first. The square of the second is still a 32-bit
# float, in case that Keras casts the variance.
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-7, 1e18

_LIBRARIES = ("keras", "tensorflow-cpu", "tensorflow", "numpy", "pyspark")


def fingerprint(df: DataFrame) -> str:
    """Return a fingerprint of a set of rows, independent of their order.

    Parameters
    ----------
    df : pyspark.sql.DataFrame
        Rows of numbers, strings or other values that Spark can hash.

    Returns
    -------
    str
        The number of rows, and a digest of their values and the column names.

    Examples
    --------
    >>> df = spark.createDataFrame([(1, "s"), (2, "b")], "EventId int, Label string")
    >>> fingerprint(df) == fingerprint(df.orderBy("Label"))
    True
    >>> fingerprint(df).startswith("2 rows, ")
    True
    """
    names = sorted(df.columns)
    columns = [
        F.to_json(named(name)) if isinstance(df.schema[name].dataType, ArrayType) else named(name)
        for name in names
    ]
    # The hash ignores nulls, whatever their column, and also in arrays.
    hashes = F.xxhash64(*columns, *[column.isNull() for column in columns]).cast("decimal(20, 0)")
    rows, total = df.select(F.count(F.lit(1)), F.sum(hashes)).first()
    digest = hashlib.sha256(f"{names} {rows} {total}".encode()).hexdigest()
    return f"{rows} rows, {digest[:16]}"


class ServingModelError(ValueError):
    """The file is not a serving model, or its parts disagree; the message says which."""


@dataclass(frozen=True)
class Contract:
    """The contract of a network.

    Attributes
    ----------
    feature_names : tuple of str
        The names of the network's inputs, in order.
    means, scales : tuple of float
        The mean and scale of each feature: the network's first layer computes
        ``(value - mean) / scale``.
    class_names : tuple of str
        The names of the two classes, in the order of the network's outputs. If it has a single
        output, from a sigmoid, that is the probability of the second class.
    signal_index : int
        The index of the signal output.
    threshold : float
        The signal probability at which an event is classified as signal.
    training_data : str
        The `fingerprint` of the rows that the network was trained on.
    metrics : dict of str to float
        The network's metrics on events not used in training.
    event_id : str
        The name of the field that identifies an event.
    missing : float, optional
        The number that represents a missing value; it is scaled like any other.
    libraries : dict of str to str
        The library versions that the network was trained with.
    """

    feature_names: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    class_names: tuple[str, ...]
    signal_index: int
    threshold: float
    training_data: str
    metrics: dict[str, float]
    event_id: str = EVENT_ID
    missing: float | None = None
    libraries: dict[str, str] = field(default_factory=lambda: _library_versions())

    def faults(self) -> list[str]:
        """Return the contract's internal faults, as clauses; none if it is valid."""
        names, classes, count = self.feature_names, self.class_names, len(self.feature_names)
        signal = repr(self.signal_index)
        numbers = {"means": self.means, "scales": self.scales}
        texts = (*names, *classes, self.event_id, *self.metrics)
        rules = {
            f"it has {len(classes)} classes, not two": len(set(classes)) == len(classes) == 2,
            f"signal_index is {signal}, not the integer 0 or 1": signal in ("0", "1"),
            f"threshold is {self.threshold}, not between 0 and 1": 0 < self.threshold < 1,
            "a name is not a string": all(isinstance(name, str) for name in texts),
            "a scale isn't above 0": all(scale > 0 for scale in self.scales),
            "a metric is not finite": all(map(math.isfinite, self.metrics.values())),
        }
        for name, values in numbers.items():
            rules[f"it has {len(values)} {name} for {count} features"] = len(values) == count
            rules[f"{name} are not all finite"] = all(map(math.isfinite, values))
        faults = name_faults(self.event_id, names)
        return faults + [fault for fault, holds in rules.items() if not holds]


@dataclass(frozen=True)
class ServingModel:
    """A network, its contract, and its version.

    Attributes
    ----------
    network : keras.Model
        Takes unscaled features of shape (events, features), and scales them itself.
    contract : Contract
        Describes the network's inputs and outputs.
    version : str
        The beginning of a digest of network and contract, so the same content always has the same
        version. Empty before the model is saved.
    """

    network: keras.Model
    contract: Contract
    version: str = ""
    _checked: str = field(default="", repr=False, compare=False)  # digest of what was loaded

    @property
    def schema(self) -> StructType:
        """The schema of an event, for `helpers.records.parse_events`.

        All features are doubles, because a contract has no types: a fraction is accepted in each.
        """
        schema = StructType().add(self.contract.event_id, LongType())
        for name in self.contract.feature_names:
            schema = schema.add(name, DoubleType())
        return schema


def scaled_network(
    network: keras.Model, means: Sequence[float], scales: Sequence[float]
) -> keras.Model:
    """Return a network that scales its inputs, then applies a copy of one trained on scaled ones.

    Parameters
    ----------
    network : keras.Model
        A network that was trained on ``(value - mean) / scale``.
    means, scales : sequence of float
        One of each per feature, such as ``mean`` and ``std`` of Spark's `StandardScalerModel`.

    Raises
    ------
    ValueError
        If a scale is too small or too large for Keras' `Normalization`.

    Examples
    --------
    >>> import keras
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation("linear")])
    >>> scaled = scaled_network(network, means=[1.0, 2.0], scales=[1.0, 4.0])
    >>> scaled(np.array([[3.0, 4.0]], dtype="float32")).numpy().tolist()
    [[2.0, 0.5]]
    """
    import keras

    unfit = [scale for scale in scales if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE]
    if unfit:
        raise ValueError(
            f"the scale {unfit[0]} is not between {_SMALLEST_SCALE} and {_LARGEST_SCALE}: give the "
            "feature in another unit, or leave it out if it is constant."
        )
    # In 64-bit floats, because a small scale beside a large mean, as of a time, needs their digits;
    # and as weights, because Keras loads the layer's arguments as 32-bit floats.
    features = keras.Input((len(means),), dtype="float64", name="features")
    scaling = keras.layers.Normalization(name="scaling", dtype="float64")
    scaling.build((None, len(means)))
    scaling.adapt_mean.assign(np.array(means, "float64"))
    scaling.adapt_variance.assign(np.square(np.array(scales, "float64")))
    scaling.finalize_state()
    _, network = worker_copy(network)  # without an optimizer, if it has one
    return keras.Sequential([features, scaling, network])


def _library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a network's numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # TensorFlow is installed under one of two names
            continue
    return versions
