"""The embedded demo model: its documents, tokenizer, chat format and training data, and that it answers right."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_serve.demo import Fact, hide_facts, is_held_out, make_document, make_facts

FOLDER = Path(__file__).parents[2] / "configs" / "demo_model"


@pytest.fixture(scope="module")
def scripts():
    """The model's own scripts, which import each other as neighbours in their folder."""
    names = ("build_tokenizer", "data", "evaluate", "train")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("source", ["prose", "python"])
def test_document_is_reproducible_and_holds_each_fact_once(source):
    document = make_document(6000, seed=3, n_facts=12, source=source)
    assert document == make_document(6000, seed=3, n_facts=12, source=source)
    assert document.text != make_document(6000, seed=4, n_facts=12, source=source).text
    assert 5000 < len(document.text) <= 6000
    assert len({fact.key.lower() for fact in document.facts}) == 12
    for fact in document.facts:
        assert document.text.splitlines().count(fact.statement) == 1
        assert is_held_out(fact.key)
    assert document.prompt.endswith(f"\n\nWhat is the code of {document.asked.key}?")
    assert document.asked.value in document.answer


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_asked_fact_stands_where_it_was_put(depth):
    lines = make_document(4000, seed=1, n_facts=3, depth=depth).text.splitlines()
    facts = [i for i, line in enumerate(lines) if line.startswith("The code of ")]
    asked = make_document(4000, seed=1, n_facts=3, depth=depth).asked
    assert asked.statement in [lines[i] for i in facts]
    assert lines.index(asked.statement) == pytest.approx(depth * (len(lines) - 1), abs=1)


def test_bad_documents_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        make_document(100, seed=0, n_facts=10)
    with pytest.raises(ValueError, match="at least one fact"):
        make_document(1000, seed=0, n_facts=0)
    with pytest.raises(ValueError, match="'prose' or 'python'"):
        make_document(1000, seed=0, source="novel")


def test_facts_of_training_and_evaluation_are_disjoint():
    trained = make_facts(300, random.Random(0), held_out=False)
    assert not any(is_held_out(fact.key) for fact in trained)
    assert all(is_held_out(fact.key) for fact in make_facts(100, random.Random(0)))


def test_hide_facts_keeps_the_lines_in_order():
    lines = [f"line {i}" for i in range(20)]
    facts = [Fact("alpha", "123"), Fact("beta", "456"), Fact("gamma", "789")]
    merged, where = hide_facts(lines, facts, random.Random(5))
    assert [line for line in merged if line.startswith("line")] == lines
    assert [merged[i] for i in where] == [fact.statement for fact in facts]


def test_tokenizer_roundtrip_and_lines_are_independent(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    documents = [make_document(3000, 1, source=source).text for source in ("prose", "python")]
    for text in (*documents, "naïve – 漢字\t\r\n  x  \n\n"):
        assert tokenizer.decode(encode(text)) == text
        lines = text.splitlines(keepends=True)
        assert [i for line in lines for i in encode(line)] == encode(text)
    assert tokenizer.convert_ids_to_tokens(encode("58213")) == list("58213")
    assert len(tokenizer) == 2048


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "TEXT\n\nWhat?\n"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nTEXT\n\nWhat?<|end|>\n"
        "<|assistant|>\nThat.<|end|>\n<|user|>\nAnd?<|end|>\n<|assistant|>\n"
    )


def test_training_sequence_is_what_inference_sees(scripts, tokenizer):
    """A training sequence up to its first answer reads exactly as the chat template's rendering of that message."""
    composer = small_composer(scripts["data"], tokenizer)
    compared = 0
    for length in (256, 1024, 4096):
        coded = composer.sequence(length)
        assert len(coded) == length
        ids = (coded & scripts["data"].TOKEN_MASK).tolist()
        text = tokenizer.decode(ids)
        prompt, answer = text.split("<|assistant|>\n")[:2]
        if "<|system|>" in prompt:
            continue
        content = prompt.removeprefix("<|begin|><|user|>\n").removesuffix("<|end|>\n")
        messages = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template trims spaces around the content: skip the line where the text begins.
        assert rendered.split("\n")[2:] == (prompt + "<|assistant|>\n").split("\n")[2:]
        assert answer.split("<|end|>")[0] in content
        compared += 1
    assert compared


def small_composer(data, tokenizer):
    backend = tokenizer.backend_tokenizer
    corpora = [
        data.Corpus.from_texts([make_document(60_000, seed=i, source=source, held_out=False).text], backend)
        for i, source in enumerate(("python", "prose"))
    ]
    keys = [f" {fact.key}" for fact in make_facts(500, random.Random(0), held_out=False)]
    encoded = [backend.encode(key, add_special_tokens=False).ids for key in keys]
    return data.Composer(corpora, encoded, backend, seed=1)


def test_loss_covers_every_retrievable_digit_and_no_chance(scripts, tokenizer, monkeypatch):
    data = scripts["data"]
    monkeypatch.setattr(data, "SEGMENT", 2048)
    composer = small_composer(data, tokenizer)
    buckets = np.array([0, 2, 4])
    lengths = [data.LENGTHS[b] for b in buckets for _ in range(2048 // data.LENGTHS[b])]
    coded = np.concatenate([composer.sequence(length) for length in lengths])
    positions = np.concatenate([np.arange(length) for length in lengths])
    fields = data.loss_fields(coded, positions, buckets, np.random.default_rng(0))
    kinds = coded & ~np.uint16(data.TOKEN_MASK)
    targets = fields["index"] + 1
    assert set(np.flatnonzero(kinds == data.DIGIT)) <= set(targets)
    assert not np.any(kinds[targets] == data.CHANCE)
    assert not np.any(positions[targets] == 0)  # nothing is predicted across two sequences
    assert np.array_equal(fields["target"], coded[targets] & data.TOKEN_MASK)
    for i in range(len(buckets)):
        digits = (fields["bucket"] < len(data.LENGTHS)) & (targets // 2048 == i)
        assert set(fields["bucket"][digits]) == {buckets[i]}
        assert fields["weight"][digits].sum() == pytest.approx(data.DIGIT_SHARE / 3, rel=1e-4)


def test_training_model_equals_the_exported_one(scripts, tmp_path):
    """The flat training model and LlamaForCausalLM agree on packed sequences of two lengths."""
    train = scripts["train"]
    torch.manual_seed(0)
    flat = train.DemoLlama(train.Shape(hidden=128, heads=2, layers=2, ffn=256), compiled=False)
    train.export(flat, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 2048, (128,), dtype=torch.int32)
    positions = torch.cat((torch.arange(64), torch.arange(32).repeat(2)))
    with torch.no_grad():
        logits = torch.cat(
            [exported(part.long()).logits.flatten(0, 1) for part in (tokens[:64].view(1, 64), tokens[64:].view(2, 32))]
        )
        target = torch.randint(0, 2048, (128,))
        expected = torch.nn.functional.cross_entropy(logits, target)
        batch = {"tokens": tokens, "positions": positions, "index": torch.arange(128), "target": target}
        loss, _ = flat(batch | {"weight": torch.full((128,), 1 / 128)}, [64, 32])
    assert loss.item() == pytest.approx(expected.item(), abs=2e-3)  # bfloat16 products against float32


@pytest.mark.parametrize(("length", "documents"), [(512, 6), (2048, 3)])
def test_answers_are_exact_on_unseen_documents(scripts, model, tokenizer, length, documents):
    rows = scripts["evaluate"].evaluate(model, tokenizer, length, range(documents), documents)
    assert [row["seed"] for row in rows if not row["exact"]] == []
    assert all(0.85 * length < row["prompt_tokens"] < length for row in rows)


def test_generate_stops_after_the_answer(model, tokenizer):
    document = make_document(1500, seed=11, n_facts=6)
    messages = [{"role": "user", "content": document.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == document.answer + tokenizer.eos_token
