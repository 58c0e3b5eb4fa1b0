from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _unwritten_memory_is_never_zero(poisoned_empty: None) -> None:
    """Every test of this package runs with poisoned `torch.empty`."""
