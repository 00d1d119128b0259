"""Rows that write."""

import os
import random
import threading
import time

from peers import MEMORY_DISK, run_s5cmd, run_sdk
from row import Outcome, Row
from server import BUCKET, MIB, PREFIX, WRITTEN

# Bytes of a part, of mlfs and wherever it can be set.
PART = 16 * MIB
# What overwrites; lab-sdk writes the same.
CHANGED = b"\7" * 4096
SDK_KEY = f"{PREFIX}/{WRITTEN}-sdk"


def write_all(descriptor, *buffers):
    rest = [memoryview(buffer) for buffer in buffers]
    while rest:
        written = os.writev(descriptor, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][written:]


def write_file(path, size):
    """A sequential write in pieces of 1 MiB."""
    data = random.Random(1).randbytes(MIB)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for _ in range(size // MIB):
            write_all(descriptor, data)
    finally:
        os.close(descriptor)


def in_threads(count, items, work):
    """Shares the items out among so many threads; raises the first error."""
    if count == 1:
        for item in items:
            work(item)
        return
    errors = []

    def share(mine):
        try:
            for item in mine:
                work(item)
        except Exception as error:
            errors.append(error)

    # Not waited for if this one takes too long: they end with the mount.
    threads = [threading.Thread(target=share, args=(items[n::count],), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Write(Row):
    unit = "MiB/s until visible (requests at once)"
    discards = True

    def mount(self, mount, server, size):
        server.reset()
        started = time.monotonic()
        write_file(mount.path / WRITTEN, size)
        if mount.stores:
            server.wait_stored({WRITTEN: size})
        seconds = time.monotonic() - started
        extra = f"{server.most_at_once()} at once" if mount.stores else ""
        return Outcome(size / MIB / seconds, size, extra)

    def sdk(self, server, size, signed=False):
        server.reset()
        told, cpu = run_sdk(server, ["put", "--key", SDK_KEY, "--size", size // MIB], size, signed)
        return Outcome(told["mib_per_second"], size, f"{server.most_at_once()} at once"), cpu

    def s5cmd(self, server, size):
        source = MEMORY_DISK / "mlfs-bench-source"
        try:
            write_file(source, size)
            seconds, cpu = run_s5cmd(server, "cp", "-c", 16, "-p", 16, source,
                                     f"s3://{BUCKET}/{PREFIX}/{WRITTEN}-s5")
        finally:
            source.unlink(missing_ok=True)
        return Outcome(size / MIB / seconds, size), cpu / (size / (1 << 30))


class Saved(Row):
    """A model of tensors of 4 MiB, written as a library writes it (calls as strace shows them)."""
    higher_is_better = False
    TENSOR = 4 * MIB

    def save(self, folder, tensors):
        """Writes the file → its name and its bytes."""
        raise NotImplementedError

    def mount(self, mount, server, size):
        folder = mount.path / f"{WRITTEN}-model"
        os.makedirs(folder, exist_ok=True)
        started = time.monotonic()
        name, written = self.save(folder, size // self.TENSOR)
        server.wait_stored({f"{WRITTEN}-model/{name}": written})
        return Outcome(time.monotonic() - started, written)

    def sdk(self, server, size, signed=False):
        told, cpu = run_sdk(server, ["put", "--key", SDK_KEY, "--size", size // MIB], size, signed)
        return Outcome(told["seconds"], size), cpu


class TorchSave(Saved):
    unit = "s until visible, as torch.save"

    def save(self, folder, tensors):
        data = random.Random(1).randbytes(self.TENSOR)
        descriptor = os.open(folder / "model.pt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for index in range(tensors):
                write_all(descriptor, bytes(64 if index else 832), data)
            write_all(descriptor, bytes(1111))
        finally:
            os.close(descriptor)
        return "model.pt", 832 + 64 * (tensors - 1) + tensors * self.TENSOR + 1111


class Safetensors(Saved):
    unit = "s until visible, as safetensors (renamed while open)"
    beside = "torchsave"

    def save(self, folder, tensors):
        data = random.Random(1).randbytes(self.TENSOR)
        size = 404 + tensors * self.TENSOR
        temporary = folder / ".tmpaB3xY9"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size)
            write_all(descriptor, bytes(404))
            for _ in range(tensors):
                write_all(descriptor, data)
            os.rename(temporary, folder / "model.safetensors")
        finally:
            os.close(descriptor)
        return "model.safetensors", size


class Checkpoint(Row):
    higher_is_better = False
    limit = 120
    FILES = 8

    def __init__(self, at_once):
        self.at_once = at_once
        how = "one after the other" if at_once == 1 else f"{at_once} at once"
        self.unit = f"s until visible, {self.FILES} files of 512 MiB, {how}"

    def each(self, size):
        """MiB of each file: 512, and less in proportion where the large file is under 1 GiB."""
        return min(512, size // MIB // 2)

    def mount(self, mount, server, size):
        each = self.each(size)
        folder = f"{WRITTEN}-checkpoint"
        os.makedirs(mount.path / folder, exist_ok=True)
        names = [f"{folder}/shard{index}" for index in range(self.FILES)]
        started = time.monotonic()
        in_threads(self.at_once, names, lambda name: write_file(mount.path / name, each * MIB))
        server.wait_stored(dict.fromkeys(names, each * MIB))
        return self.outcome(time.monotonic() - started, each)

    def sdk(self, server, size, signed=False):
        each = self.each(size)
        told, cpu = run_sdk(server, ["put", "--key", SDK_KEY, "--size", each, "--files", self.FILES,
                                     "--at-once", self.at_once], self.FILES * each * MIB, signed)
        return self.outcome(told["seconds"], each), cpu

    def outcome(self, seconds, each):
        return Outcome(seconds, self.FILES * each * MIB, f"of {each} MiB" if each < 512 else "")


class Small(Row):
    higher_is_better = False
    limit = 120
    FILES, BYTES = 500, 100 * 1024

    def __init__(self, at_once):
        self.at_once = at_once
        writers = "one writer" if at_once == 1 else f"{at_once} writers"
        self.unit = f"s until visible, {self.FILES} files of 100 KiB, {writers}"

    def mount(self, mount, server, size):
        data = os.urandom(self.BYTES)
        folder = f"{WRITTEN}-small"
        os.makedirs(mount.path / folder, exist_ok=True)
        names = [f"{folder}/f{index}" for index in range(self.FILES)]

        def write(name):
            with open(mount.path / name, "wb", buffering=0) as file:
                file.write(data)

        started = time.monotonic()
        in_threads(self.at_once, names, write)
        server.wait_stored(dict.fromkeys(names, self.BYTES))
        return Outcome(time.monotonic() - started, self.FILES * self.BYTES)

    def sdk(self, server, size, signed=False):
        moved = self.FILES * self.BYTES
        told, cpu = run_sdk(server, ["small", "--key", SDK_KEY, "--files", self.FILES, "--size",
                                     self.BYTES // 1024, "--in-flight", self.at_once], moved, signed)
        return Outcome(told["seconds"], moved), cpu


class Append(Row):
    """External data as onnx saves it."""
    TENSORS = 300
    unit = f"x bytes sent, {TENSORS} tensors of 1 MiB appended, each by open/write/close"
    higher_is_better = False
    measure = "bytes"
    limit = 400
    SIZE = TENSORS * MIB

    def mount(self, mount, server, size):
        data = random.Random(1).randbytes(MIB)
        server.reset()
        started = time.monotonic()
        for _ in range(self.TENSORS):
            descriptor = os.open(mount.path / WRITTEN, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.lseek(descriptor, 0, os.SEEK_END)
                write_all(descriptor, data)
            finally:
                os.close(descriptor)
        server.wait_stored({WRITTEN: self.SIZE})
        return self.outcome(server, time.monotonic() - started)

    def sdk(self, server, size, signed=False):
        server.reset()
        told, cpu = run_sdk(server, ["put", "--key", SDK_KEY, "--size", self.TENSORS], self.SIZE, signed)
        return self.outcome(server, told["seconds"]), cpu

    def outcome(self, server, seconds):
        return Outcome(server.sent() / self.SIZE, self.SIZE, seconds=seconds)


class Overwrite(Row):
    unit = "parts of 16 MiB sent, 4 KiB overwritten in 1 GiB across the edge of two parts"
    higher_is_better = False
    measure = "bytes"
    limit = 120
    SIZE, OFFSET, BYTES = 1 << 30, (512 << 20) - 2048, len(CHANGED)

    def mount(self, mount, server, size):
        server.generate(WRITTEN, self.SIZE)
        _, before = server.objects(WRITTEN)[WRITTEN]
        server.reset()
        started = time.monotonic()
        descriptor = os.open(mount.path / WRITTEN, os.O_WRONLY)
        try:
            assert os.pwrite(descriptor, CHANGED, self.OFFSET) == self.BYTES
        finally:
            os.close(descriptor)
        server.wait_replaced(WRITTEN, before)
        return self.outcome(server, WRITTEN, time.monotonic() - started)

    def sdk(self, server, size, signed=False):
        server.generate(f"{WRITTEN}-sdk", self.SIZE)
        server.reset()
        told, cpu = run_sdk(server, ["overwrite", "--key", SDK_KEY, "--size", self.SIZE // MIB,
                                     "--offset", self.OFFSET], 0, signed)
        return self.outcome(server, f"{WRITTEN}-sdk", told["seconds"]), cpu

    def outcome(self, server, name, seconds):
        sent, fetched = server.sent() / PART, server.fetched() / PART
        assert server.read(name, self.OFFSET, self.BYTES) == CHANGED, "was not overwritten"
        return Outcome(sent, extra=f"{fetched:.2f} parts fetched", seconds=seconds)
