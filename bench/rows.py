"""What is measured. A row runs on a mount, and where it makes sense by the direct clients."""

import hashlib
import mmap
import os
import random
import statistics
import time

from peers import MEMORY_DISK, run_s5cmd, run_sdk
from server import BUCKET, MIB, PREFIX, tensor_head

READS = 128


class Outcome:
    """A value in the row's unit, bytes moved, and what else is worth showing."""

    def __init__(self, value, moved=0, extra=""):
        self.value, self.moved, self.extra = value, moved, extra


class Row:
    unit = ""
    higher_is_better = True
    # Columns that this row is for; None: all.
    only = None
    # Seconds one measurement may take; None: the --limit.
    limit = None

    def mount(self, mount, server, size):
        """Measures through a mount → Outcome."""
        raise NotImplementedError

    def sdk(self, server, size):
        """Measures the SDK → (Outcome, CPU seconds per GiB), or None."""

    def s5cmd(self, server, size):
        """Measures s5cmd → (Outcome, CPU seconds per GiB), or None."""


class Write(Row):
    unit = "MiB/s until visible"

    def mount(self, mount, server, size):
        data = random.Random(1).randbytes(MIB)
        started = time.monotonic()
        descriptor = os.open(mount.path / "written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for _ in range(size // MIB):
            os.write(descriptor, data)
        os.close(descriptor)
        while not server.has("written"):
            time.sleep(0.005)
        seconds = time.monotonic() - started
        server.delete("written")
        return Outcome(size / MIB / seconds, size)

    def sdk(self, server, size):
        told, cpu = run_sdk(server, ["put", "--key", "sdk", "--size", size // MIB], size)
        return Outcome(told["mib_per_second"], size), cpu

    def s5cmd(self, server, size):
        source = MEMORY_DISK / "mlfs-bench-source"
        data = random.Random(1).randbytes(MIB)
        try:
            with open(source, "wb") as file:
                for _ in range(size // MIB):
                    file.write(data)
            seconds, cpu = run_s5cmd(server, "cp", "-c", 16, "-p", 16, source, f"s3://{BUCKET}/s5")
        finally:
            source.unlink(missing_ok=True)
        return Outcome(size / MIB / seconds, size), cpu / (size / (1 << 30))


def read_through(path, piece):
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(piece)
        total = 0
        while count := file.readinto(buffer):
            total += count
    return total


class Read(Row):
    def __init__(self, piece):
        self.piece = piece
        self.unit = f"MiB/s, reads of {piece // 1024} KiB"

    def mount(self, mount, server, size):
        started = time.monotonic()
        assert read_through(mount.path / "big", self.piece) == size
        return Outcome(size / MIB / (time.monotonic() - started), size)

    def sdk(self, server, size):
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
    unit = "MiB/s, second read"

    def mount(self, mount, server, size):
        read_through(mount.path / "big", MIB)
        return Read(MIB).mount(mount, server, size)


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

    def sdk(self, server, size):
        told, cpu = run_sdk(server, ["random", "--key", f"{PREFIX}/huge", "--size", 8192,
                                     "--in-flight", 1, "--reads", READS], READS * MIB)
        return Outcome(told["p50_ms"], READS * MIB), cpu


class Tensor(Row):
    unit = "s, header and one 64 MiB tensor of 4 GiB (fetched/needed)"
    higher_is_better = False
    INDEX = 31

    def mount(self, mount, server, size):
        server.reset()
        start = len(tensor_head()) + self.INDEX * 64 * MIB
        began = time.monotonic()
        with open(mount.path / "m.safetensors", "rb", buffering=0) as file:
            os.pread(file.fileno(), int.from_bytes(os.pread(file.fileno(), 8, 0), "little"), 8)
            for piece in range(64):
                os.pread(file.fileno(), MIB, start + piece * MIB)
        seconds = time.monotonic() - began
        return Outcome(seconds, 64 * MIB, f"{server.fetched() / (64 * MIB):.2f} x")

    def sdk(self, server, size):
        told, cpu = run_sdk(server, ["tensor", "--key", f"{PREFIX}/m.safetensors", "--size", 64,
                                     "--index", self.INDEX], 64 * MIB)
        return Outcome(told["seconds"], 64 * MIB), cpu


class List(Row):
    unit = "s, readdir and stat of 10 000"
    higher_is_better = False

    def mount(self, mount, server, size):
        started = time.monotonic()
        with os.scandir(mount.path / "many") as entries:
            count = sum(entry.stat().st_size >= 0 for entry in entries)
        assert count == 10_000, count
        return Outcome(time.monotonic() - started)

    def sdk(self, server, size):
        told, cpu = run_sdk(server, ["list", "--key", f"{PREFIX}/many/"], 0)
        return Outcome(told["seconds"]), cpu

    def s5cmd(self, server, size):
        seconds, cpu = run_s5cmd(server, "ls", f"s3://{BUCKET}/{PREFIX}/many/*")
        return Outcome(seconds), cpu


class Small(Row):
    FILES, BYTES = 500, 100 * 1024
    unit = f"s, {FILES} files of 100 KiB, each closed"
    higher_is_better = False

    def mount(self, mount, server, size):
        data = os.urandom(self.BYTES)
        os.makedirs(mount.path / "small", exist_ok=True)
        started = time.monotonic()
        for index in range(self.FILES):
            with open(mount.path / "small" / f"f{index}", "wb", buffering=0) as file:
                file.write(data)
        seconds = time.monotonic() - started
        for index in range(self.FILES):
            server.delete(f"small/f{index}")
        return Outcome(seconds, self.FILES * self.BYTES)

    def sdk(self, server, size):
        moved = self.FILES * self.BYTES
        told, cpu = run_sdk(server, ["small", "--key", "sdk-small", "--files", self.FILES,
                                     "--size", self.BYTES // 1024, "--in-flight", 1], moved)
        return Outcome(told["seconds"], moved), cpu


class Verified(Row):
    """What was written is what is read by a mount that has nothing cached."""
    unit = "MiB/s read back, SHA-256 compared"
    only = ("mlfs", "mlfs signed")
    limit = 300

    def mount(self, mount, server, size):
        generator = random.Random(3)
        written = hashlib.sha256()
        with open(mount.path / "verified", "wb", buffering=0) as file:
            for _ in range(size // MIB):
                data = generator.randbytes(MIB)
                written.update(data)
                file.write(data)
        self.written = written.hexdigest()
        return Outcome(0)

    def after(self, mount, server, size):
        read = hashlib.sha256()
        started = time.monotonic()
        with open(mount.path / "verified", "rb", buffering=0) as file:
            while data := file.read(MIB):
                read.update(data)
        seconds = time.monotonic() - started
        server.delete("verified")
        assert read.hexdigest() == self.written, "what was read is not what was written"
        return Outcome(size / MIB / seconds, size, f"SHA-256 {self.written[:12]}… twice")


class Bounds(Row):
    """10 GiB written, and 10 GiB read, with --memory 512MiB."""
    unit = "MiB of peak resident memory, 10 GiB (at most 640)"
    higher_is_better = False
    only = ("mlfs", "mlfs signed")
    limit = 300
    SIZE = 10 << 30

    def __init__(self, writes):
        self.writes = writes
        self.unit = f"MiB of peak memory, 10 GiB {'written' if writes else 'read'} (at most 640)"

    def mount(self, mount, server, size):
        if self.writes:
            outcome = Write().mount(mount, server, self.SIZE)
        else:
            server.generate("ten", self.SIZE)
            started = time.monotonic()
            assert read_through(mount.path / "ten", MIB) == self.SIZE
            outcome = Outcome(self.SIZE / MIB / (time.monotonic() - started), self.SIZE)
        return Outcome(mount.peak(), self.SIZE, f"{outcome.value:.0f} MiB/s")


ROWS = {
    "write": Write(),
    "read": Read(MIB),
    "read128k": Read(128 * 1024),
    "second": SecondRead(),
    "mmap": Touch(),
    "random": RandomReads(),
    "tensor": Tensor(),
    "list": List(),
    "small": Small(),
    "verify": Verified(),
    "bounds-write": Bounds(True),
    "bounds-read": Bounds(False),
}
WRITES = ("write", "small", "verify", "bounds-write")
