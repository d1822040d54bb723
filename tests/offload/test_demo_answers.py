"""The embedded model through the engine: a wrong byte in weights or KV is a wrong answer here, not a plausible one."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elsa_serve.demo import make_document
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Steps

NUMBERS = itertools.count()
MODEL = Path(__file__).parents[2] / "configs" / "demo_model"
PLACEMENTS = {
    "all layers resident": {"resident_layers": 5},
    "all layers streamed": {"resident_layers": 0, "chunk_tokens": 512},
    "serial twin": {"resident_layers": 0, "chunk_tokens": 512, "serial": True},
    # Embeddings, the ring, a chunk's activations and the working buffers fit; most layers' KV does not.
    "KV on the host": {"resident_layers": 0, "chunk_tokens": 128, "gpu_memory": "56MiB"},
    "split linear layers": {"resident_layers": 0, "linear": "elsa"},
}


def ask(engine, document):
    return "".join(event.text for event in events_of(engine, document))


def events_of(engine, document):
    conversation = [{"role": "user", "content": document.prompt}]
    tokens = engine.tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    request = GenerationRequest(
        f"seed {len(tokens)} {next(NUMBERS)}", tokens, SamplingParams(max_tokens=40, temperature=0.0)
    )
    return list(stream(engine, request))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_finds_the_fact(placement):
    options = {"device": "cpu", "dtype": "float32", "context": 4096, "max_batch": 1, "progress": False}
    engine = OffloadEngine(MODEL, **options | {"gpu_memory": "200MiB"} | PLACEMENTS[placement])
    try:
        if placement == "KV on the host":
            assert engine.plan.kv_gpu_tokens < engine.plan.context
        for seed in (3, 4):
            document = make_document(3000, seed, depth=seed / 10, measure=lambda line: len(line) // 4)
            assert document.answer in ask(engine, document)
    finally:
        engine.shutdown()


def test_every_feature_at_once_finds_every_fact():
    """Rounds beside decodes, guesses, growth, the prefix cache, KV on the host: three documents, each asked twice."""
    steps = Steps()
    engine = OffloadEngine(
        MODEL, device="cpu", dtype="float32", context=4096, max_batch=3, progress=False, gpu_memory="70MiB",
        resident_layers=0, chunk_tokens=128, prefill_round_tokens=1024, max_num_batched_tokens=256, sink=steps,
    )  # fmt: skip
    documents = [make_document(n, n, depth=0.4, measure=lambda line: len(line) // 4) for n in (1500, 2200, 3000)]
    try:
        with ThreadPoolExecutor(3) as clients:
            answers = [one for _ in range(2) for one in clients.map(lambda d: events_of(engine, d), documents)]
    finally:
        engine.shutdown()
    for document, events in zip(documents * 2, answers):
        assert document.answer in "".join(event.text for event in events)
    assert [events[-1].cached_tokens > 1000 for events in answers] == [False] * 3 + [True] * 3
    assert sum(one.accepted_tokens for one in steps.passes) > 20
    assert {one.phase for one in steps.passes} == {"prefill", "mixed", "decode"}
