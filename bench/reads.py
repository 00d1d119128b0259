"""Rows that read."""

import mmap
import os
import pathlib
import random
import statistics
import subprocess
import tempfile
import time

from peers import CACHED, MEMORY_DISK, disk_cache, run_s5cmd, run_sdk
from machine import drop_caches, touch_memory
from row import Outcome, Row
from server import BUCKET, FIRST, MANY_SMALL, MIB, PREFIX, RELEASE, SMALL_SIZE, TENSORS, tensor_head
from writes import in_threads

READS = 256


def read_through(path, piece):
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(piece)
        total = 0
        while count := file.readinto(buffer):
            total += count
    return total


def in_page_cache(path):
    """Bytes of a file; a mount may read local disk instead, of which this knows nothing."""
    told = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", path],
                          check=True, capture_output=True, text=True)
    return int(told.stdout)


class Read(Row):
    def __init__(self, piece):
        self.piece = piece
        self.unit = f"MiB/s, reads of {piece // 1024} KiB"

    def mount(self, mount, server, size):
        started = time.monotonic()
        assert read_through(mount.path / "big", self.piece) == size
        return Outcome(size / MIB / (time.monotonic() - started), size)

    def sdk(self, server, size, signed=False):
        if self.piece != MIB:
            return None
        told, cpu = run_sdk(server, ["get", "--key", f"{PREFIX}/big", "--size", size // MIB], size)
        return Outcome(told["mib_per_second"], size), cpu

    def s5cmd(self, server, size):
        if self.piece != MIB:
            return None
        target = MEMORY_DISK / "mlfs-bench-target"
        try:
            seconds, cpu = run_s5cmd(server, "cp", "-c", 16, "-p", 16,
                                     f"s3://{BUCKET}/{PREFIX}/big", target)
        finally:
            target.unlink(missing_ok=True)
        return Outcome(size / MIB / seconds, size), cpu / (size / (1 << 30))


class SecondRead(Row):
    unit = "MiB/s, second read (of what the kernel kept)"

    def mount(self, mount, server, size):
        read_through(mount.path / "big", MIB)
        kept = in_page_cache(mount.path / "big")
        outcome = Read(MIB).mount(mount, server, size)
        return Outcome(outcome.value, size, f"{kept / size:.2%} kept")


class WarmRead(Row):
    unit = "MiB/s, disk cache warm, kernel cache dropped"
    only = CACHED
    TURNS = 3

    def before(self, mount, server, size):
        subprocess.run([RELEASE / "mlfs", "prefetch", mount.path / "big"], check=True,
                       stdout=subprocess.DEVNULL)
        # Whatever is below this machine's disk has it in its cache before either measurement.
        drop_caches()
        read_through(self.data(mount), MIB)

    def data(self, mount):
        data, = disk_cache(mount.mount).glob("v1/*/data")
        return data

    def mount(self, mount, server, size):
        paths = {"local": self.data(mount), "mount": mount.path / "big"}
        rates = {what: [] for what in paths}
        # In turns: each gets what the other one gets of the caches below this machine.
        for _ in range(self.TURNS):
            for what, path in paths.items():
                drop_caches()
                touch_memory()
                started = time.monotonic()
                assert read_through(path, MIB) == size
                rates[what].append(size / MIB / (time.monotonic() - started))
        local, mounted = (statistics.median(rates[what]) for what in paths)
        told = f"{mounted / local:.2f} x a local file of {local:.0f} MiB/s"
        return Outcome(mounted, self.TURNS * size, told)


class Touch(Row):
    unit = "MiB/s, pages of a mapping touched"

    def mount(self, mount, server, size):
        started = time.monotonic()
        with open(mount.path / "big", "rb") as file:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
                sum(mapped[offset] for offset in range(0, size, 4096))
        return Outcome(size / MIB / (time.monotonic() - started), size)


class RandomReads(Row):
    unit = f"ms, p50 of {READS} reads of 1 MiB at random in 8 GiB (fetched/asked)"
    higher_is_better = False

    def mount(self, mount, server, size):
        server.reset()
        generator = random.Random(2)
        latencies = []
        with open(mount.path / "huge", "rb", buffering=0) as file:
            for _ in range(READS):
                offset = generator.randrange(0, (8 << 30) - MIB)
                started = time.monotonic()
                os.pread(file.fileno(), MIB, offset)
                latencies.append(time.monotonic() - started)
        moved = READS * MIB
        return Outcome(statistics.median(latencies) * 1000, moved,
                       f"{server.fetched() / moved:.2f} x")

    def sdk(self, server, size, signed=False):
        told, cpu = run_sdk(server, ["random", "--key", f"{PREFIX}/huge", "--size", 8192,
                                     "--in-flight", 1, "--reads", READS], READS * MIB)
        return Outcome(told["p50_ms"], READS * MIB), cpu


class RandomThreads(Row):
    THREADS, EACH, LENGTH = 8, 30, 4 * MIB
    unit = "MiB/s, 8 threads, each 30 reads of 4 MiB at random in 8 GiB (fetched/asked)"

    def mount(self, mount, server, size):
        server.reset()
        generator = random.Random(3)
        reads = self.THREADS * self.EACH
        offsets = [generator.randrange(0, (8 << 30) - self.LENGTH) for _ in range(reads)]
        started = time.monotonic()
        with open(mount.path / "huge", "rb", buffering=0) as file:
            in_threads(self.THREADS, offsets,
                       lambda offset: os.pread(file.fileno(), self.LENGTH, offset))
        seconds = time.monotonic() - started
        moved = reads * self.LENGTH
        return Outcome(moved / MIB / seconds, moved, f"{server.fetched() / moved:.2f} x")

    def sdk(self, server, size, signed=False):
        moved = self.THREADS * self.EACH * self.LENGTH
        told, cpu = run_sdk(server, ["random", "--key", f"{PREFIX}/huge", "--size", 8192,
                                     "--range", self.LENGTH // 1024, "--in-flight", self.THREADS,
                                     "--reads", self.THREADS * self.EACH], moved)
        return Outcome(told["mib_per_second"], moved), cpu


class Parts(Row):
    THREADS = 4
    unit = f"MiB/s, {THREADS} threads, each reads a part of the file (fetched/asked)"

    def mount(self, mount, server, size):
        server.reset()
        part = -(-size // (self.THREADS * MIB)) * MIB

        def read_part(start):
            with open(mount.path / "big", "rb", buffering=0) as file:
                for offset in range(start, min(start + part, size), MIB):
                    assert len(os.pread(file.fileno(), MIB, offset)) == MIB

        started = time.monotonic()
        in_threads(self.THREADS, range(0, size, part), read_part)
        seconds = time.monotonic() - started
        return Outcome(size / MIB / seconds, size, f"{server.fetched() / size:.2f} x")


class Turns(Row):
    THREADS, LENGTH = 8, 16 * MIB
    unit = f"MiB/s, {THREADS} threads, each takes the next 16 MiB that nobody has begun (fetched/asked)"

    def mount(self, mount, server, size):
        server.reset()
        pieces = iter(range(0, size, self.LENGTH))

        def read_pieces(_):
            with open(mount.path / "big", "rb", buffering=0) as file:
                for start in pieces:
                    for offset in range(start, min(start + self.LENGTH, size), MIB):
                        assert len(os.pread(file.fileno(), MIB, offset)) == MIB

        started = time.monotonic()
        in_threads(self.THREADS, range(self.THREADS), read_pieces)
        seconds = time.monotonic() - started
        return Outcome(size / MIB / seconds, size, f"{server.fetched() / size:.2f} x")


class FirstByte(Row):
    unit = f"ms, p50 of {FIRST} files opened and their first byte read, once they were listed"
    higher_is_better = False

    def mount(self, mount, server, size):
        latencies = []
        for entry in sorted(os.scandir(mount.path / "first"), key=lambda entry: entry.name):
            started = time.monotonic()
            with open(entry.path, "rb", buffering=0) as file:
                file.read(1)
            latencies.append(time.monotonic() - started)
        assert len(latencies) == FIRST
        return Outcome(statistics.median(latencies) * 1000)

    def sdk(self, server, size, signed=False):
        told, cpu = run_sdk(server, ["random", "--key", f"{PREFIX}/huge", "--size", 8192,
                                     "--range", 32, "--in-flight", 1, "--reads", FIRST], 0)
        return Outcome(told["p50_ms"]), cpu


class SmallReads(Row):
    unit = f"s, {MANY_SMALL} files of {SMALL_SIZE // 1024} KiB read by 8 threads"
    higher_is_better = False

    def mount(self, mount, server, size):
        names = [mount.path / f"small/f{index:04}" for index in range(MANY_SMALL)]
        started = time.monotonic()
        in_threads(8, names, lambda name: read_through(name, MIB))
        return Outcome(time.monotonic() - started, MANY_SMALL * SMALL_SIZE)

    def sdk(self, server, size, signed=False):
        moved = MANY_SMALL * SMALL_SIZE
        told, cpu = run_sdk(server, ["objects", "--key", f"{PREFIX}/small/f", "--in-flight", 8,
                                     "--files", MANY_SMALL, "--size", SMALL_SIZE // 1024], moved)
        return Outcome(told["seconds"], moved), cpu


class LoadFile(Row):
    SIZE = 2 << 30
    unit = "MiB/s, safetensors' load_file of 2 GiB in 32 tensors"

    def before(self, mount, server, size):
        self.in_memory = self.local()

    def mount(self, mount, server, size):
        rate = self.load(mount.path / "load.safetensors")
        return Outcome(rate, self.SIZE, f"{rate / self.in_memory:.2f} x a file in memory")

    def load(self, path):
        from safetensors.numpy import load_file

        started = time.monotonic()
        tensors = load_file(path)
        seconds = time.monotonic() - started
        assert sum(tensor.nbytes for tensor in tensors.values()) == self.SIZE
        return self.SIZE / MIB / seconds

    def local(self):
        """What the loader itself does, when it has to wait for nothing."""
        path = MEMORY_DISK / "mlfs-bench-load.safetensors"
        piece = bytes(range(256)) * (MIB // 256)
        try:
            with open(path, "wb") as file:
                file.write(tensor_head(32))
                for _ in range(self.SIZE // MIB):
                    file.write(piece)
            return self.load(path)
        finally:
            path.unlink(missing_ok=True)

    def sdk(self, server, size, signed=False):
        told, cpu = run_sdk(server, ["get", "--key", f"{PREFIX}/load.safetensors",
                                     "--size", 2048], 2 << 30)
        return Outcome(told["mib_per_second"], 2 << 30), cpu


class Tensor(Row):
    unit = "s, header and one 64 MiB tensor of 8 GiB, whose name was looked up (fetched/needed)"
    higher_is_better = False
    INDEX = 63

    def mount(self, mount, server, size):
        os.stat(mount.path / "m.safetensors")
        server.reset()
        start = len(tensor_head()) + self.INDEX * 64 * MIB
        began = time.monotonic()
        with open(mount.path / "m.safetensors", "rb", buffering=0) as file:
            os.pread(file.fileno(), int.from_bytes(os.pread(file.fileno(), 8, 0), "little"), 8)
            for piece in range(64):
                os.pread(file.fileno(), MIB, start + piece * MIB)
        seconds = time.monotonic() - began
        return Outcome(seconds, 64 * MIB, f"{server.fetched() / (64 * MIB):.2f} x")

    def sdk(self, server, size, signed=False):
        told, cpu = self.fetch(server)
        return Outcome(told["seconds"], 64 * MIB), cpu

    def fetch(self, server, *more):
        return run_sdk(server, ["tensor", "--key", f"{PREFIX}/m.safetensors", "--size", 64,
                                "--index", self.INDEX, *more], 64 * MIB)


class Member(Tensor):
    """The same of a file of torch's, by torch; the SDK as in `tensor`."""
    unit = "s, torch.load(mmap=True) of 8 GiB and one 64 MiB tensor of it (fetched/needed)"

    def before(self, mount, server, size):
        import torch

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "m.pt"
            # Holes where the tensors' bytes would be.
            with torch.serialization.skip_data():
                tensors = {f"t{index}": torch.empty(64 * MIB, dtype=torch.uint8)
                           for index in range(TENSORS)}
                torch.save(tensors, path)
            server.generate_around("m.pt", path.stat().st_size, written(path))

    def mount(self, mount, server, size):
        import torch

        os.stat(mount.path / "m.pt")
        server.reset()
        began = time.monotonic()
        tensors = torch.load(mount.path / "m.pt", mmap=True)
        tensors[f"t{self.INDEX}"].clone()
        seconds = time.monotonic() - began
        return Outcome(seconds, 64 * MIB, f"{server.fetched() / (64 * MIB):.2f} x")

    def sdk(self, server, size, signed=False):
        outcome, cpu = super().sdk(server, size)
        looking, _ = self.fetch(server, "--looks", TENSORS)
        outcome.extra = f"{looking['seconds']:.3f} s with {TENSORS} looks"
        return outcome, cpu


def written(path):
    """What a file has between its holes: where each piece begins → its bytes."""
    pieces, end = {}, 0
    with open(path, "rb", buffering=0) as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return pieces
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            pieces[start] = os.pread(file.fileno(), end - start, start)


class List(Row):
    unit = "s, readdir and stat of 10 000"
    higher_is_better = False

    def mount(self, mount, server, size):
        started = time.monotonic()
        with os.scandir(mount.path / "many") as entries:
            count = sum(entry.stat().st_size >= 0 for entry in entries)
        assert count == 10_000, count
        return Outcome(time.monotonic() - started)

    def sdk(self, server, size, signed=False):
        told, cpu = run_sdk(server, ["list", "--key", f"{PREFIX}/many/"], 0)
        return Outcome(told["seconds"]), cpu

    def s5cmd(self, server, size):
        seconds, cpu = run_s5cmd(server, "ls", f"s3://{BUCKET}/{PREFIX}/many/*")
        return Outcome(seconds), cpu
