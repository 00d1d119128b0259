"""The programs that are measured: mounts, and clients without one."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from server import BUCKET, PREFIX, RELEASE, TOP

# In memory, so that no disk is measured where a direct client needs a file.
MEMORY_DISK = pathlib.Path("/dev/shm")


def tree(pid):
    """A process and everything it started: some peers are started through a wrapper."""
    pids = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids += [it for child in task.read_text().split() for it in tree(int(child))]
        except OSError:
            pass
    return pids


def cpu_seconds(pids):
    ticks = 0
    for pid in pids:
        try:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib(pids):
    peak = 0
    for pid in pids:
        try:
            text = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        lines = [line for line in text.splitlines() if line.startswith("VmHWM")]
        peak += int(lines[0].split()[1]) // 1024 if lines else 0
    return peak


class Mount:
    """A mount of the server's bucket by one of the programs, from start to stop."""

    def __init__(self, name, server, work):
        self.name = name
        self.work = pathlib.Path(tempfile.mkdtemp(dir=work))
        self.mount = self.work / "mount"
        self.mount.mkdir()
        environment = dict(os.environ, AWS_ACCESS_KEY_ID="lab", AWS_SECRET_ACCESS_KEY="labsecret",
                           AWS_REGION="us-east-1", MLFLOW_S3_ENDPOINT_URL=server.endpoint,
                           MLFLOW_TRACKING_URI=server.told["tracking"], HOME=str(self.work),
                           XDG_CACHE_HOME=str(self.work / "cache"))
        with open(self.work / "log", "wb") as log:
            self.process = subprocess.Popen(MOUNTS[name](self.mount, server), env=environment,
                                            stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not os.path.ismount(self.mount):
            if self.process.poll() is not None or time.monotonic() > deadline:
                reason = (self.work / "log").read_text()[-300:] or "did not mount"
                self.stop()
                raise RuntimeError(reason)
            time.sleep(0.02)
        # Whether what is written to it gets to the server.
        self.stores = name != "discard"
        if name.startswith("mlfs"):
            self.path = self.mount / "r1"
        else:
            self.path = self.mount / PREFIX if self.stores else self.mount
        self.pids = tree(self.process.pid)
        for pid in self.pids:
            pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")

    def cpu(self):
        return cpu_seconds(self.pids)

    def peak(self):
        return peak_mib(self.pids)

    def stop(self):
        subprocess.run(["umount", self.mount], stderr=subprocess.DEVNULL)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            for pid in tree(self.process.pid):
                os.kill(pid, 9)
            self.process.wait()
        subprocess.run(["umount", "-l", self.mount], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.work, ignore_errors=True)


def mlfs(*flags):
    return lambda mount, server: [RELEASE / "mlfs", "mount", "--foreground", mount, *flags]


def mlfs_with_disk(*flags):
    return lambda mount, server: mlfs("--memory", "512MiB", "--sign-payload", "never",
                                      "--cache-dir", disk_cache(mount), *flags)(mount, server)


def disk_cache(mount):
    """Where the disk cache of what is mounted there is."""
    return mount.parent / "blocks"


def mount_s3(mount, server):
    program = os.environ.get("MOUNT_S3") or TOP.parent / "shared" / "peers" / "mount-s3"
    return [program, "--foreground", BUCKET, mount, "--endpoint-url", server.endpoint,
            "--force-path-style", "--region", "us-east-1", "--allow-overwrite", "--allow-delete"]


def s3fs(mount, server):
    return ["s3fs", BUCKET, mount, "-f", "-o", f"url={server.endpoint}",
            "-o", "use_path_request_style", "-o", "sigv4", "-o", "endpoint=us-east-1",
            "-o", "multipart_size=16", "-o", "parallel_count=16"]


def rclone(mode):
    def command(mount, server):
        remote = (f":s3,provider=Other,endpoint='{server.endpoint}',access_key_id=lab,"
                  f"secret_access_key=labsecret,force_path_style=true:{BUCKET}")
        return ["rclone", "mount", "--config", "/dev/null", remote, mount,
                "--vfs-cache-mode", mode, "--vfs-write-back", "0s"]
    return command


def discard(mount, server):
    return [RELEASE / "lab-discard", mount]


MOUNTS = {
    # With as many connections as the direct clients have.
    "mlfs": mlfs("--memory", "512MiB", "--sign-payload", "never", "--transfers", "16"),
    "mlfs signed": mlfs("--memory", "512MiB", "--sign-payload", "always", "--transfers", "16"),
    # With the memory of the smallest peer, and with as many connections as mlfs takes untold.
    "mlfs small": mlfs("--memory", "96MiB", "--sign-payload", "never", "--transfers", "16"),
    "mlfs untold": mlfs("--memory", "512MiB", "--sign-payload", "never"),
    "mlfs disk": mlfs_with_disk(),
    "mlfs disk ro": mlfs_with_disk("--read-only"),
    "mount-s3": mount_s3,
    "s3fs": s3fs,
    "rclone off": rclone("off"),
    "rclone full": rclone("full"),
    # What the kernel's side of a mounted write costs, not a peer.
    "discard": discard,
}
PEERS = ("mount-s3", "s3fs", "rclone off", "rclone full")
# Clients without a mount: what a filesystem is compared with, not a peer.
DIRECT = ("sdk", "sdk signed", "s5cmd")
COLUMNS = (*MOUNTS, *DIRECT)
# Columns only for rows that write; the second lot also for any row where they are asked for.
SIGNED = ("mlfs signed", "sdk signed")
VARIANTS = ("mlfs small", "mlfs untold")
# Columns only for the row about them.
CACHED = ("mlfs disk", "mlfs disk ro")


def run_sdk(server, arguments, moved, signed=False):
    """The AWS SDK in a plain Rust program; see lab-sdk --help."""
    command, *rest = arguments
    where = ["--endpoint", server.endpoint, "--bucket", BUCKET]
    if signed:
        where.append("--sign-payload")
    output = subprocess.run([RELEASE / "lab-sdk", command, *where, *map(str, rest)], check=True,
                            capture_output=True)
    told = json.loads(output.stdout)
    return told, told["cpu_seconds"] / (moved / (1 << 30)) if moved else told["cpu_seconds"]


def run_s5cmd(server, *arguments):
    """Seconds and CPU seconds of one s5cmd command, its start included."""
    environment = dict(os.environ, AWS_ACCESS_KEY_ID="lab", AWS_SECRET_ACCESS_KEY="labsecret",
                       AWS_REGION="us-east-1")
    before = os.times()
    started = time.monotonic()
    subprocess.run(["s5cmd", "--endpoint-url", server.endpoint, "--log", "error",
                    *map(str, arguments)], check=True, env=environment, capture_output=True)
    seconds = time.monotonic() - started
    after = os.times()
    return seconds, (after.children_user - before.children_user
                     + after.children_system - before.children_system)
