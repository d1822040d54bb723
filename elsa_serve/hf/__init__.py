"""Hugging Face integration: `attn_implementation="elsa"` for `from_pretrained`, `from_config` and `generate`.

    import elsa_serve.hf
    model = AutoModelForCausalLM.from_pretrained("path", attn_implementation="elsa")

Importing this module registers two attention implementations with transformers; importing `elsa_serve` alone does not,
and does not import transformers. `elsa` is strict: what it cannot do is an error that names the remedy. `elsa_or_sdpa`
lets PyTorch's SDPA run in those cases and says so once per reason. Nothing in transformers is patched.

Every model that asks transformers' `AttentionInterface` for its attention works: decoders with grouped heads, sliding
windows, softcap and sinks, static, dynamic and sliding caches, and encoders. Padding on either side, causality and
windows reach the kernels as numbers; other masks as a dense bias.
"""

from elsa_serve.fp32_linear import use_fp32_linear
from elsa_serve.hf.masks import DenseMaskWarning, StructuredMask
from elsa_serve.hf.registration import NAMES, register, use_attention

__all__ = ["NAMES", "DenseMaskWarning", "StructuredMask", "register", "use_attention", "use_fp32_linear"]

register()
