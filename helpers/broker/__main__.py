"""Run a Kafka broker in a terminal until Ctrl-C: ``python -m helpers.broker --port 9092``."""

from __future__ import annotations

import argparse
import signal
import sys

from helpers.broker import BrokerError, LocalKafka
from helpers.spark import JarsError


def main(arguments: list[str] | None = None) -> int:
    """Run a broker in the foreground until Ctrl-C or SIGTERM."""
    description = "Run a real Apache Kafka broker on this machine, until Ctrl-C."
    parser = argparse.ArgumentParser(prog="python -m helpers.broker", description=description)
    parser.add_argument("--port", type=int, default=9092, help="default: %(default)s")
    parser.add_argument("--folder", help="keep the data here; default: a temporary folder")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with LocalKafka(port=options.port, folder=options.folder) as kafka:
            print(f"ready at {kafka.bootstrap_servers}; Ctrl-C stops it", flush=True)
            return kafka.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 0
    except (BrokerError, JarsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
