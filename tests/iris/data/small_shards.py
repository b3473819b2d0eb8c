"""Tiny WebDataset shards for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def jpeg(number, width=20, height=16):
    """A picture whose colour tells its number, as JPEG bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, 255 - number % 256, 10)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_shard(path, numbers, **changed):
    """Rows jpg, txt, json; ``changed``: {"r7": {"txt": None}} leaves a member out or replaces its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            fields = {"score": number / 10, "class": number % 3, "caption": f"field {number}"}
            members = {"jpg": jpeg(number), "txt": f"row {number}".encode(), "json": json.dumps(fields).encode()}
            for ending, data in (members | changed.get(f"r{number}", {})).items():
                if data is not None:
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def write_shards(folder, shards=4, rows=10):
    for i in range(shards):
        write_shard(folder / f"s-{i:03d}.tar", range(i * rows, (i + 1) * rows))
    return str(folder / f"s-{{000..{shards - 1:03d}}}.tar")


def numbers(examples):
    return [int(example.caption.split()[1]) for example in examples]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
