"""Sinks for scored events: Parquet files, exactly once despite failures.

`ParquetSink` stores the batches of a stream, and `read_scored` reads them. Bad records can be sent
to Kafka, as dead letters.

`parquet` has the steps from a scored batch to its commit, `columns` what they store, `parts` the
data files, `commits` the manifests that commit batches, `progress` the offsets that are
stored and where streams began, `lease` the claim that keeps a second job out, and `dead_letters`
what sends bad records to Kafka.
"""

from helpers.sinks.dead_letters import DEAD_LETTERS, prepare_dead_letters, send_dead_letters
from helpers.sinks.errors import SinkError
from helpers.sinks.parquet import ON_BAD_RECORD, Counts, ParquetSink, read_bad_records, read_scored
from helpers.sinks.progress import check_topics
