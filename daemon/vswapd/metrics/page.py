"""The metrics page: a small HTTP server on one address.

Invariants:
- It answers on the given address only.
- At most MAX_SCRAPES connections are open; one more and the oldest is cut off, so that nobody can
  keep others out by being slow.
- `close` leaves no thread and no socket behind, whatever clients do.

This module must not know what is measured.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import socketserver
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from vswapd.config import ConfigError
from vswapd.config_checks import parse_listen
from vswapd.errors import OutOfServiceError
from vswapd.metrics.families import Snapshot, registry

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication

CLIENT_TIMEOUT_S: Final = 5.0
"""A client that is silent for so long is cut off."""
PATHS: Final = ("/metrics", "/")
"""Where the page is; it has nothing but itself to offer, so the root is it, too."""
METHODS: Final = ("GET", "HEAD")
MAX_SCRAPES: Final = 8
"""Each open connection has a thread."""

_log = logging.getLogger(__name__)


def check(listen: str, *, or_in_use: bool = False) -> None:
    """Whether the page could be served now.

    Args:
        listen: as for `start`.
        or_in_use: whether it will do that somebody serves there: perhaps it is the daemon that is
            to read this.

    Raises:
        ConfigError: as `start` does.
    """
    host, port = _parsed(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if not (or_in_use and error.errno == errno.EADDRINUSE):
                raise _not_there(listen, error) from None


def start(listen: str, snapshot: Snapshot) -> MetricsServer:
    """Serve metrics over HTTP.

    Args:
        listen: `ADDRESS:PORT`, as in metrics.listen.
        snapshot: gives a STATUS document; called once per scrape, from a thread of the server.

    Raises:
        ConfigError: no address and port, not an address of this host, or the port is taken.
    """
    host, port = _parsed(listen)
    try:
        return MetricsServer(host, port, snapshot)
    except OSError as error:
        raise _not_there(listen, error) from None


def _parsed(listen: str) -> tuple[str, int]:
    parsed = parse_listen(listen)
    if parsed is None:
        text = f"{listen!r} is no address and port: write 127.0.0.1:9177"
        raise ConfigError(text, key="metrics.listen")
    return parsed


def _not_there(listen: str, error: OSError) -> ConfigError:
    text = f"cannot listen at {listen}: {error.strerror}: write another address or port"
    return ConfigError(text, key="metrics.listen")


class MetricsServer:
    """A running server; a context manager. `address` is where it answers: (host, port)."""

    def __init__(self, host: str, port: int, snapshot: Snapshot) -> None:
        self._http = (_Http6 if ":" in host else _Http)((host, port), _Handler)
        self._http.set_app(_page(snapshot))
        self.address: Final = (host, self._http.server_port)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="metrics")
        self._thread.start()

    def close(self) -> None:
        """Stop answering; returns when all its threads have ended."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._http.cut_off_all()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        # Not serve_forever: it looks twice a second whether it is to stop.
        with selectors.DefaultSelector() as selector:
            selector.register(self._http, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fileobj is self._http for key, _ in selector.select()):
                self._http.handle_request()


class _Http(socketserver.ThreadingMixIn, WSGIServer):
    """One thread per connection; `server_close` waits for all of them."""

    daemon_threads = False
    timeout = 0
    """`handle_request` is called when there is a connection; if it is gone again, so be it."""

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without the look-up of the host's name that the base class would do."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread; the oldest has to go if there are too many."""
        with self._lock:
            if len(self._open) >= MAX_SCRAPES:
                _cut_off(next(iter(self._open)))
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The connection has been served."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def cut_off_all(self) -> None:
        """End all connections that are open."""
        with self._lock:
            for connection in self._open:
                _cut_off(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as above
        """A client that went away, or was cut off, is no news."""
        _log.debug("metrics: %s", client_address, exc_info=True)


class _Http6(_Http):
    address_family = socket.AF_INET6


def _cut_off(connection: socket.socket) -> None:
    # Its thread sees the end of the stream and closes it.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Scrapes are no news."""
        _log.debug("metrics: %s", format % args)


def _page(snapshot: Snapshot) -> WSGIApplication:
    """The page at PATHS, to be read and nothing else.

    503 if its numbers cannot be had for now, 500 and a line in the journal if ever.
    """
    metrics = make_wsgi_app(registry(snapshot))

    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] not in PATHS:
            return _text(start_response, "404 Not Found", f"the metrics are at {PATHS[0]}")
        method = environ["REQUEST_METHOD"]
        if method not in METHODS:
            allow = ("Allow", ", ".join(METHODS))
            return _text(start_response, "405 Method Not Allowed", "it can be read only", allow)
        try:
            return _measured(metrics, {**environ, "REQUEST_METHOD": "GET"}, start_response)
        except OutOfServiceError as error:
            return _text(start_response, "503 Service Unavailable", f"no numbers: {error}")
        except Exception:  # noqa: BLE001 - a border: one scrape fails, and it is logged
            _log.exception("metrics: no numbers")
            status = "500 Internal Server Error"
            return _text(start_response, status, "no numbers: the journal has the cause")

    def page(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        body = answer(environ, start_response)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else body

    return page


def _measured(
    metrics: WSGIApplication, environ: dict[str, Any], start_response: StartResponse
) -> Iterable[bytes]:
    """The page, with its length: a HEAD, whose page is not sent, has to tell it all the same."""
    said: list[tuple[str, list[tuple[str, str]]]] = []

    def keep(status: str, headers: list[tuple[str, str]], *_: object) -> Any:
        said.append((status, headers))

    body = b"".join(metrics(environ, keep))
    [(status, headers)] = said
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return [body]


def _text(
    start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    kind = ("Content-Type", "text/plain; charset=utf-8")
    start_response(status, [kind, ("Content-Length", str(len(body))), *headers])
    return [body]
