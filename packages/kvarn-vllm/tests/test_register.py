from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

import kvarn_vllm
from kvarn_core import PRESETS


def test_vllm_finds_the_plugin() -> None:
    plugins = entry_points(group="vllm.general_plugins")
    [found] = [entry for entry in plugins if entry.name == "kvarn"]
    assert found.load() is kvarn_vllm.register


def test_registering_twice_does_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    kvarn_vllm.register()
    wrapped = EngineArgs.create_engine_config
    kvarn_vllm.register()
    assert EngineArgs.create_engine_config is wrapped


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_line_knows_the_presets(preset: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    kvarn_vllm.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--kv-cache-dtype", preset])
    assert options.kv_cache_dtype == preset


FRESH = """
import sys
import vllm
vllm.__version__ = "0.24.1"
import kvarn_vllm
kvarn_vllm.register()
from vllm import EngineArgs
from vllm.config.cache import CacheDType
from vllm.platforms.cpu import CpuPlatform
print("RESULT", [name for name in CacheDType.__args__ if name.startswith("kvarn")])
print("RESULT", hasattr(CpuPlatform.get_attn_backend_cls, "__kvarn__"))
try:
    EngineArgs(model=sys.argv[1], kv_cache_dtype="kvarn_k4v2_g128").create_engine_config()
except RuntimeError as error:
    print("RESULT", error)
"""


def test_an_unknown_vllm_is_left_alone_and_says_why(tiny_model: Any) -> None:
    """A fresh process: nothing is patched, and debug presets need their variable."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("KVARN_")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tiny_model())],
        env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines == [
        f"RESULT {list(PRESETS)}",
        "RESULT False",
        "RESULT KVarN: vLLM 0.24.1 is not supported (tested: 0.22.0). "
        "Install vllm==0.22.0 or a newer kvarn-vllm.",
    ]


BROKEN = """
import logging, sys
sys.modules["kvarn_core.spec"] = None  # as if kvarn-core were of another version
logging.basicConfig(format="RESULT %(message)s")
import kvarn_vllm
kvarn_vllm.register()
from vllm import EngineArgs
print("RESULT", EngineArgs(model=sys.argv[1]).create_engine_config().cache_config.cache_dtype)
"""


def test_a_plugin_that_cannot_be_loaded_leaves_vllm_alone(tiny_model: Any) -> None:
    command = [sys.executable, "-c", BROKEN, str(tiny_model())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line for line in (done.stderr + done.stdout).splitlines() if "RESULT" in line]
    assert "KVarN: the plugin cannot be loaded (" in said[0]
    assert "Install kvarn-core and kvarn-vllm of one version." in said[0]
    assert said[-1] == "RESULT auto"
