"""The `elsa-serve` command. Packages add commands to it through the entry-point group "elsa_serve.commands"."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from elsa_serve import __version__
from elsa_serve.errors import ElsaError, UsageError
from elsa_serve.vllm_plugin.serve import chosen_engine
from elsa_serve.vllm_plugin.serve import main as serve_with_vllm

DESCRIPTION = """\
Exact long-context attention and an LLM engine that streams layers.

  elsa-serve serve MODEL_DIR --gpu-memory 24GiB --context 32768   an OpenAI-compatible server
  elsa-serve generate MODEL_DIR --prompt-file report.txt          one answer on the terminal
  elsa-serve plan MODEL_DIR --gpu-memory 24GiB --context 131072   what fits where, without loading
  elsa-serve doctor                                               what this machine offers
"""


class Parser(argparse.ArgumentParser):
    """Exact flags only; an unknown one is answered with its nearest neighbours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            close = difflib.get_close_matches(word.split("=")[0], flags, n=2) if word.startswith("--") else []
            if close and word not in flags:
                message += f" (did you mean {' or '.join(close)}?)"
                break
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = self._parse_strictly(args, namespace)
        config = getattr(parsed, "config", None)
        if config is None:
            return parsed
        # The file gives defaults, so flags on the command line win over it.
        parsed.parser.set_defaults(**read_config(config, parsed.parser))
        return self._parse_strictly(args, namespace)

    def _parse_strictly(self, args: Any, namespace: Any) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # Name the flags of the chosen command, not only those of the top level.
            command = getattr(parsed, "parser", self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def read_config(path: Path, parser: Parser) -> dict[str, Any]:
    """The flags of a YAML file, as defaults of `parser`: keys are flag names without the dashes."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {error}")
    if not isinstance(entries, dict):
        parser.error(f"--config {path}: expected a mapping of flag names to values, found {type(entries).__name__}")
    actions = {option[2:]: a for a in parser._actions for option in a.option_strings if option.startswith("--")}
    defaults = {}
    for key, value in entries.items():
        action = actions.get(str(key).replace("_", "-"))
        if action is None or action.dest in ("config", "help"):
            close = difflib.get_close_matches(str(key), actions, n=1)
            parser.error(f"--config {path}: unknown key {key!r}" + (f" (did you mean {close[0]}?)" if close else ""))
        if action.choices is not None and value not in action.choices:
            parser.error(f"--config {path}: {key}: {value!r} is none of {', '.join(map(str, action.choices))}")
        try:
            defaults[action.dest] = action.type(value) if callable(action.type) and value is not None else value
        except (TypeError, ValueError):
            parser.error(f"--config {path}: {key}: invalid value {value!r}")
    return defaults


def build_parser() -> Parser:
    parser = Parser(prog="elsa-serve", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"elsa-serve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for entry in sorted(entry_points(group="elsa_serve.commands"), key=lambda e: e.name):
        add_command: Callable[[Any], None] = entry.load()
        add_command(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file of flags; the command line wins over it"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    try:
        if command == "serve" and chosen_engine(words) == "vllm":
            return serve_with_vllm(words[1:])  # the flags are vLLM's: not ours to parse
        args = build_parser().parse_args(words)
        command = args.command
        return int(args.run(args) or 0)
    except UsageError as error:
        print(f"elsa-serve {command}: {error}", file=sys.stderr)
        return 2
    except ElsaError as error:
        print(f"elsa-serve {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
