"""tinyllm: language models you can read, in NumPy, every number proven against PyTorch."""

import os
import sys

if "numpy" not in sys.modules:  # OpenBLAS reads it when it is loaded; device.step_of_few_rows says why
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

from tinyllm import functional, nn, optim
from tinyllm.backend.random import manual_seed
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.models import GPT2, GPT2Config, Llama, LlamaConfig, load_model
from tinyllm.tensor import Tensor, concatenate, einsum, no_grad, split, stack, where
from tinyllm.tokenizers import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "Error",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Tensor",
    "concatenate",
    "einsum",
    "functional",
    "generate",
    "load_model",
    "load_tokenizer",
    "manual_seed",
    "nn",
    "no_grad",
    "optim",
    "split",
    "stack",
    "where",
]
