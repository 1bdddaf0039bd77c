"""Save a trained network and its contract to one file, and load them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers.model import (
    are_probabilities,
    check_copy,
    dependence,
    first_line,
    interface_of,
    model_on_worker,
    model_to_bytes,
    scoring_function,
)
from helpers.serving.contract import Contract, ServingModel, ServingModelError

if TYPE_CHECKING:
    import keras

CONTRACT = "contract.json"  # the contract's name in the .keras file, which is a ZIP archive

_KERAS_FILES = ("metadata.json", "config.json", "model.weights.h5")  # contents of any .keras file
_ASSETS = "assets/"  # the folder of what a layer has learned besides weights, such as a vocabulary

_TRIED = 32  # on how many events a network must return probabilities

_DIGEST_LENGTH = 12  # hexadecimal digits of a version

# Errors of an edited contract; the last two come from huge numbers and deep nesting.
_INVALID = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)

# Maximum expansion of a part of the archive. Keras doesn't compress; a part that is compressed a
# thousandfold is meant to exhaust the memory.
_MOST_EXPANSION = 100


def save_serving_model(model: ServingModel, path: str | os.PathLike[str]) -> ServingModel:
    """Write a network and its contract to one file, which plain Keras can also open.

    An existing file is replaced atomically: a job that serves from it loads either the old or
    the new one.

    Parameters
    ----------
    model : ServingModel
        The network, with two outputs, and its contract.
    path : str or path-like
        The file to write; its name must end in ``.keras``. Its folder is created if missing.

    Returns
    -------
    ServingModel
        The model as `load_serving_model` returns it, including its version.

    Raises
    ------
    ServingModelError
        If network and contract disagree, or the path is not local or doesn't end in ``.keras``.
    helpers.model.UnservableModelError
        If the saved network returns other numbers than the network.
    """
    path = _local(path)
    if path.suffix != ".keras":
        raise ServingModelError(f"{path} must end in .keras: Keras requires this suffix.")
    files = _files_in(model_to_bytes(model.network), path)
    contract = asdict(model.contract)
    written = _json({"contract": contract, "digest": _digest(files, contract)})
    content = _archive({**files, CONTRACT: written})
    saved = _serving_model_in(content, path)
    check_copy(model.network, saved.network)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        draft = Path(folder) / path.name
        draft.write_bytes(content)
        draft.replace(path)
    return saved


def load_serving_model(path: str | os.PathLike[str]) -> ServingModel:
    """Load a network and its contract from a file, without running any code in it.

    Parameters
    ----------
    path : str or path-like
        A file that `save_serving_model` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ServingModelError
        If the file is not a serving model, its parts disagree, or the path is not local.

    Examples
    --------
    >>> import keras
    >>> from helpers.serving import scaled_network
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
    # Read the file once, because it may be replaced at any moment.
    return _serving_model_in(path.read_bytes(), path)


def verified(model: ServingModel) -> ServingModel:
    """Return a serving model with the version of its content, after checking that its parts agree.

    A model that was loaded, and not changed since, has been checked.

    Parameters
    ----------
    model : ServingModel
        The network and its contract.

    Raises
    ------
    ServingModelError
        If network and contract disagree.

    Examples
    --------
    >>> verified(serving_model).version == serving_model.version
    True
    """
    digest = _digest_of(model.network, model.contract)
    if digest == model._checked:
        return model
    faults = model.contract.faults() or _disagreements(model.network, model.contract)
    if faults:
        raise ServingModelError(f"this model can't serve: {'; '.join(faults)}.")
    return replace(model, version=digest[:_DIGEST_LENGTH], _checked=digest)


def _local(path: str | os.PathLike[str]) -> Path:
    """Return a local path; raise `ServingModelError` for a URI of another file system."""
    if re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise ServingModelError(f"{path} is not a path on this machine: copy the file to one.")
    return Path(path)


def _serving_model_in(content: bytes, path: Path) -> ServingModel:
    """Return the serving model in a file's content."""
    files = _files_in(content, path)
    contract, written, noted = _contract_in(files, path)
    faults = contract.faults()
    try:
        digest = _digest(files, written)
    except (ValueError, RecursionError) as error:
        raise ServingModelError(f"{path} has no network that can be loaded: {error}.") from None
    if digest != noted:
        faults.append("the network or the contract was changed after they were saved together")
    if not faults:
        # Without the contract, because Keras treats an unknown part as a folder of assets.
        network = _network_in(
            _archive({name: part for name, part in files.items() if name != CONTRACT}), path
        )
        faults = _disagreements(network, contract)
    if faults:
        raise ServingModelError(f"{path} can't serve: {'; '.join(faults)}.")
    # Keras may write a network that it has loaded in another way than it was written.
    return ServingModel(network, contract, digest[:_DIGEST_LENGTH], _digest_of(network, contract))


def _files_in(content: bytes, path: Path) -> dict[str, bytes]:
    """Return the files in a ``.keras`` archive, each verified against its checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            known = [
                name for name in archive.namelist()
                if name in (*_KERAS_FILES, CONTRACT) or name.startswith(_ASSETS)
            ]  # fmt: skip
            for part in map(archive.getinfo, known):
                if part.file_size > _MOST_EXPANSION * part.compress_size:
                    raise ValueError(f"{part.filename} would be {part.file_size} bytes")
            files = {name: archive.read(name) for name in known}
        for name in _KERAS_FILES:
            if name not in files:
                raise ValueError(f"it has no {name}")
        return files
    except Exception as error:  # a damaged archive may raise many kinds of errors
        raise ServingModelError(f"{path} is not a .keras file, or is damaged: {error}.") from error


def _archive(files: Mapping[str, bytes]) -> bytes:
    """Return the content of an archive with these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    return content.getvalue()


def _contract_in(files: Mapping[str, bytes], path: Path) -> tuple[Contract, dict[str, object], str]:
    """Return the contract in a ``.keras`` file, its JSON content, and the digest stored there."""
    if CONTRACT not in files:
        raise ServingModelError(
            f"{path} has no contract: write it with helpers.serving.save_serving_model."
        )
    try:
        whole = json.loads(files[CONTRACT])
        parts = dict(whole["contract"])
        known = {part.name: part.type for part in fields(Contract)}
        for name, value in parts.items():
            if known[name].startswith("tuple"):
                if not isinstance(value, list):  # a string is also a sequence
                    raise TypeError(f"{name} is not a list")
                parts[name] = tuple(value)
        contract = Contract(**parts)
        contract.faults()  # fails on values of the wrong type
        return contract, whole["contract"], whole["digest"]
    except _INVALID as error:
        raise ServingModelError(f"{path} has an invalid contract: {error}.") from None


def _network_in(content: bytes, path: Path) -> keras.Model:
    """Return the network in the content of a plain ``.keras`` file."""
    try:
        network = model_on_worker(content)
        interface_of(network)
    except OSError:  # of this machine, such as a full disk
        raise
    except Exception as error:  # Keras may raise anything for a file from elsewhere
        raise ServingModelError(
            f"{path} has no network that can be loaded: {first_line(error)}."
        ) from error
    return network


def _disagreements(network: keras.Model, contract: Contract) -> list[str]:
    """Return the disagreements between a network and its contract."""
    interface = interface_of(network)
    names, classes = contract.feature_names, contract.class_names
    rules = {
        f"the network takes {interface.features} features, the contract names {len(names)}":
            interface.features in (None, len(names)),
        f"the network distinguishes {interface.classes} classes, the contract {len(classes)}":
            interface.classes == len(classes),
        "the network doesn't scale its inputs with the contract's means and scales (make it with "
        "helpers.serving.scaled_network)": _scales_with(network, contract),
    }  # fmt: skip
    return [fault for fault, holds in rules.items() if not holds] or _faults_in_scores(
        network, contract
    )


def _faults_in_scores(network: keras.Model, contract: Contract) -> list[str]:
    """Return what is wrong with a network's output for random events around the means."""
    random = np.random.default_rng(0).normal(size=(_TRIED, len(contract.means)))
    events = contract.means + np.multiply(contract.scales, 3 * random)
    try:
        score = scoring_function(network)
        values = score(events)
        fault = dependence(score, events, values)
    except Exception as error:  # TensorFlow may raise anything for a network that doesn't fit
        reason = first_line(error)
        return [f"the network fails on all events around the contract's means ({reason})"]
    if not np.isfinite(values).all(axis=1).any():
        return ["the network returns no finite number for events around the contract's means"]
    if not are_probabilities(values):
        return [
            "the network doesn't return probabilities: end it with a softmax over the classes, "
            "or with a single sigmoid"
        ]
    return [fault] if fault else []


def _scales_with(network: keras.Model, contract: Contract) -> bool:
    """Return whether a network's first layer has the contract's means and scales."""
    import keras

    layer = network.layers[0]
    if not isinstance(layer, keras.layers.Normalization) or layer.invert:
        return False
    mean, variance = (np.ravel(numbers) for numbers in (layer.mean, layer.variance))
    means, scales = np.array(contract.means), np.array(contract.scales)
    if not len(mean) == len(variance) == len(means):
        return False
    # A mean counts in units of its scale.
    divisors = np.maximum(np.sqrt(variance), keras.config.epsilon())
    return np.allclose((mean - means) / scales, 0, atol=1e-5) and np.allclose(
        divisors, scales, rtol=1e-5, atol=0
    )


def _digest_of(network: keras.Model, contract: Contract) -> str:
    """Return the digest of a network, as Keras would save it, and its contract."""
    return _digest(_files_in(model_to_bytes(network), Path("the network")), asdict(contract))


def _digest(files: Mapping[str, bytes], contract: Mapping[str, object]) -> str:
    """Return a digest of the network in the files of a ``.keras`` archive and its contract."""
    layers = json.loads(files["config.json"], object_hook=_without_address)
    digest = hashlib.sha256(_json([contract, layers]))
    digest.update(files["model.weights.h5"])
    for name in sorted(name for name in files if name.startswith(_ASSETS)):
        digest.update(_json([name, hashlib.sha256(files[name]).hexdigest()]))
    return digest.hexdigest()


def _without_address(part: dict[str, object]) -> dict[str, object]:
    """Return a part of a network's config without Keras' memory address for it."""
    return {name: value for name, value in part.items() if name != "shared_object_id"}


def _json(content: object) -> bytes:
    """Serialize content to JSON, converting NumPy's numbers and arrays to Python's."""
    return json.dumps(content, indent=1, sort_keys=True, default=lambda n: n.tolist()).encode()
