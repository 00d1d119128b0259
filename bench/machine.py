"""What the machine has to do with a measurement: its caches, its memory, its processors."""

import ctypes
import mmap
import os
import pathlib
import sys

# Bytes: a row's pages in the kernel, the daemon's memory, and what a loader makes of a file.
TOUCHED = 5 << 30


def drop_caches():
    """The kernel forgets what it has of files."""
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"caches not dropped: {error}", file=sys.stderr)


def touch_memory():
    """Has the machine give the memory that a row may take. Of a virtual machine whose free memory goes
    back to its host, the first touch costs some 2 s a GiB, whoever is measured."""
    with open("/proc/meminfo") as file:
        told = dict(line.split(":") for line in file)
    free = int(told["MemFree"].split()[0]) << 10
    length = min(TOUCHED, free * 3 // 4) // mmap.PAGESIZE * mmap.PAGESIZE
    if length:
        with mmap.mmap(-1, length) as memory:
            here = ctypes.c_char.from_buffer(memory)
            ctypes.memset(ctypes.addressof(here), 1, length)
            del here


class Processors:
    """How much of all processors' time is used while this is open: by the server, the reader or
    writer, the mount and the kernel together."""

    def __enter__(self):
        self.before = self.ticks()
        return self

    def __exit__(self, *_):
        idle, total = (now - before for now, before in zip(self.ticks(), self.before))
        self.busy = 1 - idle / total if total else None

    @staticmethod
    def ticks():
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        # Idle, and idle while a disk works.
        return ticks[3] + ticks[4], sum(ticks)
