"""Is each paper's mechanism alive? Where there is something to find, on planted data, it must find it.

    python benchmarks/controls.py              run what is missing, then table, page and figure
    python benchmarks/controls.py --table      run nothing: collect and write
    python benchmarks/controls.py --list       the commands, and which of them are done

For each paper a plant of data/planted.py; on it the standard SAE, the method at the same L0, and the
method with the mechanism's cause taken away (--shuffle train), seeds 42 to 44. Settings were found
with seed 1. Writes results/controls.json, results/controls.png, and docs/results.md between
`<!-- controls -->` and `<!-- /controls -->`. @MINUTES@ of two cores.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common                   # before torch: it sets how idle threads wait

from benchmarks import experiments
from benchmarks.experiments import Row

RESULT, FIGURE = experiments.RESULTS / "controls.json", experiments.RESULTS / "controls.png"
PAGE = HERE / "docs" / "results.md"
STANDARD = "tsae --no-temporal"


def rows(plant, common_flags, **methods):
    """{name: Row} of one plant; `shuffled` is added to what is called `method`."""
    methods = {**methods, "shuffled": methods["method"] + " --shuffle train"}
    return {name: Row(text.split()[0], " ".join(
        f"--model synthetic --plant {plant} {common_flags} {' '.join(text.split()[1:])}".split()),
        "core") for name, text in methods.items()}
