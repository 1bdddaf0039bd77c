"""Lets only this user's Java call back into Python.

PySpark's server for such calls listens on loopback, where every user of the machine reaches it, and
asks for no secret. Java's calls need none to be told from those of others: Linux lists the user of
each connection in ``/proc/net``. Elsewhere, there is no such list, and all calls are accepted.
"""

from __future__ import annotations

import io
import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, BinaryIO

from py4j.java_gateway import CallbackServer, JavaGateway
from pyspark.sql import SparkSession

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_USER = os.getuid()

Address = tuple[IPv4Address | IPv6Address, int]


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

    def create_connection(connection: socket.socket, stream: BinaryIO) -> Any:
        try:
            is_ours = _is_ours(connection)
        except Exception:  # such as for one that is closed already: the server must go on
            is_ours = False
        return create(connection, stream if is_ours else io.BytesIO())

    server._create_connection = create_connection
    return server


def _is_ours(connection: socket.socket) -> bool:
    """Return whether an accepted connection is one of this user's programs."""
    ours, peer = (
        (ip_address(host), port)
        for host, port, *_ in (connection.getsockname(), connection.getpeername())
    )
    rows = _rows({ours[1], peer[1]})
    if not any(local[1] == ours[1] and other[1] == 0 for local, other, *_ in rows):
        return True  # not even the server is listed: this system has no such list
    return any(
        (local, other, user) == (peer, ours, _USER) and inode for local, other, user, inode in rows
    )


def _rows(ports: set[int]) -> list[tuple[Address, Address, int, int]]:
    """Return the sockets at some ports that Linux lists: address, peer, user and inode.

    The inode is 0 if its program has closed the socket.
    """
    rows = []
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, peer, *_, user, _, inode = line.split()[:10]
            if int(local.rpartition(":")[2], 16) in ports:
                rows.append((_address(local), _address(peer), int(user), int(inode)))
    return rows


def _address(text: str) -> Address:
    """Return an address in Linux' list: words of four bytes, in the order of the machine."""
    host, _, port = text.rpartition(":")
    words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
    found = ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(found, "ipv4_mapped", None) or found, int(port, 16)
