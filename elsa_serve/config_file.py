"""Flags from a YAML file: `--config FILE` puts them before those of the command line, which win."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def with_config(words: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The words of a command line, those of its --config file put in after the command. A bad file ends the program."""
    parser = commands.get(words[0]) if words else None
    path = _value(words, "--config")
    if parser is None or path is None or "--config" not in _flags(parser):
        return list(words)
    others = {flag for other in commands.values() for flag in _flags(other)}
    return [words[0], *_words(Path(path), parser, words[1:], others), *words[1:]]


def _value(words: Sequence[str], flag: str) -> str | None:
    for at, word in enumerate(words):
        name, separator, value = word.partition("=")
        if name == flag:
            return value if separator else next(iter(words[at + 1 :]), None)
    return None


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


def _read(path: Path, parser: argparse.ArgumentParser) -> dict[Any, Any]:
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {error}")
    if entries is None:  # nothing but comments
        return {}
    if not isinstance(entries, dict):
        parser.error(f"--config {path}: expected a mapping of flag names to values, found {type(entries).__name__}")
    return entries


def _words(path: Path, parser: argparse.ArgumentParser, given: Sequence[str], others: set[str]) -> list[str]:
    """The file's flags as words, without those that the command line gives itself."""
    flags, words, elsewhere = _flags(parser), list[str](), list[str]()
    named = {word.partition("=")[0] for word in given}
    for key, value in _read(path, parser).items():
        flag = "--" + str(key).replace("_", "-")
        action = flags.get(flag)
        if action is None and flag in others:
            elsewhere.append(flag)
        elif action is None or action.dest in ("config", "help"):
            parser.error(f"--config {path}: unknown key {key!r}{_hint(str(key), parser)}")
        elif value is not None and named.isdisjoint(action.option_strings):
            try:
                words += _as_words(flag, action, value)
            except (TypeError, ValueError) as error:
                parser.error(f"--config {path}: {key}: {error}")
    if elsewhere:
        print(f"{parser.prog}: --config {path}: left out, flags of other commands: {', '.join(elsewhere)}",
              file=sys.stderr)  # fmt: skip
    return words


def _hint(key: str, parser: argparse.ArgumentParser) -> str:
    for action in parser._actions:
        if action.dest == key and not action.option_strings:
            return f": {action.metavar or key} is no flag, it stands on the command line"
    close = difflib.get_close_matches(key, [flag[2:] for flag in _flags(parser)], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _as_words(flag: str, action: argparse.Action, value: Any) -> Iterable[str]:
    """Raises ValueError for a value that the flag does not take."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        on = action.option_strings[0]
        if flag != on:
            raise ValueError(f"write {on[2:]}: true or false")
        if not isinstance(value, bool):
            raise ValueError(f"invalid value {value!r}: choose true or false")
        return [flag] if value else [f for f in action.option_strings if f.startswith("--no-")]
    several = isinstance(value, list) and isinstance(action, argparse._AppendAction)
    return [f"{flag}={_checked(action, one)}" for one in (value if several else [value])]


def _checked(action: argparse.Action, value: Any) -> str:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"invalid value {value!r}")
    text = str(value)
    if action.choices is not None and text not in action.choices:
        raise ValueError(f"{text!r} is none of {', '.join(map(str, action.choices))}")
    try:
        if callable(action.type):
            action.type(text)
    except (TypeError, ValueError):
        raise ValueError(f"invalid value {value!r}") from None
    return text
