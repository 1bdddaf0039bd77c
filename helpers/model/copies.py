"""A model as the bytes that workers get, and loading it from them without other code."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from helpers.model.errors import UnservableModelError, first_line, refusal

if TYPE_CHECKING:
    import keras

Made = TypeVar("Made")

# How Keras says that it doesn't know something: its kind, and its name.
_UNKNOWN = re.compile(
    r"Could not locate (\w+) '([^']+)'|object of (type) `([^`]+)`"
    r"|Could not interpret (\w+) identifier: (\S+)"
)

_REGISTRY = threading.Lock()  # held while the classes that are registered with Keras are hidden


def model_to_bytes(model: keras.Model) -> bytes:
    """Return a model as the bytes of a ``.keras`` file.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> model_from_bytes(model_to_bytes(build_model())).count_params()
    1018002
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return path.read_bytes()


def model_from_bytes(content: bytes) -> keras.Model:
    """Return the model that `model_to_bytes` serialized. Keras' safe mode runs no code from it.

    Raises
    ------
    ValueError
        If the bytes are not a Keras model.
    """
    import keras

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(content)
        _leave_out_training(path)
        return keras.saving.load_model(path, compile=False)


def _leave_out_training(path: Path) -> None:
    """Rewrite a ``.keras`` file without the losses and metrics of its parts, which may need code.

    Keras leaves out those of the outermost model only.
    """
    try:
        with zipfile.ZipFile(path) as found:
            text = found.read("config.json")
            if b'"compile_config"' not in text:
                return
            parts = {name: found.read(name) for name in found.namelist()}
        config = json.loads(text, object_hook=_uncompiled)
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError):
        return  # Keras says what is wrong with it
    with zipfile.ZipFile(path, "w") as kept:
        for name, part in {**parts, "config.json": json.dumps(config)}.items():
            kept.writestr(name, part)


def _uncompiled(part: dict[str, object]) -> dict[str, object]:
    """Return a part of a model's config without its loss, metrics and optimizer."""
    return {name: value for name, value in part.items() if name != "compile_config"}


def model_on_worker(content: bytes) -> keras.Model:
    """Return a model as a worker loads it from bytes, with Keras' classes only.

    Parameters
    ----------
    content : bytes
        The bytes that `model_to_bytes` returned.

    Raises
    ------
    UnservableModelError
        If the model has classes or functions that are not part of Keras.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> model_on_worker(model_to_bytes(build_model())).name
    'higgs'
    """
    try:
        return as_on_worker(model_from_bytes, content)
    except Exception as error:  # Keras may raise anything for a class that it doesn't know
        raise needs_code(error) from None


def as_on_worker(function: Callable[..., Made], *arguments: object) -> Made:
    """Call a function that loads something of Keras, as a worker would: with Keras' classes only.

    Meanwhile, classes and functions that were registered with Keras in this process are hidden,
    because workers don't have them.

    Parameters
    ----------
    function : callable
        Loads something.
    *arguments
        What it is called with.

    Examples
    --------
    >>> import keras
    >>> as_on_worker(keras.losses.deserialize, "mean_squared_error").__name__
    'mean_squared_error'
    """
    import keras

    registered = keras.saving.get_custom_objects()
    with _REGISTRY:
        hidden = dict(registered)
        registered.clear()
        try:
            # Keras' scopes of custom objects, and of loading code, belong to a thread.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(function, *arguments).result()
        finally:
            registered.update(hidden)


def needs_code(error: Exception) -> UnservableModelError | OSError:
    """Return the error for a model that Keras can't copy without code.

    Parameters
    ----------
    error : Exception
        What Keras raised. An error of this machine, such as a full disk, is returned as it is.

    Examples
    --------
    >>> needs_code(TypeError("Could not locate class 'Mine'."))
    UnservableModelError("this model can't be served: the class 'Mine' is not part of Keras: ...
    """
    if isinstance(error, OSError) and error.errno:
        return error
    return refusal(
        f"{missing_code(error)}: build it from keras.layers and keras.ops, because workers have no "
        "other code"
    )


def missing_code(error: Exception) -> str:
    """Return why Keras can't copy something.

    Parameters
    ----------
    error : Exception
        What Keras raised.

    Examples
    --------
    >>> missing_code(TypeError("Could not locate class 'Mine'."))
    "the class 'Mine' is not part of Keras"
    """
    text = str(error)
    unknown = _UNKNOWN.search(text)
    if unknown:
        kind, name = filter(None, unknown.groups())
        return f"the {kind} {name.rpartition('>')[2]!r} is not part of Keras"
    if "lambda" in text.lower():
        return "it has a Python lambda"
    return f"Keras can't copy it ({first_line(error)})"
