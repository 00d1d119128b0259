"""One file of 1 GiB written and read through mlfs and by MLflow's own client, on the same servers in
the same run: two whose clients reach S3 or Azure by themselves, and three that proxy artifacts."""

import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "tests" / "savers"))

from machine import Processors, drop_caches, touch_memory  # noqa: E402
from server import BUCKET, PREFIX, Server as InMemory  # noqa: E402
from servers import Server  # noqa: E402

MIB = 1 << 20
# Odd, for the medians.
ROUNDS = 3
SIZE = int(os.environ.get("MLFS_CLIENT_SIZE", 1024)) * MIB
# In memory, so that no disk is measured where the client needs a file.
MEMORY_DISK = pathlib.Path("/dev/shm")
TIMED = """
import time
started = time.monotonic()
{}
print(time.monotonic() - started)
"""
# What a user of the client does: the file is saved, then it is logged.
SAVED_AND_LOGGED = """
import os, time
client = MlflowClient()
started = time.monotonic()
path = os.path.join(sys.argv[4], os.path.basename(sys.argv[3]))
with open(sys.argv[3], "rb") as read, open(path, "wb") as write:
    while piece := read.read(4 << 20):
        write.write(piece)
saved = time.monotonic()
client.log_artifact(sys.argv[2], path, "client")
print(time.monotonic() - started, time.monotonic() - saved)
os.unlink(path)
"""


def timed(act):
    cold()
    started = time.monotonic()
    act()
    return time.monotonic() - started


def cold():
    drop_caches()
    touch_memory()


def copy(source, target):
    with open(source, "rb") as read, open(target, "wb") as write:
        while piece := read.read(4 * MIB):
            write.write(piece)


def read(path, size=None, offset=0):
    left = size or SIZE
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while left:
            left -= len(file.read(min(left, 4 * MIB)))


def write(server, source, index):
    """Once through each; who is first changes, since the first pays for what the store is not used to."""
    def through_mlfs():
        cold()
        started = time.monotonic()
        with Processors() as processors:
            copy(source, server.run / f"written{index}")
        return time.monotonic() - started, processors.busy

    def by_client():
        with tempfile.TemporaryDirectory() as folder:
            cold()
            told = server.client(SAVED_AND_LOGGED, server.run_id, source, folder)
        return [float(seconds) for seconds in told.split()]

    if index % 2:
        mlfs, client = through_mlfs(), by_client()
    else:
        client, mlfs = by_client(), through_mlfs()
    return *client, *mlfs


@contextlib.contextmanager
def store(name):
    """The store of a row that names one in memory: it leaves the processors to those who are measured,
    and a connection carries what one to S3 does."""
    if "in memory" not in name:
        yield
        return
    usual = dict(os.environ)
    server = InMemory("s3-like")
    os.environ |= {"MLFLOW_S3_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "lab",
                   "AWS_SECRET_ACCESS_KEY": "lab", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(usual)
        server.stop()


def measure(name, server, source):
    server.mount()
    rounds = [write(server, source, index) for index in range(ROUNDS)]
    by_client, logged, by_mlfs, busy = (statistics.median(column) for column in zip(*rounds))
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        script = ("mlflow.artifacts.download_artifacts(run_id=sys.argv[2], "
                  "artifact_path=sys.argv[3], dst_path=sys.argv[4])")
        cold()
        client_read = float(server.client(TIMED.format(script), server.run_id,
                                          f"client/{source.name}", folder))
    server.cold()
    os.stat(server.run / "client" / source.name)
    mlfs_read = timed(lambda: read(server.run / "client" / source.name))
    server.cold()
    os.stat(server.run / "written0")
    before = server.store()["bytes_in"]
    mlfs_part = timed(lambda: read(server.run / "written0", 64 * MIB, SIZE // 2))
    fetched = (server.store()["bytes_in"] - before) / MIB
    print(f"| {name} | {by_mlfs:.2f} / {by_client:.2f} ({by_client / by_mlfs:.2f} x) "
          f"| {logged:.2f} ({logged / by_mlfs:.2f} x), {busy:.0%} "
          f"| {mlfs_read:.2f} / {client_read:.2f} ({client_read / mlfs_read:.2f} x) "
          f"| {mlfs_part:.2f}, {fetched:.0f} MiB |", flush=True)


def main():
    print(f"{SIZE // MIB} MiB; seconds, mlfs / MLflow's client (client : mlfs)\n")
    print(f"Written {ROUNDS} times; the medians.\n")
    print("| server | write and close; save and log_artifact "
          "| log_artifact alone; processors busy while mlfs writes | cold read "
          "| cold read of 64 MiB in the middle |")
    print("|---|---|---|---|---|")
    with tempfile.NamedTemporaryFile(dir=MEMORY_DISK) as source:
        piece = os.urandom(MIB)
        for index in range(SIZE // MIB):
            source.write(piece[index % 97:] + piece[:index % 97])
        source.flush()
        for name, how in (
                ("direct, S3", ("--default-artifact-root", "s3://mlflow/{}",
                                "--no-serve-artifacts")),
                ("direct, Azure's emulator",
                 ("--default-artifact-root",
                  "wasbs://mlflow@devstoreaccount1.blob.core.windows.net/{}",
                  "--no-serve-artifacts")),
                ("proxied, directory", ("--artifacts-destination", "{}/artifacts")),
                ("proxied, S3", ("--artifacts-destination", "s3://mlflow/{}")),
                ("proxied, S3 in memory", ("--artifacts-destination", f"s3://{BUCKET}/{PREFIX}/{{}}"))):
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            with tempfile.TemporaryDirectory() as folder, store(name):
                place = folder if "directory" in name else os.path.basename(folder)
                server = Server(pathlib.Path(folder), *(it.format(place) for it in how))
                try:
                    measure(name, server, pathlib.Path(source.name))
                finally:
                    server.stop()


main()
