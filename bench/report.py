"""Tables of results, and ratios between two of them."""

import json
import pathlib
import statistics

from peers import DIRECT


def median(results, field="value"):
    return statistics.median(result[field] for result in results)


def cell(results):
    if not results:
        return "–"
    value = median(results)
    text = f"**{value:.3g}**" if value < 100 else f"**{value:.0f}**"
    details = [f"{median(results, 'cpu'):.2f} s/GiB" if results[0]["moved"]
               else f"{median(results, 'cpu'):.2f} s CPU"]
    peaks = [result["peak"] for result in results if result["peak"]]
    if peaks:
        details.append(f"{max(peaks)} MiB")
    if results[0]["extra"]:
        details.append(results[0]["extra"])
    return f"{text} ({', '.join(details)})"


def ratio(ours, theirs, higher_is_better):
    """How many times better ours is."""
    if not ours or not theirs:
        return "–"
    return f"{ours / theirs if higher_is_better else theirs / ours:.2f} x"


def table(profile, rows, results, names, reasons):
    lines = [f"\n### {profile}\n",
             "| row | " + " | ".join(names) + " | mlfs : mount-s3 | mlfs : best peer | mlfs : sdk |",
             "|---|" + "---|" * (len(names) + 3)]
    for name, row in rows.items():
        if name not in results:
            continue
        cells = results[name]
        medians = {column: median(cells[column]) for column in names if cells.get(column)}
        peers = [value for column, value in medians.items()
                 if not column.startswith("mlfs") and column not in DIRECT]
        better = max if row.higher_is_better else min
        ratios = [ratio(medians.get("mlfs"), other, row.higher_is_better)
                  for other in (medians.get("mount-s3"), better(peers) if peers else None,
                                medians.get("sdk"))]
        lines.append(f"| {name}: {row.unit} | " +
                     " | ".join(cell(cells.get(column)) for column in names) +
                     " | " + " | ".join(ratios) + " |")
    lines += ["", *(f"- {reason}" for reason in sorted(reasons))]
    return "\n".join(lines)


def compare(former, later):
    former, later = (json.loads(pathlib.Path(path).read_text()) for path in (former, later))
    for profile, rows in later["profiles"].items():
        for row, cells in rows.items():
            for name, results in cells.items():
                before = former["profiles"].get(profile, {}).get(row, {}).get(name)
                if before and results:
                    one, other = median(before), median(results)
                    print(f"{profile:8} {row:12} {name:12} {one:10.3g} -> {other:10.3g}  "
                          f"({other / one:.2f} x)")
