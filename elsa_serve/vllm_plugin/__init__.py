"""ELSA as an attention backend of vLLM: `vllm serve MODEL --attention-backend elsa`.

vLLM finds two entry points here. `register` (group "vllm.general_plugins") runs in every vLLM process and adds the
backend ELSA. `cpu_platform` (group "vllm.platform_plugins") matters on vLLM's CPU build alone, whose platform ignores
every backend but its own. Neither imports vLLM, or torch, before vLLM calls it.

vLLM logs a plugin that fails to import and goes on without it, so nothing here relies on having been loaded:
`elsa_serve.vllm_plugin.verify.assert_active` proves from the engine's own counters that ELSA computed.
"""

from __future__ import annotations

import logging
from typing import Any

NAME = "ELSA"
BACKEND = "elsa_serve.vllm_plugin.backend.ElsaBackend"
PLATFORM = "elsa_serve.vllm_plugin.platform.ElsaCpuPlatform"

# A child of vLLM's own logger: its handler and its --log-level apply.
logger = logging.getLogger("vllm.elsa")

__all__ = ["BACKEND", "NAME", "cpu_platform", "register"]


def register() -> None:
    """Add the backend ELSA to vLLM's registry. Any number of calls have the effect of one.

    Under an unsupported vLLM the name is registered all the same, so that choosing it is answered with the reason
    (`backend.py` raises it) rather than with "unknown backend"; who does not choose it is not disturbed.
    """
    from elsa_serve import __version__
    from elsa_serve.vllm_plugin import compat, metrics

    refusal = compat.refusal(compat.vllm_version())
    if refusal is not None:
        logger.warning("elsa-serve %s: %s", __version__, refusal)
    _member()
    if refusal is None:
        from elsa_serve.vllm_plugin import fp32_linear  # registers --quantization elsa_fp32

        metrics.expose()
        compat.check_cpu_platform()
        logger.info(
            "elsa-serve %s: attention backend ELSA (--attention-backend elsa) and FP32-accurate linear layers "
            "(--quantization %s) are registered",
            __version__,
            fp32_linear.NAME,
        )


def _member() -> Any:
    """The backend's name in vLLM's enumeration, added to it if need be; what it is pickled as.

    A spawned worker unpickles the configuration, this member in it, before it is ready to load plugins.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND)
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (_member, ())
    return AttentionBackendEnum[NAME]


def cpu_platform() -> str | None:
    """The platform class that lets vLLM's CPU build use ELSA, or None where vLLM runs on anything else.

    The class is vLLM's own CPU platform in everything but the answer to a chosen backend of the name ELSA.
    """
    from elsa_serve.vllm_plugin import compat

    return PLATFORM if compat.wants_cpu_platform() else None
