"""Files for llama.cpp, which ``bench decode`` measures beside tinyllm and transformers, for honesty.

It is another kind of program, written in C++ for inference, and it decodes quantized weights as they are,
where tinyllm and transformers compute in float32. So its figures are printed and have no target.
"""

from collections import Counter
from pathlib import Path

import numpy as np


def files(source: Path, folder: Path) -> dict[str, str]:
    """Side -> file: the GGUF file ``source`` as it is, and with its matrices in float16 (in ``folder``)."""
    import gguf

    sizes = Counter()
    for tensor in gguf.GGUFReader(source).tensors:
        sizes[tensor.tensor_type.name] += tensor.n_elements
    most = max(sizes, key=sizes.get)  # the type of most weights
    if most == "F16":
        return {"llama.cpp F16": str(source)}
    write_f16(source, folder / "f16.gguf")
    return {"llama.cpp F16": str(folder / "f16.gguf"), f"llama.cpp {most}": str(source)}


def write_f16(source: Path, path: Path) -> None:
    """Write a copy of a GGUF file with matrices in float16 and vectors in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture").contents())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, field in fields.items():
        if name not in ("general.file_type", "general.quantization_version"):
            kind, *element = field.types
            writer.add_key_value(name, field.contents(), kind, element[0] if element else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
