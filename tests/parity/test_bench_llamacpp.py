"""The GGUF files that ``bench decode`` gives to llama.cpp."""

import numpy as np
import pytest

from parity.bench import llamacpp

gguf = pytest.importorskip("gguf")

MATRIX = np.linspace(-1, 1, 256, dtype=np.float32).reshape(8, 32)
VECTOR = np.full(8, 1 / 3, np.float32)


def write(path, kind):
    """A file with one matrix of this type, one vector in float32, and keys of every form."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ä"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("matrix", gguf.quantize(MATRIX, kind), raw_dtype=kind)
    writer.add_tensor("vector", VECTOR)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_quantized_file_is_measured_as_it_is_and_in_float16(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_1
    source = write(tmp_path / "model.gguf", kind)
    files = llamacpp.files(source, tmp_path)
    assert files == {"llama.cpp F16": str(tmp_path / "f16.gguf"), "llama.cpp Q4_1": str(source)}

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(files["llama.cpp F16"])
    tensors = {tensor.name: tensor.data for tensor in after.tensors}
    dequantized = gguf.dequantize(before.tensors[0].data, kind)
    assert tensors["matrix"].dtype == np.float16 and tensors["vector"].dtype == np.float32
    np.testing.assert_array_equal(tensors["matrix"], dequantized.astype(np.float16))
    np.testing.assert_array_equal(tensors["vector"], VECTOR)

    contents = {name: field.contents() for name, field in after.fields.items() if "GGUF." not in name}
    expected = {name: field.contents() for name, field in before.fields.items() if "GGUF." not in name}
    del expected["general.quantization_version"]
    assert contents == expected | {"general.file_type": gguf.LlamaFileType.MOSTLY_F16}


def test_a_float16_file_is_measured_once(tmp_path):
    source = write(tmp_path / "model.gguf", gguf.GGMLQuantizationType.F16)
    assert llamacpp.files(source, tmp_path) == {"llama.cpp F16": str(source)}
