"""The in-memory S3 server, shaped by a profile."""

import json
import pathlib
import subprocess
import urllib.error
import urllib.request

TOP = pathlib.Path(__file__).resolve().parent.parent
RELEASE = TOP / "target" / "release"
MIB = 1 << 20
BUCKET, PREFIX = "bench", "root/r1/artifacts"
# Milliseconds to the first byte, bytes a second of each connection.
PROFILES = {"raw": (0, 0), "s3-like": (15, 90_000_000), "far": (40, 25_000_000)}


class Server:
    def __init__(self, profile):
        first_byte, rate = PROFILES[profile]
        self.process = subprocess.Popen(
            [RELEASE / "lab-s3", "--open", "--threads", "2", "--first-byte", str(first_byte),
             "--connection-rate", str(rate), "--run", f"r1=s3://{BUCKET}/{PREFIX}"],
            stdout=subprocess.PIPE, text=True)
        self.told = json.loads(self.process.stdout.readline())
        self.endpoint = self.told["endpoint"]

    def ask(self, method, path, body=None):
        request = urllib.request.Request(self.endpoint + path, data=body, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def counts(self):
        """Requests and bytes by kind since the last reset."""
        return json.loads(self.ask("GET", "/-/lab/stats"))["kinds"]

    def fetched(self):
        return self.counts().get("get", {}).get("bytes_out", 0)

    def reset(self):
        self.ask("POST", "/-/lab/stats/reset", b"")

    def generate(self, name, size, head=b""):
        self.ask("PUT", f"/-/lab/generated?bucket={BUCKET}&key={PREFIX}/{name}&size={size}", head)

    def put(self, name, body):
        self.ask("PUT", f"/{BUCKET}/{PREFIX}/{name}", body)

    def has(self, name):
        try:
            self.ask("HEAD", f"/{BUCKET}/{PREFIX}/{name}")
            return True
        except urllib.error.HTTPError:
            return False

    def delete(self, name):
        self.ask("DELETE", f"/{BUCKET}/{PREFIX}/{name}")

    def stop(self):
        self.process.kill()
        self.process.wait()


def tensor_head(tensors=64, size=64 * MIB):
    """The start of a safetensors file of equal tensors."""
    entries = {f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
               for i in range(tensors)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


def prepare(server, size):
    """The objects that the rows read."""
    server.generate("big", size)
    server.generate("huge", 8 << 30)
    head = tensor_head()
    server.generate("m.safetensors", len(head) + 64 * 64 * MIB, head)
    for index in range(10_000):
        server.generate(f"many/f{index:05}", 1)
