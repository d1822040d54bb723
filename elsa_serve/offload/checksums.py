"""A debug mode (ELSA_CHECKSUMS=1): has the memory that holds KV changed since it was computed?

After each pass, every new token's keys and values are summed up, layer by layer; before each pass the sums of what its
requests hold are made again. That reads all of their KV once more a pass, on whichever tier it lies: it finds bad
memory, bad disks and our own mistakes, and is not for serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elsa_serve.offload.kv import Extent, RequestKV

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # an element's bits as a number that sums are exact of
_VALUES = 3  # the weight of V's sums, so that K and V in each other's places are seen


@dataclass(frozen=True, slots=True)
class Damage:
    """The first layer and token (of a request's) whose keys and values are no longer what was computed."""

    extent: Extent
    layer: int
    token: int

    def __str__(self) -> str:
        where = {"gpu": "on the device", "host": "in host memory", "disk": "on disk"}[self.extent.tier]
        return (
            f"the keys and values of token {self.token} in layer {self.layer}, {where}, are no longer what was "
            "computed: check that memory, then send the request again"
        )


def remember(kv: RequestKV, first: int) -> None:
    """A pass has computed the tokens from `first` on."""
    for span in kv.spans_of(first, kv.length):
        places, extent = span.within(first, kv.length), span.extent
        if extent.sums is None:
            extent.sums = torch.zeros(len(extent.layers), extent.capacity, dtype=torch.int64)
        extent.sums[:, places] = _sums(extent, places)


def damage(kv: RequestKV) -> Damage | None:
    """What has changed in the KV of a request; None if all of it is as it was computed."""
    for span in kv.spans_of(0, kv.length):
        places, extent = span.within(0, kv.length), span.extent
        if extent.sums is None:
            raise RuntimeError(f"tokens {span.first} … of a request have no checksums although they are computed")
        changed = (extent.sums[:, places] != _sums(extent, places)).nonzero()
        if len(changed):
            layer, place = changed[0].tolist()
            return Damage(extent, layer, span.first + place)
    return None


def _sums(extent: Extent, places: slice) -> torch.Tensor:
    """[layers, tokens] int64 on the CPU."""
    made = []
    for block in extent.layers:
        words = block[:, :, places].view(_WORDS[block.element_size()])
        keys, values = words.sum((1, 3), dtype=torch.int64)
        made.append(keys + _VALUES * values)
    return torch.stack(made).cpu()
