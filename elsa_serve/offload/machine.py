"""What this machine offers: host limits, GPU facts, copy bandwidths."""

from __future__ import annotations
