"""Serve from a file, and follow its replacements."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from helpers.model import UnservableModelError
from helpers.serving.archive import load_serving_model
from helpers.serving.contract import ServingModel, ServingModelError
from helpers.serving.transformer import ServingTransformer

_LOGGER = logging.getLogger(__name__)


class ModelFile:
    """A serving model in a file that may be replaced while a stream runs.

    Call `current` before each batch, so that a batch is scored by one version. If a new file is
    rejected, or has another field for the event's id, other classes or another signal index, the
    previous version keeps serving, and the reason is logged. A file that can't be read is retried.

    Parameters
    ----------
    path : str or path-like
        A file written by `helpers.serving.save_serving_model`.

    Raises
    ------
    FileNotFoundError
        If there is no file at the start.
    ServingModelError
        If the first file is rejected.

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
        """Return the stage for the file's current version, and set `model` to that version."""
        state = self._state()
        if state != self._seen:
            try:
                self._replace(load_serving_model(self._path))
                self._seen, self._warning = state, ""
            except (ServingModelError, UnservableModelError) as error:
                self._seen = state
                self._warn(error)
            except OSError as error:
                self._warn(error)
        return self._transformer

    def _warn(self, error: Exception) -> None:
        """Log once why the previous version keeps serving."""
        warning = f"{self.model.version} keeps serving: {error}"
        if warning != self._warning:
            _LOGGER.warning("%s", warning)
        self._warning = warning

    def _replace(self, model: ServingModel) -> None:
        """Serve another model; raise `ServingModelError` if its results have another meaning."""
        if model.version == self.model.version:
            return  # the same one, written again
        ours, theirs = self.model.contract, model.contract
        for name in ("event_id", "class_names", "signal_index"):
            if getattr(theirs, name) != getattr(ours, name):
                raise ServingModelError(
                    f"{self._path} has {name} {getattr(theirs, name)!r}, but the results so far "
                    f"have {getattr(ours, name)!r}: give this model another output."
                )
        self.model, self._transformer = model, ServingTransformer(model)

    def _state(self) -> tuple[int, int, int] | None:
        """Return the file attributes that change when it is replaced."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
