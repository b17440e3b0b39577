"""What a proxy has to know of the two wire protocols: where a COMMIT is, and where its answer ends."""

from typing import Protocol

from attrs import define

_STARTUP = 0x0003_0000
"""PostgreSQL's protocol number 3.0; what asks for encryption has another one and is followed by more."""
_READY = b"Z\0\0\0\5"
_COM_QUERY = b"\3"


class Wire(Protocol):
    """One connection's protocol, seen from between."""

    def split(self, data: bytes) -> list[bytes]:
        """Take bytes of the client's and return the messages that are complete."""
        ...

    def is_commit(self, message: bytes) -> bool:
        """Whether a message of the client's asks for COMMIT."""
        ...

    def is_answer(self, data: bytes) -> bool:
        """Whether these bytes are the whole answer to one statement."""
        ...


@define(eq=False)
class PostgresqlWire:
    """PostgreSQL, version 3 of its protocol, unencrypted."""

    _rest: bytes = b""
    _started: bool = False

    def split(self, data: bytes) -> list[bytes]:
        """Take bytes of the client's and return the messages that are complete."""
        rest, found = self._rest + data, list[bytes]()
        while True:
            type_ = 1 if self._started else 0  # the first messages have no type
            if len(rest) < type_ + 4:
                break
            end = type_ + int.from_bytes(rest[type_ : type_ + 4])
            if len(rest) < end:
                break
            if not self._started:
                self._started = int.from_bytes(rest[4:8]) == _STARTUP
            found.append(rest[:end])
            rest = rest[end:]
        self._rest = rest
        return found

    def is_commit(self, message: bytes) -> bool:
        """Whether a message is a simple query that asks for COMMIT."""
        return message[:1] == b"Q" and message[5:].strip(b"\0 ;\n").upper() == b"COMMIT"

    def is_answer(self, data: bytes) -> bool:
        """Whether the server has said that it is ready for the next query."""
        return data[-6:-1] == _READY


@define(eq=False)
class MariadbWire:
    """MariaDB, unencrypted and uncompressed."""

    _rest: bytes = b""

    def split(self, data: bytes) -> list[bytes]:
        """Take bytes of the client's and return the packets that are complete."""
        rest, found = self._rest + data, list[bytes]()
        while len(rest) >= 4 and len(rest) >= (end := 4 + int.from_bytes(rest[:3], "little")):
            found.append(rest[:end])
            rest = rest[end:]
        self._rest = rest
        return found

    def is_commit(self, message: bytes) -> bool:
        """Whether a packet is a query that asks for COMMIT."""
        return message[4:5] == _COM_QUERY and message[5:].strip(b" ;").upper() == b"COMMIT"

    def is_answer(self, data: bytes) -> bool:
        """Whether a whole packet is there: COMMIT is answered by one."""
        return len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:3], "little")
