"""A TCP way to the server that ends after so many bytes: a cable that is pulled."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator


class Cable:
    """``port`` leads to ``target``. ``carried`` counts all bytes, both ways; at ``limit`` it is cut."""

    def __init__(self, target: int, limit: int | None = None) -> None:
        self.carried = 0
        self.limit = limit
        self._target = target
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection as a reset."""
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._sockets.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 14):
                with self._lock:
                    self.carried += len(data)
                    over = self.limit is not None and self.carried >= self.limit
                if over:
                    self.cut()
                    return
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def cable(target: int, limit: int | None = None) -> Iterator[Cable]:
    made = Cable(target, limit)
    try:
        yield made
    finally:
        made.close()
