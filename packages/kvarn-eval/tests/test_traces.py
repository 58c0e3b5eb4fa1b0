from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvarn_eval import traces
from kvarn_eval.server import ServerConfig, serve

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


def score(folder: Path, cache_dtype: str, behaviour: str) -> list[traces.Divergences]:
    """Divergence of an arm from an exact reference, over two texts of the stand-in server."""
    texts = [[5 + (i * j) % 90 for i in range(300)] for j in (1, 3)]
    with serve(ServerConfig("m", command=FAKE), folder / "a.log") as server:
        floor = traces.score_reference(server, texts, folder, 256)
        assert [sum(text.kld) for text in floor] == [0, 0]
    options = ("--kv-cache-dtype", cache_dtype, "--behaviour", behaviour)
    with serve(ServerConfig("m", options, command=FAKE), folder / "b.log") as server:
        return traces.score_arm(server, texts, folder, 256)


def test_a_faithful_arm_has_no_divergence(tmp_path: Path) -> None:
    found = traces.measurements("kvarn", "plain", score(tmp_path, "kvarn", "healthy"), 256)
    value = {m.name: m.median for m in found}
    assert value["plain.traces.kld_mean"] == pytest.approx(0, abs=1e-6)
    assert value["plain.traces.top1"] == 1


def test_a_damaged_arm_has_one(tmp_path: Path) -> None:
    found = traces.measurements("kvarn", "plain", score(tmp_path, "kvarn", "damaged"), 256)
    value = {m.name: m.median for m in found}
    assert value["plain.traces.kld_mean"] > 0.05
    assert "plain.traces.kld_at_0" in value


def test_shares_are_those_of_all_positions() -> None:
    found = [
        traces.Divergences(length=n, kld=[0.0] * n, covered=share, top1=share)
        for n, share in ((260, 0.0), (292, 1.0))
    ]
    value = {m.name: m.median for m in traces.measurements("kvarn", "plain", found, 256)}
    assert value["plain.traces.top1"] == value["plain.traces.covered"] == 0.9  # 4 and 36


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    positions = [{1: -0.5, 7: -1.5}, {3: -0.25, 4: -2.0, 5: -3.0}]
    traces.save_scores(tmp_path / "s.safetensors", positions)
    assert traces.load_scores(tmp_path / "s.safetensors") == positions


def test_scoring_reads_the_cache_as_decoding_does() -> None:
    assert traces.scoring_options(128)["long-prefill-token-threshold"] == 128
