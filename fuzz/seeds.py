"""Small valid files of each format, to begin from: seeds.py FOLDER. Only the standard library.

Eight zeros behind each say that the store tells the file's own size.
"""

import io
import json
import struct
import sys
import zipfile
from pathlib import Path

CLAIM = bytes(8)


def safetensors(count: int, size: int, metadata: bool) -> bytes:
    header = {"__metadata__": {"format": "pt"}} if metadata else {}
    for number in range(count):
        place = [number * size, (number + 1) * size]
        header[f"layer.{number}.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": place}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(count * size)


def many_names(count: int) -> bytes:
    content = json.dumps({f"{number:x}": {} for number in range(count)}, separators=(",", ":")).encode()
    return struct.pack("<Q", len(content)) + content


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


# Types of GGUF's metadata values.
UINT8, UINT32, STRING, ARRAY, FLOAT64 = 0, 4, 8, 9, 12


def gguf(version: int, count: int, words: int, alignment: int) -> bytes:
    entries = [
        text("general.architecture") + struct.pack("<I", STRING) + text("llama"),
        text("general.alignment") + struct.pack("<II", UINT32, alignment),
        text("a.flag") + struct.pack("<IB", UINT8, 1),
        text("a.number") + struct.pack("<Id", FLOAT64, 0.5),
        text("tokens") + struct.pack("<IIQ", ARRAY, STRING, words)
        + b"".join(text(f"word {number}") for number in range(words)),
        text("scores") + struct.pack("<IIQ", ARRAY, UINT32, words) + bytes(4 * words),
        text("nested") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", UINT8, 3) + bytes(3),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, count, len(entries)) + b"".join(entries)
    for number in range(count):
        head += text(f"blk.{number}.weight") + struct.pack("<IQQI", 2, 4, 8, 0)
        head += struct.pack("<Q", number * alignment)
    head += bytes(-len(head) % alignment)
    return head + bytes(count * alignment)


def container(count: int, method: int = zipfile.ZIP_STORED, large: bool = False) -> bytes:
    file = io.BytesIO()
    limit = zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT
    if large:
        # As if every number were too large for its place.
        zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT = -1, 0
    with zipfile.ZipFile(file, "w", method) as archive:
        for number in range(count):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            member.compress_type = method
            archive.writestr(member, bytes(number * 50))
    zipfile.ZIP64_LIMIT, zipfile.ZIP_FILECOUNT_LIMIT = limit
    content = file.getvalue()
    if large:
        # The end record, too, as other writers make it.
        content = content[:-14] + b"\xff" * 12 + content[-2:]
    return content


SEEDS = {
    "safetensors": [
        safetensors(0, 0, False),
        safetensors(1, 8, False),
        safetensors(3, 16, True),
        many_names(2000),
    ],
    "gguf": [gguf(3, 0, 0, 32), gguf(2, 1, 2, 32), gguf(3, 3, 3, 64), gguf(3, 2, 3000, 32)],
    "zip": [
        container(0),
        container(1),
        container(3, zipfile.ZIP_DEFLATED),
        container(0, large=True),
        container(3, large=True),
    ],
}

for name, files in SEEDS.items():
    folder = Path(sys.argv[1], name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(files):
        (folder / str(number)).write_bytes(content + CLAIM)
