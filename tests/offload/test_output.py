"""Text as it is generated: whole characters, right spacing, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_models import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from elsa_serve.offload.output import Detokenizer, OutputText, StopStrings, eos_token_ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token a byte: every character beyond ASCII falls apart."""
    from transformers import AutoTokenizer

    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


class WordTokenizer:
    """Like SentencePiece: words carry a leading space, which decoding strips from the first one."""

    eos_token_id = None
    words = ("▁the", "▁cat", "s", "▁sat", ".", "▁on")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[i] for i in token_ids).replace("▁", " ").removeprefix(" ")


class RunTokenizer:
    """Like SentencePiece's byte fallback: a run of bytes that is no UTF-8 as a whole decodes to one sign a byte."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        raw = bytes(token_ids)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(raw)


def pieces(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [detokenizer.push(token) for token in tokens]


def test_a_character_appears_with_its_last_byte(tokenizer: Any) -> None:
    assert pieces(Detokenizer(tokenizer, []), list("aé€🙂b".encode())) == [
        "a", "", "é", "", "", "€", "", "", "", "🙂", "b",
    ]  # fmt: skip


@given(text=st.text(max_size=120), prompt=st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_pieces_join_to_the_whole(tokenizer: Any, text: str, prompt: str) -> None:
    detokenizer = Detokenizer(tokenizer, list(prompt.encode()))
    assert "".join(pieces(detokenizer, list(text.encode()))) + detokenizer.flush() == text


def test_bytes_that_are_no_text_come_out_as_replacement_characters(tokenizer: Any) -> None:
    tokens = [0x61, 0xFF, 0xFE, 0x62, 0xE2, 0x82]
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(pieces(detokenizer, tokens)) + detokenizer.flush() == bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("text", ["你好世界" * 12, "a" * 100 + "語" * 30])
def test_byte_runs_longer_than_the_window_stay_whole(text: str) -> None:
    detokenizer = Detokenizer(RunTokenizer(), [])  # type: ignore[arg-type]
    assert "".join(pieces(detokenizer, list(text.encode()))) == text


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    tokens = [1, 2, 3, 4]
    assert pieces(Detokenizer(WordTokenizer(), [0]), tokens) == [" cat", "s", " sat", "."]  # type: ignore[arg-type]
    assert pieces(Detokenizer(WordTokenizer(), []), tokens) == ["cat", "s", " sat", "."]  # type: ignore[arg-type]


def test_spacing_survives_the_cutting_of_the_window() -> None:
    tokens = [1, 2, 3, 5, 0] * 40
    detokenizer = Detokenizer(WordTokenizer(), [0])  # type: ignore[arg-type]
    assert "".join(pieces(detokenizer, tokens)) == " cats sat on the" * 40


def test_a_stop_string_over_several_pieces_is_cut_out() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("Hello\n") == ("Hello", False)
    assert stops.push("\nUs") == ("", False)
    assert stops.push("er: more") == ("", True)


def test_held_text_is_released_when_it_turns_out_to_be_no_stop_string() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("EN") == ("EN", False)
    assert stops.flush() == "EN"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert StopStrings(["later", "now"]).push("from now until later") == ("from ", True)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    whole = min((text.find(stop) for stop in stops if stop in text), default=None)
    watcher, shown, stopped = StopStrings(stops), "", False
    rest = text
    for cut in cuts:
        piece, rest = rest[:cut], rest[cut:]
        part, stopped = watcher.push(piece)
        shown += part
        if stopped:
            break
    if stopped:
        assert whole is not None
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert whole is None
        assert shown + watcher.flush() == text


def test_stop_strings_wait_for_min_tokens(tokenizer: Any) -> None:
    output = OutputText(tokenizer, [], ["b"], min_tokens=3)
    assert [output.push(token, False) for token in b"abcab"] == [
        ("a", False), ("b", False), ("c", False), ("a", False), ("", True),
    ]  # fmt: skip


def test_the_last_token_releases_what_is_held(tokenizer: Any) -> None:
    output = OutputText(tokenizer, [], ["END"], min_tokens=0)
    assert output.push(ord("E"), False) == ("", False)
    assert output.push(0xE2, True) == ("E\ufffd", False)


def test_special_tokens_make_no_text(tokenizer: Any) -> None:
    assert Detokenizer(tokenizer, []).push(tokenizer.eos_token_id) == ""


def test_eos_ids_are_the_generation_configs_else_the_configs_and_the_tokenizers() -> None:
    def source(value: Any) -> Any:
        return SimpleNamespace(eos_token_id=value)

    assert eos_token_ids(source([1, 2]), source(3), source(4)) == {1, 2, 4}
    assert eos_token_ids(source(None), source(3), source(None)) == {3}
    assert eos_token_ids(None, source(None), source(0)) == {0}
    assert eos_token_ids(None, None, source(None)) == frozenset()
