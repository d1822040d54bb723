"""An OpenAI-compatible endpoint with known timings, in a process of its own: `python mock_endpoint.py PORT`.

A plain asyncio server that knows no framework, so that what it sends and when is exactly what stands here. The prompt
of a completion is JSON: {"first": seconds, "gaps": [seconds, …], "sizes": [tokens, …], "mode": …}. It answers with the
first chunk after `first`, then a chunk after every gap; chunk i carries sizes[i] tokens ("t" each, default 1). Gaps are
held against a fixed schedule, so that sleeping too long once delays nothing after it.

Modes: "refuse:N" answers 503 with Retry-After N for the first two attempts; "break" closes the connection after the
first chunk; "error" sends an error event; "truncate" ends without a finish_reason; "split" writes byte by byte;
"padded" puts a megabyte into one event; "continuous" counts tokens in every chunk. Other prompts are answered at once
with the size of the body.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
refused: dict[str, int] = {}


def event(payload: dict) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None, **extra) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **extra}], "usage": None}


def chunk_with(size: int, plan: dict, total: int) -> dict:
    payload = chunk("t" * size, logprobs={"tokens": ["t"] * size})
    if plan.get("mode") == "continuous":
        payload["usage"] = {"prompt_tokens": 7, "completion_tokens": total}
    if plan.get("mode") == "padded":
        payload["padding"] = "x" * (1 << 20)
    return payload


async def until(moment: float) -> None:
    """Sleep, and spin for the last millisecond: the loop's own sleep is late by up to one."""
    left = moment - time.perf_counter()
    if left > 0.001:
        await asyncio.sleep(left - 0.001)
    while time.perf_counter() < moment:
        await asyncio.sleep(0)


async def write(writer: asyncio.StreamWriter, data: bytes, mode: str | None) -> None:
    for part in [data[i : i + 1] for i in range(len(data))] if mode == "split" else [data]:
        writer.write(part)
        await writer.drain()


async def answer(writer: asyncio.StreamWriter, plan: dict, start: float) -> None:
    mode = plan.get("mode")
    writer.write(HEAD)
    sizes = plan.get("sizes") or [1] * (len(plan["gaps"]) + 1)
    moment, total = start, 0
    for delay, size in zip([plan["first"], *plan["gaps"]], sizes):
        moment += delay
        total += size
        payload = event(chunk_with(size, plan, total))
        await until(moment)
        await write(writer, payload, mode)
        if mode == "break":
            writer.transport.abort()
            return
    if mode == "error":
        await write(writer, event({"error": {"message": "the engine failed", "code": "engine_error"}}), mode)
    elif mode != "truncate":
        await write(writer, event(chunk("", "length")), mode)
    usage = {"prompt_tokens": plan.get("prompt_tokens", 7), "completion_tokens": total}
    await write(writer, b": keep-alive\n\n" + event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n", mode)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(h.split(":")[1]) for h in head.split("\r\n") if h.lower().startswith("content-length")), 0)
        body = await reader.readexactly(length)
        start = time.perf_counter()
        if head.startswith("GET"):
            data = json.dumps({"data": [{"id": "mock"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)
        else:
            await post(writer, body, start)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the client hung up, which some tests are about
    finally:
        writer.close()


async def post(writer: asyncio.StreamWriter, body: bytes, start: float) -> None:
    prompt = json.loads(body)["prompt"]
    plan = json.loads(prompt) if isinstance(prompt, str) and prompt.startswith("{") else None
    if plan is None:
        plan = {"first": 0, "gaps": [], "prompt_tokens": len(body)}
    mode = plan.get("mode", "")
    if mode.startswith("refuse") and refused.setdefault(plan["id"], 0) < 2:
        refused[plan["id"]] += 1
        text = b'{"error": {"message": "busy"}}'
        wait = mode.partition(":")[2].encode()
        reply = b"HTTP/1.1 503 Busy\r\nRetry-After: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        writer.write(reply % (wait, len(text)) + text)
        return
    await answer(writer, plan, start)


async def main(port: int) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 26, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
