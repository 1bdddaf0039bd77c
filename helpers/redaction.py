"""Which settings of Kafka's clients are secret: hidden in plans, messages and command lines."""

from __future__ import annotations

import re

# The settings whose values are nobody else's business: all that Kafka calls passwords, and more.
SECRET_SETTINGS = r"passw|passphrase|jaas|secret|token|private\.key|keystore\.key"
_SECRET = re.compile(SECRET_SETTINGS, re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Tell whether the value of a setting of Kafka's is nobody else's business.

    Examples
    --------
    >>> is_secret("sasl.jaas.config"), is_secret("ssl.truststore.location")
    (True, False)
    """
    return _SECRET.search(name) is not None
