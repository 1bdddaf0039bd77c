"""What a run needs, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.preflight import checks

if TYPE_CHECKING:
    import pandas as pd


def preflight(
    bootstrap_servers: str = "", memory: str = "2g", cores: int | None = None
) -> pd.DataFrame:
    """Check all that a run needs, and say for what is missing which command mends it.

    Nothing is changed, except that the jars of Kafka and of the connector are fetched if they
    aren't on disk.

    Parameters
    ----------
    bootstrap_servers : str
        The broker that the run will use, as ``host:port``; empty if it starts one of its own.
    memory : str
        Java's memory in the run, as in ``"2g"``.
    cores : int, optional
        How many tasks the run has at a time on this machine; by default one a core.

    Returns
    -------
    pandas.DataFrame
        A row for each thing, with ``what`` it is, whether it is ``ok``, what was ``found``, and the
        ``remedy``, which is empty where all is well. In a notebook, ``preflight().style`` shows
        long commands whole.

    Examples
    --------
    >>> preflight().columns.tolist()
    ['what', 'ok', 'found', 'remedy']
    """
    import pandas as pd

    return pd.DataFrame(all_checks(bootstrap_servers, memory, cores))


def all_checks(bootstrap_servers: str, memory: str, cores: int | None) -> list[checks.Check]:
    """Return the checks of all that a run needs."""
    return [
        checks.check_java(),
        checks.check_spark(),
        checks.check_connector(),
        checks.check_worker_python(),
        checks.check_broker(bootstrap_servers),
        checks.check_memory(memory, cores),
        checks.check_disk(),
        checks.check_ports(),
    ]
