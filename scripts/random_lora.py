"""LoRA adapters with small random weights for a GGUF model, as llama.cpp's LoRA GGUF, which both
ingot and llama-server read. For measurements: what they say means nothing.
"""

import random
import struct
from pathlib import Path

RANK = 16
ALPHA = 32.0
TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

STRING, ARRAY = 8, 9
# Formats of GGUF's other value types: u8, i8, u16, i16, u32, i32, f32, bool, and u64, i64, f64.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16 = 6, 1
ALIGNMENT = 32


class Header:
    """Metadata and the shapes of the tensors of a GGUF file (v2, v3)."""

    def __init__(self, path):
        with open(path, "rb") as self.file:
            if self.file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file")
            _version, tensors, keys = self.take("IQQ")
            self.metadata = {self.string(): self.value(*self.take("I")) for _ in range(keys)}
            self.shapes = dict(self.tensor() for _ in range(tensors))

    def take(self, form):
        return struct.unpack("<" + form, self.file.read(struct.calcsize("<" + form)))

    def string(self):
        return self.file.read(*self.take("Q")).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, length = self.take("IQ")
            if of in SCALARS:
                return self.take(f"{length}{SCALARS[of]}")
            return [self.value(of) for _ in range(length)]
        return self.take(SCALARS[kind])[0]

    def tensor(self):
        name, (dims,) = self.string(), self.take("I")
        shape = self.take(f"{dims}Q")
        self.take("IQ")
        return name, shape


def text(string):
    return struct.pack("<Q", len(string.encode())) + string.encode()


def halves(count, source):
    """`count` random numbers in f16, of a size of 2^-6 to 2^-5 and either sign."""
    numbers = bytearray(source.randbytes(2 * count))
    # The upper bytes keep their sign and upper bits of the mantissa; the exponent is set.
    numbers[1::2] = numbers[1::2].translate(bytes(b & 0x83 | 0x24 for b in range(256)))
    return bytes(numbers)


def write(path, base, seed):
    """Writes an adapter for all linear layers of the model whose header is `base`."""
    source = random.Random(seed)
    tensors = []
    for name, shape in base.shapes.items():
        parts = name.split(".")
        if len(shape) == 2 and parts[0] == "blk" and parts[-2] in TARGETS:
            tensors.append((f"{name}.lora_a", (shape[0], RANK)))
            tensors.append((f"{name}.lora_b", (RANK, shape[1])))
    metadata = {
        "general.type": "adapter",
        "general.architecture": base.metadata["general.architecture"],
        "adapter.type": "lora",
    }
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata) + 1)
    for key, value in metadata.items():
        header += text(key) + struct.pack("<I", STRING) + text(value)
    header += text("adapter.lora.alpha") + struct.pack("<If", F32, ALPHA)
    offset = 0
    for name, shape in tensors:
        header += text(name) + struct.pack("<I2QIQ", 2, *shape, F16, offset)
        offset += padded(2 * shape[0] * shape[1])
    with open(path, "wb") as file:
        file.write(header.ljust(padded(len(header)), b"\0"))
        for _, shape in tensors:
            data = halves(shape[0] * shape[1], source)
            file.write(data.ljust(padded(len(data)), b"\0"))


def padded(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_all(model, folder, count):
    """`count` different adapters for the file `model`, in `folder`: their paths."""
    base = Header(model)
    paths = [Path(folder) / f"a{index}.gguf" for index in range(count)]
    for seed, path in enumerate(paths):
        write(path, base, seed)
    return paths
