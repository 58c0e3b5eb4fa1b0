"""A stand-in for `bench_child`: sends nothing, writes results of the right shape."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--fail", action="store_true", help="report requests that failed")
parser.add_argument("--refuse", action="store_true", help="report loads that failed")
own = parser.parse_args()
parser = argparse.ArgumentParser()
for name in ("--dataset-path", "--result-dir", "--result-filename", "--metric-percentiles"):
    parser.add_argument(name)
parser.add_argument("--num-prompts", type=int)
for line in sys.stdin:
    load = json.loads(line)
    Path(load["log"]).write_text("nothing was sent\n", encoding="utf-8")
    options, _ = parser.parse_known_args(load["options"])
    lines = Path(options.dataset_path).read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines][: options.num_prompts]
    lengths = [request["output_tokens"] for request in requests]
    result = {
        "duration": 1.0,
        "output_throughput": float(sum(lengths)),
        "input_lens": [len(request["prompt"]) for request in requests],
        "output_lens": lengths,
        "errors": ["timed out" if own.fail else "" for _ in requests],
        "start_times": [0.0 for _ in requests],
        "ttfts": [0.1 for _ in requests],
        "itls": [[0.01] * (length - 1) for length in lengths],
    }
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for percentile in options.metric_percentiles.split(","):
            result[f"p{percentile}_{metric}_ms"] = 10.0 + len(requests[0]["prompt"]) / 1000
    out = Path(options.result_dir) / options.result_filename
    out.write_text(json.dumps(result), encoding="utf-8")
    unfinished = Path(load["over"] + ".part")
    unfinished.write_text("ValueError: no" if own.refuse else "", encoding="utf-8")
    unfinished.rename(load["over"])
