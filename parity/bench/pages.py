"""The pages that ``--write`` writes: one for each maker of processors, and the table of the front page.

MKL chooses its kernels by the processor's maker, so ratios to PyTorch differ between two processors that have
the same instructions. No figure is copied by hand: the table of the front page is made anew from the pages in
``measured/`` whenever ``bench train --write`` or ``bench decode --write`` has written them.
"""

from pathlib import Path

from parity import tables
from parity.bench.targets import MEMORY, NOT_MEASURED, TIME
from tinyllm.errors import Error

FRONT_PAGE = tables.PAGE.parents[1] / "README.md"
MEASURED = Path(__file__).parent / "measured"

MAKERS = "Intel", "AMD"
INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512"}  # -> the tables' names

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


def page_of(facts: dict) -> Path:
    """``measured/amd.md`` or the like for the facts of ``process.machine()``; ``Error`` if there is none."""
    for maker in MAKERS:
        if maker in facts["cpu"]:
            return MEASURED / f"{maker.lower()}.md"
    raise Error(
        f"--write has pages for processors of {' and '.join(MAKERS)}, not for {facts['cpu']}: write the "
        "result to a file with --json"
    )


def check_pages(table: str, facts: dict) -> None:
    """Raise ``Error`` if this table or the front page's could not be written."""
    tables.check_page(page_of(facts), table)
    tables.check_page(FRONT_PAGE, "speed")


def write_front_page() -> None:
    """Replace the table of the front page by one of what the pages in ``measured/`` say now."""
    tables.write(FRONT_PAGE, "speed", front_page())


def front_page() -> str:
    """The table: for each work, maker and instruction set tinyllm's time divided by PyTorch's; its memory."""
    columns = [(maker, instructions) for maker in MAKERS for instructions in INSTRUCTIONS]
    train, decode = [], []  # for each column: (work, cost, against) -> ratio; name -> ratio
    for maker, instructions in columns:
        page, name = page_of({"cpu": maker}), INSTRUCTIONS[instructions]
        *_, ratios = tables.cells(tables.read(page, f"train-{name}")) or [[]]
        train.append({(work, cost, against): ratio.split()[0] for work, cost, against, ratio in ratios})
        comparisons, *_ = tables.cells(tables.read(page, f"decode-{name}")) or [[]]
        decode.append({row[0]: row[5] for row in comparisons})
    rows = []
    for label, work in TRAINING.items():
        times = [ratio.get((work, TIME, "torch-eager"), NOT_MEASURED) for ratio in train]
        memory = {ratio[key] for ratio in train if (key := (work, MEMORY, "torch-eager")) in ratio}
        rows.append((label, *times, " to ".join(sorted({min(memory), max(memory)})) if memory else "–"))
    rows += [
        (label, *(ratio.get(name, NOT_MEASURED) for ratio in decode), "–") for label, name in DECODING.items()
    ]
    return tables.markdown(("", *map(", ".join, columns), "peak memory"), rows)
