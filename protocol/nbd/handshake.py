"""The handshake of one NBD connection, server side: fixed newstyle, sans I/O.

The caller sends `greeting`, then feeds whatever bytes arrive to `receive` and sends what it
returns, until `state` is no longer "negotiating". It keeps HANDSHAKE_DEADLINE_SECONDS and
CONNECTIONS_MAX itself, and closes the socket when the state is "closed" or a ProtocolViolation
comes out.

Legal transitions (the state after a row is where the next bytes are read):

    state      bytes                             next
    flags      client flags, 4                   header
    header     option header, 16                 data    (known option, data in bounds)
                                                 drain   (unknown option or data too long)
    data       option data                       header, transmission or closed
    drain      option data, thrown away          header or closed
    any        a violation, or too much          closed  (ProtocolViolation is raised)

Invariants: bytes kept <= one option (OPTION_BYTES_MAX) + what one `receive` was given; options
<= OPTIONS_MAX; bytes answered <= HANDSHAKE_REPLY_BYTES_MAX. Replies do not depend on how the
bytes were split. Source: doc/proto.md of the NBD project, "Handshake", "Option types".
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from protocol.nbd import constants as c
from protocol.nbd import options
from protocol.nbd.errors import ProtocolViolation
from protocol.nbd.exports import Export as Export
from protocol.nbd.exports import ExportSource as ExportSource
from protocol.nbd.options import OptionError

NEGOTIATING = "negotiating"
TRANSMISSION = "transmission"
CLOSED = "closed"

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION_HEADER = struct.Struct(">QII")
_EXPORT_NAME_REPLY = struct.Struct(">QH")
_ZEROES = bytes(124)
_KNOWN_CLIENT_FLAGS = c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES


class Handshake:
    """Negotiates one connection; afterwards the attributes say what was agreed."""

    def __init__(self, exports: ExportSource) -> None:
        self.greeting = _GREETING.pack(
            c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
        )
        self.state = NEGOTIATING
        self.stopping = False  # set by a server that shuts down: options get ERR_SHUTDOWN
        self.export: Export | None = None
        self.structured_replies = False
        self.contexts: tuple[tuple[int, str], ...] = ()
        self.no_zeroes = False
        self.leftover = b""
        self._exports = exports
        self._context_export = ""  # the canonical name `contexts` were selected for
        self._fixed = False
        self._input = bytearray()
        self._replies: list[bytes] = []
        self._reply_bytes = 0
        self._option_count = 0
        self._drain_bytes = 0
        self._after_drain: Callable[[], None] | None = None
        self._step: Callable[[], bool] = self._read_client_flags
        self._handlers: dict[int, Callable[[bytes], None]] = {
            c.OPT_EXPORT_NAME: self._export_name,
            c.OPT_LIST: self._list,
            c.OPT_STARTTLS: self._starttls,
            c.OPT_INFO: self._info,
            c.OPT_GO: self._go,
            c.OPT_STRUCTURED_REPLY: self._structured_reply,
            c.OPT_LIST_META_CONTEXT: self._list_meta_context,
            c.OPT_SET_META_CONTEXT: self._set_meta_context,
        }
        self._option = 0
        self._length = 0

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the client in any split; return the bytes to send to it.

        Once closed it ignores what comes. In the transmission phase it must not be called.
        """
        assert self.state != TRANSMISSION, "the handshake is over, parse requests instead"
        if self.state == CLOSED:
            return b""
        self._input += data
        self._replies = []
        try:
            while self.state == NEGOTIATING and self._step():
                pass
        except ProtocolViolation:
            self._close()
            raise
        if self.state == TRANSMISSION:
            self.leftover = bytes(self._input)
            self._input.clear()
        return b"".join(self._replies)

    # The steps. Each returns False when it needs more bytes.

    def _read_client_flags(self) -> bool:
        head = self._take(_CLIENT_FLAGS.size)
        if head is None:
            return False
        (flags,) = _CLIENT_FLAGS.unpack(head)
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolViolation(
                f"client flags 0x{flags:08x} contain bits this server did not offer "
                f"(offered 0x{_KNOWN_CLIENT_FLAGS:x})"
            )
        self._fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        self.no_zeroes = bool(flags & c.FLAG_NO_ZEROES)
        self._step = self._read_option_header
        return True

    def _read_option_header(self) -> bool:
        head = self._take(_OPTION_HEADER.size)
        if head is None:
            return False
        magic, option, length = _OPTION_HEADER.unpack(head)
        if magic != c.OPTION_MAGIC:
            raise ProtocolViolation(f"option magic 0x{magic:016x} is not IHAVEOPT")
        self._option_count += 1
        if self._option_count > c.OPTIONS_MAX:
            raise ProtocolViolation(
                f"more than {c.OPTIONS_MAX} options in one handshake; open another connection"
            )
        if not self._fixed and option != c.OPT_EXPORT_NAME:
            raise ProtocolViolation(
                f"option {option} without the fixed newstyle client flag; "
                "only EXPORT_NAME is allowed there"
            )
        if option == c.OPT_EXPORT_NAME and length > c.STRING_BYTES_MAX:
            raise ProtocolViolation(
                f"EXPORT_NAME of {length} bytes; a name has at most {c.STRING_BYTES_MAX}"
            )
        if length > c.OPTION_DRAIN_BYTES_MAX:
            raise ProtocolViolation(
                f"option {option} announces {length} bytes; "
                f"at most {c.OPTION_DRAIN_BYTES_MAX} are skipped"
            )
        self._option, self._length = option, length
        self._choose_option_step()
        return True

    def _choose_option_step(self) -> None:
        """Keep the data of a known option, throw away any other while answering all of them."""
        option, length = self._option, self._length
        self._step, self._drain_bytes = self._drain, length
        if option == c.OPT_SET_META_CONTEXT:
            self.contexts = ()  # replaced even when the option fails
        if option == c.OPT_ABORT:
            self._after_drain = self._abort
        elif self.stopping:
            self._after_drain = self._refuse_stopping
        elif option not in self._handlers:
            self._after_drain = self._refuse_unknown
        elif length > c.OPTION_BYTES_MAX:
            self._after_drain = self._refuse_too_big
        else:
            self._step = self._read_option_data

    def _read_option_data(self) -> bool:
        data = self._take(self._length)
        if data is None:
            return False
        self._step = self._read_option_header
        try:
            self._handlers[self._option](data)
        except OptionError as error:
            self._reply(error.reply, str(error).encode())
        return True

    def _drain(self) -> bool:
        skipped = min(self._drain_bytes, len(self._input))
        del self._input[:skipped]
        self._drain_bytes -= skipped
        if self._drain_bytes:
            return False
        self._step = self._read_option_header
        assert self._after_drain is not None
        self._after_drain()
        return True

    # The options, by number. Each gets the whole option data.

    def _export_name(self, data: bytes) -> None:
        """EXPORT_NAME (1): has no way to say no, so every refusal ends the connection."""
        try:
            export = self._find(options.decode_string("export name", data))
        except OptionError as error:
            raise ProtocolViolation(str(error)) from None
        reply = _EXPORT_NAME_REPLY.pack(export.size_bytes, self._transmission_flags(export))
        self._send(reply if self.no_zeroes else reply + _ZEROES)
        self._begin_transmission(export)

    def _list(self, data: bytes) -> None:
        """LIST (3): an export that is gone by the time it is looked up is left out."""
        options.require_empty("LIST", data)
        for name in self._exports.list():
            export = self._exports.find(name)
            if export is not None:
                self._reply(c.REP_SERVER, options.server_data(export))
        self._reply(c.REP_ACK)

    def _starttls(self, data: bytes) -> None:
        """STARTTLS (5): "NOTLS mode"; TLS can wrap the socket outside of the protocol."""
        options.require_empty("STARTTLS", data)
        raise OptionError(c.REP_ERR_POLICY, "this server does not offer TLS inside NBD")

    def _info(self, data: bytes) -> None:
        """INFO (6)"""
        self._inform(data)

    def _go(self, data: bytes) -> None:
        """GO (7): the same replies as INFO, then transmission."""
        self._begin_transmission(self._inform(data))

    def _inform(self, data: bytes) -> Export:
        name, wanted = options.parse_info(data)
        export = self._find(name)
        for information in options.information(export, self._transmission_flags(export), wanted):
            self._reply(c.REP_INFO, information)
        self._reply(c.REP_ACK)
        return export

    def _structured_reply(self, data: bytes) -> None:
        """STRUCTURED_REPLY (8)"""
        options.require_empty("STRUCTURED_REPLY", data)
        self.structured_replies = True
        self._reply(c.REP_ACK)

    def _list_meta_context(self, data: bytes) -> None:
        """LIST_META_CONTEXT (9): the identifiers in these replies are reserved and zero."""
        name, queries = options.parse_meta_context(data)
        for context in options.match_list(self._find(name).contexts, queries):
            self._reply(c.REP_META_CONTEXT, options.context_data(0, context))
        self._reply(c.REP_ACK)

    def _set_meta_context(self, data: bytes) -> None:
        """SET_META_CONTEXT (10)"""
        if not self.structured_replies:
            raise OptionError(c.REP_ERR_INVALID, "SET_META_CONTEXT needs STRUCTURED_REPLY first")
        name, queries = options.parse_meta_context(data)
        export = self._find(name)
        selected = options.match_set(export.contexts, queries)
        for identifier, context in selected:
            self._reply(c.REP_META_CONTEXT, options.context_data(identifier, context))
        self._reply(c.REP_ACK)
        self.contexts = selected
        self._context_export = export.name

    # Answers given after an option's data was thrown away.

    def _abort(self) -> None:
        self._reply(c.REP_ACK)
        self._close()

    def _refuse_stopping(self) -> None:
        if self._option == c.OPT_EXPORT_NAME:
            raise ProtocolViolation("EXPORT_NAME while the server shuts down cannot be answered")
        self._reply(c.REP_ERR_SHUTDOWN, b"the server is shutting down")

    def _refuse_unknown(self) -> None:
        self._reply(c.REP_ERR_UNSUP, f"option {self._option} is not known here".encode())

    def _refuse_too_big(self) -> None:
        text = f"option {self._option} has {self._length} bytes, at most {c.OPTION_BYTES_MAX}"
        self._reply(c.REP_ERR_TOO_BIG, text.encode())

    # Helpers

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            raise OptionError(c.REP_ERR_UNKNOWN, f"there is no export {name[:256]!r} here")
        return export

    def _transmission_flags(self, export: Export) -> int:
        return export.transmission_flags | (c.FLAG_SEND_DF if self.structured_replies else 0)

    def _begin_transmission(self, export: Export) -> None:
        if self._context_export != export.name:
            self.contexts = ()
        self.export = export
        self.state = TRANSMISSION

    def _close(self) -> None:
        self.state = CLOSED
        self._input.clear()

    def _take(self, count: int) -> bytes | None:
        if len(self._input) < count:
            return None
        data = bytes(self._input[:count])
        del self._input[:count]
        return data

    def _reply(self, kind: int, data: bytes = b"") -> None:
        self._send(options.reply(self._option, kind, data))

    def _send(self, data: bytes) -> None:
        self._reply_bytes += len(data)
        if self._reply_bytes > c.HANDSHAKE_REPLY_BYTES_MAX:
            raise ProtocolViolation(
                f"the client asked for more than {c.HANDSHAKE_REPLY_BYTES_MAX} bytes of replies "
                "in one handshake; open another connection"
            )
        self._replies.append(data)
