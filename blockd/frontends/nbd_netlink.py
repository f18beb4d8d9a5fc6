"""The kernel's nbd driver through generic netlink: the one place that imports pyroute2.

Imported only when an nbd device is used: pyroute2 costs 28 MiB. Every call opens a netlink socket,
waits for the kernel's answer and closes it. Socket descriptors are looked up by the kernel in the
calling process while the call lasts; the caller closes its own copies afterwards.

What the driver (drivers/block/nbd.c, Linux 6.12) does that is not obvious:

- CONNECT without an index takes the first free device or makes a new one.
- RECONFIGURE fills dead connections only. While none is dead it drops the sockets and succeeds.
- It must repeat the backend identifier. A size or block size that is not the device's freezes the
  queue until all requests are answered, before the sockets are looked at: with a dead connection
  that is for ever, with the lock held that every way out needs. So `reconnect` names no size.
- Without TIMEOUT no request is ever given up. The attribute, even as 0, would set the queue's
  request timer back to 30 s.

Source: include/uapi/linux/nbd-netlink.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from protocol.errors import StateError

FAMILY = "nbd"
VERSION = 1
CONNECT, DISCONNECT, RECONFIGURE, STATUS = 1, 2, 3, 5
BUSY_TRIES = 10  # a device that udev opens in the same moment is taken; the next one is free

Attributes = list[list[Any]]


class nbdmsg(genlmsg):  # type: ignore[misc]
    """A message of the family, in pyroute2's words; the order is the attribute number."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


def connect(
    descriptors: Sequence[int],
    *,
    size_bytes: int,
    block_size: int,
    flags: int,
    dead_seconds: int,
    backend: str,
) -> int:
    """Make a device of connected sockets; its index."""
    attributes: Attributes = [
        ["NBD_ATTR_SIZE_BYTES", size_bytes],
        ["NBD_ATTR_BLOCK_SIZE_BYTES", block_size],
        ["NBD_ATTR_DEAD_CONN_TIMEOUT", dead_seconds],
        ["NBD_ATTR_SERVER_FLAGS", flags],
        ["NBD_ATTR_BACKEND_IDENTIFIER", backend],
        _sockets(descriptors),
    ]
    for _ in range(BUSY_TRIES - 1):
        try:
            return _index_of(_request(CONNECT, attributes))
        except KernelError as error:
            if error.errno != errno.EBUSY:
                raise
    return _index_of(_request(CONNECT, attributes))


def reconnect(index: int, descriptors: Sequence[int], *, dead_seconds: int, backend: str) -> None:
    """Put connected sockets in the place of dead ones; does nothing while none is dead."""
    attributes: Attributes = [
        ["NBD_ATTR_INDEX", index],
        ["NBD_ATTR_DEAD_CONN_TIMEOUT", dead_seconds],
        ["NBD_ATTR_BACKEND_IDENTIFIER", backend],
        _sockets(descriptors),
    ]
    _request(RECONFIGURE, attributes)


def resize(index: int, *, size_bytes: int, backend: str) -> None:
    """Give a device another size. The kernel first waits for the answers to all its requests."""
    attributes: Attributes = [
        ["NBD_ATTR_INDEX", index],
        ["NBD_ATTR_SIZE_BYTES", size_bytes],
        ["NBD_ATTR_BACKEND_IDENTIFIER", backend],
    ]
    _request(RECONFIGURE, attributes)


def disconnect(index: int) -> None:
    """Take a device down; requests that are not answered fail."""
    _request(DISCONNECT, [["NBD_ATTR_INDEX", index]])


def status() -> dict[int, bool]:
    """Every nbd device by index: is it set up?"""
    found: dict[int, bool] = {}
    for message in _request(STATUS, []):
        devices = message.get_attr("NBD_ATTR_DEVICE_LIST")
        for item in devices.get_attrs("NBD_DEVICE_ITEM") if devices else ():
            index = int(item.get_attr("NBD_DEVICE_INDEX"))
            found[index] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
    return found


def encoded(command: int, attributes: Attributes) -> bytes:
    """The message as it goes to the kernel, netlink header included."""
    message = _message(command, attributes)
    message.encode()
    return bytes(message.data)


class KernelError(StateError):
    """The nbd driver refused; `errno` says why."""

    retry = False


def _message(command: int, attributes: Attributes) -> Any:
    message = nbdmsg()
    message["cmd"], message["version"], message["attrs"] = command, VERSION, attributes
    return message


def _request(command: int, attributes: Attributes) -> list[Any]:
    """Send one message; what the kernel answered."""
    try:
        with GenericNetlinkSocket() as family:
            family.bind(FAMILY, nbdmsg)
            flags = NLM_F_REQUEST | NLM_F_ACK
            message = _message(command, attributes)
            return list(family.nlm_request(message, msg_type=family.prid, msg_flags=flags))
    except (NetlinkError, OSError) as error:
        code = int(getattr(error, "code", None) or getattr(error, "errno", None) or errno.EIO)
        names = {CONNECT: "CONNECT", DISCONNECT: "DISCONNECT", RECONFIGURE: "RECONFIGURE"}
        raise KernelError(
            f"the kernel's nbd driver refuses {names.get(command, 'STATUS')}: "
            f"{os.strerror(code)}; see the kernel log",
            errno=code,
        ) from None


def _sockets(descriptors: Sequence[int]) -> list[Any]:
    items = [
        ["NBD_SOCK_ITEM", {"attrs": [["NBD_SOCK_FD", descriptor]]}] for descriptor in descriptors
    ]
    return ["NBD_ATTR_SOCKETS", {"attrs": items}]


def _index_of(answers: list[Any]) -> int:
    for message in answers:
        index = message.get_attr("NBD_ATTR_INDEX")
        if index is not None:
            return int(index)
    raise KernelError("the kernel's nbd driver made a device and did not say which")
