#!/usr/bin/env python3
"""A table of the lines of JSON that scripts/gpu_bench.sh collects: titan beside PyTorch's best eager and compiled way.

    gpu_table.py RESULTS

Of several runs of a way, the median.
"""

import json
import sys
from pathlib import Path

CASES = Path(__file__).resolve().parent.parent / "benches/cases.json"


def table(results):
    """One row per case: titan beside PyTorch's best eager and best compiled way."""
    head = ["case", "titan tok/s", "eager", "compiled", "titan / eager", "titan / compiled"]
    head += ["MFU titan", "eager", "compiled", "peak GiB titan", "eager", "compiled", "launches per step"]
    rows = [head]
    order = list(json.loads(CASES.read_text())["gpu"]) + sorted({line["case"] for line in results})
    for case in dict.fromkeys(order):
        lines = [line for line in results if line["case"] == case]
        titan = pick([line for line in lines if line["program"].startswith("titan")])
        if "tps" in titan:
            # Memory that belongs to a recorded step is not counted with the rest.
            titan = titan | {"peak_mem_bytes": max(line.get("peak_mem_bytes", 0) for line in lines if line["program"] == titan["program"])}
        torchs = [line for line in lines if line["program"].startswith("PyTorch")]
        eager = pick([line for line in torchs if line["way"].endswith("eager")])
        compiled = pick([line for line in torchs if not line["way"].endswith("eager")])
        if not lines:
            continue
        known = [line for line in (titan, eager, compiled) if "tps" in line]
        for key in ("n_params", "flops_per_token"):
            if len({line[key] for line in known}) > 1:
                print(f"warning: {case}: {key} differs: {[line[key] for line in known]}", file=sys.stderr)

        def cell(line, key, form):
            return form(line) if key in line else line.get("error", "")[:40]

        tps = [cell(line, "tps", lambda line: f"{line['tps']:,.0f}") for line in (titan, eager, compiled)]
        for i, line in enumerate((titan, eager, compiled)):
            if "tps" in line and line["way"] not in ("bf16", "bf16-eager", "bf16-compile"):
                tps[i] += f" ({line['way']})"
        ratios = [f"{titan['tps'] / it['tps']:.2f}" if "tps" in it and "tps" in titan else "" for it in (eager, compiled)]
        mfu = [f"{100 * it['tps'] * it['flops_per_token'] / it['peak_flops']:.1f}%" if "tps" in it else "" for it in (titan, eager, compiled)]
        gib = [f"{it['peak_mem_bytes'] / 2**30:.2f}" if "tps" in it else "" for it in (titan, eager, compiled)]
        launches = titan.get("launches")
        rows.append([case, *tps, *ratios, *mfu, *gib, "" if launches is None else f"{launches:.0f}"])
    device = next((line["device"] for line in results if "device" in line), "")
    programs = " and ".join(sorted({it["program"] for it in results}, reverse=True))
    return f"{programs}, {device}\n\n" + markdown(rows)


def pick(lines):
    """The fastest that ran, by the median of each way; else one that says why not; else nothing."""
    ways = {}
    for line in lines:
        if "tps" in line:
            ways.setdefault((line["program"], line["way"]), []).append(line)
    middle = [sorted(way, key=lambda line: line["tps"])[len(way) // 2] for way in ways.values()]
    return max(middle, key=lambda line: line["tps"], default=lines[-1] if lines else {})


def markdown(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
