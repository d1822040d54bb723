"""vLLM's CPU platform, except that a chosen backend of the name ELSA is honoured."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from elsa_serve.vllm_plugin import BACKEND, NAME, logger

# Whichever class vLLM would have taken here (there is one more for AMD's zentorch).
_CpuPlatform: Any = resolve_obj_by_qualname(cpu_platform_plugin())


class ElsaCpuPlatform(_CpuPlatform):
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is None or selected_backend.name != NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend = resolve_obj_by_qualname(BACKEND)
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"Selected backend {NAME} is not valid for this configuration. Reason: {reasons}")
        logger.info("Using %s backend.", NAME)
        return BACKEND
