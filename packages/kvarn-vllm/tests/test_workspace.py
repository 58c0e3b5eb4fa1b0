from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.worker.workspace import (
    current_workspace_manager,
    init_workspace_manager,
    reset_workspace_manager,
)

from kvarn_core.ops.decode import workspace_bytes
from kvarn_vllm.cache_spec import record_layout
from kvarn_vllm.workspace import CONTEXT_TOKENS, Workspace

LAYOUT = record_layout("kvarn_k4v2_g128", 64)


@pytest.fixture
def manager(monkeypatch: Any) -> Any:
    """vLLM's own workspace manager, on the CPU."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    init_workspace_manager(torch.device("cpu"))
    yield current_workspace_manager()
    reset_workspace_manager()


def test_nothing_grows_after_the_reservation(manager: Any) -> None:
    workspace = Workspace(LAYOUT, 4, 2, max_requests=16, engine="triton")
    workspace.reserve(torch.empty(512, 4, 64, dtype=torch.float16))
    manager.lock()
    for requests in (1, 16):
        scratch, lse = workspace.decode(requests)
        assert scratch.numel() == workspace_bytes(16, 4, 2, LAYOUT)
        assert lse.shape == (requests, 4)
    key, value = workspace.context(CONTEXT_TOKENS, torch.float16)
    assert key.shape == value.shape == (CONTEXT_TOKENS, 2, 64)
    with pytest.raises(AssertionError, match="Workspace is locked"):
        workspace.context(CONTEXT_TOKENS + 1, torch.float16)


def test_every_call_gets_the_same_bytes(manager: Any) -> None:
    """A captured graph reads the addresses of the step it was captured in."""
    workspace = Workspace(LAYOUT, 4, 2, max_requests=16, engine="triton")
    workspace.reserve(torch.empty(512, 4, 64, dtype=torch.float16))
    first = [tensor.data_ptr() for tensor in workspace.decode(3)]
    workspace.context(100, torch.float16)
    assert [tensor.data_ptr() for tensor in workspace.decode(3)] == first


def test_layers_of_a_kind_share_the_scratch_of_decode_which_begins_as_zeros(manager: Any) -> None:
    layers = [Workspace(LAYOUT, 4, 2, max_requests=5, engine="triton") for _ in range(2)]
    scratch, other = (layer.decode(5)[0] for layer in layers)
    assert scratch.data_ptr() == other.data_ptr()
    assert not scratch.any()
    key, value = layers[0].context(100, torch.float16)
    for tensor in (key, value, layers[0].decode(5)[1]):
        tensor.fill_(1)
    assert not scratch.any()


def test_tensors_of_one_call_do_not_overlap(manager: Any) -> None:
    workspace = Workspace(LAYOUT, 4, 2, max_requests=16, engine="triton")
    for tensors in (workspace.context(100, torch.float16), workspace.decode(16)):
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1]]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
