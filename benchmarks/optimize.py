"""The main command as a user runs it: its text, its time, and whether it met the budget.

    python benchmarks/optimize.py                 every command of COMMANDS
    python benchmarks/optimize.py --only example  one of them; the others keep their rows

Writes benchmarks/results/optimize.json, from which the docs show the output. Run it on a quiet machine: times are part
of the result.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import run_header, write_json

OUT = Path(__file__).parent / "results" / "optimize.json"
COMMANDS = {
    "default": "nano",
    "example": "nano --max-flops 0.9x --max-bytes 0.4x --max-loss 2pt",
    "time_on": "nano --max-ttft 0.5x --time-on llava-onevision-0.5b",
}
"""name: what follows `foveate optimize`."""
SHOWN = (
    "model",
    "budget_text",
    "verdict",
    "met",
    "recipe",
    "front",
    "compare",
    "timing",
    "nearest",
    "limits",
    "quality",
    "dense",
)
"""Keys of report.json that the text on the terminal is made of."""


def measured(arguments: str) -> dict[str, Any]:
    """{"arguments", "seconds", "cpu_seconds", "exit_code", "space", "tried", "report"} of one command, in a process of
    its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "foveate", "optimize", *shlex.split(arguments), "-o", str(out)]
        start, before = time.monotonic(), processor_seconds()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds, spent = time.monotonic() - start, processor_seconds() - before
        if done.returncode not in (0, 1):
            raise SystemExit(f"foveate optimize {arguments}: exit code {done.returncode}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return row(arguments, report, seconds, spent, done.returncode)


def processor_seconds() -> float:
    """What ended child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(arguments: str, report: dict[str, Any], seconds: float, cpu_seconds: float, code: int) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "arguments": arguments,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "exit_code": code,
        "space": report["space"],
        "tried": sum(trial["n"] > 0 for trial in report["trials"]),
        "report": {key: report[key] for key in SHOWN},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(COMMANDS), action="append", help="one command, repeatable")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    before = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.only and args.out.exists() else {}
    runs = {**before, **{name: measured(COMMANDS[name]) for name in args.only or COMMANDS}}
    write_json(args.out, {**run_header(), "runs": {name: runs[name] for name in COMMANDS if name in runs}})


if __name__ == "__main__":
    main()
