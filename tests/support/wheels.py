"""Wheels that pip accepts as those of a published file, in a folder that is pip's only index."""

import dataclasses
import hashlib
import os
import zipfile

import pytest

from tinyllm.errors import Error


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder, wheel, content):
    """Write a wheel that pip accepts as the one described by ``wheel``, with this content of its member."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{wheel.file.rpartition('-py3')[0]}.dist-info"
    files = {
        wheel.member: content,
        f"{wheel.member.partition('/')[0]}/__init__.py": "raise SystemExit('it was run')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {wheel.package}\nVersion: {wheel.version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / wheel.file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / wheel.file


def as_made(source, folder, contents):
    """A packaged file with the sizes and checksums of the wheels in a folder, and of these contents."""
    made = [(wheel, (folder / wheel.file).read_bytes()) for wheel in source.wheels]
    wheels = [dataclasses.replace(wheel, size=len(data), sha256=sha256(data)) for wheel, data in made]
    whole = b"".join(contents)
    return dataclasses.replace(source, size=len(whole), sha256=sha256(whole), wheels=tuple(wheels))


def only_index(monkeypatch, folder):
    """Make the folder pip's only index."""
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def message_of(call, *args, **kwargs):
    """The message of the error that a call raises: one line, without a full stop."""
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    return text


def contents(folder):
    """The names in a folder, none if there is no folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
