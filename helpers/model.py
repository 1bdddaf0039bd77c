"""The network of the walkthrough, and the file in which a trained one goes to where it serves.

A network alone doesn't say what its inputs are called, in which order they come, how they were
scaled, or which of its outputs means signal; whoever has to guess that will guess wrong one day. A
*serving model* is a network together with its *contract*: one ``.keras`` file that holds all of it,
and that is refused when its parts disagree.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import keras
import numpy
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, LongType, StructType

from helpers.higgs import EVENT_ID

FEATURE_COUNT = 30
CLASS_COUNT = 2

# How many of the events a network of random weights calls class 0 is an accident of its weights,
# anything from none to all. With this seed it is about half of them, so there is something to see.
SEED = 39

CONTRACT = "contract.json"  # its name in the .keras file, which is a ZIP archive
_KERAS_FILES = ("metadata.json", "config.json", "model.weights.h5")  # what Keras' own files have
_LIBRARIES = ("keras", "tensorflow-cpu", "tensorflow", "numpy", "pyspark")
_DIGEST_LENGTH = 12  # hexadecimal digits of a version

# How much larger than in its archive a part may be. Keras doesn't compress; what somebody else has
# compressed a thousandfold is there to fill the memory.
_MOST_EXPANSION = 100


def build_model(seed: int = SEED, feature_count: int = FEATURE_COUNT) -> keras.Model:
    """Return the original notebook's network with random weights: 30-500-1000-500-2.

    Dense layers with relu, dropout of 0.4 after the first two, softmax at the end: 1,018,002
    parameters. The same seed gives the same weights.

    Parameters
    ----------
    seed : int
        Seed of the random weights.
    feature_count : int
        The number of inputs.

    Returns
    -------
    keras.Model
        Takes float32 of shape (events, feature_count), returns probabilities of shape (events, 2).

    References
    ----------
    The layers are those of the notebook "Kafka and Spark High Throughput Deep Learning Production
    Pipeline" of Distributed Keras (CERN, 2016), https://github.com/cerndb/dist-keras.

    Examples
    --------
    >>> build_model().count_params()
    1018002
    """
    weights = [keras.initializers.GlorotUniform(seed=seed + layer) for layer in range(4)]
    return keras.Sequential(
        [
            keras.Input(shape=(feature_count,), name="features"),
            _dense(500, "relu", weights[0], "hidden_1"),
            keras.layers.Dropout(0.4, seed=seed, name="dropout_1"),
            _dense(1000, "relu", weights[1], "hidden_2"),
            keras.layers.Dropout(0.4, seed=seed, name="dropout_2"),
            _dense(500, "relu", weights[2], "hidden_3"),
            _dense(CLASS_COUNT, "softmax", weights[3], "classes"),
        ],
        name="higgs",
    )


def _dense(
    units: int, activation: str, weights: keras.initializers.Initializer, name: str
) -> keras.layers.Dense:
    return keras.layers.Dense(
        units, activation=activation, kernel_initializer=weights, name=name
    )


def model_to_bytes(model: keras.Model) -> bytes:
    """Return a model as the bytes of a ``.keras`` file.

    Examples
    --------
    >>> model_from_bytes(model_to_bytes(build_model())).count_params()
    1018002
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return path.read_bytes()


def model_from_bytes(content: bytes) -> keras.Model:
    """Return the model that `model_to_bytes` made bytes of. No code in it runs (Keras' safe mode).

    Raises
    ------
    ValueError
        If the bytes are no Keras model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(content)
        return keras.saving.load_model(path, compile=False)


def compiled_predict(model: keras.Model) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Return a model's fastest way from features to probabilities, compiled once for all sizes.

    `keras.Model.predict` sets up a data pipeline on each call and compiles again for each new size
    of the last batch; a stream calls with thousands of batches of all sizes.

    Parameters
    ----------
    model : keras.Model
        A model with one input of shape (features,) and one output of shape (classes,).

    Returns
    -------
    callable
        Takes float32 of shape (events, features), returns float32 of shape (events, classes).

    Examples
    --------
    >>> compiled_predict(build_model())(numpy.zeros((3, 30), dtype="float32")).shape
    (3, 2)
    """
    import tensorflow

    signature = tensorflow.TensorSpec([None, *model.input_shape[1:]], tensorflow.float32)
    # autograph rewrites Python's control flow; there is none here, and it leaves files behind.
    graph = tensorflow.function(
        lambda features: model(features, training=False),
        input_signature=[signature],
        autograph=False,
    )
    return lambda features: graph(features).numpy()


def fingerprint(df: DataFrame) -> str:
    """Return what identifies a set of rows, whatever their order.

    Parameters
    ----------
    df : pyspark.sql.DataFrame
        Rows of numbers, texts or other values that Spark can hash.

    Returns
    -------
    str
        The number of rows, and a digest of their values and of the columns' names.

    Examples
    --------
    >>> df = spark.createDataFrame([(1, "s"), (2, "b")], "EventId int, Label string")
    >>> fingerprint(df) == fingerprint(df.orderBy("Label"))
    True
    >>> fingerprint(df).startswith("2 rows, ")
    True
    """
    names = sorted(df.columns)
    columns = [F.col(f"`{name}`") for name in names]
    # The hash passes over nulls, wherever they are.
    hashes = F.xxhash64(*columns, *[column.isNull() for column in columns]).cast("decimal(20, 0)")
    rows, total = df.select(F.count(F.lit(1)), F.sum(hashes)).first()
    digest = hashlib.sha256(f"{names} {rows} {total}".encode()).hexdigest()
    return f"{rows} rows, {digest[:16]}"


class ServingModelError(ValueError):
    """The file is no serving model, or its parts disagree; the message says which."""


@dataclass(frozen=True)
class Contract:
    """What has to hold where a network serves.

    Attributes
    ----------
    feature_names : tuple of str
        The network's inputs, in their order.
    means, scales : tuple of float
        What each feature is scaled with, ``(value - mean) / scale``, by the network's own first
        layer.
    class_names : tuple of str
        The network's two outputs, in their order.
    signal_index : int
        Which of them is signal.
    threshold : float
        The probability of signal from which an event is called signal.
    training_data : str
        The `fingerprint` of the rows that the network was trained on.
    metrics : dict of str to float
        How good the network was on events that training did not see.
    event_id : str
        The field that identifies an event.
    missing : float, optional
        The value that stands for one that is missing, and is scaled like any other.
    libraries : dict of str to str
        The versions that the network was trained with.
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
        """Return what is wrong in itself, in clauses; none if nothing is."""
        names, classes, count = self.feature_names, self.class_names, len(self.feature_names)
        numbers = {"means": self.means, "scales": self.scales}
        texts = (*names, *classes, self.event_id, *self.metrics)
        rules = {
            f"features are named twice: {_repeated(names)}": len(set(names)) == count,
            f"the field of the id, {self.event_id!r}, is a feature": self.event_id not in names,
            f"it has {len(classes)} classes, not two": len(set(classes)) == len(classes) == 2,
            f"signal_index is {self.signal_index!r}": repr(self.signal_index) in ("0", "1"),
            f"threshold is {self.threshold}, not between 0 and 1": 0 < self.threshold < 1,
            "a name is no text": all(isinstance(name, str) for name in texts),
            "a scale isn't above 0": all(scale > 0 for scale in self.scales),
            "a metric is not finite": all(map(math.isfinite, self.metrics.values())),
        }
        for name, values in numbers.items():
            rules[f"it has {len(values)} {name} for {count} features"] = len(values) == count
            rules[f"{name} are not all finite"] = all(map(math.isfinite, values))
        return [fault for fault, holds in rules.items() if not holds]


@dataclass(frozen=True)
class ServingModel:
    """A network, its contract, and its version.

    Attributes
    ----------
    network : keras.Model
        Takes features as they are, of shape (events, features), and scales them itself.
    contract : Contract
        What its inputs and outputs are.
    version : str
        The beginning of a digest of network and contract: the same ones have the same version,
        whenever they are saved. Empty if they never were.
    """

    network: keras.Model
    contract: Contract
    version: str = ""

    @property
    def schema(self) -> StructType:
        """The fields of an event, for `helpers.records.parse_events`."""
        schema = StructType().add(self.contract.event_id, LongType())
        for name in self.contract.feature_names:
            schema = schema.add(name, DoubleType())
        return schema


def scaled_network(
    network: keras.Model, means: Sequence[float], scales: Sequence[float]
) -> keras.Model:
    """Return a network that scales its inputs itself, before a copy of one trained on scaled ones.

    Parameters
    ----------
    network : keras.Model
        Was trained on ``(value - mean) / scale``.
    means, scales : sequence of float
        One of each a feature, such as ``mean`` and ``std`` of Spark's `StandardScalerModel`.

    Examples
    --------
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation("linear")])
    >>> scaled = scaled_network(network, means=[1.0, 2.0], scales=[1.0, 4.0])
    >>> scaled(numpy.array([[3.0, 4.0]], dtype="float32")).numpy().tolist()
    [[2.0, 0.5]]
    """
    variance = numpy.square(scales)
    scaling = keras.layers.Normalization(mean=means, variance=variance, name="scaling")
    network = model_from_bytes(model_to_bytes(network))  # without an optimizer, if it has one
    return keras.Sequential([keras.Input((len(means),), name="features"), scaling, network])


def save_serving_model(model: ServingModel, path: str | os.PathLike[str]) -> ServingModel:
    """Write a network and its contract to one file, which Keras alone can open, too.

    A file that is there is replaced in one step: whoever serves from it has the old or the new one.

    Parameters
    ----------
    model : ServingModel
        The network, with two outputs, and its contract.
    path : str or path-like
        Where to; the name ends in ``.keras``. Its folder is made if it isn't there.

    Returns
    -------
    ServingModel
        What `load_serving_model` makes of the file, its version among it.

    Raises
    ------
    ServingModelError
        If network and contract disagree, or the path is none of this machine, or of a file that
        isn't called ``.keras``.
    """
    path = _local(path)
    if path.suffix != ".keras":
        raise ServingModelError(f"{path} must end in .keras, by which Keras knows such a file.")
    files = _files_in(model_to_bytes(model.network), path)
    contract = asdict(model.contract)
    written = _json({"contract": contract, "digest": _digest(files, contract)})
    content = _archive({**files, CONTRACT: written})
    saved = _serving_model_in(content, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        draft = Path(folder) / path.name
        draft.write_bytes(content)
        draft.replace(path)
    return saved


def load_serving_model(path: str | os.PathLike[str]) -> ServingModel:
    """Return the network and its contract from a file; no code in the file runs.

    Parameters
    ----------
    path : str or path-like
        A file that `save_serving_model` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ServingModelError
        If it is no serving model, its parts disagree, or the path is none of this machine.

    Examples
    --------
    >>> contract = Contract(
    ...     feature_names=("mass", "energy"), means=(90.0, 40.0), scales=(30.0, 20.0),
    ...     class_names=("background", "signal"), signal_index=1, threshold=0.5,
    ...     training_data="none", metrics={})
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    >>> network = scaled_network(network, contract.means, contract.scales)
    >>> path = getfixture("tmp_path") / "model.keras"
    >>> saved = save_serving_model(ServingModel(network, contract), path)
    >>> load_serving_model(path).contract == contract
    True
    """
    path = _local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    # Read once: the file may be replaced at any moment.
    return _serving_model_in(path.read_bytes(), path)


def _local(path: str | os.PathLike[str]) -> Path:
    """Return a path of this machine; raise `ServingModelError` for another file system's."""
    if re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise ServingModelError(f"{path} is no path of this machine: copy the file to one.")
    return Path(path)


def _serving_model_in(content: bytes, path: Path) -> ServingModel:
    """Return the serving model that a file with this content holds."""
    files = _files_in(content, path)
    contract, written, noted = _contract_in(files, path)
    faults = contract.faults()
    try:
        digest = _digest(files, written)
    except (ValueError, RecursionError) as error:
        raise ServingModelError(f"{path} has no network that can be loaded: {error}.") from None
    if digest != noted:
        faults.append("network or contract were changed after they were saved together")
    if not faults:
        # Without the contract: Keras takes a part that it doesn't know for a folder of assets.
        network = _network_in(_archive({name: files[name] for name in _KERAS_FILES}), path)
        faults = _disagreements(network, contract)
    if faults:
        raise ServingModelError(f"{path} can't serve: {'; '.join(faults)}.")
    return ServingModel(network, contract, digest[:_DIGEST_LENGTH])


def _files_in(content: bytes, path: Path) -> dict[str, bytes]:
    """Return the files that a ``.keras`` file consists of, each checked against its checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            known = [name for name in archive.namelist() if name in (*_KERAS_FILES, CONTRACT)]
            for part in map(archive.getinfo, known):
                if part.file_size > _MOST_EXPANSION * part.compress_size:
                    raise ValueError(f"{part.filename} would be {part.file_size} bytes")
            files = {name: archive.read(name) for name in known}
    except Exception as error:  # a damaged archive has many errors
        raise ServingModelError(f"{path} is no .keras file, or is damaged: {error}.") from error
    missing = [name for name in _KERAS_FILES if name not in files]
    if missing:
        raise ServingModelError(f"{path} is no .keras file, or is damaged: it has no {missing[0]}.")
    return files


def _archive(files: Mapping[str, bytes]) -> bytes:
    """Return the content of an archive of these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    return content.getvalue()


def _contract_in(
    files: Mapping[str, bytes], path: Path
) -> tuple[Contract, dict[str, object], str]:
    """Return the contract in a ``.keras`` file, as it is written there, and the digest there."""
    if CONTRACT not in files:
        raise ServingModelError(
            f"{path} has no contract: write it with helpers.model.save_serving_model."
        )
    try:
        whole = json.loads(files[CONTRACT])
        parts = dict(whole["contract"])
        known = {part.name: part.type for part in fields(Contract)}
        for name, value in parts.items():
            if known[name].startswith("tuple"):
                parts[name] = tuple(_checked_list(name, value))
        contract = Contract(**parts)
        contract.faults()  # which can't compare what has another type
        return contract, whole["contract"], whole["digest"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ServingModelError(f"{path} has a contract that isn't whole: {error}.") from None


def _checked_list(name: str, value: object) -> list:
    """Return a list as it is; raise `TypeError` for a text, whose letters would pass for one."""
    if not isinstance(value, list):
        raise TypeError(f"{name} is no list")
    return value


def _network_in(content: bytes, path: Path) -> keras.Model:
    """Return the network in the content of Keras' own file."""
    try:
        network = model_from_bytes(content)
        if not (network.input_shape and network.output_shape):
            raise ValueError("it has no inputs or no outputs")
    except Exception as error:  # whatever Keras meets in a file that somebody has made
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise ServingModelError(f"{path} has no network that can be loaded: {reason}") from error
    return network


def _disagreements(network: keras.Model, contract: Contract) -> list[str]:
    """Return where a network isn't what its contract says."""
    inputs, outputs = network.input_shape[1:], network.output_shape[1:]
    names, classes = contract.feature_names, contract.class_names
    rules = {
        f"the network has inputs {inputs}, the contract {len(names)} features":
            inputs == (len(names),),
        f"the network has outputs {outputs}, the contract {len(classes)} classes":
            outputs == (len(classes),),
        "the network doesn't scale its inputs with the contract's means and scales (make it with "
        "helpers.model.scaled_network)": _scales_with(network, contract),
    }  # fmt: skip
    return [fault for fault, holds in rules.items() if not holds]


def _scales_with(network: keras.Model, contract: Contract) -> bool:
    """Tell whether a network's first layer has a contract's means and scales."""
    layer = network.layers[0]
    if not isinstance(layer, keras.layers.Normalization) or layer.invert:
        return False
    mean, variance = (numpy.ravel(numbers) for numbers in (layer.mean, layer.variance))
    pairs = ((mean, contract.means), (numpy.sqrt(variance), contract.scales))
    # The layer keeps 32-bit floats.
    return all(len(one) == len(other) and numpy.allclose(one, other, rtol=1e-5, atol=1e-30)
               for one, other in pairs)  # fmt: skip


def _digest(files: Mapping[str, bytes], contract: Mapping[str, object]) -> str:
    """Return the digest of the network in the files of a ``.keras`` file, and of its contract."""
    layers = json.loads(files["config.json"], object_hook=_without_address)
    digest = hashlib.sha256(_json([contract, layers]))
    digest.update(files["model.weights.h5"])
    return digest.hexdigest()


def _without_address(part: dict[str, object]) -> dict[str, object]:
    """Return a part of a network's description without where Keras had it in its memory."""
    return {name: value for name, value in part.items() if name != "shared_object_id"}


def _json(content: object) -> bytes:
    """Return what a contract has as JSON; NumPy's numbers and arrays become Python's."""
    return json.dumps(content, indent=1, sort_keys=True, default=lambda n: n.tolist()).encode()


def _library_versions() -> dict[str, str]:
    """Return the versions of what a network's numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # tensorflow comes under one of two names
            continue
    return versions


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))
