"""The metrics page: real requests to a real server on the loopback address."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.status_documents import BUSY
from vswapd.config import ConfigError
from vswapd.metrics import MetricsServer, page, start


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    before = set(threading.enumerate())
    with MetricsServer("127.0.0.1", 0, lambda: BUSY) as server:
        yield server
    assert set(threading.enumerate()) == before


def get(
    address: tuple[str, int], method: str = "GET", path: str = "/metrics"
) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()
    finally:
        connection.close()


def test_page_is_what_prometheus_reads(server: MetricsServer) -> None:
    """A GET answers 200 with the exposition format and the document's numbers."""
    status, kind, text = get(server.address)
    assert status == 200
    assert kind.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["vswap_store_pages"].samples[0].value == BUSY["traffic"]["store_pages"]
    assert get(server.address)[0] == 200


def test_only_its_own_metrics_are_there(server: MetricsServer) -> None:
    """The registry is its own: nothing of the process or of the library is on the page."""
    _, _, text = get(server.address)
    assert all(f.name.startswith("vswap_") for f in text_string_to_metric_families(text))


def test_other_methods_are_refused(server: MetricsServer) -> None:
    """The page can be read and nothing else."""
    assert get(server.address, "POST")[0] == 405


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "NONSENSE"])
def test_what_is_allowed_is_said(server: MetricsServer, method: str) -> None:
    """405 names the methods that there are."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request(method, "/metrics")
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")
    connection.close()


@pytest.mark.parametrize("path", ["/metrics", "/", "/metrics?name=value"])
def test_head_is_get_without_the_page(server: MetricsServer, path: str) -> None:
    """HEAD answers with the status, kind and length of a GET, and with nothing behind them."""
    status, kind, text = get(server.address, path=path)
    assert (status, bool(text)) == (200, True)
    assert get(server.address, "HEAD", path) == (200, kind, "")
    with socket.create_connection(server.address, timeout=20) as client:
        client.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert said.endswith(b"\r\n\r\n")
    assert f"\r\nContent-Length: {len(text)}\r\n".encode() in said


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("path", ["/favicon.ico", "/metric", "/metrics/", "/%00"])
def test_other_pages_are_not_there(server: MetricsServer, method: str, path: str) -> None:
    """What is no page of ours is 404, with where the page is."""
    status, _, text = get(server.address, method, path)
    assert status == 404
    assert text == ("" if method == "HEAD" else "the metrics are at /metrics\n")


def test_listen_is_the_configurations() -> None:
    """start() takes metrics.listen as it stands, for both families of addresses."""
    for host in ("127.0.0.1", "::1"):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, 0))
            except OSError:
                continue  # a host without IPv6
            port = probe.getsockname()[1]
        listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with start(listen, lambda: BUSY) as server:
            assert server.address == (host, port)
            assert get(server.address)[0] == 200


def test_taken_port_is_one_clear_error(server: MetricsServer) -> None:
    """An address that cannot be listened at is one line with the key, the address, and why."""
    listen = f"127.0.0.1:{server.address[1]}"
    with pytest.raises(ConfigError, match=f"^metrics.listen: cannot listen at {listen}: Address"):
        start(listen, lambda: BUSY)


def test_wrong_address_is_refused() -> None:
    """Text that is no address and port is refused before anything is opened."""
    with pytest.raises(ConfigError, match="is no address and port"):
        start("nowhere", lambda: BUSY)


def test_snapshot_that_fails_is_500_and_a_line_in_the_journal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One scrape fails, is logged with its cause, and the next one is answered."""
    outcomes: list[Any] = [RuntimeError("stopping"), BUSY]

    def snapshot() -> dict[str, Any]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return dict(outcome)

    with MetricsServer("127.0.0.1", 0, snapshot) as server:
        status, _, text = get(server.address)
        assert (status, text) == (500, "no numbers: the journal has the cause\n")
        assert get(server.address)[0] == 200
    assert "stopping" in caplog.text


def test_silent_clients_are_cut_off_by_newer_ones(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds connections open keeps nobody out: the oldest goes when there are too many."""
    monkeypatch.setattr(page._Handler, "timeout", 60)  # not because of its silence
    with socket.create_connection(server.address, timeout=20) as oldest:
        others = [socket.create_connection(server.address) for _ in range(page.MAX_SCRAPES - 1)]
        assert get(server.address)[0] == 200
        assert oldest.recv(1) == b""
        for other in others:
            other.close()


def test_silent_client_is_cut_off_after_a_while(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends nothing is cut off by the timeout, not kept for ever."""
    monkeypatch.setattr(page._Handler, "timeout", 0.05)
    with socket.create_connection(server.address, timeout=20) as silent:
        assert silent.recv(1) == b""


def test_close_does_not_wait_for_silent_clients() -> None:
    """Closing ends open connections; afterwards nobody listens and no thread is left."""
    before = set(threading.enumerate())
    server = MetricsServer("127.0.0.1", 0, lambda: BUSY)
    with socket.create_connection(server.address, timeout=20) as half:
        half.sendall(b"GET /metrics HTT")
        assert get(server.address)[0] == 200
        server.close()
        assert half.recv(1) == b""
    assert set(threading.enumerate()) == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


def test_garbage_is_no_news(server: MetricsServer, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are no request, and clients that go away, raise nothing and log no warning."""
    for garbage in (b"", b"\x00\xff\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70000):
        with socket.create_connection(server.address, timeout=20) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            while True:
                try:
                    if not client.recv(65536):
                        break
                except ConnectionResetError:
                    break
    assert get(server.address)[0] == 200
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
