"""The serving model in a file, which may be replaced while a stream runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from helpers.serving.archive import load_serving_model
from helpers.serving.contract import ServingModel, ServingModelError
from helpers.serving.transformer import ServingTransformer

_LOGGER = logging.getLogger(__name__)


class ModelFile:
    """The serving model in a file, which may be replaced while a stream runs.

    Asked before each batch, so a batch is scored by one version. A file that is refused, that takes
    another field for the event's id than the one before, or has other classes, changes nothing: the
    version before goes on serving, and the log says why. One that can't be read is tried again.

    Parameters
    ----------
    path : str or path-like
        What `helpers.serving.save_serving_model` writes.

    Raises
    ------
    FileNotFoundError
        If there is no file to begin with.
    ServingModelError
        If it can't serve.

    Examples
    --------
    >>> file = ModelFile(model_path)
    >>> file.current().transform(events).columns[-1]
    'model_version'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._seen, self._warning = self._state(), ""
        self.model = load_serving_model(path)
        self._transformer = ServingTransformer(self.model)

    def current(self) -> ServingTransformer:
        """Return the stage that scores with the version in the file now; its `model` is that."""
        state = self._state()
        if state != self._seen:
            try:
                self._replace(load_serving_model(self._path))
                self._seen, self._warning = state, ""
            except ServingModelError as error:
                self._seen = state
                self._warn(error)
            except OSError as error:
                self._warn(error)
        return self._transformer

    def _warn(self, error: Exception) -> None:
        """Say once why the version before goes on serving."""
        warning = f"{self.model.version} goes on serving: {error}"
        if warning != self._warning:
            _LOGGER.warning("%s", warning)
        self._warning = warning

    def _replace(self, model: ServingModel) -> None:
        """Serve with another model; raise `ServingModelError` if its results mean other things."""
        ours, theirs = self.model.contract, model.contract
        for name in ("event_id", "class_names", "signal_index"):
            if getattr(theirs, name) != getattr(ours, name):
                raise ServingModelError(
                    f"{self._path} has {name} {getattr(theirs, name)!r}, and what is written so "
                    f"far {getattr(ours, name)!r}: begin another output with it."
                )
        self.model, self._transformer = model, ServingTransformer(model)

    def _state(self) -> tuple[int, int, int] | None:
        """Return what changes when the file is replaced."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
