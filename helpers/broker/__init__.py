"""A real Apache Kafka broker on this machine, for as long as a `with` block lasts.

    with LocalKafka() as kafka:
        kafka.create_topic("Machine_Learning", partitions=4)
        ...  # produce to and consume from kafka.bootstrap_servers

In a terminal of its own: ``python -m helpers.broker --port 9092``. `local` runs the broker;
`security` has what a secured broker and its clients need.
"""

from helpers.broker.local import (
    ANSWER_SECONDS,
    KAFKA_JARS,
    KAFKA_VERSION,
    LOOPBACK,
    BrokerError,
    LocalKafka,
    count_records,
    fetch,
    free_port,
    port_is_free,
)
from helpers.broker.security import python_settings
