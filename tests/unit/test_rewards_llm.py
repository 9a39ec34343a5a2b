"""The language model as a judge, against a local service that may be hostile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from megatron_vlmr1.rewards import functions, language_judge
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem


class Service(HTTPServer):
    """Answers each request with `reply`, as it is; remembers what it was asked."""

    reply: bytes = b""
    status = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    wait_s = 0.0
    asked: list[tuple[str, dict[str, str], Any]]


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for start in range(0, len(self.server.reply), 1 << 16):
                self.wfile.write(self.server.reply[start : start + (1 << 16)])
                time.sleep(self.server.wait_s)
        except OSError:
            pass  # the client has heard enough

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("VLMR1_JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("VLMR1_JUDGE_MODEL", "judge")
    monkeypatch.delenv("VLMR1_JUDGE_KEY", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def says(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def reward(answer: str, truth: str = "cat", compat: Any = "none") -> float:
    return functions.get("llm")(RewardItem(f"<answer>{answer}</answer>", truth, compat=compat))


def fails_and_published_compares(match: str) -> None:
    with pytest.raises(RewardFailure, match=match):
        reward("feline")
    assert reward("cat", compat="vlm-r1") == 1.0
    assert reward("feline", compat="vlm-r1") == 0.0


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMR1_JUDGE_URL", raising=False)
    fails_and_published_compares("llm judge is off: set VLMR1_JUDGE_URL")


@pytest.mark.parametrize(("content", "value"), [("1", 1.0), ("0", 0.0), (" 1.0\n", 1.0), ("0.0", 0.0)])
def test_verdict(service: Service, monkeypatch: pytest.MonkeyPatch, content: str, value: float) -> None:
    monkeypatch.setenv("VLMR1_JUDGE_KEY", "secret")
    service.reply = says(content)
    assert reward('feline\ud800"', "cat") == value
    path, headers, body = service.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("judge", 0)
    assert json.loads(body["messages"][-1]["content"]) == {"reference": "cat", "answer": 'feline\ud800"'}
    assert reward("dog", compat="vlm-r1") == value


def test_no_answer_is_not_asked_about(service: Service) -> None:
    assert functions.get("llm")(RewardItem("cat", "cat")) == 0.0
    assert reward(" ") == 0.0
    with pytest.raises(RewardFailure, match="solution is empty"):
        reward("cat", " ")
    assert service.asked == []


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [null]}',
        says(None),
        says(1),
        says(""),
        says("0.5"),
        says("NaN"),
        says("Infinity"),
        says("yes"),
        says("1 and 0"),
        says("9" * 5000),
        b"1" * 5000,
    ],
    ids=lambda reply: repr(reply[:20]),
)
def test_hostile_replies(service: Service, reply: bytes) -> None:
    service.reply = reply
    fails_and_published_compares("llm judge: ")


def test_a_huge_reply_is_not_read_to_its_end(service: Service) -> None:
    service.reply = says("1") + b" " * (8 << 20)
    fails_and_published_compares("a reply of more than 1048576 bytes")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://127.0.0.1:1/", "ftp://127.0.0.1/"])
def test_redirects_are_not_followed(service: Service, target: str) -> None:
    for service.status in (301, 302, 307, 308):
        service.headers = {"Location": target}
        service.reply = says("1")
        fails_and_published_compares(f"HTTP Error {service.status}")


def test_errors_of_the_service(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.status = 500
    fails_and_published_compares("HTTP Error 500")
    monkeypatch.setenv("VLMR1_JUDGE_URL", "http://127.0.0.1:1/v1")
    fails_and_published_compares("llm judge: URLError")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/v1", "host:8000/v1"])
def test_only_http(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("VLMR1_JUDGE_URL", url)
    monkeypatch.setenv("VLMR1_JUDGE_MODEL", "judge")
    fails_and_published_compares("must begin with http")


@pytest.mark.parametrize("url", ["http://", "http://[", "http://host:port/", "http://a b/", "http://\x00/"])
def test_broken_addresses(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(language_judge.os, "environ", {"VLMR1_JUDGE_URL": url, "VLMR1_JUDGE_MODEL": "judge"})
    fails_and_published_compares("llm judge: ")


def test_a_slow_service_is_left(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte a while keeps every single wait short."""
    monkeypatch.setattr(language_judge, "TIMEOUT_S", 0.3)
    service.reply, service.wait_s = b" " * (10 << 16), 0.1
    for compat, value in (("none", None), ("vlm-r1", 0.0)):
        start = time.monotonic()
        if value is None:
            with pytest.raises(RewardFailure, match="llm judge: no result within 0.3 s"):
                reward("feline")
        else:
            assert reward("feline", compat=compat) == value
        assert time.monotonic() - start < 2
