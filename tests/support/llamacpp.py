"""llama.cpp (package xllamacpp) as another reader of GGUF files, in a process of its own.

It may end the process where a file is wrong. The cache of keys and values is float32, so that what differs
from tinyllm is rounding in products and in the tables that llama.cpp has for GELU, SiLU and exp.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROGRAM = """
import json, sys, urllib.request
import xllamacpp

asked = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx = asked["path"], asked["context"]
parameters.n_parallel, parameters.port = 1, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
parameters.warmup, parameters.verbosity, parameters.swa_full = False, 0, True
server = xllamacpp.Server(parameters)

def post(path, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))

def complete(ids, count, probabilities):
    request = {"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    if probabilities:  # of a token that is a part of a character the server says nothing: take another
        request["logit_bias"] = [[asked["plain"], 10000.0]]
    return post("/completion", request | {"n_probs": probabilities, "cache_prompt": True})

def tokenize(text):
    return post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

found = {"logprobs": [], "greedy": [], "tokens": [tokenize(text) for text in asked["texts"]]}
for end in range(1, asked["positions"] + 1):
    answer = complete(asked["ids"][:end], 1, asked["top"])
    best = answer["completion_probabilities"][0]["top_logprobs"]
    found["logprobs"].append([[each["id"], each["logprob"]] for each in best])
if asked["new"]:
    found["greedy"] = complete(asked["ids"], asked["new"], 0)["tokens"]
print("\\nFOUND " + json.dumps(found), flush=True)
"""


@dataclass
class Found:
    """Per position the ``ids`` (T, K) of the most likely tokens and their ``logprobs``; tokens."""

    ids: np.ndarray
    logprobs: np.ndarray
    greedy: list[int]
    tokens: list[list[int]]


def run_llamacpp(path: Path, ids=(), positions=0, top=64, new=0, texts=(), context=512, plain=64) -> Found:
    """What llama.cpp makes of a file: after each of the first ``positions`` prefixes of the ids, of all of
    them with ``new`` greedy tokens, and of texts as tokens; ``plain`` is the id of any whole character.

    RuntimeError with its messages if it fails.
    """
    asked = dict(path=str(path), ids=[int(i) for i in ids], positions=positions, top=top, new=new)
    asked |= dict(texts=list(texts), context=context, plain=plain)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise RuntimeError(
            f"llama.cpp failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    found = json.loads(lines[0].removeprefix("FOUND "))
    pairs = np.array(found["logprobs"]).reshape(positions, -1 if positions else 0, 2)
    return Found(pairs[..., 0].astype(int), pairs[..., 1], found["greedy"], found["tokens"])
