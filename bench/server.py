"""The in-memory S3 server, shaped by a profile."""

import json
import os
import pathlib
import subprocess
import time
import urllib.parse
import urllib.request

TOP = pathlib.Path(__file__).resolve().parent.parent
RELEASE = TOP / "target" / "release"
MIB = 1 << 20
BUCKET, PREFIX = "bench", "root/r1/artifacts"
# How the names begin of all that a measurement leaves behind.
WRITTEN = "written"
# Milliseconds to the first byte, bytes a second of each connection.
PROFILES = {"raw": (0, 0), "s3-like": (15, 90_000_000), "far": (40, 25_000_000)}


class Server:
    def __init__(self, profile):
        first_byte, rate = PROFILES[profile]
        # It keeps the memory of what it is made to forget: clearing pages would take more of the
        # processor than the measured program does.
        keeping = {"_RJEM_MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"}
        self.process = subprocess.Popen(
            [RELEASE / "lab-s3", "--open", "--threads", "2", "--first-byte", str(first_byte),
             "--connection-rate", str(rate), "--run", f"r1=s3://{BUCKET}/{PREFIX}"],
            stdout=subprocess.PIPE, text=True, env={**os.environ, **keeping})
        self.told = json.loads(self.process.stdout.readline())
        self.endpoint = self.told["endpoint"]

    def ask(self, method, path, body=None, headers=None):
        request = urllib.request.Request(self.endpoint + path, data=body, method=method,
                                         headers=headers or {})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def stats(self):
        """Requests and bytes since the last reset."""
        return json.loads(self.ask("GET", "/-/lab/stats"))

    def fetched(self):
        """Bytes of objects that went out."""
        return self.stats()["kinds"].get("get", {}).get("bytes_out", 0)

    def sent(self):
        """Bytes of objects that came in."""
        kinds = self.stats()["kinds"]
        return sum(kinds.get(kind, {}).get("bytes_in", 0) for kind in ("put", "upload_part"))

    def most_at_once(self):
        """The most requests that were being served at a time."""
        return self.stats()["most_at_once"]

    def reset(self):
        self.ask("POST", "/-/lab/stats/reset", b"")

    def generate(self, name, size, head=b""):
        self.ask("PUT", f"/-/lab/generated?bucket={BUCKET}&key={PREFIX}/{name}&size={size}", head)

    def objects(self, prefix):
        """Names that start so → bytes and ETag. Neither counted as a request nor held up as one."""
        where = urllib.parse.urlencode({"bucket": BUCKET, "prefix": f"{PREFIX}/{prefix}"})
        return {key.removeprefix(f"{PREFIX}/"): told
                for key, told in json.loads(self.ask("GET", f"/-/lab/objects?{where}")).items()}

    def wait_stored(self, sizes):
        """Until each of these names has an object of so many bytes."""
        prefix = os.path.commonprefix(list(sizes))
        while True:
            stored = {name: size for name, (size, _) in self.objects(prefix).items()}
            if all(stored.get(name) == size for name, size in sizes.items()):
                return
            time.sleep(0.005)

    def wait_replaced(self, name, etag):
        """Until the object of this name has another ETag."""
        while self.objects(name)[name][1] == etag:
            time.sleep(0.005)

    def read(self, name, offset, count):
        return self.ask("GET", f"/{BUCKET}/{PREFIX}/{name}",
                        headers={"Range": f"bytes={offset}-{offset + count - 1}"})

    def forget_written(self):
        where = urllib.parse.urlencode({"bucket": BUCKET, "prefix": f"{PREFIX}/{WRITTEN}"})
        self.ask("DELETE", f"/-/lab/objects?{where}")

    def stop(self):
        self.process.kill()
        self.process.wait()


def tensor_head(tensors=64, size=64 * MIB):
    """The start of a safetensors file of equal tensors."""
    entries = {f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
               for i in range(tensors)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


# Files whose first byte is read, and small ones that are read whole: how many, and bytes each.
FIRST = 64
MANY_SMALL, SMALL_SIZE = 1000, 100 * 1024


def prepare(server, size):
    """The objects that the rows read."""
    server.generate("big", size)
    server.generate("huge", 8 << 30)
    head = tensor_head()
    server.generate("m.safetensors", len(head) + 64 * 64 * MIB, head)
    head = tensor_head(32)
    server.generate("load.safetensors", len(head) + 32 * 64 * MIB, head)
    for index in range(FIRST):
        server.generate(f"first/f{index:02}", 1 << 30)
    for index in range(MANY_SMALL):
        server.generate(f"small/f{index:04}", SMALL_SIZE)
    # It makes up all bytes when it is asked for the first one.
    server.read("big", 0, 1)
    for index in range(10_000):
        server.generate(f"many/f{index:05}", 1)
