"""Every architecture: a tiny random model of each is captured, compared, given adapters and asked to generate.

    python -m bench.sweep [--only REGEX] [--task TASK] [--jobs 2] [--seconds 180] [--gibibytes 6] [--again failed | all] [--table]

What it takes beside the package: `pip install -c constraints.txt -e ".[test,sweep]"`. One line of JSON per model goes to build/sweep.jsonl as
soon as it is known, so a run that was stopped goes on where it was; `--again` forgets the lines that it names. Each model runs in a process of its
own, under a time and a memory limit. At the end bench/results/sweep.json, docs/architectures.md and bench/results/not-built.json are written from
all the lines. Exit code 1: something failed, or a model was not built that not-built.json does not name: it may only become shorter.
"""

import argparse
import collections
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LINES = TOP / "build" / "sweep.jsonl"
RESULTS = TOP / "bench" / "results" / "sweep.json"
NOT_BUILT = TOP / "bench" / "results" / "not-built.json"
TABLE = TOP / "docs" / "architectures.md"
CHECKS = ("equal", "trains", "roles", "adapted", "generates")


def judge(entry, keep):
    """Build one model and run the checks on it → its record."""
    from .judged import Judged, accepts, words
    from .plain import PLAIN
    from .tiny import tiny

    start = time.perf_counter()
    try:
        if entry.kind == "plain":
            model, example, at = PLAIN[entry.name]()
            level = 0
        else:
            model, _, level = tiny(entry, accepts)
            example = at = None
    except Exception as failure:  # upstream's reason
        return {"outcome": "not built", "reason": words(failure)}
    built = round(time.perf_counter() - start, 2)
    judged = Judged(model, keep, example, *([at] if at else []))
    judged.found["seconds"]["built"], judged.found["level"] = built, level
    found = judged.run()
    return found | outcome(found)


def outcome(found):
    """The outcome of a model's checks, with the reason where something failed."""
    if found["captured"] != "ok":
        return {"outcome": "failed", "reason": f"captured: {found['captured']}"}
    wrong = [f"{check}: {found[check]}" for check in CHECKS if not found[check].startswith(("ok", "no generator", "upstream"))]
    if wrong:
        return {"outcome": "failed", "reason": "; ".join(wrong)}
    refused = [text for text in found.get("narrowed", ()) if "upstream" not in text]
    refused += found.get("refused", [])
    refused += [note for note in found["notes"] if note.startswith("captured without ")]
    return {"outcome": "opaque" if found["opaque"] else "narrowed" if refused else "whole"}


def child(entry, path, gibibytes):
    """Run in a process of its own: the record is written to `path` after each check."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (int(gibibytes * 2**30),) * 2)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    keep = lambda found: path.write_text(json.dumps(found))
    try:
        found = judge(entry, keep)
    except BaseException as failure:
        found = {"outcome": "failed", "reason": f"the sweep itself: {type(failure).__name__}: {failure}"}
    found["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    keep(found)
    os._exit(0)


def sweep(entries, jobs, seconds, gibibytes, done):
    """Run the entries, `jobs` at a time; done(entry, record) after each."""
    LINES.parent.mkdir(exist_ok=True)
    waiting, running = collections.deque(entries), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                entry = waiting.popleft()
                path = LINES.parent / f"sweep-{os.getpid()}-{entry.name}.json"
                pid = os.fork()
                if pid == 0:
                    child(entry, path, gibibytes)
                running[pid] = entry, path, time.monotonic()
            time.sleep(0.05)
            for pid, (entry, path, start) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                late = time.monotonic() - start > seconds
                if not ended and not late:
                    continue
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                found = json.loads(path.read_text()) if path.exists() else {}
                path.unlink(missing_ok=True)
                if "outcome" not in found:
                    at = found.pop("at", "built")
                    why = f"over {seconds} s" if late else f"the process ended with status {status}"
                    found |= {"outcome": "not built" if at == "built" else "failed", "reason": f"{at}: {why}"}
                found["seconds"] = {**found.get("seconds", {}), "all": round(time.monotonic() - start, 1)}
                done(entry, found)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def records():
    """name → record, the latest line of each."""
    if not LINES.exists():
        return {}
    return {record["name"]: record for record in map(json.loads, LINES.read_text().splitlines())}


def versions():
    found = {}
    for name in ("torch", "transformers", "peft", "timm", "diffusers", "torchvision"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit():
    """The commit that is run, so that lines of several can be told apart; None outside of a checkout."""
    found = subprocess.run(["git", "-C", str(TOP), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def main():
    from .plain import entries as plain
    from .tables import write
    from .tiny import TASKS, architectures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names that this regular expression finds")
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)}, plain torch, timm, diffusers")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--gibibytes", type=float, default=12, help="of address space, for each model")
    parser.add_argument("--again", help='forget what is known first: "all", or an outcome ("failed", "not built")')
    parser.add_argument("--table", action="store_true", help="run nothing, write the tables from what is known")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    from .wheels import torchvision

    torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    import rewrite.passes.lora  # noqa: F401  what every child needs is imported once

    from . import judged  # noqa: F401

    everything = (*plain(), *architectures())
    chosen = [e for e in everything if (not given.only or re.search(given.only, e.name)) and (not given.task or given.task in e.tasks)]
    known = records()
    forgotten = {e.name for e in chosen if given.again and e.name in known and given.again in ("all", known[e.name]["outcome"])}
    todo = [] if given.table else [e for e in chosen if e.name not in known or e.name in forgotten]
    start, counts, at = time.monotonic(), collections.Counter(), commit()

    def done(entry, found):
        record = {"name": entry.name, "type": entry.kind, "tasks": entry.tasks, "commit": at, **found}
        with LINES.open("a") as file:
            file.write(json.dumps(record) + "\n")
        counts[found["outcome"]] += 1
        print(f"{sum(counts.values()):>4}/{len(todo)} {found['outcome']:<9} {found['seconds']['all']:>6.1f} s  {entry.name}  {found.get('reason', '')[:160]}", flush=True)

    sweep(todo, given.jobs, given.seconds, given.gibibytes, done)
    seconds = round(time.monotonic() - start)
    run = {"command": " ".join(("python -m bench.sweep", *sys.argv[1:])), "models": len(todo), "seconds": seconds}
    print(f"{seconds} s: {', '.join(f'{n} {name}' for name, n in counts.most_common())}")
    found = records()
    complete = [found[e.name] for e in everything if e.name in found]
    sys.exit(write(complete, [e for e in everything if e.name not in found], versions(), run, RESULTS, NOT_BUILT, TABLE))


if __name__ == "__main__":
    main()
