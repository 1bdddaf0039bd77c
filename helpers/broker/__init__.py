"""A real Apache Kafka broker on this machine, for as long as a `with` block lasts.

    with LocalKafka() as kafka:
        kafka.create_topic("Machine_Learning", partitions=4)
        ...  # produce to and consume from kafka.bootstrap_servers

In a terminal: ``python -m helpers.broker --port 9092``. `local` runs the broker process, `server`
defines its settings, `admin` creates topics and users and counts records, and `security` provides
the certificate, passwords and settings of a secured broker and its clients.
"""

from helpers.broker.admin import CONNECT_TIME_OUT, abandon, connecting, count_records
from helpers.broker.local import LocalKafka, free_port, port_is_free
from helpers.broker.security import LOOPBACK, python_settings
from helpers.broker.server import KAFKA_JARS, KAFKA_VERSION, BrokerError, fetch
