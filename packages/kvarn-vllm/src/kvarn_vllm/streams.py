"""Work beside the main stream of a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import aux_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def beside(work: Callable[[], None], device: torch.device) -> Iterator[None]:
    """Run `work` on a second stream while the body runs; the body's stream then waits for it.

    On a CPU there are no streams, and `work` runs first. Capturable: the second stream is forked
    from the first and joined to it.
    """
    if device.type != "cuda":
        work()
        yield
        return
    main, side = torch.cuda.current_stream(device), aux_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        work()
    yield
    main.wait_stream(side)
