"""The house rules that a reader relies on: which file may import which, and what a file may speak of.

Each rule is a function over source text that returns what breaks it; each is tried on a planted violation.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports point one way: from a later line to the same or an earlier one.
LAYERS = """
version errors checks files
backend
tensor tensor_ops tensor_einsum
functional
nn
optim
weights
tokenizers
models
data
inference
training
tools
serve
cli
""".strip().splitlines()

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}

# What `import tinyllm` must not bring with it, and nothing in it may import but within a function
HEAVY = {"torch", "transformers", "scipy", "pytest", "matplotlib"}

# A learner reads these: how and in which type they run on a GPU is the backend's business.
TEXTBOOK = ["linear", "norms", "activations", "attention", "losses", "composed"]

HARDWARE = """gpu gpus on_gpu cuda cupy device devices autocast tf32 bfloat16 float16 16-bit is_short is_half
half-precision half precision wide product_dtype multiply_in"""

LONGEST, LONGEST_ARCHITECTURE = 400, 200  # lines

NOT_ARCHITECTURES = {
    "__init__",
    "base",
    "cache",
    "classifier",
    "packed",
    "rope",
    "saving",
    "sizes",
    "windows",
}  # of models/


def sources(folder: str) -> dict[str, str]:
    """Every Python file below a folder: its name as a module -> its text. A package goes by its own name."""
    found = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file.read_text(encoding="utf-8")
    return found


def imports(text: str, modules: set[str], in_functions: bool = True) -> set[str]:
    """The modules that a file imports: the innermost one named, where ``modules`` has it.

    ``from tinyllm import nn`` is ``tinyllm.nn``, and ``from tinyllm import Tensor`` is ``tinyllm``.
    """
    found, nodes = set(), [ast.parse(text)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in inner}
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


def graph(files: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, also within a function."""
    return {name: imports(text, {*files}) & {*files} - {name} for name, text in files.items()}


def upward_imports(files: dict[str, str]) -> list[str]:
    """Imports of what stands later in ``LAYERS``, or in none of them."""

    def rank(module: str) -> int | None:
        return RANK.get(module.split(".")[1]) if "." in module else None

    below = {name: used for name, used in graph(files).items() if name not in ("tinyllm", "tinyllm.__main__")}
    unknown = [f"{name} is in no layer" for name in below if rank(name) is None]
    return unknown + [
        f"{name} imports {other}"
        for name, used in below.items()
        for other in sorted(used)
        if rank(name) is not None and (rank(other) is None or rank(other) > rank(name))
    ]


def import_cycle(files: dict[str, str]) -> list[str]:
    """The modules of one cycle of imports, the first also last; empty if there is none."""
    try:
        TopologicalSorter(graph(files)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def heavy_imports(files: dict[str, str]) -> list[str]:
    """Imports of ``HEAVY`` that happen when a file is imported."""
    return [
        f"{name} imports {other}"
        for name, text in files.items()
        for other in sorted(imports(text, {*files}, in_functions=False))
        if other.split(".")[0] in HEAVY
    ]


def hardware_words(text: str) -> list[str]:
    """The words about devices and 16-bit types in code, comments and docstrings; ``_`` parts words."""
    words = sorted(HARDWARE.replace("half precision", "half_precision").split(), key=len, reverse=True)
    pattern = "|".join(map(re.escape, words)).replace("half_precision", r"half\s+precision")
    return re.findall(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", text.lower())


def too_long(files: dict[str, str]) -> list[str]:
    """Files that are longer than a file may be."""
    lengths = {name: text.count("\n") for name, text in files.items()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > limit(name)]


def limit(module: str) -> int:
    """Of an architecture of ``tinyllm.models`` less than of other files."""
    package, _, name = module.rpartition(".")
    architecture = package == "tinyllm.models" and name not in NOT_ARCHITECTURES
    return LONGEST_ARCHITECTURE if architecture else LONGEST


def imports_of_tests(files: dict[str, str]) -> list[str]:
    """Test files that import another, by whatever path Python finds it."""
    return [
        f"{name} imports {other}"
        for name, text in files.items()
        for other in sorted(imports(text, {*files} | {file.removeprefix("tests.") for file in files}))
        if other.rpartition(".")[2].startswith("test_")
    ]


# ------------------------------------------------------------------------------ they are kept


def test_imports_point_one_way():
    assert upward_imports(sources("tinyllm")) == []


def test_there_is_no_import_cycle():
    assert import_cycle(sources("tinyllm")) == []


def test_tinyllm_imports_nothing_heavy_and_nothing_of_the_proof():
    files = sources("tinyllm")
    assert heavy_imports(files) == []
    others = {other.split(".")[0] for text in files.values() for other in imports(text, {*files})}
    assert not others & {"parity", "tests", "support"}


@pytest.mark.parametrize("name", [name for name in sources("tinyllm/models") if name != "tinyllm.models"])
def test_a_model_speaks_of_no_device_and_of_no_16_bit_type(name):
    assert hardware_words(sources("tinyllm/models")[name]) == []


@pytest.mark.parametrize("name", TEXTBOOK)
def test_a_textbook_op_speaks_of_no_device_and_of_no_16_bit_type(name):
    assert hardware_words(sources("tinyllm/functional")[f"tinyllm.functional.{name}"]) == []


@pytest.mark.parametrize("folder", ["tinyllm", "parity"])
def test_files_are_short(folder):
    assert too_long(sources(folder)) == []


def test_chapters_are_short_without_their_prose():
    code = {name: re.sub(r"^#.*\n", "", text, flags=re.M) for name, text in sources("examples").items()}
    assert too_long(code) == []


def test_no_test_file_imports_another():
    assert imports_of_tests(sources("tests")) == []


# ------------------------------------------------------------------- and a violation is found


@pytest.mark.parametrize(
    "planted",
    [
        "from tinyllm.models import GPT2",
        "import tinyllm.models",
        "from tinyllm import models",
        "def f():\n    from tinyllm.models.gpt2 import GPT2",
    ],
)
def test_an_upward_import_is_found(planted):
    files = {"tinyllm": "", "tinyllm.models": "", "tinyllm.models.gpt2": "", "tinyllm.nn": planted}
    (found,) = upward_imports(files)
    assert found.startswith("tinyllm.nn imports tinyllm.models")
    assert upward_imports(files | {"tinyllm.nn": "", "tinyllm.cli": planted}) == []


def test_an_import_of_the_whole_package_and_a_file_without_a_layer_are_found():
    files = {"tinyllm": "", "tinyllm.nn": "from tinyllm import Tensor", "tinyllm.utils": ""}
    assert upward_imports(files) == ["tinyllm.utils is in no layer", "tinyllm.nn imports tinyllm"]


def test_a_cycle_is_found_also_a_lazy_one():
    lazy = "def f():\n    from tinyllm.b import g"
    files = {"tinyllm.a": lazy, "tinyllm.b": "from tinyllm import c", "tinyllm.c": "import tinyllm.a"}
    assert set(import_cycle(files)) == {"tinyllm.a", "tinyllm.b", "tinyllm.c"}
    assert import_cycle(files | {"tinyllm.c": "import numpy"}) == []


def test_a_heavy_import_is_found_but_not_within_a_function():
    files = {
        "tinyllm.a": "import torch.nn",
        "tinyllm.b": "class A:\n    from scipy import special",
        "tinyllm.c": "try:\n    import pytest\nexcept ImportError:\n    pass",
        "tinyllm.d": "def f():\n    import torch",
    }
    assert [found.split()[0] for found in heavy_imports(files)] == ["tinyllm.a", "tinyllm.b", "tinyllm.c"]


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("x = 1  # a GPU waits", ["gpu"]),
        ('"""The device\'s type."""', ["device"]),
        ("from tinyllm.backend.cuda.launch import on_gpu", ["cuda", "on_gpu"]),
        ("x.astype(wide(x.dtype))", ["wide"]),
        ("dtype = 'bfloat16'", ["bfloat16"]),
        ("# in half precision or a half-precision\n# type", ["half precision", "half-precision"]),
        ("half = D // 2  # of a wider layer; a short device_id", ["device"]),
        ("half = D // 2  # of a wider layer, and a shorter one", []),
    ],
)
def test_a_word_about_hardware_is_found(planted, found):
    assert hardware_words(planted) == found


def test_a_long_file_is_found():
    lines = "x = 1\n" * 201
    files = {"tinyllm.models.gpt2": lines, "tinyllm.models.base": lines, "tinyllm.nn": lines * 2}
    assert too_long(files) == ["tinyllm.models.gpt2 has 201 lines", "tinyllm.nn has 402 lines"]


@pytest.mark.parametrize(
    "planted", ["from models import test_gpt2", "from test_files import x", "import tests.nn.test_nn as t"]
)
def test_a_test_that_imports_a_test_is_found(planted):
    files = {"tests.models.test_gpt2": "", "tests.test_files": "", "tests.test_a": planted}
    assert len(imports_of_tests(files)) == 1
