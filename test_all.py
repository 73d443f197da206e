"""Every test. `python test_all.py` runs all, `python test_all.py tsae resume` those whose file or
name holds one of the words, `python test_all.py exercise_3` one exercise's check. Flags are
pytest's, which finds the same tests: `python -m pytest`.

Tests of what this machine lacks (a model's weights, a browser, a library) are skipped with the
reason. Two run at a time, each in a process with one thread.
"""
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def main(words):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(HERE)
    flags = [word for word in words if word.startswith("-")]
    names = [word for word in words if word not in flags]
    where = [f"tests/exercises.py::{name}" for name in names if name.startswith("exercise_")]
    how = ["-o", "python_functions=exercise_*"] if where else ["-n2", "-k", " or ".join(names)]
    return pytest.main(["-q", "-rs", "-W", "ignore", "--tb=short", "--assert=plain", *how,
                        *(where or ["tests"]), *flags])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
