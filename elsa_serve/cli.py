"""The `elsa-serve` command. Packages add commands to it through the entry-point group "elsa_serve.commands"."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from elsa_serve import __version__
from elsa_serve.config_file import with_config
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
        for word in (word.partition("=")[0].rstrip(":,") for word in message.split()):
            close = difflib.get_close_matches(word, flags, n=2) if word.startswith("--") else []
            if close and word not in flags:
                message += f" (did you mean {' or '.join(close)}?)"
                break
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        commands = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), {})
        return self._parse_strictly(with_config(words, commands), namespace)

    def _parse_strictly(self, args: Any, namespace: Any) -> Any:
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
        if not any(isinstance(action, argparse._SubParsersAction) for action in command._actions):
            command.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line wins over it")
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
