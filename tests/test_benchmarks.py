"""Benchmarks: runs made once and collected, verdicts that follow the numbers, timings of toys."""
import contextlib
import functools
import importlib
import io
import json
import math
import shutil
import sys
import types

from tests.helpers import HERE, TINY, folder, replaced, run

import common

from benchmarks import claims, controls, experiments, peers, throughput


silent = functools.partial(contextlib.redirect_stdout, io.StringIO())


def test_every_recorded_command_is_one_that_its_script_takes():
    tables = [*experiments.SUITES.values(), claims.RUNS,
              *(control.table(paper) for paper, control in controls.CONTROLS.items())]
    for row in {row for table in tables for row in table.values()}:
        module = importlib.import_module(row.script)
        with silent():
            common.configure(module.Config, module.LAPTOP, getattr(module, "defaults", None),
                             [*row.flags.split(), "--eval", row.evals])
    for key in claims.asked(claims.CLAIMS):
        name, layer = key.split(" | layer ")
        assert name in claims.MEASURED or (int(layer), 42) in claims.RUNS[name].jobs(), key


def test_experiments_run_once_add_evaluations_and_keep_other_seeds():
    def in_process(command, real=experiments.subprocess.run, **more):
        """A command of experiments.py, without a process of its own."""
        if command[0] != sys.executable:
            return real(command, **more)
        module, flags = importlib.import_module(command[2]), command[3:]
        return types.SimpleNamespace(returncode=run(module, *flags)[0])
    flags = " ".join(map(str, TINY)) + " --steps 4"
    Row, key = experiments.Row, "plain | layer 0"
    one, more = (Row("tsae", f"--no-temporal {flags}", evals, seeds=(1, 2), layers=(0,))
                 for evals in ("core", "core,temporal"))
    with folder() as here, replaced(experiments, "RUNS", here / "runs"), silent(), \
            replaced(experiments.subprocess, "run", in_process):
        experiments.run([one], workers=1)
        out = one.folder(0, 1)
        weights = (out / "sae_weights.safetensors").read_bytes()
        assert experiments.lacks(out, "core,temporal") == ["temporal"]
        experiments.run([more], workers=1)
        assert not experiments.lacks(out, "core,temporal")
        assert (out / "sae_weights.safetensors").read_bytes() == weights, "trained again"
        table = experiments.collect({"plain": more}, {}, ["core.EV"])
        values = table[key]["values"]["core.EV"]
        assert set(values) == {"1", "2"} and values["1"] != values["2"]
        shutil.rmtree(out)                                 # recorded on another machine
        again = experiments.collect({"plain": more}, table, ["core.EV"])
        assert again[key]["values"]["core.EV"] == values


def test_claims_verdicts_follow_from_the_numbers():
    """Of made-up values; how these are read: the recorded ones, below."""
    assert len(claims.CLAIMS) >= 50 and {c.id[0] for c in claims.CLAIMS} == set("ABCDE")
    for claim in claims.CLAIMS:
        inside, step = (claim.low, -1) if math.isfinite(claim.low) else (claim.high, 1)
        for numbers, want in (([inside] * 3, "reproduced"), ([], "not run"),
                              ([inside, inside + 1, inside - 1], "within the noise of the seeds"),
                              ([inside + step] * 3, "refuted (in all readings tried)")):
            with replaced(claims, "values", lambda *_: numbers):
                found = claims.judge(claim, {})["verdict"]
            assert found == ("not testable here" if claim.untestable else want), (claim.id, found)
        assert bool(claim.untestable) != bool(claim.readings and claim.criterion), claim.id
    two = types.SimpleNamespace(readings={"one": "A", "other": "B"}, metric="m", any=False,
                                low=0, high=2, untestable="")
    with replaced(claims, "values", lambda table, item, metric: [1.0 if item == "A" else 9.0] * 3):
        assert claims.judge(two, {})["verdict"] == "depends on the reading"


def test_claims_pages_follow_from_the_recorded_numbers():
    """Verdicts and page in the tree are what the recorded values give, byte for byte."""
    data = json.loads((HERE / "results/claims.json").read_text())
    again = json.loads(json.dumps(claims.ledger(data["runs"])))
    assert data["claims"] == again["claims"]
    assert claims.markdown(data) == (HERE / "results/claims.md").read_text()


def test_throughput_of_random_gemma_as_a_toy():
    with folder() as here, silent():
        throughput.main(["--random_gemma", "--toy", "--cases", "standard, ReLU", "--out", "."])
        table = common.read_json(here / "gpu.json")
    assert len(table["rows"]) == 4 and table["lm_tokens/s"] > 0
    assert all(row.get("tokens/s", 0) > 0 for row in table["rows"] if not row["compile"])


def test_peers_ours_runs_and_a_missing_package_is_a_row():
    libraries = {"ours": peers.LIBRARIES["ours"], "other": ("no-such-package-of-saes", None),
                 "ours (plain process)": peers.LIBRARIES["ours"]}
    with replaced(peers, "LIBRARIES", libraries):          # each in a process of its own
        rows = peers.measure(16, ["float32"], [4], 1)["rows"]
    ours = [row for row in rows if row["library"] != "other"]
    assert {"library": "other", "reason": "not installed"} in rows and len(ours) == 4
    assert all(row["ours/this"] > 0 and row["plain/this"] > 0 for row in ours)
