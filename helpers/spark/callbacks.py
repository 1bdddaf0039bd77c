"""Lets only this user's Java call back into Python.

PySpark's server for such calls listens on loopback, where every user of the machine reaches it, and
asks for no secret. Java's calls need none to be told from those of others: Linux lists the user of
each connection in ``/proc/net``. Elsewhere, there is no such list, and all calls are accepted.
"""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import BinaryIO, NamedTuple

from py4j.java_gateway import CallbackServer, JavaGateway, JavaObject
from pyspark.sql import SparkSession

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_USER = os.getuid()


class _Row(NamedTuple):
    """A socket in Linux' list."""

    port: int
    peer_port: int
    user: int
    inode: int  # 0 if its program has closed it


def guard_callbacks(spark: SparkSession) -> None:
    """Refuse calls of other users to the Python objects of a session.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.

    Examples
    --------
    >>> guard_callbacks(spark)
    """
    gateway: JavaGateway = spark.sparkContext._gateway
    if "_create_callback_server" in vars(gateway):
        return  # it is guarded already
    create = gateway._create_callback_server
    gateway._create_callback_server = lambda parameters: _guarded(create(parameters))
    if vars(gateway).get("_callback_server") is not None:
        _guarded(gateway._callback_server)


def _guarded(server: CallbackServer) -> CallbackServer:
    """Return a server that reads nothing of the connections of other users."""
    create = server._create_connection

    def create_connection(connection: socket.socket, stream: BinaryIO) -> JavaObject:
        return create(connection, stream if _is_ours(connection) else io.BytesIO())

    server._create_connection = create_connection
    return server


def _is_ours(connection: socket.socket) -> bool:
    """Return whether an accepted connection is one of this user's programs."""
    port, (_, peer_port, *_) = connection.getsockname()[1], connection.getpeername()
    rows = _rows()
    if not any(row.port == port and row.peer_port == 0 for row in rows):
        return True  # not even the server is listed: this system has no such list
    return any(
        (row.port, row.peer_port, row.user) == (peer_port, port, _USER) and row.inode
        for row in rows
    )


def _rows() -> list[_Row]:
    """Return the sockets that Linux lists."""
    rows = []
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, peer, *_, user, _, inode = line.split()[:10]
            ports = (int(address.rpartition(":")[2], 16) for address in (local, peer))
            rows.append(_Row(*ports, int(user), int(inode)))
    return rows
