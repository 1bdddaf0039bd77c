"""Print what a run needs and whether it is available: ``python -m helpers.preflight``."""

from __future__ import annotations

import argparse
import sys

from helpers.preflight.checks import Check
from helpers.preflight.table import all_checks


def _as_table(checks: list[Check]) -> str:
    """Return checks as lines of aligned text, with a remedy under each thing that is missing."""
    width = max(len(check.what) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok' if check.ok else 'MISSING':<7}  {check.what:<{width}}  {check.found}")
        if not check.ok:
            lines.append(f"{'':<7}  {'':<{width}}  mend it with: {check.remedy}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print what a run needs and whether it is there, and return 1 if something is missing."""
    description = "Check all that a run needs; what is missing is told with what mends it."
    parser = argparse.ArgumentParser(prog="python -m helpers.preflight", description=description)
    parser.add_argument(
        "--bootstrap-servers", default="", metavar="host:port", help="the broker of the run"
    )
    parser.add_argument("--memory", default="2g", help="Java's memory; default: %(default)s")
    parser.add_argument("--cores", type=int, help="tasks at a time; default: one a core")
    options = parser.parse_args(arguments)
    checks = all_checks(options.bootstrap_servers, options.memory, options.cores)
    print(_as_table(checks))
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
