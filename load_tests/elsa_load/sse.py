"""Server-sent events out of network reads of any size, in time linear in the bytes."""

from __future__ import annotations

DONE = b"[DONE]"


class EventParser:
    """Feed it bytes as they come; it returns the data of each event that is complete. Comments are skipped."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        self._rest += chunk
        if b"\n" not in chunk:  # an event of a megabyte is searched once, not once a read
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events
