"""All rows, by name."""

from promises import Bounds, Verified
from reads import (FirstByte, List, LoadFile, Member, Parts, RandomReads, RandomThreads, Read,
                   SecondRead, SmallReads, Tensor, Touch, Turns, WarmRead)
from server import MIB
from writes import Append, Checkpoint, Overwrite, Safetensors, Small, TorchSave, Write

ROWS = {
    "write": Write(),
    "torchsave": TorchSave(),
    "safetensors": Safetensors(),
    "checkpoint": Checkpoint(1),
    "checkpoint8": Checkpoint(8),
    "small": Small(1),
    "small8": Small(8),
    "append": Append(),
    "overwrite": Overwrite(),
    "read": Read(MIB),
    "read128k": Read(128 * 1024),
    "parts": Parts(),
    "turns": Turns(),
    "second": SecondRead(),
    "warm": WarmRead(),
    "mmap": Touch(),
    "random": RandomReads(),
    "tensor": Tensor(),
    "member": Member(),
    "random8": RandomThreads(),
    "first": FirstByte(),
    "smallreads": SmallReads(),
    "loadfile": LoadFile(),
    "list": List(),
    "verify": Verified(),
    "bounds-write": Bounds(True),
    "bounds-read": Bounds(False),
}
WRITES = ("write", "torchsave", "safetensors", "checkpoint", "checkpoint8", "small", "small8", "append",
          "overwrite", "verify", "bounds-write")
