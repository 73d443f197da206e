"""Every test. `python test_all.py` runs all, `python test_all.py tsae resume` those whose file or
name holds one of the words, `python test_all.py exercise_3` one exercise's check. The tests
are plain functions in tests/, and pytest finds the same ones (its --durations: the slowest).

Tests of what this machine lacks (a model's weights, a browser, a library) are skipped with the
reason. Two tests run at a time where there are two cores, each in a process with one thread.
"""
import ast
import importlib
import multiprocessing
import os
import sys
import time
import traceback
import unittest
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent


def collect(words):
    """(file, function) of each test that the words name; of every test without words."""
    found = []
    for path in [*sorted(HERE.glob("tests/test_*.py")), HERE / "tests" / "exercises.py"]:
        for node in ast.parse(path.read_text()).body:
            name = getattr(node, "name", "")
            if name.startswith("exercise_") and path.stem == "exercises":
                wanted = name in words                          # only when asked for by its name
            else:
                wanted = not words or any(word in f"{path.stem}.{name}" for word in words)
                wanted &= isinstance(node, ast.FunctionDef) and name.startswith("test_")
            if wanted:
                found.append((path.stem, name))
    return found


def run_test(file, name):
    """-> ("passed", "failed" or "skipped", what there is to say, seconds)"""
    start, outcome, text = time.time(), "passed", ""
    try:
        getattr(importlib.import_module(f"tests.{file}"), name)()
    except unittest.SkipTest as reason:
        outcome, text = "skipped", str(reason)
    except Exception:
        outcome, text = "failed", traceback.format_exc()
    return outcome, text, time.time() - start


def main(words):
    tests = collect(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts = dict(passed=0, failed=0, skipped=0)
    workers = max(1, min(2, os.cpu_count() or 1, len(tests)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run_test, *test): ".".join(test) for test in tests}
        for job in as_completed(jobs):
            try:
                outcome, text, took = job.result()
            except Exception as error:                          # the process died
                outcome, text, took = "failed", repr(error), 0.0
            counts[outcome] += 1
            print(f"{outcome:8}{jobs[job]}  ({took:.1f} s)  {text}", flush=True)
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    return 1 if counts["failed"] or not tests else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
