"""Benchmarks: runs made once and collected, verdicts that follow the numbers, timings of toys; the
losses and codes of benchmarks/published.py against loops."""
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import shutil
import types

from tests.helpers import HERE, TINY, configured, folder, replaced, run, tiny
from tests.test_tsae import keep_largest

import common
import torch
import torch.nn.functional as F

from benchmarks import claims, controls, experiments, peers, published, throughput

silent = functools.partial(contextlib.redirect_stdout, io.StringIO())


def test_every_recorded_command_is_one_that_its_script_takes():
    tables = [*experiments.SUITES.values(), claims.RUNS,
              *(control.table(paper) for paper, control in controls.CONTROLS.items())]
    for row in {row for table in tables for row in table.values()}:
        configured(importlib.import_module(row.script), [*row.flags.split(), "--eval", row.evals])
    for key in claims.asked(claims.CLAIMS):
        name, layer = key.split(" | layer ")
        assert name in claims.MEASURED or (int(layer), 42) in claims.RUNS[name].jobs(), key


def test_experiments_run_once_add_evaluations_and_keep_other_seeds():
    def in_process(command, **_):
        status, *_ = run(importlib.import_module(command[2]), *command[3:])
        return types.SimpleNamespace(returncode=status)
    flags = " ".join(map(str, ("--no-temporal", *TINY, "--steps", 4)))
    one, more = (experiments.Row("tsae", flags, evals, seeds=(1, 2), layers=(0,))
                 for evals in ("core", "core,temporal"))
    args, runs = experiments.arguments("").parse_args(["--workers", "1"]), []
    with folder() as here, replaced(experiments, "RUNS", here / "runs"), silent(), \
            replaced(experiments, "subprocess", types.SimpleNamespace(run=in_process, STDOUT=None)):
        experiments.prepare(args, {"plain": one}, {})
        out = one.folder(0, 1)
        weights = (out / "sae_weights.safetensors").read_bytes()
        assert experiments.lacks(out, "core,temporal") == ["temporal"]
        experiments.prepare(args, {"plain": more}, {})
        assert not experiments.lacks(out, "core,temporal")
        assert (out / "sae_weights.safetensors").read_bytes() == weights, "trained again"
        table = experiments.collect({"plain": more}, {}, ["core.EV"])
        values = table["plain | layer 0"]["values"]["core.EV"]
        assert set(values) == {"1", "2"} and values["1"] != values["2"]
        shutil.rmtree(out)                                 # recorded on another machine
        with replaced(experiments, "run", lambda pairs, *_: runs.append(pairs)):
            for flags in [], ["--again"]:
                experiments.prepare(experiments.arguments("").parse_args(flags),
                                    {"plain": more}, table)
        assert [len(pairs) for pairs in runs] == [0, 2], "recorded runs, unless --again"
        assert experiments.collect({"plain": more}, table, ["core.EV"]) == table


def test_claims_verdicts_and_page_follow_from_the_numbers():
    """Of made-up values; and those in the tree from the recorded ones, byte for byte."""
    data = json.loads((HERE / "results/claims.json").read_text())
    assert data["claims"] == json.loads(json.dumps(claims.ledger(data["runs"])))["claims"]
    assert claims.markdown(data) == (HERE / "results/claims.md").read_text()
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
    for seeds in ("42",), ("42", "43", "44"):              # no verdict before all seeds are there
        row = {"seeds": dict.fromkeys(seeds), "values": {"core.EV": dict.fromkeys(seeds, 0.5)}}
        want = [0.5] * 3 if len(seeds) == 3 else []
        assert claims.values({"A | layer 19": row}, "A", "core.EV") == want


def test_throughput_of_random_gemma_as_a_toy():
    with folder() as here, replaced(throughput, "SCRIPTS", ("tsae",)), silent():
        throughput.main(["--random_gemma", "--toy", "--cases", "standard, ReLU", "--out", "."])
        *steps, alone, two, killed, resumed = common.read_json(here / "gpu.json")["rows"]
    assert len(steps) == 4 and all(row["tokens/s"] > 0 for row in steps if not row["compile"])
    assert alone["status"] == two["status"] == resumed["status"] == 0 > killed["status"]
    assert resumed["last loss"] == alone["last loss"]


def test_peers_ours_runs_and_a_missing_package_is_a_row():
    libraries = {"ours": peers.LIBRARIES["ours"], "other": ("no-such-package-of-saes", None),
                 "ours (plain process)": peers.LIBRARIES["ours"]}
    with replaced(peers, "LIBRARIES", libraries):          # each in a process of its own
        rows = peers.measure(16, ["float32"], [4], 1)["rows"]
    ours = [row for row in rows if row["library"] != "other"]
    assert {"library": "other", "reason": "not installed"} in rows and len(ours) == 4
    assert all(row["ours/this"] > 0 and row["plain/this"] > 0 for row in ours)


def sae_and_batch(method):
    torch.manual_seed(0)
    cfg = published.Config(method=method, expansion=2, k=3, T=7, high=0.5)
    sae = published.PublishedSAE(6, cfg)
    for p in sae.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    mask = torch.rand(3, 7) < 0.8
    mask[:, 2:4] = True
    return sae, torch.randn(3, 7, 6), mask, cfg


def test_published_codes_equal_loops():
    sae, x, mask, cfg = sae_and_batch("pooled")
    f, pre = sae.encode(x, mask), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    for b, t in itertools.product(range(3), range(7)):
        last = [pre[b, s] for s in range(max(0, t - cfg.window + 1), t + 1) if mask[b, s]]
        mean = sum(last) / max(1, len(last)) + torch.zeros(12)
        assert torch.allclose(f[b, t], keep_largest(mean, 3), atol=1e-6)

    sae, x, mask, cfg = sae_and_batch("tfa")
    h, (f, predicted) = x - sae.b_dec, sae.codes(x, mask)
    for b, t in itertools.product(range(3), range(7)):
        past, mixed = h[b, :t][mask[b, :t]], torch.zeros(6)    # (n, D)
        if len(past):
            scores = past @ sae.W_k @ (h[b, t] @ sae.W_q)
            mixed = (scores / 6 ** 0.5).softmax(0) @ past @ sae.W_v
        guess = F.relu(mixed @ sae.W_enc + sae.b_pred)
        novel = keep_largest((h[b, t] - guess @ sae.W_dec) @ sae.W_enc + sae.b_enc, 3)
        assert torch.allclose(predicted[b, t], guess, atol=1e-5)
        assert torch.allclose(f[b, t], novel, atol=1e-5)
    assert torch.allclose(sae(x, mask)[0], (f + predicted) @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_published_tsae_equals_its_definition():
    """BatchTopK, in training k a token, later a threshold; the high group alone; each pair against
    the tokens before the pairs of other sequences."""
    sae, x, mask, cfg = sae_and_batch("tsae")
    f, pre = sae.encode(x, mask), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    kept = pre[mask].flatten().sort(descending=True).values[:3 * mask.sum()]
    assert (f[mask] > 0).sum() == 3 * mask.sum() and sae.threshold == kept[-1]
    assert torch.equal(f[mask], torch.where(pre[mask] >= kept[-1], pre[mask], 0.0))
    sae.eval()
    assert torch.equal(sae.encode(x), pre * (pre > sae.threshold))
    terms, _ = published.losses(sae, x, mask, mask.sum(), 0, cfg)
    z, entropy = sae.encode(x)[..., :6], []                    # of 12
    error = (z @ sae.W_dec[:6] + sae.b_dec - x)[mask].square().sum(-1)
    assert torch.allclose(terms["high"], error.mean())
    every = itertools.product(range(3), range(1, 7))
    pairs = [(b, t) for b, t in every if mask[b, t - 1] and mask[b, t]]
    for b, t in pairs:                                         # its own first
        before = [z[b, t - 1], *(z[c, s - 1] for c, s in pairs if c != b)]
        cosine = F.cosine_similarity(z[b, t], torch.stack(before), dim=1)
        entropy.append(cosine.logsumexp(0) - cosine[0])
    assert torch.allclose(terms["contrast"], 0.6 * sum(entropy) / len(pairs))


def test_published_methods_never_see_a_later_token_and_learn():
    for method in ("tsae", "matryoshka", "tfa", "pooled", "random"):
        sae, x, mask, _ = sae_and_batch(method)
        sae.eval()
        later = x.clone()
        later[:, 4:] = torch.randn(3, 3, 6)
        assert torch.equal(sae.encode(x, mask)[:, :4], sae.encode(later, mask)[:, :4]), method
        with folder():
            found = tiny(published, "run", 60, "--method", method, "--k", 4, "--eval", "core")
        core, least = found["core"], 0.1 if method == "random" else 0.3
        assert core["EV"] > least and 2 < core["L0"] < 8, (method, core)
