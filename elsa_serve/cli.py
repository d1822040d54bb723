"""The `elsa-serve` command. Packages above this one add commands through the entry-point group "elsa_serve.commands"."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from elsa_serve import __version__
from elsa_serve.errors import ElsaError, UsageError

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
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # Name the flags of the chosen command, not only those of the top level.
            command = getattr(parsed, "parser", self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def build_parser() -> Parser:
    parser = Parser(prog="elsa-serve", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"elsa-serve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for entry in sorted(entry_points(group="elsa_serve.commands"), key=lambda e: e.name):
        add_command: Callable[[Any], None] = entry.load()
        add_command(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except UsageError as error:
        print(f"elsa-serve {args.command}: {error}", file=sys.stderr)
        return 2
    except ElsaError as error:
        print(f"elsa-serve {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
