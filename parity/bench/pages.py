"""The table of the front page: the ratios to PyTorch and transformers that stand in this folder's page.

``bench train --write`` and ``bench decode --write`` make it anew after their own tables, so that no figure of
the front page is copied by hand.
"""

from parity import tables
from parity.bench.targets import MEMORY, NOT_MEASURED, TIME

FRONT_PAGE = tables.PAGE.parents[1] / "README.md"

# What stands in the first column -> the row of ``bench train`` or of ``bench decode``
TRAINING = {
    "training GPT-2 124M, 4 × 256 tokens": "gpt2-124m",
    "a Llama of its size, 4 × 256": "llama-124m",
    "6 layers of 384 channels, 16 × 256": "small",
    "3 layers of 256, 32 × 128 (the first run)": "first-run",
    "4 layers of 128, 4 × 256": "4x128-1024",
    "2 layers of 64, 8 × 64": "2x64-512",
}
DECODING = {
    "SmolLM2-135M: generating a token": "a token",
    "SmolLM2-135M: reading 512 tokens": "prefill of 512 tokens",
}
INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512"}  # -> the tables' names


def write() -> None:
    """Replace the table of the front page by one of what the page of the benchmarks says now."""
    tables.write(FRONT_PAGE, "speed", front_page())


def front_page() -> str:
    """The table: for each work and instruction set tinyllm's time divided by PyTorch's, and its memory."""
    train, decode = [], []  # for each instruction set: (work, cost, against) -> ratio; name -> ratio
    for name in INSTRUCTIONS.values():
        *_, ratios = tables.cells(tables.read(tables.BENCH_PAGE, f"train-{name}")) or [[]]
        train.append({(work, cost, against): ratio for work, cost, against, ratio in ratios})
        comparisons, *_ = tables.cells(tables.read(tables.BENCH_PAGE, f"decode-{name}")) or [[]]
        decode.append({row[0]: row[5] for row in comparisons})
    rows = []
    for label, work in TRAINING.items():
        times = [ratio.get((work, TIME, "torch-eager"), NOT_MEASURED) for ratio in train]
        memory = [ratio.get((work, MEMORY, "torch-eager"), "–").split()[0] for ratio in train]
        rows.append((label, *times, ", ".join(dict.fromkeys(memory))))
    rows += [
        (label, *(ratio.get(name, NOT_MEASURED) for ratio in decode), "–") for label, name in DECODING.items()
    ]
    return tables.markdown(("", *(f"time, {name}" for name in INSTRUCTIONS), "peak memory"), rows)
