"""Tables of results, and ratios between two of them."""

import json
import pathlib
import statistics

from peers import DIRECT, PEERS
from server import MIB, PROFILES

# Whose figures are set against whose, below the table.
PAIRS = (("mlfs", (*PEERS, "sdk")),
         ("mlfs signed", ("s3fs", "rclone off", "rclone full", "sdk signed")),
         ("mlfs small", ("mount-s3",)), ("mlfs untold", ("mount-s3",)))
# Connections of which the profile's bound is told: those of `mlfs`, and of `mlfs untold`, and of that in `far`.
CONNECTIONS = (16, 32, 64)


def median(results, field="value"):
    return statistics.median(result[field] for result in results)


def peak(results):
    return max((result["peak"] for result in results if result["peak"]), default=None)


def cell(results):
    if not results:
        return "–"
    value = median(results)
    text = f"**{value:.3g}**" if value < 100 else f"**{value:.0f}**"
    details = [f"{median(results, 'cpu'):.2f} s/GiB" if results[0]["moved"]
               else f"{median(results, 'cpu'):.2f} s CPU"]
    if peak(results):
        details.append(f"{peak(results)} MiB")
    shares = [result["busy"] for result in results if result["busy"] is not None]
    if shares:
        details.append(f"{statistics.median(shares):.0%} busy")
    if results[0]["seconds"] is not None:
        details.append(f"{median(results, 'seconds'):.2f} s")
    if results[0]["extra"]:
        details.append(results[0]["extra"])
    return f"{text} ({', '.join(details)})"


def ratio(ours, theirs, higher_is_better):
    """How many times better ours is."""
    if not ours or not theirs:
        return "–"
    return f"{ours / theirs if higher_is_better else theirs / ours:.2f} x"


def times(what, ours, theirs):
    """How many times theirs ours is, as a list of one text, or of none."""
    return [f"{what} {ours / theirs:.2f} x"] if ours and theirs else []


def against(row, ours, theirs, is_direct):
    """What ours is of theirs, in plain ratios. What a direct client does bounds the time."""
    one, other = median(ours), median(theirs)
    if row.higher_is_better:
        told = times("time", other, one) if is_direct else times("speed", one, other)
    else:
        told = times(row.measure, one, other)
    told += times("CPU", median(ours, "cpu"), median(theirs, "cpu"))
    return told + times("memory", peak(ours), peak(theirs))


def ratios(rows, name, results):
    """Lines of a row's ratios."""
    row, cells = rows[name], results[name]
    for ours, others in PAIRS:
        told = [f"{theirs} ({', '.join(against(row, cells[ours], cells[theirs], theirs in DIRECT))})"
                for theirs in others if cells.get(ours) and cells.get(theirs)]
        if told:
            yield f"{name}, {ours} : {'; '.join(told)}"
    if all(cells.get(column) for column in ("mlfs signed", "sdk signed", "discard")):
        bound = median(cells["sdk signed"], "cpu") + median(cells["discard"], "cpu")
        for told in times("CPU", median(cells["mlfs signed"], "cpu"), bound):
            yield f"{name}, mlfs signed : sdk signed + discard ({told})"
    for column, mine in cells.items():
        if column in DIRECT:
            continue
        beside = results.get(row.beside, {}).get(column)
        if mine and beside:
            told = against(row, mine, beside, False)
            yield f"{column}, {name} : {row.beside} ({', '.join(told)})"


def bounds(profile):
    """What a profile's wire lets through."""
    first_byte, rate = PROFILES[profile]
    if not rate:
        return "No bound on the wire: the processor is the limit."
    told = "; ".join(f"{count} carry at most {count * rate / MIB:.0f} MiB/s" for count in CONNECTIONS)
    return (f"A connection carries {rate / 1e6:.0f} MB/s, and its first byte comes after "
            f"{first_byte} ms: {told}.")


def table(profile, rows, results, names, reasons):
    lines = [f"\n### {profile}\n", bounds(profile), "",
             "| row | " + " | ".join(names) +
             " | mlfs : mount-s3 | mlfs : best peer | mlfs : sdk |",
             "|---|" + "---|" * (len(names) + 3)]
    below = []
    for name, row in rows.items():
        if name not in results:
            continue
        cells = results[name]
        medians = {column: median(cells[column]) for column in names if cells.get(column)}
        peers = [value for column, value in medians.items() if column in PEERS]
        better = max if row.higher_is_better else min
        columns = [ratio(medians.get("mlfs"), other, row.higher_is_better)
                   for other in (medians.get("mount-s3"), better(peers) if peers else None,
                                 medians.get("sdk"))]
        lines.append(f"| {name}: {row.unit} | " +
                     " | ".join(cell(cells.get(column)) for column in names) +
                     " | " + " | ".join(columns) + " |")
        below += ratios(rows, name, results)
    if below:
        lines += ["", "The last columns: how many times better. Here, how many times as much:", "",
                  *(f"- {line}" for line in below)]
    if reasons:
        lines += ["", "Not measured:", "", *(f"- {reason}" for reason in sorted(reasons))]
    return "\n".join(lines)


def compare(former, later):
    former, later = (json.loads(pathlib.Path(path).read_text()) for path in (former, later))
    if former["size_mib"] != later["size_mib"]:
        print(f"sizes differ: {former['size_mib']} and {later['size_mib']} MiB")
    for profile, rows in later["profiles"].items():
        for row, cells in rows.items():
            for name, results in cells.items():
                before = former["profiles"].get(profile, {}).get(row, {}).get(name)
                if before and results:
                    one, other = median(before), median(results)
                    told = times("value", other, one)
                    told += times("CPU", median(results, "cpu"), median(before, "cpu"))
                    told += times("memory", peak(results), peak(before))
                    print(f"{profile:8} {row:12} {name:12} {one:10.3g} -> {other:10.3g}  "
                          f"({', '.join(told)})")
