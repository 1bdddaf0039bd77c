"""Sinks for scored events: Parquet files, exactly once despite failures.

`ParquetSink` stores the batches of a stream, and `read_scored` reads them. Bad records can be sent
to Kafka, as dead letters.
"""

from helpers.sinks.bad_records import ON_BAD_RECORD
from helpers.sinks.dead_letters import DEAD_LETTERS, prepare_dead_letters, send_dead_letters
from helpers.sinks.errors import SinkError
from helpers.sinks.parquet import Counts, ParquetSink, read_bad_records, read_scored
from helpers.sinks.progress import check_topics
