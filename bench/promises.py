"""Rows that check a promise of mlfs's own."""

import hashlib
import random
import time

from reads import read_through
from row import Outcome, Row
from server import MIB, WRITTEN
from writes import Write


class Verified(Row):
    """What was written is what is read by a mount that has nothing cached."""
    unit = "MiB/s read back, SHA-256 compared"
    only = ("mlfs", "mlfs signed")
    limit = 300

    def mount(self, mount, server, size):
        generator = random.Random(3)
        written = hashlib.sha256()
        with open(mount.path / f"{WRITTEN}-verified", "wb", buffering=0) as file:
            for _ in range(size // MIB):
                data = generator.randbytes(MIB)
                written.update(data)
                file.write(data)
        self.written = written.hexdigest()
        return Outcome(0)

    def after(self, mount, server, size):
        read = hashlib.sha256()
        started = time.monotonic()
        with open(mount.path / f"{WRITTEN}-verified", "rb", buffering=0) as file:
            while data := file.read(MIB):
                read.update(data)
        seconds = time.monotonic() - started
        assert read.hexdigest() == self.written, "what was read is not what was written"
        return Outcome(size / MIB / seconds, size, f"SHA-256 {self.written[:12]}… twice")


class Bounds(Row):
    """10 GiB written, and 10 GiB read, with --memory 512MiB."""
    unit = "MiB of peak resident memory, 10 GiB (at most 640)"
    higher_is_better = False
    measure = "memory"
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
