from __future__ import annotations

import pytest
import torch

from kvarn_vllm.streams import beside


def test_without_streams_the_work_runs_first() -> None:
    order = []
    with beside(lambda: order.append("work"), torch.device("cpu")):
        order.append("body")
    assert order == ["work", "body"]


@pytest.mark.gpu
def test_the_main_stream_waits_for_the_work() -> None:
    device = torch.device("cuda")
    late = torch.zeros(1 << 20, device=device)
    streams = []

    def work() -> None:
        streams.append(torch.cuda.current_stream())
        torch.cuda._sleep(100_000_000)
        late.add_(1)

    with beside(work, device):
        streams.append(torch.cuda.current_stream())
    assert late.sum().item() == late.numel()
    assert streams[0] != streams[1]


@pytest.mark.gpu
def test_a_graph_holds_both_streams() -> None:
    device = torch.device("cuda")
    counts = torch.zeros(2, device=device)

    def step() -> None:
        with beside(lambda: counts[0].add_(1), device):
            counts[1].add_(1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    assert counts.tolist() == [4.0, 4.0]
