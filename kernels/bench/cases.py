"""What is measured, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call. Queries are the last Nq of Nk positions; `precision` as in `elsa_kernels.attention`."""

    dtype: str
    causal: bool
    B: int
    H: int
    Nq: int
    D: int
    Nk: int = 0
    Hkv: int = 0
    precision: str = "fp32"
    op: str = "prefill"

    def __post_init__(self) -> None:
        object.__setattr__(self, "Nk", self.Nk or self.Nq)
        object.__setattr__(self, "Hkv", self.Hkv or self.H)
        if self.H % self.Hkv:
            raise ValueError(f"{self.H} query heads are not a multiple of {self.Hkv} key heads")

    def flops(self) -> float:
        """Useful floating-point operations: 4·D per visible pair of query and key."""
        pairs = self.Nq * self.Nk
        if self.causal:
            pairs -= self.Nq * (self.Nq - 1) // 2
        return 4.0 * self.D * self.B * self.H * pairs

    def input_bytes(self) -> int:
        size = 4 if self.dtype == "float32" else 2
        return size * self.D * self.B * (self.H * self.Nq + 2 * self.Hkv * self.Nk)

    def row(self) -> dict[str, Any]:
        """The case as keys of a results row."""
        return asdict(self)


LENGTHS = (1024, 4096, 16384)
FP32 = [Case("float32", causal, 1, 40, N, 128) for N in LENGTHS for causal in (True, False)]
FP32_D64 = [Case("float32", False, 1, 16, N, 64) for N in (8192, 16384)] + [Case("float32", False, 1, 40, 16384, 64)]
# A chunk of 8K queries against 32K keys, as chunked prefill of a long prompt has it.
CHUNKED = [Case("float32", True, 1, 40, 8192, 128, Nk=32768), Case("float16", True, 1, 40, 8192, 128, Nk=32768)]
HALF = [Case(dtype, causal, 1, 40, 16384, 128) for dtype in ("float16", "bfloat16") for causal in (True, False)] + [
    Case("float16", causal, 1, 40, N, 128) for N, causal in ((4096, True), (4096, False), (32768, True))
]
GQA = [Case("float32", True, 1, 32, 16384, 128, Hkv=8), Case("bfloat16", True, 1, 32, 16384, 128, Hkv=8)]
# Encoders: BERT-base (12 heads of 64) and ViT-B/16 at 224 (197 tokens) and 384 (577 tokens).
ENCODERS = [Case("float32", False, B, 12, N, 64) for B in (8, 32, 64) for N in (128, 197, 512, 577)]

SUITES: dict[str, list[Case]] = {
    "fp32": FP32 + FP32_D64,
    "half": HALF,
    "chunked": CHUNKED,
    "gqa": GQA,
    "encoders": ENCODERS,
}

# Accuracy: lengths and families of inputs (`inputs.py` draws them).
ACCURACY_LENGTHS = tuple(2**e for e in range(8, 18))
FAMILIES = ("normal", "positive", "outlier", "small", "large", "sharp", "flat")
