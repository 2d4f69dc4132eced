"""A line to a server of a test, which the test can cut, or on which it can change what passes."""

from __future__ import annotations

import socket
import threading


class Relay:
    """A port that passes connections on to another one until it is closed."""

    def __init__(self, port: int) -> None:
        self.target, self.server, self.open = port, socket.create_server(("127.0.0.1", 0)), True
        self.replace: dict[bytes, bytes] = {}
        """Texts of what passes, in either direction, and by what each is replaced."""
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self.open:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            if not self.open:
                client.close()
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                for text, other in list(self.replace.items()):
                    data = data.replace(text, other)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def close(self) -> None:
        self.open = False
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
