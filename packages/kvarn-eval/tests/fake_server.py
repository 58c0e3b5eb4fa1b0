"""A tiny stand-in for an inference server; its behaviour is chosen by options."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kvarn_eval.small_model import tokenizer

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--kv-cache-dtype", "--behaviour"):
    parser.add_argument(name, default="")
parser.add_argument("--port", type=int)
parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30)
parser.add_argument("--child-pid", type=Path)
parser.add_argument("--answers", type=Path)
options, _ = parser.parse_known_args()
compressed = options.kv_cache_dtype.startswith("kvarn")
answers = json.loads(options.answers.read_text(encoding="utf-8")) if options.answers else {}

METRICS = f"""# HELP vllm:cache_config_info Information
vllm:cache_config_info{{block_size="128",cache_dtype="{options.kv_cache_dtype or "auto"}",\
kv_cache_memory_bytes="{options.kv_cache_memory_bytes}",\
num_gpu_blocks="{6472 if compressed else 1365}"}} 1.0
vllm:num_preemptions_total{{engine="0"}} 0.0
vllm:prefix_cache_hits_total{{engine="0"}} 0.0
vllm:prefix_cache_queries_total{{engine="0"}} 0.0
vllm:num_requests_running{{engine="0"}} 1.0
vllm:kv_cache_usage_perc{{engine="0"}} 0.25
"""


def position(token: int) -> dict[str, dict[str, float]]:
    """The given token is almost certain; a compressed cache shifts a little mass."""
    other = 0.08 if compressed and options.behaviour == "damaged" else 0.001
    probabilities = {token: 0.998 - other, token + 1 if token < 10 else token - 1: other}
    return {str(k): {"logprob": math.log(p)} for k, p in probabilities.items()}


def complete(body: dict[str, object]) -> dict[str, object]:
    """Answer a completions request from the table of answers."""
    prompt = body["prompt"]
    if isinstance(prompt, list):
        scores = [None, *(position(token) for token in prompt[1:])]
        return {"choices": [{"prompt_logprobs": scores}]}
    if body.get("return_token_ids"):  # sampled: no two servers write the same
        dice = random.Random(f"{os.getpid()} {body['seed']}")  # noqa: S311 - a text
        ids = [dice.randrange(5, 95) for _ in range(int(str(body["max_tokens"])))]
        return {"choices": [{"prompt_token_ids": [5], "token_ids": ids}]}
    text = answers.get(prompt, "")
    if compressed and options.behaviour == "damaged":
        text = text[:-2]
    tokens = len(tokenizer.encode(str(prompt)))
    usage = {"prompt_tokens": tokens, "completion_tokens": len(tokenizer.encode(text)) + 1}
    return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def reply(self, status: int, content: str) -> None:
        data = content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(200, METRICS if self.path == "/metrics" else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if options.behaviour == "refuse":
            self.reply(400, "no such model")
        else:
            self.reply(200, json.dumps(complete(body)))

    def log_message(self, *args: object) -> None:
        pass


print("loading weights", flush=True)
if options.child_pid:  # a worker that outlives its parent unless the whole group ends
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    options.child_pid.write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
if options.behaviour == "crash":
    sys.exit("KVarN: head_size 96 is not supported.")
if options.behaviour == "hang":
    time.sleep(600)
ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
