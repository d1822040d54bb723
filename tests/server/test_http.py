"""What lies below the official client: error shapes, sizes, streams as bytes, disconnects, health."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import pytest
from elsa_server import answers
from fake_engine import FakeEngine
from server_harness import Running, eventually

from elsa_serve.errors import CheckpointError

HANG = {"model": "fake", "prompt": "hang on", "stream": True}


def error_of(answer: httpx.Response) -> answers.ErrorDetail:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return answers.ErrorResponse.model_validate_json(answer.content).error


def test_one_error_shape_for_every_status(running: Running) -> None:
    http, path = running.http(), "/v1/completions"
    as_json = {"Content-Type": "application/json"}
    for status, code, answer in (
        (404, "not_found", http.get("/nope")),
        (404, "model_not_found", http.get("/v1/models/nope")),
        (404, "model_not_found", http.post("/tokenize", json={"model": "x", "prompt": "a"})),
        (405, "method_not_allowed", http.get(path)),
        (405, "method_not_allowed", http.delete("/livez")),
        (413, "request_too_large", http.post(path, content=b" " * (9 << 20), headers=as_json)),
        (415, "unsupported_media_type", http.post(path, content=b"{}", headers={"Content-Type": "text/plain"})),
        (400, "invalid_json", http.post(path, content=b"{", headers=as_json)),
        (400, "invalid_json", http.post(path, content=b'{"a": NaN}', headers=as_json)),
        (400, "invalid_json", http.post(path, content=b"[" * 100_000, headers=as_json)),
        (400, "invalid_json", http.post(path, content=b'"\xff"', headers=as_json)),
        (400, "invalid_value", http.post(path, content=b"[]", headers=as_json)),
        (400, "invalid_value", http.post(path, content=b'{"model": "fake", "prompt": "\\ud800"}', headers=as_json)),
        (400, "missing_required_parameter", http.post(path, json={"model": "fake"})),
        (400, "unknown_parameter", http.post(path, json={"model": "fake", "prompt": "a", "x" * 10_000: 1})),
        (400, "invalid_value", http.post(path, json={"model": "fake", "prompt": "a", "stop": "y" * 100_000})),
        (400, "invalid_value", http.post(path, json={"model": "fake", "prompt": "a", "n": 10**4000})),
        (400, "invalid_value", http.post("/detokenize", json={"tokens": [10**7]})),
    ):
        assert (answer.status_code, error_of(answer).code) == (status, code)
        assert len(answer.content) < 1500
    assert http.get(path).headers["allow"] == "POST"


def test_unforeseen_exceptions_tell_nothing_of_the_inside(running: Running, monkeypatch, caplog) -> None:
    monkeypatch.setattr(running.engine, "submit", lambda *_: 1 / 0)
    with caplog.at_level(logging.CRITICAL, "elsa_server"):
        answer = running.http().post("/v1/completions", json={"model": "fake", "prompt": "a"})
    assert answer.status_code == 500
    assert "zero" not in error_of(answer).message
    assert running.server.lifecycle.open_requests == 0


def test_request_ids(running: Running) -> None:
    http = running.http()
    assert http.get("/livez", headers={"X-Request-Id": "trace-1.a_B"}).headers["x-request-id"] == "trace-1.a_B"
    for unsafe in ("a b", "x" * 65, "-a", "a;b", ""):
        assert len(http.get("/livez", headers={"X-Request-Id": unsafe}).headers["x-request-id"]) == 32
    body = {"model": "fake", "prompt": "a"}
    twice = [http.post("/v1/completions", json=body, headers={"X-Request-Id": "same"}) for _ in range(2)]
    assert [answer.json()["id"] for answer in twice] == ["cmpl-same"] * 2
    ids = [request.request_id for request in running.engine.requests]
    assert len(set(ids)) == len(ids)


def test_stream_headers_come_before_the_first_token(start) -> None:
    running = start(keep_alive_interval_s=0.05)
    with running.http().stream("POST", "/v1/completions", json=HANG) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        parts = answer.iter_text()
        assert [next(parts), next(parts)] == [": keep-alive\n\n"] * 2


def test_progress_only_when_asked_for(running: Running) -> None:
    body = {"model": "fake", "prompt": "one two three four", "stream": True}
    assert "prefill_progress" not in running.http().post("/v1/completions", json=body).text
    text = running.http().post("/v1/completions", json=body | {"stream_options": {"include_progress": True}}).text
    seen = [json.loads(line[6:]) for line in text.split("\n\n") if "prefill_progress" in line]
    assert [chunk["prefill_progress"]["processed_tokens"] for chunk in seen] == [2, 4]
    assert all(chunk["choices"] == [] for chunk in seen)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("prompt", "phase"), [("hang on", "prefill"), ("slow " * 500, "decode")])
def test_a_gone_client_frees_the_engine(running: Running, stream: bool, prompt: str, phase: str) -> None:
    before = running.value("elsa_client_disconnects_total", phase=phase)
    cancelled = running.value("elsa_requests_finished_total", outcome="cancelled")
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=10)
    body = {"model": "fake", "prompt": prompt, "max_tokens": 400, "n": 2, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    eventually(lambda: len(running.engine.live) == 2)
    if stream:
        connection.getresponse().close()
    if phase == "decode":
        last = running.engine.last_step
        eventually(lambda: running.engine.last_step != last)
        time.sleep(0.02)  # for the token to reach the server
    connection.close()
    eventually(lambda: not running.engine.live)
    eventually(lambda: running.value("elsa_requests_finished_total", outcome="cancelled") == cancelled + 2)
    eventually(lambda: running.value("elsa_client_disconnects_total", phase=phase) == before + 1)
    eventually(lambda: running.value("elsa_cancel_latency_seconds_count") >= 2)
    eventually(lambda: not running.server.lifecycle.generations)


def test_a_refused_sequence_ends_those_before_it(start) -> None:
    running = start(FakeEngine(max_running=2))
    body = {"model": "fake", "prompt": "hang", "n": 3}
    answer = running.http().post("/v1/completions", json=body)
    assert (answer.status_code, error_of(answer).code) == (503, "overloaded")
    eventually(lambda: not running.engine.live)
    eventually(lambda: not running.server.lifecycle.generations)


def raw_post(url: str, head: str, body: bytes, pause: threading.Event | None = None) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        connection.sendall(body)
        return connection.recv(65536)


def test_body_limit_by_count_and_before_the_body_is_sent(start) -> None:
    running = start(max_body_bytes=1000)
    chunked = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
    body = b"400\r\n" + b" " * 1024 + b"\r\n0\r\n\r\n"
    assert raw_post(running.url, chunked, body).startswith(b"HTTP/1.1 413")
    waiting = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Length: 2000\nExpect: 100-continue\n\n"
    assert raw_post(running.url, waiting, b"").startswith(b"HTTP/1.1 413")
    assert running.value("elsa_admission_rejections_total", reason="body_size") == 2
    exact = json.dumps({"model": "fake", "prompt": "one"}).ljust(1000).encode()
    answer = running.http().post("/v1/completions", content=exact, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_authentication_covers_everything_but_the_probes(start) -> None:
    running = start(api_keys=("secret",))
    http = running.http()
    paths = ["/v1/models", "/v1/models/fake", "/metrics", "/version", "/openapi.json", "/nope", "/docs"]
    for path in paths:
        answer = http.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert error_of(answer).type == "authentication_error"
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert http.post(path, json={}).status_code == 401
    for wrong in ("Bearer", "Basic secret", "Bearer secret2", "secret"):
        assert http.get("/version", headers={"Authorization": wrong}).status_code == 401
    assert http.get("/version", headers={"Authorization": "bearer secret"}).status_code == 200
    assert [http.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200, 200, 200]
    assert start(api_keys=("secret",), open_metrics=True).http().get("/metrics").status_code == 200


def test_cors_is_off_unless_origins_are_named(running: Running, start) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in running.http().options("/v1/completions", headers=ask).headers
    opened = start(cors_origins=("https://a.example",), api_keys=("secret",)).http()
    ask["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    allowed = opened.options("/v1/completions", headers=ask)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
    other = opened.options("/v1/completions", headers=ask | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = opened.get("/v1/models", headers={"Origin": "https://a.example"})  # errors are readable from a page too
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_tokenize_and_back(running: Running) -> None:
    http = running.http()
    tokens = http.post("/tokenize", json={"prompt": "one two"}).json()
    assert tokens == {"tokens": running.engine.tokenizer.encode("one two"), "count": 2, "max_model_len": 1000}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "one two"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "one two"}]}).json()
    assert chat["tokens"] == tokens["tokens"]
    for bad in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}):
        assert http.post("/tokenize", json=bad).status_code == 400


def test_loading_then_ready(start) -> None:
    future: Future = Future()
    running = start(future)
    http = running.http()
    assert http.get("/livez").status_code == 200
    for answer in (http.get("/readyz"), http.get("/v1/models"), http.post("/v1/completions", json={})):
        assert (answer.status_code, error_of(answer).code) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1
    assert http.get("/metrics").text.count('elsa_engine_state{state="loading"} 1.0') == 1
    future.set_result(running.engine)
    assert http.get("/readyz").json() == {"status": "ready"}
    assert http.post("/v1/completions", json={"model": "fake", "prompt": "one"}).status_code == 200
    assert 'elsa_engine_state{state="ready"} 1.0' in http.get("/metrics").text


def test_a_model_that_cannot_load_ends_the_server(start) -> None:
    future: Future = Future()
    running = start(future)
    future.set_exception(CheckpointError("no such checkpoint"))
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_readiness_follows_the_engine_and_its_progress(start) -> None:
    running = start(stall_timeout_s=0.1)
    http = running.http()
    running.engine.last_step = time.monotonic() - 1000  # long idle is no stall
    assert http.get("/readyz").status_code == 200
    with http.stream("POST", "/v1/completions", json=HANG):
        eventually(lambda: running.http().get("/readyz").status_code == 503)
        assert error_of(running.http().get("/readyz")).code == "stalled"
    eventually(lambda: http.get("/readyz").status_code == 200)
    running.engine.state = "failed"
    assert error_of(http.get("/readyz")).code == "failed"
    running.engine.state = "ready"


def test_drain_lets_open_requests_finish_and_refuses_new_ones(start) -> None:
    running = start(drain_timeout_s=10)
    http = running.http()
    body = {"model": "fake", "prompt": "slow " * 20, "max_tokens": 20, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        running.server.drain()
        other = running.http()
        eventually(lambda: other.get("/readyz").status_code == 503)
        assert error_of(other.get("/readyz")).code == "draining"
        assert other.get("/livez").status_code == 200
        refused = other.post("/v1/completions", json={"model": "fake", "prompt": "one"})
        assert (refused.status_code, error_of(refused).code) == (503, "draining")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        text = answer.read().decode()
    assert text.count(" slow") == 20
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    running.thread.join(5)
    assert not running.thread.is_alive()


def test_a_drain_out_of_time_ends_streams_in_the_protocol(start) -> None:
    running = start(drain_timeout_s=0.1)
    with running.http().stream("POST", "/v1/completions", json=HANG) as answer:
        running.server.drain()
        events = answer.read().decode().split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "draining"
    assert events[-2:] == ["data: [DONE]", ""]
    running.thread.join(8)
    assert not running.thread.is_alive()
    assert not running.engine.live


def test_counts_add_up_after_a_mixture_of_ends(start) -> None:
    running = start(FakeEngine(max_running=3), request_timeout_s=0.2)
    http = running.http()
    for prompt in ("one", "fail two three four", "hang", ["hang"] * 5, "w " * 2000):
        http.post("/v1/completions", json={"model": "fake", "prompt": prompt})
    http.post("/v1/completions", json={"model": "fake", "prompt": "one", "max_tokens": 0})
    http.post("/v1/chat/completions", json={"model": "fake", "messages": []})
    eventually(lambda: not running.engine.live)
    received = running.value("elsa_requests_received_total")
    assert received == running.value("elsa_requests_finished_total")
    for outcome in ("ok", "length", "server_error", "timeout", "rejected", "client_error"):
        assert running.value("elsa_requests_finished_total", outcome=outcome) >= 1, outcome
    assert running.value("elsa_requests_running") == 0
