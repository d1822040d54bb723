"""`elsa-serve serve MODEL --engine vllm …`: vLLM's own server with ELSA attention; every other flag is vLLM's."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence

from elsa_serve.errors import UsageError
from elsa_serve.vllm_plugin import compat

BACKEND_FLAGS = ("--attention-backend", "--attention-config", "--attention-config.backend", "-ac")


def chosen_engine(argv: Sequence[str]) -> str | None:
    """The value of --engine on a command line of `elsa-serve serve`, if it is there."""
    for at, word in enumerate(argv):
        flag, separator, value = word.partition("=")
        if flag == "--engine":
            return value if separator else next(iter(argv[at + 1 :]), None)
    return None


def vllm_command(argv: Sequence[str]) -> list[str]:
    """The command of vLLM's server for the arguments of `elsa-serve serve`, --engine taken out of them.

    vLLM's CPU distribution has no working `vllm` command: its server module takes the model as a flag alone.
    """
    words = list(argv)
    for at, word in enumerate(words):
        if word.partition("=")[0] == "--engine":
            del words[at : at + (1 if "=" in word else 2)]
            break
    if not any(word.replace("_", "-").partition("=")[0] in BACKEND_FLAGS for word in words):
        words += ["--attention-backend", "elsa"]
    if compat.has_vllm_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words]
    if words and not words[0].startswith("-"):
        words[0:0] = ["--model"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def check_installation() -> None:
    """Raise UsageError where vLLM would run without ELSA, or not at all; vLLM itself would only log it."""
    try:
        version = compat.vllm_version()
    except ImportError as error:
        raise UsageError("--engine vllm needs vLLM: pip install 'elsa-serve[vllm]'") from error
    if (refusal := compat.refusal(version)) is not None:
        raise UsageError(refusal)
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        if not any(entry.value.startswith("elsa_serve.") for entry in importlib.metadata.entry_points(group=group)):
            raise UsageError(
                f"vLLM finds its plugins through installed metadata, and elsa-serve has none in the group {group}: "
                "pip install it (a source tree on PYTHONPATH is not enough)"
            )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "elsa" not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS is {allowed!r} and keeps ELSA out: add elsa to it, or unset it")


def main(argv: Sequence[str]) -> int:
    """Become vLLM's server. Raises UsageError before that, where ELSA could not take part."""
    check_installation()
    command = vllm_command(argv)
    sys.stdout.flush()
    os.execv(command[0], command)
