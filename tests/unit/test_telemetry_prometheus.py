"""The endpoint as a scraper reads it."""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_vlmr1.launch.health import port_problem
from megatron_vlmr1.telemetry import prometheus
from megatron_vlmr1.telemetry.metrics import MetricsWriter
from megatron_vlmr1.telemetry.prometheus import CONTENT_TYPE, PrometheusEndpoint, exposition

# The grammar of the text format, version 0.0.4.
LINE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{metric="((?:[^"\\\n]|\\[\\"n])*)",run="((?:[^"\\\n]|\\[\\"n])*)"\} (\S+)'
)


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), text)


def read(text: str) -> dict[str, tuple[str, str, float]]:
    """Metric to (name, run, value); fails on what is not the format."""
    found: dict[str, tuple[str, str, float]] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("#"):
            family = re.fullmatch(r"# TYPE (\S+) gauge", line)[1]
            assert family not in {name for name, _, _ in found.values()}  # a family in one piece
            continue
        name, metric, run, value = LINE.fullmatch(line).groups()
        assert name == family
        found[unescaped(metric)] = (name, unescaped(run), float(value))
    return found


def test_names_and_values_read_back() -> None:
    nasty = 'a "b"\\\n{c}'
    metrics = {"reward/mean": 1.25, "evaluate/held-out/acc50": 1e-7, nasty: 2.0, "a/b": 3.0, "a_b": 4.0}
    found = read(exposition({**metrics, "inf": math.inf, "low": -math.inf, "nan": math.nan}, "r\\1"))
    assert {metric: found[metric][2] for metric in metrics} == metrics
    assert found["reward/mean"][:2] == ("vlmr1_reward_mean", "r\\1")
    assert found["a/b"][0] == found["a_b"][0] == "vlmr1_a_b"
    assert (found["inf"][2], found["low"][2]) == (math.inf, -math.inf) and math.isnan(found["nan"][2])


def test_the_last_step_is_served(tmp_path: Path) -> None:
    endpoint = PrometheusEndpoint("127.0.0.1", 0, "mine")
    writer = MetricsWriter(tmp_path, prometheus=endpoint)
    url = f"http://127.0.0.1:{endpoint.port}"
    for step in range(3):
        writer.write(step, {"x": step / 2})
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        found = read(answer.read().decode())
    assert found["x"] == ("vlmr1_x", "mine", 1.0) and found["step"][2] == 2 and found["unix_s"][2] > 1e9
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/../etc/passwd")
    writer.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/metrics")


def test_a_client_that_has_gone_is_no_news_and_no_name_server_is_asked(monkeypatch, caplog, capfd) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of a handler that another test has left behind
    monkeypatch.setattr(socket, "getfqdn", lambda host="": pytest.fail("asked for a name"))
    left = threading.Event()
    monkeypatch.setattr(prometheus._Server, "shutdown_request", lambda *_: left.set())  # the end of a request
    monkeypatch.setattr(PrometheusEndpoint, "read", lambda self: 1 / 0)  # as a connection that is reset
    endpoint = PrometheusEndpoint("127.0.0.1", 0, "mine")
    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert left.wait(20)
    endpoint.close()
    assert capfd.readouterr().err == "" and "Traceback" not in caplog.text


def test_a_host_that_is_no_name_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert PrometheusEndpoint("ä..b", 0, "mine").port is None
    assert "nothing is served at ä..b" in caplog.text
    assert port_problem("ä..b", 9400).startswith("telemetry.prometheus_port=9400 cannot be had at ä..b: ")


def test_a_port_that_is_taken_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        endpoint = PrometheusEndpoint("127.0.0.1", port, "mine")
    assert endpoint.port is None and f"telemetry.prometheus_port={port}" in caplog.text
    writer = MetricsWriter(tmp_path, prometheus=endpoint)
    writer.write(0, {"x": 1.0})
    writer.close()
