"""mlfs and its peers on one in-memory S3 server, each in turn, with cold caches.

Every cell is the median of the repetitions; CPU is the daemon's, in seconds per GiB moved; memory
is the daemon's peak. A peer that is missing or fails leaves its cell empty, with the reason below
the table. Compare only within one run.
"""

import argparse
import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

TOP = pathlib.Path(__file__).resolve().parent.parent
RELEASE = TOP / "target" / "release"
MIB = 1 << 20
BUCKET, PREFIX = "bench", "root/r1/artifacts"
PROFILES = {"raw": (0, 0), "s3-like": (15, 90_000_000), "far": (40, 25_000_000)}


class Server:
    """lab-s3, shaped by a profile."""

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

    def fetched(self):
        return json.loads(self.ask("GET", "/-/lab/stats"))["kinds"].get("get", {}).get("bytes_out", 0)

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


class Peer:
    """A way to mount the server's bucket."""

    def __init__(self, name, command):
        self.name, self.command = name, command

    def start(self, server, work):
        self.work = pathlib.Path(tempfile.mkdtemp(dir=work))
        self.mount = self.work / "mount"
        self.mount.mkdir()
        environment = dict(os.environ, AWS_ACCESS_KEY_ID="lab", AWS_SECRET_ACCESS_KEY="labsecret",
                           AWS_REGION="us-east-1", MLFLOW_S3_ENDPOINT_URL=server.endpoint,
                           MLFLOW_TRACKING_URI=server.told["tracking"], HOME=str(self.work),
                           XDG_CACHE_HOME=str(self.work / "cache"))
        with open(self.work / "log", "wb") as log:
            self.process = subprocess.Popen(self.command(self, server), env=environment,
                                            stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not os.path.ismount(self.mount):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.work / "log").read_text()[-300:] or "did not mount")
            time.sleep(0.05)
        self.path = self.mount / "r1" if self.name.startswith("mlfs") else self.mount / PREFIX
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")")[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(l for l in text.splitlines() if l.startswith("VmHWM")).split()[1]) // 1024

    def stop(self):
        subprocess.run(["umount", self.mount], stderr=subprocess.DEVNULL)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        subprocess.run(["umount", "-l", self.mount], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.work, ignore_errors=True)


def mlfs(*flags):
    return lambda peer, server: [RELEASE / "mlfs", "mount", "--foreground", peer.mount, *flags]


def mount_s3(peer, server):
    program = os.environ.get("MOUNT_S3") or TOP.parent / "shared" / "peers" / "mount-s3"
    return [program, "--foreground", BUCKET, peer.mount, "--endpoint-url", server.endpoint,
            "--force-path-style", "--region", "us-east-1", "--allow-overwrite", "--allow-delete"]


def s3fs(peer, server):
    return ["s3fs", BUCKET, peer.mount, "-f", "-o", f"url={server.endpoint}",
            "-o", "use_path_request_style", "-o", "sigv4", "-o", "endpoint=us-east-1",
            "-o", "multipart_size=16", "-o", "parallel_count=16"]


def rclone(mode):
    def command(peer, server):
        remote = (f":s3,provider=Other,endpoint='{server.endpoint}',access_key_id=lab,"
                  f"secret_access_key=labsecret,force_path_style=true:{BUCKET}")
        return ["rclone", "mount", "--config", "/dev/null", remote, peer.mount,
                "--vfs-cache-mode", mode, "--vfs-write-back", "0s"]
    return command


PEERS = {
    "mlfs": mlfs("--memory", "512MiB", "--sign-payload", "never"),
    "mlfs signed": mlfs("--memory", "512MiB", "--sign-payload", "always"),
    "mount-s3": mount_s3,
    "s3fs": s3fs,
    "rclone off": rclone("off"),
    "rclone full": rclone("full"),
}


def drop_caches():
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"caches not dropped: {error}", file=sys.stderr)


def read_through(path, piece):
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(piece)
        total = 0
        while count := file.readinto(buffer):
            total += count
    return total


# Each row: prepare(server, size), then run(peer, server, size) → (value, bytes moved).

def row_write(peer, server, size):
    data = random.Random(1).randbytes(MIB)
    started = time.monotonic()
    descriptor = os.open(peer.path / "written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(size // MIB):
        os.write(descriptor, data)
    os.close(descriptor)
    while not server.has("written"):
        time.sleep(0.005)
    seconds = time.monotonic() - started
    server.delete("written")
    return size / MIB / seconds, size


def row_read(piece):
    def run(peer, server, size):
        started = time.monotonic()
        assert read_through(peer.path / "big", piece) == size
        return size / MIB / (time.monotonic() - started), size
    return run


def row_second(peer, server, size):
    read_through(peer.path / "big", MIB)
    return row_read(MIB)(peer, server, size)


def row_mmap(peer, server, size):
    started = time.monotonic()
    with open(peer.path / "big", "rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
            sum(mapped[offset] for offset in range(0, size, 4096))
    return size / MIB / (time.monotonic() - started), size


def row_random(peer, server, size):
    server.reset()
    generator = random.Random(2)
    latencies = []
    with open(peer.path / "huge", "rb", buffering=0) as file:
        for _ in range(128):
            offset = generator.randrange(0, 8 << 30) - MIB
            started = time.monotonic()
            os.pread(file.fileno(), MIB, max(offset, 0))
            latencies.append(time.monotonic() - started)
    row_random.extra = f"{server.fetched() / (128 * MIB):.2f} x"
    return statistics.median(latencies) * 1000, 128 * MIB


def tensor_head():
    tensor = 64 * MIB
    entries = {f"t{i}": {"dtype": "U8", "shape": [tensor],
                         "data_offsets": [i * tensor, (i + 1) * tensor]} for i in range(64)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


def row_tensor(peer, server, size):
    server.reset()
    start = len(tensor_head()) + 31 * 64 * MIB
    began = time.monotonic()
    with open(peer.path / "m.safetensors", "rb", buffering=0) as file:
        os.pread(file.fileno(), int.from_bytes(os.pread(file.fileno(), 8, 0), "little"), 8)
        for piece in range(64):
            os.pread(file.fileno(), MIB, start + piece * MIB)
    seconds = time.monotonic() - began
    row_tensor.extra = f"{server.fetched() / (64 * MIB):.2f} x"
    return seconds, 64 * MIB


def row_list(peer, server, size):
    started = time.monotonic()
    with os.scandir(peer.path / "many") as entries:
        count = sum(entry.stat().st_size >= 0 for entry in entries)
    assert count == 10_000, count
    return time.monotonic() - started, 0


def row_small(peer, server, size):
    data = os.urandom(100 * 1024)
    os.makedirs(peer.path / "small", exist_ok=True)
    started = time.monotonic()
    for index in range(200):
        with open(peer.path / "small" / f"f{index}", "wb", buffering=0) as file:
            file.write(data)
    return time.monotonic() - started, 200 * len(data)


ROWS = {
    "write": (row_write, "MiB/s until visible", True),
    "read": (row_read(MIB), "MiB/s, 1 MiB reads", True),
    "read128k": (row_read(128 * 1024), "MiB/s, 128 KiB reads", True),
    "second": (row_second, "MiB/s, second read", True),
    "mmap": (row_mmap, "MiB/s, pages touched", True),
    "random": (row_random, "ms, p50 of 1 MiB at random in 8 GiB", False),
    "tensor": (row_tensor, "s, header and one 64 MiB tensor of 4 GiB", False),
    "list": (row_list, "s, readdir and stat of 10 000", False),
    "small": (row_small, "s, 200 files of 100 KiB, each closed", False),
}
ONLY_WRITES = {"write", "small"}


def sdk(row, server, size):
    where = ["--endpoint", server.endpoint, "--bucket", BUCKET]
    mebibytes = str(size // MIB)
    calls = {
        "write": ["put", *where, "--key", "sdk", "--size", mebibytes],
        "read": ["get", *where, "--key", f"{PREFIX}/big", "--size", mebibytes],
        "random": ["random", *where, "--key", f"{PREFIX}/huge", "--size", "8192", "--in-flight",
                   "1", "--reads", "128"],
    }
    if row not in calls:
        return None
    output = subprocess.run([RELEASE / "lab-sdk", *calls[row]], check=True, capture_output=True)
    told = json.loads(output.stdout)
    moved = 128 * MIB if row == "random" else size
    return {"value": told["p50_ms"] if row == "random" else told["mib_per_second"],
            "cpu": told["cpu_seconds"] / (moved / (1 << 30)), "peak": None, "extra": ""}


def measure(name, row, server, size, work):
    if name == "sdk":
        return sdk(row, server, size)
    if name == "mlfs signed" and row not in ONLY_WRITES:
        return None
    run, _, _ = ROWS[row]
    peer = Peer(name, PEERS[name])
    drop_caches()
    try:
        peer.start(server, work)
        before = peer.cpu()
        signal.alarm(300)
        value, moved = run(peer, server, size)
        signal.alarm(0)
        spent = peer.cpu() - before
        return {"value": value, "cpu": spent / (moved / (1 << 30)) if moved else spent,
                "peak": peer.peak(), "extra": getattr(run, "extra", "")}
    finally:
        signal.alarm(0)
        if hasattr(peer, "process"):
            peer.stop()


def prepare(server, size):
    server.generate("big", size)
    server.generate("huge", 8 << 30)
    head = tensor_head()
    server.generate("m.safetensors", len(head) + 64 * 64 * MIB, head)
    for index in range(10_000):
        server.put(f"many/f{index:05}", b"x")


def cell(results):
    if not results:
        return "–"
    value = statistics.median(result["value"] for result in results)
    text = f"**{value:.3g}**" if value < 100 else f"**{value:.0f}**"
    details = [f"{statistics.median(result['cpu'] for result in results):.2f} s/GiB"]
    peaks = [result["peak"] for result in results if result["peak"]]
    if peaks:
        details.append(f"{max(peaks)} MiB")
    if results[0]["extra"]:
        details.append(results[0]["extra"])
    return f"{text} ({', '.join(details)})"


def table(profile, results, names, reasons):
    lines = [f"\n### {profile}\n", "| row | " + " | ".join(names) + " | mlfs : best peer |",
             "|---|" + "---|" * (len(names) + 1)]
    for row, (_, unit, higher) in ROWS.items():
        if row not in results:
            continue
        cells = results[row]
        medians = {name: statistics.median(r["value"] for r in cells[name])
                   for name in names if cells.get(name)}
        peers = [value for name, value in medians.items()
                 if not name.startswith("mlfs") and name != "sdk"]
        ratio = "–"
        if "mlfs" in medians and peers:
            best = max(peers) if higher else min(peers)
            ratio = f"{medians['mlfs'] / best if higher else best / medians['mlfs']:.2f} x"
        lines.append(f"| {row}: {unit} | " +
                     " | ".join(cell(cells.get(name)) for name in names) + f" | {ratio} |")
    lines += [f"- {reason}" for reason in sorted(reasons)]
    return "\n".join(lines)


def compare(one, other):
    one, other = (json.loads(pathlib.Path(path).read_text()) for path in (one, other))
    for profile, rows in other["profiles"].items():
        for row, cells in rows.items():
            for name, results in cells.items():
                former = one["profiles"].get(profile, {}).get(row, {}).get(name)
                if former and results:
                    a = statistics.median(r["value"] for r in former)
                    b = statistics.median(r["value"] for r in results)
                    print(f"{profile:8} {row:9} {name:12} {a:10.3g} -> {b:10.3g}  ({b / a:.2f} x)")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="raw,s3-like,far", help="of raw, s3-like, far")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows")
    parser.add_argument("--peers", default="mlfs,mlfs signed,sdk," + ",".join(
        name for name in PEERS if not name.startswith("mlfs")))
    parser.add_argument("--size", type=int, default=2048, help="MiB of the large file")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--compare", nargs=2, metavar="JSON", help="print ratios of two results")
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("took over 300 s")))
    names = arguments.peers.split(",")
    size = arguments.size * MIB
    revision = subprocess.run(["git", "-C", TOP, "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True).stdout.strip()
    everything = {"revision": revision, "size_mib": arguments.size, "profiles": {}}
    with tempfile.TemporaryDirectory(prefix="mlfs-bench-") as work:
        for profile in arguments.profiles.split(","):
            server = Server(profile)
            results, reasons = {}, set()
            try:
                print(f"preparing {profile}", file=sys.stderr)
                prepare(server, size)
                for row in arguments.rows.split(","):
                    cells = results.setdefault(row, {name: [] for name in names})
                    for _ in range(arguments.repeat):
                        for name in names:
                            print(f"{profile} {row} {name}", file=sys.stderr)
                            try:
                                result = measure(name, row, server, size, work)
                                if result:
                                    cells[name].append(result)
                            except Exception as error:
                                reasons.add(f"{row}, {name}: {str(error)[:200]}")
            finally:
                server.stop()
            everything["profiles"][profile] = results
            print(table(profile, results, names, reasons), flush=True)
    target = pathlib.Path(arguments.json) if arguments.json else (
        TOP / "bench-results" / f"{time.strftime('%Y-%m-%d-%H%M')}-{revision}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(everything, indent=1))
    print(f"\nresults in {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
