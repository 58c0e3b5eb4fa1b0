from __future__ import annotations

import pytest

from kvarn_core.testing.plugin import poisoned_empty

__all__ = ["poisoned_empty"]


@pytest.fixture(autouse=True)
def _unwritten_memory_is_never_zero(poisoned_empty: None) -> None:
    """Every test of this package runs with poisoned `torch.empty`."""
