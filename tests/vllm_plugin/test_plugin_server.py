"""A real vLLM server process with `--attention-backend elsa` (`elsa-serve serve --engine vllm`), and the openai client.

Chunked prefill (512 tokens a step), prefix caching, and a KV cache small enough that requests preempt one another; the
answers of concurrent requests are those of a second server with vLLM's own CPU attention, token by token, in FP32.
"""

import concurrent.futures
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from vllm_support import DEMO_MODEL, needs_vllm

from elsa_serve.demo import make_document
from elsa_serve.vllm_plugin import verify

pytestmark = needs_vllm

START_TIMEOUT_S = 240
# 75 usable blocks of 32 tokens: two prompts of about 1,150 tokens fit, but not both their answers: one is preempted.
FLAGS = (
    "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "512",
    "--block-size", "32", "--num-gpu-blocks-override", "76", "--enforce-eager", "--served-model-name", "demo",
)  # fmt: skip


class Server:
    """A server process on a free port; `log` is what it wrote."""

    def __init__(self, command, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended:\n{self.log.read_text()[-4000:]}")
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start in {START_TIMEOUT_S} s:\n{self.log.read_text()[-4000:]}")

    def metric(self, name, **labels):
        page = urllib.request.urlopen(self.url + "/metrics", timeout=10).read().decode()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in page.splitlines()
            if re.split(r"[{ ]", line)[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items())
        )

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: engine processes too
            self.process.wait(10)


def ask(url, conversations):
    """Token texts and log-probabilities of concurrent chats, through the openai client."""
    from openai import OpenAI

    def one(messages):
        answer = client.chat.completions.create(
            model="demo", messages=messages, max_tokens=48, temperature=0, logprobs=True, seed=0,
            extra_body={"ignore_eos": True},
        ).choices[0]  # fmt: skip
        return answer.message.content, [(step.token, step.logprob) for step in answer.logprobs.content]

    with (
        OpenAI(base_url=url + "/v1", api_key="none", timeout=300) as client,
        concurrent.futures.ThreadPoolExecutor(len(conversations)) as pool,
    ):
        return list(pool.map(one, conversations))


@pytest.fixture(scope="module")
def documents():
    def length(line):
        return len(line) // 4

    return [make_document(1400, seed, depth=seed / 10, measure=length) for seed in range(1, 7)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    command = [sys.executable, "-m", "elsa_serve", "serve", str(DEMO_MODEL), "--engine", "vllm"]
    elsa = Server([*command, *FLAGS], folder / "elsa.log")
    try:
        elsa.wait()
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO_MODEL)]
        peer = Server([*module, *FLAGS], folder / "peer.log")
        try:
            yield elsa, peer.wait()
        finally:
            peer.stop()
    finally:
        elsa.stop()


def test_concurrent_answers_are_right_and_those_of_vllms_own_attention(servers, documents):
    elsa, peer = servers
    chats = [[{"role": "user", "content": document.prompt}] for document in documents]
    found, expected = ask(elsa.url, chats), ask(peer.url, chats)
    for document, (text, _) in zip(documents, found):
        assert document.answer in text
    for (_, steps), (_, expected_steps) in zip(found, expected):
        assert [token for token, _ in steps] == [token for token, _ in expected_steps]
        assert max(abs(a - b) for (_, a), (_, b) in zip(steps, expected_steps)) < 1e-3
    assert elsa.metric("vllm:num_preemptions_total") > 0


def test_a_cached_prefix_is_reused_and_the_answer_stays(servers, documents):
    elsa, _ = servers
    chats = [[{"role": "user", "content": documents[0].prompt}]]
    (first,) = ask(elsa.url, chats)
    hits, computed = elsa.metric("vllm:prefix_cache_hits_total"), tokens_of(elsa, "prefill")
    (again,) = ask(elsa.url, chats)
    assert elsa.metric("vllm:prefix_cache_hits_total") - hits >= 1024
    assert tokens_of(elsa, "prefill") - computed < 512  # ELSA attended from the rest alone
    assert [token for token, _ in again[1]] == [token for token, _ in first[1]]
    assert documents[0].answer in again[0]


def test_elsa_computed_and_the_metrics_page_proves_it(servers, capsys):
    elsa, peer = servers
    calls, before, deadline = elsa.metric("elsa_vllm_attention_calls_total"), -1.0, time.monotonic() + 60
    # A step may still be on its way, and on a busy machine rest between two layers for longer than a look takes.
    while (calls != before or calls % 5) and time.monotonic() < deadline:
        time.sleep(0.5)
        calls, before = elsa.metric("elsa_vllm_attention_calls_total"), calls
    assert elsa.metric("elsa_vllm_attention_layers") == 5
    assert elsa.metric("elsa_vllm_steps_total", phase="decode") > 0
    assert elsa.metric("elsa_vllm_steps_total", phase="mixed") > 0
    assert tokens_of(elsa, "decode") > 0
    assert calls % 5 == 0
    assert calls >= 5 * elsa.metric("elsa_vllm_steps_total") > 0
    assert elsa.metric("elsa_vllm_attention_seconds_total") > 0
    assert "ELSA attention is active: 5 layers, 4/4 heads of 64" in elsa.log.read_text()
    assert verify.main([elsa.url]) == 0
    assert "ELSA is active: 5 attention layers" in capsys.readouterr().out
    assert verify.main([peer.url + "/v1"]) == 1
    assert "no attention layer" in capsys.readouterr().err


def tokens_of(server, phase):
    return server.metric("elsa_vllm_tokens_total", phase=phase)
