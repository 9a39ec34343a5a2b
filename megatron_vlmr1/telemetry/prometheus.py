"""An endpoint that Prometheus scrapes: the metrics of the last step, in its text format (version 0.0.4)."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_S = 5.0  # a client that is silent for so long is left


class PrometheusEndpoint:
    """Serves ``/metrics`` from threads of its own. A port that cannot be had is logged, and the run goes on without.

    Attributes:
        port: that it listens on; None where it does not.
    """

    def __init__(self, host: str, port: int, run: str) -> None:
        """Listen; `run` names the run in the labels. Port 0 takes a free one."""
        self._run = run
        self._text = b""
        self.port: int | None = None
        try:
            self._server = _Server((host, port), _handler(self))
        except (OSError, TypeError) as error:  # the latter of a host that is no name
            log.error("telemetry.prometheus_port=%d: nothing is served at %s: %s", port, host, error)
            return
        self.port = int(self._server.server_address[1])
        log.info("metrics for Prometheus at http://%s:%d/metrics", host, self.port)
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let these be what is served from now on."""
        rows = {"step": float(step), "unix_s": time.time(), **metrics}
        self._text = exposition(rows, self._run).encode()

    def read(self) -> bytes:
        """Return what is served."""
        return self._text

    def close(self) -> None:
        """Stop listening."""
        if self.port is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking a name server for this host's name, which may take it long to answer."""
        TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no traceback in the run's log."""
        log.debug("a client of /metrics: %s", client_address, exc_info=True)


def exposition(metrics: Mapping[str, float], run: str) -> str:
    """Return metrics as text: ``vlmr1_reward_mean{metric="reward/mean",run="RUN"} 1.25``.

    Characters that a name may not have become "_"; two metrics of one such name differ in the label `metric`.
    """
    families: dict[str, list[str]] = {}
    for metric, value in metrics.items():
        name = "vlmr1_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
        labels = f'metric="{_escaped(metric)}",run="{_escaped(run)}"'
        families.setdefault(name, []).append(f"{name}{{{labels}}} {_number(value)}\n")
    return "".join(f"# TYPE {name} gauge\n{''.join(lines)}" for name, lines in families.items())


def _escaped(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return escaped.encode("utf-8", "replace").decode()


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _handler(endpoint: PrometheusEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_S

        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            """Give the page, and nothing else."""
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = endpoint.read()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a scrape every few seconds is no news."""

    return Handler
