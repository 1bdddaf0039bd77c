"""Print a run's requirements and whether they are met: ``python -m helpers.preflight``."""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from helpers.preflight import preflight


def _as_text(table: pd.DataFrame) -> str:
    """Return the checks as aligned lines of text, with a remedy below each failed one."""
    width = table["what"].str.len().max()
    lines = []
    for check in table.itertuples():
        lines.append(f"{'ok' if check.ok else 'MISSING':<7}  {check.what:<{width}}  {check.found}")
        if not check.ok:
            lines.append(f"{'':<7}  {'':<{width}}  fix it with: {check.remedy}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print a run's requirements and whether they are met; return 1 if one is missing."""
    description = "Check what a run needs, and name the command that provides what is missing."
    parser = argparse.ArgumentParser(prog="python -m helpers.preflight", description=description)
    parser.add_argument(
        "--bootstrap-servers", default="", metavar="host:port", help="the broker of the run"
    )
    parser.add_argument("--memory", default="2g", help="Java's memory; default: %(default)s")
    parser.add_argument("--cores", type=int, help="concurrent tasks; default: one per core")
    parser.add_argument(
        "--kafka-config", default="", metavar="FILE",
        help="settings for Kafka clients, including passwords, in Kafka's properties format",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    table = preflight(
        options.bootstrap_servers, options.memory, options.cores, options.kafka_config
    )
    print(_as_text(table))
    return 0 if table["ok"].all() else 1


if __name__ == "__main__":
    sys.exit(main())
