"""Big bodies: parsed without keeping the interpreter to themselves, whatever their shape."""

from __future__ import annotations

import threading
import time

import pytest
from elsa_server import body
from elsa_server.errors import ApiError
from elsa_server.schemas import CompletionRequest

SIZE = 2 << 20  # bytes; the limit is four times that


def longest_hold(run: threading.Thread) -> float:
    """Seconds of this process's own computing time for which no other thread got its turn while `run` ran.

    Computing time, not the clock's: a busy machine must not fail the test.
    """
    worst, last = 0.0, time.process_time()
    run.start()
    while run.is_alive():
        time.sleep(0.001)
        now = time.process_time()
        worst, last = max(worst, now - last), now
    run.join()
    return worst


@pytest.mark.timed
@pytest.mark.parametrize(
    "prompt",
    [
        b"[" + b"123," * (SIZE // 4) + b"5]",
        b"[" + b"[]," * (SIZE // 3) + b"[]]",
        b'"' + b"word " * (SIZE // 5) + b'"',
        b'"' + b"\\u4e2d" * (SIZE // 6) + b'"',
    ],
    ids=["numbers", "lists", "text", "escapes"],
)
def test_parsing_lets_the_event_loop_run(prompt: bytes) -> None:
    content = b'{"model": "fake", "prompt": ' + prompt + b"}"
    ended: list[object] = []

    def parse() -> None:
        try:
            ended.append(body.parse(content, CompletionRequest).model)
        except ApiError as error:
            ended.append(error.code)

    hold = longest_hold(threading.Thread(target=parse))
    assert ended in (["fake"], ["invalid_json"])
    print(f"held for {hold:.3f} s")
    assert hold < 0.05


def test_both_decoders_read_the_same() -> None:
    small = b'{"model": "fake", "prompt": ["a\\n\\u00e9", "b"], "temperature": 1e-1, "n": 2, "seed": -3}'
    padded = small + b" " * body.SMALL_BODY
    assert body.parse(small, CompletionRequest) == body.parse(padded, CompletionRequest)
    for bad in (b'{"a": NaN}', b'{"a": 1,}', b'{"a"}', b"[" * 1000):
        for content in (bad, bad + b" " * body.SMALL_BODY):
            with pytest.raises(ApiError) as error:
                body.parse(content, CompletionRequest)
            assert error.value.code == "invalid_json"
