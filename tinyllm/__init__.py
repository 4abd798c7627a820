"""tinyllm: readable language models in NumPy, with every result checked against PyTorch."""

from tinyllm import backend, functional, nn, optim, training
from tinyllm.backend.random import manual_seed
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.models import GPT2, GPT2Config, Llama, LlamaConfig, load_model
from tinyllm.tensor import Tensor, no_grad
from tinyllm.tensor_einsum import einsum
from tinyllm.tensor_ops import chunk, concatenate, split, stack, where
from tinyllm.tokenizers import load_tokenizer
from tinyllm.version import __version__

__all__ = [
    "GPT2",
    "Error",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Tensor",
    "__version__",
    "backend",
    "chunk",
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
    "training",
    "where",
]
