"""The GGUF container: metadata and the table of tensors, read with every count and offset checked.

The format is ggml's docs/gguf.md. `gguf.GGUFReader` trusts what it reads and makes an object of every string, which takes seconds
for a vocabulary; this reader takes a fraction of one and refuses what does not fit the file.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

from .files import CheckpointError, brief, mapped

# Value types of the metadata: number -> format for struct (8 is a string, 9 an array).
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """One row of the tensor table."""

    type: int  # ggml's number
    shape: tuple  # slowest axis first, as torch has it
    offset: int  # in bytes from the start of the file
    size: int  # bytes


def read_gguf(path):
    """(metadata, tensors) of a GGUF file: a dict of plain Python values and a dict of TensorInfo."""
    try:
        size = path.stat().st_size
        cursor = _Cursor(path, size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: begins with {magic!r}, expected b'GGUF'")
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version is {version}, expected 2 or 3 in little-endian order")
    rows = cursor.count("number of tensors", least=24)
    pairs = cursor.count("number of metadata entries", least=13)
    metadata = {}
    for _ in range(pairs):
        key = cursor.string("metadata key")
        if key in metadata:
            raise CheckpointError(f"{path}: metadata {brief(key)} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
    table = {}
    for _ in range(rows):
        name = cursor.string("tensor name")
        if name in table:
            raise CheckpointError(f"{path}: tensor {brief(name)} occurs twice")
        axes = cursor.scalar("I", name)
        if not 1 <= axes <= 4:
            raise CheckpointError(f"{path}: tensor {brief(name)} has {axes} axes, expected 1 to 4")
        shape = tuple(cursor.scalar("Q", name) for _ in range(axes))[::-1]
        table[name] = (cursor.scalar("I", name), shape, cursor.scalar("Q", name))
    return metadata, _placed(path, size, table, metadata.get("general.alignment", 32), cursor.position)


def package(path):
    """The package gguf, which knows the types of tensors; a CheckpointError about the file where it is not installed."""
    try:
        import gguf  # takes a third of a second: not before there is a file
    except ImportError:
        raise CheckpointError(f"{path}: is a GGUF file, which needs the package gguf: pip install gguf") from None
    return gguf


def _placed(path, size, table, alignment, end):
    """TensorInfo for each (type, shape, relative offset), all within the file and none upon another."""
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {brief(alignment)}, expected a power of two of at least 8")
    start = -(-end // alignment) * alignment
    block_sizes = {int(kind): sizes for kind, sizes in package(path).GGML_QUANT_SIZES.items()}
    tensors = {}
    for name, (kind, shape, offset) in table.items():
        where = f"{path}: tensor {brief(name)}"
        if kind not in block_sizes:
            raise CheckpointError(f"{where}: type is {kind}, which this version of gguf does not know")
        per_block, block_bytes = block_sizes[kind]
        if 0 in shape or shape[-1] % per_block:
            raise CheckpointError(f"{where}: shape is {brief(shape)}, expected rows of a multiple of {per_block}")
        if offset % alignment:
            raise CheckpointError(f"{where}: offset is {offset}, expected a multiple of {alignment}")
        tensors[name] = TensorInfo(kind, shape, start + offset, math.prod(shape) // per_block * block_bytes)
    reached, before = start, None
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < reached:
            raise CheckpointError(f"{path}: tensor {brief(name)} lies upon tensor {brief(before)}")
        reached, before = tensor.offset + tensor.size, name
    if reached > size:
        raise CheckpointError(f"{path}: tensor {brief(before)} ends at byte {reached}, but the file has {size}: is it cut short?")
    return tensors


class _Cursor:
    """Reads little-endian values from the front of a file and never past its end."""

    def __init__(self, path, size):
        self.path, self.size, self.position = path, size, 0
        with open(path, "rb") as file:
            self.data = mapped(file, 0, size)

    def take(self, size):
        if size > self.size - self.position:
            raise CheckpointError(f"{self.path}: ends at byte {self.size} within its header: is it cut short?")
        self.position += size
        return bytes(self.data[self.position - size : self.position])

    def scalar(self, code, what):
        value = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        # The decimal that was meant: 1e-05, not the 9.999999747378752e-06 that float32 makes of it.
        return float(str(np.float32(value))) if code == "f" else value

    def count(self, what, least):
        """A number of items of at least `least` bytes each."""
        number = self.scalar("Q", what)
        if number * least > self.size - self.position:
            raise CheckpointError(f"{self.path}: {brief(what)} is {number}, more than its {self.size} bytes hold: is it cut short?")
        return number

    def string(self, what):
        text = self.take(self.count(what, least=1))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {brief(what)} is {brief(text)}, expected UTF-8") from None

    def strings(self, what):
        """An array of strings: a vocabulary has several 100,000, so this is `string` in one tight loop."""
        texts, position, unpack = [], self.position + 8, struct.Struct("<Q").unpack_from
        try:
            for _ in range(self.count(what, least=8)):
                (length,) = unpack(self.data, position)
                end = position + 8 + length
                if end > self.size:
                    raise CheckpointError(f"{self.path}: {brief(what)}: string {len(texts)} ends past the end of the file")
                texts.append(str(self.data[position + 8 : end], "utf-8"))
                position = end
        except (struct.error, UnicodeDecodeError):
            raise CheckpointError(f"{self.path}: {brief(what)}: string {len(texts)} is cut short or not UTF-8") from None
        self.position = position
        return texts

    def value(self, kind, key):
        if kind == STRING:
            return self.string(key)
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], key)
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: metadata {brief(key)} has type {kind}, expected 0 to 12")
        kind = self.scalar("I", key)
        if kind == STRING:
            return self.strings(key)
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: metadata {brief(key)} is an array of type {kind}, expected numbers or strings")
        width = struct.calcsize("<" + SCALARS[kind])
        number = self.count(key, least=width)
        return list(struct.unpack(f"<{number}{SCALARS[kind]}", self.take(number * width)))
