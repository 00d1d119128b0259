"""mlfs and its peers on one in-memory S3 server, each in turn, with cold caches.

Every cell is the median of the repetitions; CPU is the daemon's, in seconds per GiB moved; memory
is the daemon's peak. A peer that is missing, fails, or takes too long leaves its cell empty, with
the reason below the table. Compare only within one run. Rows, columns and bounds: bench/README.md.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import peers
import report
from rows import ROWS, WRITES
from machine import Processors, drop_caches, touch_memory
from server import MIB, PROFILES, TOP, Server, prepare

USUAL_ROWS = ("write,torchsave,safetensors,checkpoint,checkpoint8,small,small8,append,overwrite,"
              "read,read128k,second,warm,mmap,random,tensor,list")


class TookTooLong(Exception):
    pass


def limited(seconds, work):
    """Runs `work`, for at most so many seconds."""
    def expire(*_):
        raise TookTooLong(f"took over {seconds} s")
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        return work()
    finally:
        signal.alarm(0)


def on_mount(name, row, server, size, work, limit):
    mount = peers.Mount(name, server, work)
    try:
        if hasattr(row, "after"):
            limited(limit, lambda: row.mount(mount, server, size))
            mount.stop()
            drop_caches()
            mount = peers.Mount(name, server, work)
            step = row.after
        else:
            if hasattr(row, "before"):
                limited(limit, lambda: row.before(mount, server, size))
                drop_caches()
                # What that took was given back.
                touch_memory()
            step = row.mount
        before = mount.cpu()
        with Processors() as processors:
            outcome = limited(limit, lambda: step(mount, server, size))
        return outcome, mount.cpu() - before, mount.peak(), processors.busy
    finally:
        mount.stop()


def directly(name, row, server, size):
    match name:
        case "sdk":
            return row.sdk(server, size)
        case "sdk signed":
            return row.sdk(server, size, signed=True)
        case "s5cmd":
            return row.s5cmd(server, size)


def measure(name, row, server, size, work, limit):
    """One measurement as it goes into the results, or None where there is nothing to measure."""
    drop_caches()
    touch_memory()
    try:
        if name in peers.DIRECT:
            with Processors() as processors:
                measured = limited(limit, lambda: directly(name, row, server, size))
            if measured is None:
                return None
            outcome, cpu = measured
            peak, busy = None, processors.busy
        else:
            outcome, seconds, peak, busy = on_mount(name, row, server, size, work, limit)
            cpu = seconds / (outcome.moved / (1 << 30)) if outcome.moved else seconds
    finally:
        server.forget_written()
    return {"value": outcome.value, "cpu": cpu, "peak": peak, "extra": outcome.extra,
            "moved": outcome.moved, "seconds": outcome.seconds, "busy": busy}


def warm(row, server, size):
    """Has the server touch the memory of what the row writes: of a virtual machine that takes longer
    than to store it, and whoever is measured first would pay for it."""
    try:
        row.sdk(server, size)
    finally:
        server.forget_written()


def applies(name, row_name, row, asked):
    """Whether a column is for a row; `asked`: those that were asked for by name."""
    if row.only is not None and name not in row.only:
        return False
    if name == "discard":
        return row.discards
    if name in peers.CACHED:
        return row.only is not None
    if name in peers.SIGNED:
        return row_name in WRITES
    if name in peers.VARIANTS:
        return row_name in WRITES or name in asked
    return True


def reason(error):
    if isinstance(error, OSError) and error.filename:
        # Without the folders, whose names are made up for each mount.
        names = [os.path.basename(name) for name in (error.filename, error.filename2) if name]
        return f"{error.strerror}: {' -> '.join(names)}"
    return str(error)[:200]


def run_profile(profile, arguments, names, asked, work):
    size = arguments.size * MIB
    results, reasons = {}, set()
    server = Server(profile)
    try:
        print(f"preparing {profile}", file=sys.stderr)
        prepare(server, size)
        for row_name in arguments.rows.split(","):
            row = ROWS[row_name]
            columns = [name for name in names if applies(name, row_name, row, asked)]
            cells = results.setdefault(row_name, {name: [] for name in names})
            failed = set()
            if row_name in WRITES:
                warm(row, server, size)
            for _ in range(arguments.repeat):
                for name in columns:
                    if name in failed:
                        continue
                    print(f"{profile} {row_name} {name}", file=sys.stderr)
                    try:
                        result = measure(name, row, server, size, work, row.limit or arguments.limit)
                        if result:
                            cells[name].append(result)
                    except Exception as error:
                        # A peer that fails once is not waited for again.
                        failed.add(name)
                        reasons.add(f"{row_name}, {name}: {reason(error)}")
    finally:
        server.stop()
    print(report.table(profile, ROWS, results, names, reasons), flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="raw,s3-like,far", help=f"of {', '.join(PROFILES)}")
    parser.add_argument("--rows", default=USUAL_ROWS, help=f"of {', '.join(ROWS)}")
    parser.add_argument("--peers", help=f"which columns, of {', '.join(peers.COLUMNS)}")
    parser.add_argument("--size", type=int, default=2048, help="MiB of the large file")
    parser.add_argument("--repeat", type=int, default=2, help="measurements of each cell")
    parser.add_argument("--limit", type=int, default=60, help="seconds one measurement may take")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--compare", nargs=2, metavar="JSON", help="print ratios of two results")
    arguments = parser.parse_args()
    if arguments.compare:
        return report.compare(*arguments.compare)
    asked = arguments.peers.split(",") if arguments.peers else []
    for option, told, known in (("--rows", arguments.rows.split(","), ROWS),
                                ("--profiles", arguments.profiles.split(","), PROFILES),
                                ("--peers", asked, peers.COLUMNS)):
        for name in told:
            if name not in known:
                parser.error(f"{option} {name}: give some of {', '.join(known)}")
    names = asked or peers.COLUMNS
    revision = subprocess.run(["git", "-C", TOP, "rev-parse", "--short", "HEAD"],
                              capture_output=True, text=True).stdout.strip()
    everything = {"revision": revision, "size_mib": arguments.size, "profiles": {}}
    target = pathlib.Path(arguments.json) if arguments.json else (
        TOP / "bench-results" / f"{time.strftime('%Y-%m-%d-%H%M')}-{revision}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mlfs-bench-") as work:
        for profile in arguments.profiles.split(","):
            everything["profiles"][profile] = run_profile(profile, arguments, names, asked, work)
            target.write_text(json.dumps(everything, indent=1))
    print(f"\nresults in {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
