"""The ledger of claims: what each paper says in numbers, beside what this repository measures.

    python benchmarks/claims.py C                        train and evaluate what paper C's claims need, then write
    python benchmarks/claims.py C --list                 the runs, and how long each trained
    python benchmarks/claims.py all --table              run nothing: collect what is there and write
    python benchmarks/claims.py all --more "--cache DIR" flags that change no result

Writes results/claims.json (numbers per seed of every run, and the claims) and results/claims.md (made from it).
The verdict of a claim is computed from the numbers by the function below its quote; nothing is entered by hand.
A number that no run produced reads "not run". The runs are those of benchmarks/experiments.py: shared with its
suites, never repeated once finished, resumed if interrupted, one worker process of one thread a core. Step times
are measured once, after the runs, and kept in results/claims.json: delete it to measure again.

Budget: under 60 minutes a paper on 2 cores, activations harvested before; results/claims.md has what each one took.
"""
import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]
import numpy as np
import torch

import common
import experiments
import throughput

PAPERS = {"A": "MTSAE: Multi-Scale Temporal Feature Extraction", "B": "Hierarchical temporal-aware SAE",
          "C": "TSAE: Time-Aware Sparse Autoencoders", "D": "MTSAE for selective unlearning", "E": "TemporalLens"}
SCRIPTS = {"A": "mtsae.py", "B": "hierarchical_sae.py", "C": "tsae.py", "D": "mtsae.py --variant unlearning",
           "E": "temporal_lens.py"}

# ----------------------------------------------------------------------------------------------------------------
# Runs: what is trained and evaluated, in the scripts' laptop preset
# ----------------------------------------------------------------------------------------------------------------

FAST = "reconstruction,temporal"
HALF = "--batch_size 2 --steps 1250 --warmup 1000 --lr_warmup 500"      # half the batch, half of every schedule
TOPK = "--activation topk --k 32"
STEPS = "--steps 2500"                                                  # as many as the control
LENS = "--heldout_tokens 128000"                                        # paper E: 1000 test sequences
FEW = "--variant unlearning --tokens 10000 --steps 0 --batch_size 16"   # paper D's text: 10,000 // 2,048 = 4 steps
KERNELS = f"{FEW} --conv_init 0.577"                                    # PyTorch's range for kernels of 3 taps


@dataclasses.dataclass
class Row:
    """One command for several seeds and layers. once: further evaluations, of the first seed only (slow ones)."""
    script: str
    flags: str = ""
    evals: str = FAST
    seeds: tuple = (42, 43, 44)
    layers: tuple = (19,)
    once: str = ""

    def command(self, layer):
        return f"python {self.script}.py --layer {layer} {self.flags}".strip()


B, ONE = functools.partial(Row, "hierarchical_sae"), (42,)
ROWS = {
    # paper A
    "MTSAE": Row("mtsae", STEPS, "core,temporal,probing"),
    "MTSAE 1,2,4": Row("mtsae", f"--rates 1,2,4 {STEPS}"),
    "MTSAE Run 1": Row("mtsae", f"--rates 1,2,4 --recon_weight 1 {STEPS}"),
    "MTSAE no resampling": Row("mtsae", f"--resample_every 0 {STEPS}"),
    "MTSAE L1 0.5": Row("mtsae", f"--l1 0.5 {STEPS}", seeds=ONE),
    # paper D
    "unlearning": Row("mtsae", f"--variant unlearning {STEPS} --dtype auto", "core,temporal,zero,unlearning"),
    "4 steps": Row("mtsae", FEW, seeds=(42, 43, 44, 45, 46)),
    "4 steps, PyTorch's kernels": Row("mtsae", KERNELS, seeds=(42, 43, 44, 45, 46)),
    # paper C; "standard" is the control of the others too
    "TSAE": Row("tsae", "", "core,temporal", seeds=(42, 43, 44, 45, 46)),
    "standard": Row("tsae", "--no-temporal", "core,temporal,zero,probing"),
    "half TSAE": Row("tsae", HALF),
    "half no clipping": Row("tsae", f"--clip 0 {HALF}"),
    "half no boost": Row("tsae", f"--boost 1 {HALF}"),
    "half no noise": Row("tsae", f"--grad_noise 0 {HALF}"),
    "half no buffers": Row("tsae", f"--no-buffers {HALF}"),
    "half no LayerNorm": Row("tsae", f"--layer_norm off {HALF}"),
    "half no variance weights": Row("tsae", f"--variance_weights off {HALF}"),
    "half no safeguards": Row("tsae", "--clip 0 --layer_norm off --boost 1 --grad_noise 0 --no-buffers "
                                      f"--variance_weights off {HALF}"),
    "half no warm-up": Row("tsae", f"{HALF.replace('--warmup 1000', '--warmup 0')}"),
    "half no threshold": Row("tsae", f"--min_variance 0 {HALF}"),
    "half standard, error averaged": Row("tsae", f"--no-temporal --recon_reduction mean {HALF}"),
    "TopK": Row("tsae", f"--no-temporal {TOPK}"),
    "TopK TSAE": Row("tsae", TOPK),
    "TopK TSAE, half the weights": Row("tsae", f"{TOPK} --layer_norm off --variance_weights off --temporal_scale 0.5"),
    # paper E
    "lens": Row("temporal_lens", LENS, layers=(5, 12, 19)),
    "lens no annealing": Row("temporal_lens", f"--no-anneal {LENS}"),
    "lens static masks": Row("temporal_lens", f"--static_masks {LENS}"),
    "lens uniform weights": Row("temporal_lens", f"--uniform_weights {LENS}"),
    "lens no masks": Row("temporal_lens", f"--no-masks --uniform_weights {LENS}"),
    # paper B: unlearning takes minutes a run, so it has one seed
    "temporal": B("", "core,temporal", once="unlearning"),
    "temporal, layers 5 and 12": B("", seeds=ONE, layers=(5, 12)),
    "hierarchical": B("--variant hierarchical", "core,temporal", once="unlearning"),
    "disentangled": B("--variant disentangled", "core,temporal", once="unlearning"),
    "adversarial": B("--variant adversarial", "core,temporal", once="unlearning"),
    "self-aligning": B("--variant self-aligning", "core,temporal", once="unlearning"),
    "self-aligning, no margin loss": B("--variant self-aligning --adv_scale 0"),
    "no convolution": B("--no-conv", seeds=ONE, once="unlearning"),
    "one level": B("--levels 1", seeds=ONE, once="unlearning"),
    "no adaptation": B("--no-adapt", seeds=ONE),
    "margin decay 0.9": B("--margin_decay 0.9", seeds=ONE),
    "margin decay 0.99": B("--margin_decay 0.99", seeds=ONE),
    "percentile 0.75": B("--percentile 0.75", seeds=ONE),
    "percentile 0.95": B("--percentile 0.95", seeds=ONE),
    "expansion 4": B("--expansion 4", seeds=ONE),
}
VARIANTS_B = ("temporal", "hierarchical", "disentangled", "adversarial", "self-aligning")
HALVES = tuple(label for label in ROWS if label.startswith("half") and "standard" not in label)


def evals_of(label, seed):
    """Evaluations of one run, as --eval takes them."""
    row = ROWS[label]
    return row.evals + (f",{row.once}" if row.once and seed == row.seeds[0] else "")


def train(label, layer, seed, more):
    """Train (or resume) one run and its evaluations, unless that is done or another process is at it."""
    row = ROWS[label]
    experiments.one(row.script, row.flags, seed, layer, evals_of(label, seed), more)


def folder(label, layer, seed):
    """Run folder of one run, there or not; experiments.py shares it between suites."""
    return experiments.run_folder(ROWS[label].script, ROWS[label].flags, seed, layer)


def gather(path):
    """All numbers of one run folder: {metric: value}; {} if it was never run or has not ended.

    Beside eval.json, flattened: log.*, heldout_loss (temporal_lens.py), and finished, which is 0 if it stopped on a
    non-finite loss. A run that was interrupted, or stopped for another reason, is no failure of the method: it counts
    as not run.
    """
    out = {}
    if (path / "status.json").exists() and "of the loss is" in str(common.read_json(path / "status.json")):
        out = {"finished": 0.0}                                           # common.Run.log's words
    if (path / "eval.json").exists():
        results = common.read_json(path / "eval.json")
        out = {"finished": 1.0, **common.flatten(results)}
        if (path / "paired.json").exists():
            out.update(common.flatten(common.read_json(path / "paired.json")))
        config = common.read_json(path / "config.json")
        if config["script"] == "temporal_lens" and "core.MSE" in out:     # Eq. 8 with w_t = 1, in its units
            error = out["core.MSE"] * config["D"] / config["scale"] ** 2
            out["heldout_loss"] = error + config["config"]["l1"] * out["core.L1"]
        for task in results.get("probing", {}).get("per_task", ()):
            out.update({f"probing.{task['task']}.{k}": v for k, v in task.items()})
    if out and (path / "log.jsonl").exists():
        out.update(log_summary([json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]))
    return {k: v for k, v in out.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def log_summary(rows):
    """Numbers from the lines of log.jsonl: {"log.*": value}. "late" is the last third of the lines.

    noise: deviation about a straight line, over the mean; loss_variance: its square without the mean.
    """
    if not rows:
        return {"log.steps": 0}
    columns = collections.defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    late = {k: np.array(v[-max(1, len(v) // 3):]) for k, v in columns.items()}
    n = len(rows)
    early = slice(0, max(3, n // 10))
    out = {"log.steps": rows[-1]["step"] + 1, "log.loss_late": late["loss"].mean(),
           "log.loss_variance": spread(late["loss"]) ** 2, "log.loss_noise": spread(late["loss"]) / late["loss"].mean(),
           "log.active_noise": spread(late["active"]) / max(late["active"].mean(), 1e-12),
           "log.early_noise": spread(columns["loss"][early]) / np.mean(columns["loss"][early]),
           "log.spike": max(columns["loss"][n // 2:]) / np.median(columns["loss"][n // 2:]),
           "log.EV_early": np.mean(columns["EV"][n // 5:n // 4 + 1])}
    if "grad_norm" in columns:
        out["log.grad_norm"] = np.median(columns["grad_norm"])
    if "temporal" in columns:
        out["log.temporal_share"] = (late["temporal"] / late["loss"]).mean()
    if "lambda_adv" in columns:
        out["log.lambda_above_floor"] = np.mean(np.array(columns["lambda_adv"]) > 0.1 + 1e-6)
    for name in ("over_margin", "similarity"):
        if name in columns:
            out[f"log.{name}"] = np.mean(columns[name]) if name == "over_margin" else columns[name][-1]
    return {k: float(v) for k, v in out.items()}


def spread(values):
    """Deviation of a series about the straight line through it."""
    if len(values) < 3:
        return 0.0
    t = np.arange(len(values))
    return float(np.std(values - np.polyval(np.polyfit(t, values, 1), t)))


# ----------------------------------------------------------------------------------------------------------------
# Measurements that are no training run: step times, memory, arithmetic
# ----------------------------------------------------------------------------------------------------------------


def trained_steps(script, T=128, D=576, n=16, steps=6, **fields):
    """Seconds of each training step of a script on n random sequences (as benchmarks/throughput.py times them)."""
    return throughput.step_seconds(script, fields, D, torch.float32, steps, skip=0, sequences=n, T=T)


def step_seconds(*args, **fields):
    """Median seconds of a step, the first two left out."""
    return statistics.median(trained_steps(*args, **fields)[2:])


def saved_bytes(script, n, **fields):
    """Bytes that autograd keeps for the backward pass of one step on n sequences, each storage counted once."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trained_steps(script, n=n, steps=1, **fields)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(storages.values())


def time_steps(repeats=5):
    """Ratios of step times, all cases once in every repeat: {metric: {repeat: value}}."""
    out = collections.defaultdict(dict)
    standard = {"script": "tsae", "temporal": False}
    for i in range(repeats):
        control, multi, one = (step_seconds(**case) for case in (
            standard, {"script": "mtsae"}, {"script": "mtsae", "rates": "1"}))
        out["MTSAE over standard"][i], out["three rates over one"][i] = multi / control, multi / one
        long, short = step_seconds("temporal_lens", T=256), step_seconds("temporal_lens", T=64)
        out["exponent in T"][i] = math.log(long / short) / math.log(4)
        wide, narrow = (code_seconds(D) for D in (2048, 512))
        out["exponent in d"][i] = math.log(wide / narrow) / math.log(4)
        if i < 2:                                        # the papers' width, slow
            wide = {script: step_seconds(script, D=2304, steps=4, **more)
                    for script, more in (("tsae", {"temporal": False}), ("mtsae", {}))}
            out["MTSAE over standard, D 2304"][i] = wide["mtsae"] / wide["tsae"]
    # memory that grows with the sequences: the difference leaves weights and constants out
    grown = {script: saved_bytes(script, 4, **more) - saved_bytes(script, 2, **more)
             for script, more in (("tsae", {"temporal": False}), ("mtsae", {}))}
    out["MTSAE over standard, bytes"][0] = grown["mtsae"] / grown["tsae"]
    return out


@torch.no_grad()
def code_seconds(D, n=8, repeats=3):
    """Seconds to encode and decode n sequences with paper D's SAE of width D: what suppressing a feature costs."""
    import mtsae
    sae = mtsae.MTSAE(D, mtsae.Config(**{"variant": "unlearning", **mtsae.VARIANTS["unlearning"]})).eval()
    x, mask, seconds = torch.randn(n, 128, D), torch.ones(n, 128, dtype=torch.bool), []
    for _ in range(repeats):
        start = time.perf_counter()
        sae(x, mask)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def arithmetic():
    """Small exact checks: the sum of Eq. 3's weights, a probe on features that are all zero, random cosines."""
    import tsae
    gen = torch.Generator().manual_seed(0)
    variance = torch.randn(4, 128, 576, generator=gen).square().mean(1, keepdim=True)
    weights = tsae.variance_weights(variance, tsae.Config())
    zeros, labels = np.zeros((200, 1)), np.repeat([0, 1], 100)
    out = {"sum of Eq. 3": weights.sum(-1).mean(),
           "probe on zeros": common.probe_accuracy(zeros, labels, zeros, labels)}
    for expansion in (1, 4):
        rows = torch.randn(576 * expansion, 576, generator=gen)
        out[f"random cosine, expansion {expansion}"] = common.max_cosine(rows).mean()
    return {k: {0: float(v)} for k, v in out.items()}


MEASURED = {"step times": time_steps, "arithmetic": arithmetic}

# ----------------------------------------------------------------------------------------------------------------
# Claims: quote and place, then the function that judges it
# ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Claim:
    """measure(v) -> (holds: True, False or None = not testable here, number: text, why: text)."""
    id: str
    place: str
    quote: str
    reported: str
    needs: tuple
    tolerance: str
    measure: object


CLAIMS = []


class NotRun(Exception):
    """A number that no run produced."""


class Values:
    """The collected numbers, as measure functions see them: v(run, metric, layer) -> one value a seed."""

    def __init__(self, table):
        self.table, self.used = table, collections.defaultdict(set)

    def seeds(self, run, metric, layer=19):
        self.used[f"{run} | layer {layer}"].add(metric)
        found = self.table.get(f"{run} | layer {layer}", {}).get("values", {}).get(metric)
        if not found:
            raise NotRun(f"{run}: {metric}")
        return found

    def __call__(self, run, metric, layer=19):
        return list(self.seeds(run, metric, layer).values())

    def mean(self, run, metric, layer=19):
        return fmean(self(run, metric, layer))

    def change(self, run, base, metric, layer=19):
        """run / base - 1, one value for each seed that both have."""
        a, b = self.seeds(run, metric, layer), self.seeds(base, metric, layer)
        pairs = [a[s] / b[s] - 1 for s in a if b.get(s)]
        if not pairs:
            raise NotRun(f"{run} and {base} with the same seed: {metric}")
        return pairs

    def maybe(self, run, metric, layer=19):
        """The numbers as text, or "not run"; for what stands beside a verdict and does not decide it."""
        try:
            return num(self(run, metric, layer))
        except NotRun:
            return "not run"


def claim(id, place, quote, reported, needs=(), tolerance="-"):
    """Decorator: the function below is the claim's measure."""
    def register(measure):
        names = (needs,) if isinstance(needs, str) else tuple(needs)
        CLAIMS.append(Claim(id, place, quote, reported, names, tolerance, measure))
        return measure
    return register


def num(values, percent=False):
    """mean ± sd (n seeds) as text."""
    mean, n = fmean(values), len(values)
    sd = statistics.stdev(values) if n > 1 else None
    largest = max(abs(mean), abs(sd or 0)) * (100 if percent else 1)
    digits = 1 if percent or largest >= 10 else 2 if largest >= 1 else 3 if largest >= 0.01 or largest == 0 else 5
    shown = [f"{round(x * (100 if percent else 1), digits) + 0.0:.{digits}f}" for x in (mean, sd) if x is not None]
    return " ± ".join(shown) + (" %" if percent else "") + (f" (n {n})" if n > 1 else "")


def near(values, target, tolerance):
    """Whether the mean is within `tolerance` of `target`."""
    return abs(fmean(values) - target) <= tolerance + 1e-12


def finished(v, runs):
    """(whether every run of these rows finished, text "n of n runs, m to M steps")."""
    done = [x for run in runs for x in v(run, "finished")]
    steps = [x for run in runs for x in v(run, "log.steps")]
    return min(done) == 1, f"{sum(done):.0f} of {len(done)} runs finished, {min(steps):.0f} to {max(steps):.0f} steps"


# --- Paper A -----------------------------------------------------------------------------------------------------


@claim("A1", "Abstract; Sec. 6.2", "consistently achieved our target 50% activation sparsity across all model variants",
       "0.50 of the features off", ("MTSAE", "MTSAE 1,2,4", "MTSAE Run 1", "MTSAE L1 0.5"), "each within ± 0.10")
def _(v):
    off = {run: v(run, "core.inactive") for run in ("MTSAE", "MTSAE 1,2,4", "MTSAE Run 1")}
    text = "; ".join(f"{name} {num(x)}" for name, x in zip(("Run 3", "Run 2", "Run 1"), off.values()))
    return (all(near(x, 0.5, 0.1) for x in off.values()), text,
            "The share depends on lambda against the scale of the activations (here: mean norm sqrt(D)). "
            f"lambda = 0.5 instead of 0.04 gives {v.maybe('MTSAE L1 0.5', 'core.inactive')}.")


@claim("A2", "Abstract", "capturing long-range dependencies across 128-token sequences", "128 tokens", "MTSAE",
       "a reach of at least 100 tokens")
def _(v):
    reach = v("MTSAE", "mixing.reach")
    return (fmean(reach) >= 100, num(reach),
            "Eq. 3's branches are parallel: the reach is the largest rate, found here by changing one token. After "
            f"training {v.maybe('MTSAE', 'mixing.neighbours')} of the kernels' energy lies on other tokens.")


@claim("A3", "Sec. 6.2", "Increasing from [1,2,4] to [1,4,16] reduced loss variance by 23%", "-23 %",
       ("MTSAE", "MTSAE 1,2,4"), "± 10 points")
def _(v):
    change = v.change("MTSAE", "MTSAE 1,2,4", "log.loss_variance")
    return (near(change, -0.23, 0.1), num(change, True), "Variance of the logged loss about its trend, last third of "
            "training, same batches in both runs.")


@claim("A4", "Sec. 6.1", "Initial implementation with [1,2,4] dilation rates showed unstable convergence", "unstable",
       "MTSAE Run 1", "a run stops, or a late loss is above 3 times its median")
def _(v):
    done, text = finished(v, ["MTSAE Run 1"])
    spike = v("MTSAE Run 1", "log.spike")
    return not done or max(spike) > 3, f"{text}; largest late loss {max(spike):.2f} medians", (
        "Run 1's loss weights are not in the paper (here: reconstruction 1 instead of 2).")


@claim("A5", "Sec. 6.1", "Adjusted loss weights (2.0:0.04:0.15) improved stability", "improved",
       ("MTSAE 1,2,4", "MTSAE Run 1"), "relative noise of the loss at least 10 % lower")
def _(v):
    change = v.change("MTSAE 1,2,4", "MTSAE Run 1", "log.loss_noise")
    return fmean(change) <= -0.1, f"noise {num(change, True)}", (
        "Deviation of the loss about its trend over its mean, last third of training.")


@claim("A6", "Sec. 6.2", "Expanded Context version showing the most stable sparsity patterns", "most stable",
       ("MTSAE", "MTSAE 1,2,4", "MTSAE Run 1"), "noise of L0 at least 10 % below both others")
def _(v):
    changes = [v.change("MTSAE", other, "log.active_noise") for other in ("MTSAE 1,2,4", "MTSAE Run 1")]
    return all(fmean(c) <= -0.1 for c in changes), (
        f"{num(changes[0], True)} against Run 2; {num(changes[1], True)} against Run 1"), (
        "Deviation of the number of active features about its trend over its mean, last third of training.")


@claim("A7", "Sec. 6.2", "improved temporal feature capture", "improved", ("MTSAE", "MTSAE 1,2,4"),
       "cosine of neighbouring codes higher by at least 0.01")
def _(v):
    both = [v("MTSAE", "temporal.neighbour_cosine"), v("MTSAE 1,2,4", "temporal.neighbour_cosine")]
    return fmean(both[0]) - fmean(both[1]) >= 0.01, (
        f"[1,4,16] {num(both[0])}; [1,2,4] {num(both[1])}"), "The paper does not say how it was measured."


@claim("A8", "Sec. 6.3", "Multi-scale processing increases training time by 2.5x", "2.5 times", "step times",
       "2.0 to 3.0 times")
def _(v):
    ratio = v("step times", "MTSAE over standard")
    return near(ratio, 2.5, 0.5), num(ratio), (
        "A step against the standard SAE's at D = 576. At the paper's D = 2304: "
        f"{v.maybe('step times', 'MTSAE over standard, D 2304')}; three rates against one: "
        f"{v.maybe('step times', 'three rates over one')} (the branches are one merged filter).")


@claim("A9", "Sec. 6.3", "128-token sequences require 16x smaller batch size", "16 times (2048 to 125)", "step times",
       "memory a sequence at least 8 times the standard SAE's")
def _(v):
    ratio = v("step times", "MTSAE over standard, bytes")
    return fmean(ratio) >= 8, f"{num(ratio)} times the memory", (
        "Bytes kept for the backward pass, for each further sequence of 128 tokens. What is large is the sequences, "
        "with any SAE; --micro_batch trains any batch in the memory of one micro-batch.")


@claim("A10", "Sec. 6.3", "15% of neurons require resampling during training", "0.15", "MTSAE", "± 0.05")
def _(v):
    share = v("MTSAE", "resampling.features")
    return near(share, 0.15, 0.05), num(share), (
        f"Share of neurons ever silent for over 500 steps; dead at the end: {v.maybe('MTSAE', 'core.dead')}.")


@claim("A11", "Sec. 6.2", "Neuron resampling every 1000 steps prevented feature collapse", "prevented",
       ("MTSAE", "MTSAE no resampling"), "without it at least 5 points more dead features")
def _(v):
    with_, without = v("MTSAE", "core.dead"), v("MTSAE no resampling", "core.dead")
    return fmean(without) - fmean(with_) >= 0.05, (
        f"dead: {num(with_)} with, {num(without)} without"), "Share of features that no held-out token activates."


@claim("A12", "Abstract", "MTSAEs maintain the base model's 93.9% accuracy", "difference 0", "MTSAE",
       "all features within 0.02 of all residual channels")
def _(v):
    sae, base = v("MTSAE", "probing.sae_all"), v("MTSAE", "probing.residual_all")
    return abs(fmean(sae) - fmean(base)) <= 0.02, f"SAE {num(sae)}, residual stream {num(base)}", (
        "Logistic probes on the bundled tasks. Best single feature: "
        f"{v.maybe('MTSAE', 'probing.sae_top_1')}; best single channel: {v.maybe('MTSAE', 'probing.residual_top_1')}.")


@claim("A13", "Sec. 6.1", "The baseline LLM achieved 93.93% average accuracy", "0.9393", "MTSAE")
def _(v):
    listed = (95.76, 93.86, 90.38, 92.55, 96.90, 93.75, 99.94)
    return None, f"bundled tasks: {v.maybe('MTSAE', 'probing.residual_all')}", (
        "because Gemma-2-2B and the eight data sets are not at hand (with them: --eval probing_saebench). Seven of "
        f"the \"eight\" are listed, mean {fmean(listed):.2f}, so the eighth would be "
        f"{8 * 93.93 - sum(listed):.1f}. The values are given for the model and for the SAE alike, so they are "
        "the language model's own probe.")


def data_set(id, quote, reported, task, name):
    """A claim on one data set's accuracy: not testable here, the nearest bundled task beside it."""
    @claim(id, "Sec. 5.2", quote, reported, () if task is None else "MTSAE")
    def _(v):
        number = "-" if task is None else (f"{task.replace('_', ' ')}: residual stream "
                                           f"{v.maybe('MTSAE', f'probing.{task}.residual_all')}, "
                                           f"SAE {v.maybe('MTSAE', f'probing.{task}.sae_all')}")
        nearest = "nothing bundled is near it" if task is None else "the nearest bundled task stands beside it"
        return None, number, f"because {name} and Gemma-2-2B are not at hand; {nearest}."


data_set("A14", "Bias detection (3 sets): 95.76%, 93.86%, 90.38% accuracy", "0.9576, 0.9386, 0.9038", None,
         "the bias_in_bios sets")
data_set("A15", "Amazon reviews sentiment: 92.55% accuracy", "0.9255", "sentiment", "the Amazon reviews")
data_set("A16", "GitHub code understanding: 96.90% accuracy", "0.9690", "programming_language", "the GitHub code set")
data_set("A17", "AG News classification: 93.75% accuracy", "0.9375", "topic", "AG News")
data_set("A18", "Europarl translation: 99.94% accuracy", "0.9994 (SAEBench's task is to name the language)", "language",
         "Europarl")


# --- Paper B -----------------------------------------------------------------------------------------------------


@claim("B1", "Sec. 6.1", "exhibit 40% lower activation variance compared to lower levels", "0.40",
       ("temporal", "temporal, layers 5 and 12", "hierarchical"), "0.30 to 0.50")
def _(v):
    drop = v("temporal", "levels.variance_drop")
    others = ", ".join(f"L{n} {v.maybe('temporal, layers 5 and 12', 'levels.variance_drop', n)}" for n in (5, 12))
    return near(drop, 0.4, 0.1), num(drop), (
        f"Top against lowest level, layer 19; {others}; hierarchical variant "
        f"{v.maybe('hierarchical', 'levels.variance_drop')}. The mean square falls too "
        f"({v.maybe('temporal', 'levels.mean_square_drop')}): higher levels code a smaller rest.")


@claim("B2", "Sec. 6.3", "unlearning evaluation scores remained at baseline (0.0) across all variants",
       "0.0 (five variants)", VARIANTS_B, "every variant at most 0.005")
def _(v):
    scores = {run: v(run, "unlearning.score") for run in VARIANTS_B}
    chance = [x for run in VARIANTS_B for pair in UNLEARNED for x in v(run, f"unlearning.{pair}.random")]
    return max(max(x) for x in scores.values()) <= 0.005, "; ".join(f"{k} {num(x)}" for k, x in scores.items()), (
        "Share of the forget domain's accuracy removed with 99 % of the rest kept; random features: at most "
        f"{max(chance):.3f}. "
        "An all-zero or too dense code has no feature that may be chosen and scores 0 by construction.")


UNLEARNED = ("code, keeping prose", "French, keeping German", "Shakespeare, keeping prose")


@claim("B3", "Sec. 5.2, 6.3", "five probing tasks: WMDP-bio, high school US history, college computer science, high "
       "school geography, and human aging", "0.0 on all five", "temporal")
def _(v):
    pairs = "; ".join(f"{pair}: {v.maybe('temporal', f'unlearning.{pair}.score')}" for pair in UNLEARNED)
    return None, pairs, ("because a model of 135M parameters is too small for these questions, and the forget corpus "
                         "is gated (with both: --eval unlearning_wmdp). Beside it: bundled forget and retain domains.")


@claim("B4", "Sec. 6.2", "Removing temporal convolution layers maintained unlearning score at 0.0", "no change",
       ("temporal", "no convolution"), "scores within 0.01 of each other")
def _(v):
    both = v("temporal", "unlearning.score"), v("no convolution", "unlearning.score")
    return abs(fmean(both[0]) - fmean(both[1])) <= 0.01, f"with {num(both[0])}, without {num(both[1])}", (
        f"EV with {v.maybe('temporal', 'core.EV')}, without {v.maybe('no convolution', 'core.EV')}.")


@claim("B5", "Sec. 6.2",
       "Varying EMA decay rates (0.9-0.99) and disabling margin adaptation showed no significant impact",
       "no impact", ("temporal", "margin decay 0.9", "margin decay 0.99", "no adaptation"),
       "largest cosine to another feature within 2 sd over seeds, or 1 %, of the default's")
def _(v):
    metric = "core.saebench.average_max_decoder_cosine_sim"
    base = v("temporal", metric)
    limit = max(2 * statistics.stdev(base) if len(base) > 1 else 0, 0.01 * fmean(base))
    rows = {run: v(run, metric) for run in ("margin decay 0.9", "margin decay 0.99", "no adaptation")}
    return all(near(x, fmean(base), limit) for x in rows.values()), (
        f"default {num(base)}; " + "; ".join(f"{k} {num(x)}" for k, x in rows.items())), (
        f"The margin mu + 2 sigma follows the similarity: {v.maybe('temporal', 'log.over_margin')} of the features are "
        "above it in an average step, and with a margin that stands still "
        f"{v.maybe('no adaptation', 'log.over_margin')}.")


@claim("B6", "Sec. 6.2",
       "Testing percentile ranges (75th-95th) for adversarial training revealed no meaningful variation",
       "no variation", ("temporal", "percentile 0.75", "percentile 0.95"),
       "EV within 2 sd over seeds, or 0.01, of the default's")
def _(v):
    base = v("temporal", "core.EV")
    limit = max(2 * statistics.stdev(base) if len(base) > 1 else 0, 0.01)
    rows = {run: v(run, "core.EV") for run in ("percentile 0.75", "percentile 0.95")}
    return all(near(x, fmean(base), limit) for x in rows.values()), (
        f"EV: default {num(base)}; " + "; ".join(f"{k} {num(x)}" for k, x in rows.items())), (
        f"lambda_adv is above its floor of 0.1 in {v.maybe('temporal', 'log.lambda_above_floor')} of the steps.")


@claim("B7", "Sec. 6.2", "Hierarchical Structure: [...] did not improve unlearning capabilities", "no improvement",
       ("temporal", "one level"), "three levels at most 0.01 above one")
def _(v):
    both = v("temporal", "unlearning.score"), v("one level", "unlearning.score")
    return fmean(both[0]) - fmean(both[1]) <= 0.01, f"three levels {num(both[0])}, one {num(both[1])}", (
        f"EV with three {v.maybe('temporal', 'core.EV')}, with one {v.maybe('one level', 'core.EV')}.")


@claim("B8", "Sec. 1", "preventing degenerate solutions through routing entropy regularization",
       "no degenerate routing", "temporal", "every level gets at least 0.10 of the routing")
def _(v):
    share = [v.mean("temporal", f"levels.share_{level}") for level in (1, 2, 3)]
    return min(share) >= 0.1, "shares " + ", ".join(f"{s:.2f}" for s in share), (
        f"Entropy of a token's gates: {v.maybe('temporal', 'levels.entropy')}; {math.log(3):.2f} if they are even.")


@claim("B9", "Sec. 6.1", "demonstrate stable convergence across architectural variants", "stable", VARIANTS_B,
       "every run ends, no late loss above 3 times its median")
def _(v):
    done, text = finished(v, VARIANTS_B)
    spike = max(x for run in VARIANTS_B for x in v(run, "log.spike"))
    return done and spike <= 3, f"{text}; largest late loss {spike:.2f} medians", "All five variants."


@claim("B10", "Sec. 6.1", "showing comparable loss trajectories to baseline approaches", "comparable",
       ("temporal", "adversarial"), "1 - EV within 25 % of the adversarial variant's")
def _(v):
    rest = {run: [1 - x for x in v(run, "core.EV")] for run in ("temporal", "adversarial")}
    ratio = fmean(rest["temporal"]) / fmean(rest["adversarial"])
    return abs(ratio - 1) <= 0.25, f"EV {v.maybe('temporal', 'core.EV')} against {v.maybe('adversarial', 'core.EV')}", (
        f"Unexplained variance {ratio:.2f} times that of the variant without temporal parts and levels.")


@claim("B11", "Sec. 1", "larger dictionary sizes lead to increased feature mixing", "increased", ("temporal",
       "expansion 4", "arithmetic"), "largest cosine grows at least 1.2 times as much as between random directions")
def _(v):
    metric = "core.saebench.average_max_decoder_cosine_sim"
    small, large = v("temporal", metric), v("expansion 4", metric)
    chance = v.mean("arithmetic", "random cosine, expansion 4") / v.mean("arithmetic", "random cosine, expansion 1")
    grown = fmean(large) / fmean(small)
    return grown >= 1.2 * chance, f"F = D {num(small)}; F = 4 D {num(large)}", (
        f"Mean largest cosine to another decoder row: {grown:.2f} times as large; between random directions "
        f"{chance:.2f} times, because there are more of them.")


@claim("B12", "Abstract", "computational efficiency (23 minutes per evaluation on H100)", "23 minutes", "temporal")
def _(v):
    try:
        number = f"{sum(v.mean('temporal', f'unlearning.{pair}.seconds') for pair in UNLEARNED) / 60:.1f} minutes"
    except NotRun:
        number = "not run"
    return None, number, ("because no H100 was used and the paper's probe sets are not at hand. Beside it: the bundled "
                          "unlearning evaluation on a CPU.")


@claim("B13", "Sec. 4.2", "This adaptive margin ensures robust feature separation", "ensured",
       ("self-aligning", "self-aligning, no margin loss"), "largest cosine at least 5 % lower than without the term")
def _(v):
    change = v.change("self-aligning", "self-aligning, no margin loss", "core.saebench.average_max_decoder_cosine_sim")
    return fmean(change) <= -0.05, f"cosine {num(change, True)}", (
        f"Share of features above their margin in an average step: {v.maybe('self-aligning', 'log.over_margin')}.")


@claim("B14", "Sec. 4.3", "The adversarial loss scaling factor is dynamically adjusted", "dynamic",
       ("temporal", "adversarial", "disentangled"),
       "above its floor of 0.1 in at least 5 % of the steps of any variant")
def _(v):
    share = {run: v(run, "log.lambda_above_floor") for run in ("temporal", "adversarial", "disentangled")}
    return max(fmean(x) for x in share.values()) >= 0.05, "; ".join(
        f"{k} {num(x)}" for k, x in share.items()), "Share of logged steps; the paper does not define A_spurious (U2)."


# --- Paper C -----------------------------------------------------------------------------------------------------


@claim("C1", "Abstract", "complete training instability (0 steps completed)", "0 steps", "TSAE",
       "no run gets beyond 10 steps")
def _(v):
    steps = v("TSAE", "log.steps")
    return max(steps) <= 10, finished(v, ["TSAE"])[1], "The paper's weights and whole schedule."


@claim("C2", "Sec. 6.2", "All temporal SAE variants failed to complete any training steps", "0 steps, every variant",
       ("TSAE", *HALVES, "TopK TSAE"), "no run gets beyond 10 steps")
def _(v):
    runs = ("TSAE", *HALVES, "TopK TSAE")
    return max(x for run in runs for x in v(run, "log.steps")) <= 10, finished(v, runs)[1], (
        f"{len(runs)} variants: the paper's, and each safeguard taken away. Less text than one batch gives 0 steps.")


@claim("C3", "Sec. 6.3", "Temporal objectives conflict with reconstruction quality", "incompatible",
       ("TopK", "TopK TSAE", "TopK TSAE, half the weights"),
       "at equal L0, neighbours no more than 2 sd closer, or an EV cost of 0.01 or more")
def _(v):
    base, smooth = (v(run, "temporal.neighbour_cosine") for run in ("TopK", "TopK TSAE, half the weights"))
    ev, cost = (v(run, "core.EV") for run in ("TopK", "TopK TSAE, half the weights"))
    sd = max(statistics.stdev(x) if len(x) > 1 else math.inf for x in (base, smooth))
    gain, lost = fmean(smooth) - fmean(base), fmean(ev) - fmean(cost)
    return not (gain > 2 * sd and lost < 0.01), (
        f"neighbour cosine {num(base)} to {num(smooth)}; EV {num(ev)} to {num(cost)}"), (
        "Half the paper's weights, no LayerNorm, no variance weights (they make the term F times weaker). The printed "
        f"configuration at the same L0: cosine {v.maybe('TopK TSAE', 'temporal.neighbour_cosine')}, "
        f"EV {v.maybe('TopK TSAE', 'core.EV')}.")


@claim("C4", "Sec. 6.3", "Feature-wise scaling amplifies noise during initialization", "amplifies",
       ("half TSAE", "half no variance weights", "arithmetic"),
       "noise of the loss in the first tenth at least 10 % higher")
def _(v):
    change = v.change("half TSAE", "half no variance weights", "log.early_noise")
    return fmean(change) >= 0.1, f"noise {num(change, True)}", (
        "With against without Eq. 3, deviation about the trend over the mean. Eq. 3's weights sum to "
        f"{v.maybe('arithmetic', 'sum of Eq. 3')} over all features, so the temporal term is "
        f"{v.maybe('half TSAE', 'log.temporal_share')} of the late loss with it and "
        f"{v.maybe('half no variance weights', 'log.temporal_share')} without.")


def collapsed(id, place, quote, reported, run, metric, target, tolerance, why=""):
    """A value that papers C and D report for a collapsed SAE: holds if the trained SAE has it."""
    @claim(id, place, quote, reported, run, f"± {tolerance}")
    def _(v):
        values = v(run, f"core.{metric}")
        return near(values, target, tolerance), num(values), (
            f"The all-zero SAE on the same text: {v.maybe(run, f'zero.{metric}')} (--eval zero). {why}".strip())


collapsed("C5", "Sec. 6.1", "Explained variance -0.78", "-0.78 (baseline)", "standard", "EV", -0.78, 0.1,
          "An SAE of zeros has minus the squared norm of the mean activation over the variance.")


@claim("C6", "Sec. 6.1", "MSE 47.25", "47.25 (baseline)", "standard")
def _(v):
    return None, v.maybe("standard", "core.MSE"), (
        "because an error in raw units depends on the model. The all-zero SAE here: "
        f"{v.maybe('standard', 'zero.MSE')}. Paper D prints the same 47.25 for another model and another method.")


@claim("C7", "Sec. 6.1", "Cross-entropy loss 18.0 (vs 2.94 without SAE)", "15.1 above the model", "standard",
       "a rise of at least 5")
def _(v):
    with_, without = v("standard", "core.ce_loss_with_sae"), v("standard", "core.ce_loss_without_sae")
    return fmean(with_) - fmean(without) >= 5, f"{num(with_)} against {num(without)}", (
        f"With the all-zero SAE: {v.maybe('standard', 'zero.ce_loss_with_sae')}.")


@claim("C8", "Sec. 5.3", "compared to 2.94 without SAE", "2.94", "standard")
def _(v):
    return None, v.maybe("standard", "core.ce_loss_without_sae"), (
        "because 2.94 is Gemma-2-2B's own cross-entropy in SAEBench's protocol.")


collapsed("C9", "Sec. 6.1", "L2 norm ratio 0.0", "0.0 (baseline)", "standard", "l2_ratio", 0.0, 0.05)


@claim("C10", "Sec. 6.1", "L0/L1 norms 0.0", "0.0 (baseline)", ("standard", "half standard, error averaged"), "± 0.5")
def _(v):
    active = v("standard", "core.L0")
    return near(active, 0.0, 0.5), num(active), (
        f"The all-zero SAE: {v.maybe('standard', 'zero.L0')}. A trained one with the error averaged over D while L1 is "
        f"summed (half the batch and steps): {v.maybe('half standard, error averaged', 'core.L0')}.")


@claim("C11", "Sec. 1",
       "Conservative temporal weights (0.01, 0.005, 0.001) and gradient clipping (threshold: 2.0) were insufficient",
       "insufficient", ("half TSAE", "half no safeguards"), "some run stops before its last step")
def _(v):
    done, text = finished(v, ("half TSAE", "half no safeguards"))
    return not done, text, (f"EV without any safeguard {v.maybe('half no safeguards', 'core.EV')}, "
                            f"with all of them {v.maybe('half TSAE', 'core.EV')}.")


@claim("C12", "Sec. 1", "reconstruction boosting (2x) improved initialization", "improved", ("half TSAE",
       "half no boost"), "EV after a fifth of the run higher by at least 0.005")
def _(v):
    with_, without = v("half TSAE", "log.EV_early"), v("half no boost", "log.EV_early")
    return fmean(with_) - fmean(without) >= 0.005, f"{num(with_)} with, {num(without)} without", (
        "EV in training, 20 to 25 % of the steps; Adam divides a constant factor of the loss out.")


@claim("C13", "Sec. 1", "Extended warmup (2000 steps) [...] improved initialization", "improved",
       ("half TSAE", "half no warm-up"), "EV after a fifth of the run higher by at least 0.005")
def _(v):
    with_, without = v("half TSAE", "log.EV_early"), v("half no warm-up", "log.EV_early")
    return fmean(with_) - fmean(without) >= 0.005, f"{num(with_)} with, {num(without)} without", (
        "Without it the temporal loss is there from the first step, with neither boost nor noise.")


@claim("C14", "Sec. 6.3", "Progressive training requires more gradual temporal loss introduction",
       "2000 steps are too few",
       ("half TSAE", "half no warm-up"), "without any warm-up a run stops, or loses at least 0.01 in final EV")
def _(v):
    done, text = finished(v, ["half no warm-up"])
    lost = v.mean("half TSAE", "core.EV") - v.mean("half no warm-up", "core.EV")
    return not done or lost >= 0.01, f"EV lost without warm-up {lost:.4f}; {text}", (
        "The test is to leave the gradual introduction out.")


@claim("C15", "Sec. 1", "a minimum threshold of 0.01 to prevent noise amplification", "prevents noise",
       ("half TSAE", "half no threshold"), "without it at least 10 % more noise in the first tenth")
def _(v):
    change = v.change("half no threshold", "half TSAE", "log.early_noise")
    return fmean(change) >= 0.1, f"noise {num(change, True)}", (
        f"EV with {v.maybe('half TSAE', 'core.EV')}, without {v.maybe('half no threshold', 'core.EV')}.")


# --- Paper D -----------------------------------------------------------------------------------------------------


@claim("D1", "Sec. 6.1", "consistent early training termination after 4 steps across all runs", "4 steps, 5 of 5 runs",
       "4 steps", "exactly 4 in every run")
def _(v):
    steps = v("4 steps", "log.steps")
    return set(steps) == {4}, f"{min(steps):.0f} to {max(steps):.0f} steps in {len(steps)} runs", (
        "With the paper's 10,000 tokens and 2,048 tokens a step the text ends there: 10,000 // 2,048 = 4.")


@claim("D2", "Sec. 6.1", "suggesting a fundamental challenge in our current architecture", "cannot train on",
       "unlearning", "no run gets beyond 10 steps")
def _(v):
    steps = v("unlearning", "log.steps")
    return max(steps) <= 10, finished(v, ["unlearning"])[1], (
        f"The same model with more text; EV {v.maybe('unlearning', 'core.EV')}.")


@claim("D3", "Abstract", "gradient norms stabilizing between 0.01–0.03 during training", "0.01 to 0.03",
       ("4 steps", "unlearning"), "median over a run in that range, in 4 steps or in the whole run")
def _(v):
    both = [v(run, "log.grad_norm") for run in ("4 steps", "unlearning")]
    return any(0.01 <= fmean(x) <= 0.03 for x in both), f"4 steps {num(both[0])}; whole run {num(both[1])}", (
        "Norm over all parameters, activations of mean norm sqrt(D); the paper names neither scale nor reduction.")


def falling(v, run, statistic):
    """Mean of each branch's statistic, and whether it falls with the rate."""
    values = [v.mean(run, f"branches.{statistic}_{r}") for r in (1, 2, 4, 8)]
    return values, all(a > b for a, b in zip(values, values[1:]))


@claim("D4", "Table 1", "standard deviations decreasing from 0.0891 to 0.0819 as dilation rates increase",
       "-8.1 %, each below the last",
       ("4 steps", "4 steps, PyTorch's kernels", "unlearning"), "falls at each rate, by 4 to 12 % in all, in 4 steps")
def _(v):
    runs = {run: falling(v, run, "std") for run in ("4 steps", "4 steps, PyTorch's kernels", "unlearning")}
    change = {run: x[3] / x[0] - 1 if x[0] else math.nan for run, (x, _) in runs.items()}
    holds = [runs[run][1] and -0.12 <= change[run] <= -0.04 for run in tuple(runs)[:2]]
    return any(holds), "; ".join(f"{run} {100 * x:+.1f} %" for run, x in change.items()), (
        "Rate 8 against rate 1, deviation of the convolutions' outputs. After 4 steps the kernels are "
        "nearly as they were drawn: what falls there is how much a text resembles itself, not a pattern found.")


@claim("D5", "Table 1", "Dilation Rate Mean Std 1 0.0012 0.0891",
       "means 0.0012, 0.0009, 0.0007, 0.0005: 0.013 to 0.006 of the deviation, falling",
       ("4 steps", "4 steps, PyTorch's kernels"), "positive and falling at each rate, in 4 steps")
def _(v):
    texts, holds = [], []
    for run in ("4 steps", "4 steps, PyTorch's kernels"):
        (mean, falls), (std, _) = falling(v, run, "mean"), falling(v, run, "std")
        holds.append(falls and min(mean) > 0)
        texts.append(f"{run}: " + ", ".join(f"{m / s if s else math.nan:.4f}" for m, s in zip(mean, std)))
    return any(holds), "; ".join(texts), "Mean over deviation, since raw units depend on the model."


@claim("D6", "Sec. 6.2", "L2 loss 47.25", "47.25", "unlearning")
def _(v):
    return None, f"MSE {v.maybe('unlearning', 'core.MSE')}", (
        "because an error in raw units depends on the model. The all-zero SAE here: "
        f"{v.maybe('unlearning', 'zero.MSE')}. Paper C prints the same 47.25 for Gemma-2-2B and a standard SAE.")


collapsed("D7", "Sec. 6.2", "explained variance -0.78515625", "-0.78515625", "unlearning", "EV", -0.785, 0.1,
          "Paper C prints -0.78 for another model.")
collapsed("D8", "Sec. 6.2", "L0/L1 norms 0.0", "0.0", "unlearning", "L0", 0.0, 0.5)
collapsed("D9", "Sec. 6.2", "KL divergence -0.5279", "-0.5279", "unlearning", "kl_div_score", -0.5279, 0.1,
          "A divergence is not negative: it is SAEBench's score.")
collapsed("D10", "Sec. 6.2", "Cross-entropy -0.5855", "-0.5855", "unlearning", "ce_loss_score", -0.5855, 0.1,
          "SAEBench's score with paper C's 18.0 and Gemma-2-2B's references is (12.4375 - 18) / (12.4375 - 2.9375) = "
          f"{(12.4375 - 18) / (12.4375 - 2.9375):.4f}: Gemma's number, not Pythia's.")


@claim("D11", "Sec. 6.2", "reconstruction bias -1.0", "-1.0", "unlearning", "± 0.1")
def _(v):
    bias = v("unlearning", "core.relative_reconstruction_bias")
    return near(bias, -1.0, 0.1), num(bias), (
        "A ratio of squared norms to inner products; for an SAE of zeros it is 0/0, which SAEBench prints as -1.")


@claim("D12", "Abstract", "enables targeted knowledge modification", "works", "unlearning",
       "score at least 0.02 on every seed, and above random features")
def _(v):
    score = v("unlearning", "unlearning.score")
    chance = fmean(v.mean("unlearning", f"unlearning.{pair}.random") for pair in UNLEARNED)
    return min(score) >= 0.02 and min(score) > chance, f"{num(score)}; random features {chance:.3f}", (
        "Share of a forget domain's next-token accuracy removed with 99 % of the retain domain's kept, three pairs.")


@claim("D13", "Sec. 3", "reduces this to O(d) in the feature dimension", "exponent 1", "step times",
       "exponent at most 1.25")
def _(v):
    exponent = v("step times", "exponent in d")
    return fmean(exponent) <= 1.25, f"exponent {num(exponent)}", (
        "Time to encode and decode, as any suppression of a feature must, at d = 512 and 2048; the encoder has 4 d² "
        "weights.")


# --- Paper E -----------------------------------------------------------------------------------------------------

LAYERS = (5, 12, 19)


def by_layer(v, metric, percent=False):
    """Text "L5 x; L12 y; L19 z" for the main run."""
    return "; ".join(f"L{n} {num(v('lens', metric, n), percent)}" for n in LAYERS)


@claim("E1", "Abstract; Sec. 6.2", "15% lower reconstruction error in early sequence positions (1-32)", "-15 %",
       ("lens", "lens no masks"), "-11 to -19 % at each of the three layers")
def _(v):
    means = [v.mean("lens", "position.no_sink.early_error", n) for n in LAYERS]
    try:
        sink = by_layer(v, "position.sink_fitted.early_error", True)
    except NotRun:
        sink = "not run"
    plain = v.maybe("lens no masks", "position.no_sink.early_error")
    return all(-0.19 <= x <= -0.11 for x in means), by_layer(v, "position.no_sink.early_error", True), (
        "Squared error a token against later positions (paired t-test over sequences at layer 19: p "
        f"{v.maybe('lens', 'position.no_sink.p')}). If the attention sink, always the same vector, counts as "
        f"position 1 and is reconstructed: {sink}. Without masks and weights (layer 19): {plain} as a fraction.")


@claim("E2", "Abstract", "an average feature sparsity of 0.73", "0.73", "lens",
       "± 0.07 at each layer, in either reading")
def _(v):
    off, mask = ([v.mean("lens", f"masks.{name}", n) for n in LAYERS] for name in ("features_off", "mean_mask"))
    return any(all(abs(x - 0.73) <= 0.07 for x in values) for values in (off, mask)), (
        f"features off {by_layer(v, 'masks.features_off')}; mean mask {by_layer(v, 'masks.mean_mask')}"), (
        "The paper does not say which of the two it means.")


def span(id, layer, quote, reported, low, high, tolerance):
    @claim(id, "Sec. 6.3", quote, reported, "lens", tolerance)
    def _(v):
        values = v("lens", "span.median", layer)
        whole = v.mean("lens", "span.ignoring_position", layer)
        null = abs(fmean(values) / whole - 1) <= 0.1
        return low <= fmean(values) <= high, num(values), (
            f"Median window with half of a feature's activation. A feature that ignores position has {whole:.0f}"
            + (": the number says nothing about position." if null else "."))


span("E3", 5, "Layer 5: Localized patterns (16-position spans)", "16", 12, 20, "12 to 20")
span("E4", 12, "Layer 12: Intermediate-range dependencies (32-48 positions)", "32 to 48", 32, 48, "32 to 48")
span("E5", 19, "Layer 19: Long-range temporal structure (64-position spans)", "64", 48, 80, "48 to 80")


@claim("E6", "Sec. 6.3", "reveals systematic differences in temporal processing",
       "spans grow 4 times from layer 5 to 19", "lens", "layer 19 at least 1.5 times layer 5, layer 12 between")
def _(v):
    spans = [v.mean("lens", "span.median", n) for n in LAYERS]
    return spans[0] < spans[1] < spans[2] and spans[2] >= 1.5 * spans[0], by_layer(v, "span.median"), (
        "T / 2 = 64 is what a feature that ignores position has.")


@claim("E7", "Sec. 1", "position weights strongly correlating with reconstruction difficulty (r = 0.82)", "0.82",
       "lens", "at least 0.72 at each layer")
def _(v):
    r = [v.mean("lens", "position.weight_difficulty_r", n) for n in LAYERS]
    return min(r) >= 0.72, by_layer(v, "position.weight_difficulty_r"), (
        "True by construction: w_t (Eq. 6) is a running average of that very error.")


@claim("E8", "Sec. 6.4", "Removing annealing leads to unstable training", "unstable", ("lens", "lens no annealing"),
       "a run stops, or a late loss is above 3 times its median")
def _(v):
    done, text = finished(v, ["lens no annealing"])
    spike = max(v("lens no annealing", "log.spike"))
    return not done or spike > 3, f"{text}; largest late loss {spike:.2f} medians", (
        f"Temperature 0.1 throughout. EV {v.maybe('lens no annealing', 'core.EV')} without, "
        f"{v.maybe('lens', 'core.EV')} with annealing.")


@claim("E9", "Sec. 6.4", "Static masks reduce reconstruction accuracy by 23%", "-23 %",
       ("lens", "lens static masks", "lens no masks"), "± 8 points")
def _(v):
    change = v.change("lens static masks", "lens", "core.EV")
    return near(change, -0.23, 0.08), f"EV {num(change, True)}", (
        "Logits frozen as drawn; change of the squared error, paired by sequence: "
        f"{v.maybe('lens static masks', 'paired.a_against_b')} (p {v.maybe('lens static masks', 'paired.p')}). EV "
        f"{v.maybe('lens', 'core.EV')} learnt, {v.maybe('lens static masks', 'core.EV')} static, "
        f"{v.maybe('lens no masks', 'core.EV')} with no masks at all.")


@claim("E10", "Sec. 6.4", "Uniform weights increase average loss by 18%", "+18 %", ("lens", "lens uniform weights"),
       "± 6 points")
def _(v):
    change = v.change("lens uniform weights", "lens", "heldout_loss")
    return near(change, 0.18, 0.06), f"loss {num(change, True)}", (
        "Held-out error + 0.04 L1, all positions alike: training losses with different weights do not compare "
        f"(there: {v.maybe('lens uniform weights', 'log.loss_late')} uniform, {v.maybe('lens', 'log.loss_late')} "
        f"adaptive). MSE {v.maybe('lens uniform weights', 'core.MSE')} uniform, {v.maybe('lens', 'core.MSE')} "
        "adaptive.")


@claim("E11", "Sec. 6.5", "Computational cost scales linearly with sequence length", "exponent 1", "step times",
       "0.85 to 1.15")
def _(v):
    exponent = v("step times", "exponent in T")
    return near(exponent, 1.0, 0.15), f"exponent {num(exponent)}", "Step time of 16 sequences, T = 64 against 256."


KS = (1, 2, 5, 10, 20, 50)


@claim("E12", "Sec. 6.1",
       "The baseline sparse autoencoder achieves uniform test accuracy of 0.5 across all top-k metrics",
       "0.5 for every k", ("standard", "arithmetic"), "every k within 0.03 of 0.5")
def _(v):
    scores = {k: v("standard", f"probing.sae_top_{k}") for k in KS}
    text = "; ".join(f"k {k}: {fmean(x):.3f}" for k, x in scores.items())
    return all(near(x, 0.5, 0.03) for x in scores.values()), text, (
        f"A probe on features that are all 0 has {v.maybe('arithmetic', 'probe on zeros')}, whatever k is.")


@claim("E13", "Sec. 6.1", "test accuracies ranging from 0.684 (top-1) to 0.900 (top-50)", "0.684 (k 1), 0.900 (k 50)",
       "standard")
def _(v):
    return None, "; ".join(f"k {k}: {v.maybe('standard', f'probing.residual_top_{k}')}" for k in (1, 50)), (
        "because these are Gemma-2-2B's channels on SAEBench's data sets. Here: this model's on the bundled tasks.")


@claim("E14", "Sec. 6.2", "developing sharp position preferences", "sharp masks, learnt", "lens",
       "at each layer half of the masks below 0.1 or above 0.9, and r with their random first logits below 0.5")
def _(v):
    sharp = [v.mean("lens", "masks.decided", n) for n in LAYERS]
    r = [v.mean("lens", "masks.r_with_first_draw", n) for n in LAYERS]
    return min(sharp) > 0.5 and max(r) < 0.5, (
        f"sharp {by_layer(v, 'masks.decided')}; r {by_layer(v, 'masks.r_with_first_draw')}"), (
        f"The masks are learnt, and end flat: {v.maybe('lens', 'masks.mean_mask')} on average at layer 19, alike at "
        "every position.")


@claim("E15", "Sec. 6.5", "Adaptive weighting can over-emphasize certain positions", "a limitation",
       "lens", "early error without the sink beyond ± 20 % at some layer")
def _(v):
    means = [v.mean("lens", "position.no_sink.early_error", n) for n in LAYERS]
    return max(abs(x) for x in means) > 0.2, by_layer(v, "position.no_sink.early_error", True), (
        "A weight is proportional to the error of its position, so weights differ only as much as the errors do.")


@claim("E16", "Abstract", "we identify distinct groups of position-specialized neurons", "distinct groups", "lens",
       "clusters from even and odd windows agree by at least 0.5 (adjusted Rand index) at each layer")
def _(v):
    agreement = [v.mean("lens", "clusters.consistency", n) for n in LAYERS]
    return min(agreement) >= 0.5, f"agreement {by_layer(v, 'clusters.consistency')}", (
        "Ward clustering of the features' profiles over positions. Profiles contain the masks, so clusters can agree "
        f"on a random first draw (E14). Median span of the masks alone: {v.maybe('lens', 'span.median_mask')} of 128.")


# ----------------------------------------------------------------------------------------------------------------
# The ledger
# ----------------------------------------------------------------------------------------------------------------

VERDICTS = {True: "reproduced", False: "refuted", None: "not testable here"}


def judge(one, v):
    """A claim with the numbers of v -> {"number", "verdict", "why"}."""
    try:
        holds, number, why = one.measure(v)
    except NotRun as missing:
        return {"number": "not run", "verdict": "not run", "why": f"missing: {missing}"}
    return {"number": number, "verdict": VERDICTS[holds], "why": why}


def needed(papers):
    """Runs that the claims of these papers need, in order: [(label, layer, seed)]; measurements: [label]."""
    labels = dict.fromkeys(label for c in CLAIMS if c.id[0] in papers for label in c.needs)
    runs = [(label, layer, seed) for label in labels if label in ROWS
            for layer in ROWS[label].layers for seed in ROWS[label].seeds]
    return runs, [label for label in labels if label in MEASURED]


def collect(recorded):
    """Numbers of all rows: from the run folders, else as recorded for the same command: {row | layer: {...}}."""
    table = {}
    for label, row in ROWS.items():
        for layer in row.layers:
            key, command = f"{label} | layer {layer}", row.command(layer)
            old = recorded.get(key, {})
            seeds = {seed: gather(folder(label, layer, seed)) for seed in row.seeds}
            if any(seeds.values()):
                values, configs = collections.defaultdict(dict), []
                for seed, numbers in seeds.items():
                    if numbers:
                        configs.append(common.read_json(folder(label, layer, seed) / "config.json"))
                    for metric, value in numbers.items():
                        values[metric][str(seed)] = value
                made = {c["model"] if isinstance(c["model"], str) else f"{c['model']['name']}, D = {c['D']}"
                        for c in configs}
                table[key] = {"command": command, "model": " and ".join(sorted(made)),
                              "commit": " and ".join(sorted({str(c["versions"].get("commit")) for c in configs})),
                              "values": dict(values)}
            elif old.get("command") == command:
                table[key] = old
    for label in MEASURED:
        if f"{label} | layer 19" in recorded:
            table[f"{label} | layer 19"] = recorded[f"{label} | layer 19"]
    return table


def asked(claims):
    """{row | layer: {metrics}} that these claims ask for, in their verdicts and beside them."""
    class Any(dict):
        def get(self, key, default=None):
            return {"values": Any()} if "|" in key else {"42": 0.5, "43": 0.6} if key != "values" else Any()
    v = Values(Any())
    for one in claims:
        one.measure(v)
    return v.used


def ledger(table):
    """What results/claims.json holds: every claim judged, and of the numbers those that a claim has used."""
    v, rows, used = Values(table), [], asked(CLAIMS)
    for one in CLAIMS:
        fields = {k: getattr(one, k) for k in ("id", "place", "quote", "reported", "needs", "tolerance")}
        rows.append({**fields, "needs": list(one.needs), **judge(one, v)})
    keep = {key: {**row, "values": {m: x for m, x in row["values"].items() if m in used[key] | {"train_seconds"}}}
            for key, row in table.items()}
    minutes = {}
    for paper in PAPERS:
        labels = {label for c in CLAIMS if c.id[0] == paper for label in c.needs}
        seconds = [s for key, row in keep.items() if key.split(" | ")[0] in labels
                   for s in row["values"].get("train_seconds", {}).values()]
        minutes[paper] = {"runs": len(seconds), "minutes": round(sum(seconds) / 60, 1)}
    models = sorted({row["model"] for row in keep.values() if "model" in row})
    return {"model": "; ".join(models) or "none yet", "time": minutes, "claims": rows, "runs": keep}


HEADER = """# The papers' claims, one by one

Made by `benchmarks/claims.py` from `results/claims.json`; nothing here is entered by hand.
Model of these runs: {model}; layer 19 unless a layer is named, the scripts' laptop preset. The papers used
Gemma-2-2B (paper D: Pythia-70m), so a verdict is about the method on this model and at this size. Attention sinks are
out of every number unless it says otherwise.

- **reproduced**: our number meets the column "holds if", which we chose; the papers give no tolerances.
- **refuted**: it does not: the number or effect does not appear here.
- **not testable here**: for the reason given; the nearest thing that was measured stands in the column "here".
- **not run**: no run has produced the number yet.

"0.111 ± 0.001 (n 3)" is mean and standard deviation over 3 seeds (or repeats, for step times). The commands are below
each table. The minutes are those of training on one core; harvesting (once a text) and the evaluations come on top;
of these only unlearning takes long (B12). Runs that two papers need are counted for both.

| paper | claims | reproduced | refuted | not testable here | not run | runs | minutes of training |
|---|---|---|---|---|---|---|---|
{summary}
"""


def cell(text):
    """Text as a cell of a markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def markdown(data):
    """results/claims.md from results/claims.json."""
    summary = []
    for paper, title in PAPERS.items():
        verdicts = collections.Counter(row["verdict"] for row in data["claims"] if row["id"][0] == paper)
        spent = data["time"][paper]
        counts = [sum(verdicts.values())] + [verdicts[k] for k in (*VERDICTS.values(), "not run")]
        summary.append(f"| {paper}: {title} (`{SCRIPTS[paper]}`) | " + " | ".join(map(str, counts))
                       + f" | {spent['runs']} | {spent['minutes']:g} |")
    parts = [HEADER.format(model=data["model"], summary="\n".join(summary))]
    for paper, title in PAPERS.items():
        rows = [row for row in data["claims"] if row["id"][0] == paper]
        parts += [f"## Paper {paper}: {title}\n",
                  "| | the paper says | its number | here | holds if | verdict | why |\n|---|---|---|---|---|---|---|"]
        for row in rows:
            cells = (row["id"], f"\"{row['quote']}\" ({row['place']})", row["reported"], row["number"],
                     row["tolerance"], f"**{row['verdict']}**", row["why"])
            parts.append("| " + " | ".join(map(cell, cells)) + " |")
        parts.append("\nRuns\n")
        for label in dict.fromkeys(label for row in rows for label in row["needs"]):
            ids = ", ".join(row["id"] for row in rows if label in row["needs"])
            if label in MEASURED:
                machine = data["runs"].get(f"{label} | layer 19", {}).get("machine", {}).get("cpu", "not run")
                parts.append(f"- {label}: `{MEASURED[label].__name__}()` in `benchmarks/claims.py`, {machine} ({ids})")
                continue
            for layer in ROWS[label].layers:
                seeds = data["runs"].get(f"{label} | layer {layer}", {}).get("values", {}).get("train_seconds", {})
                there = "seeds " + ", ".join(seeds) if seeds else "not run"
                parts.append(f"- {label}: `{ROWS[label].command(layer)}`, {there} ({ids})")
        parts.append("")
    return "\n".join(parts)


def write(data):
    common.write_json(HERE / "results" / "claims.json", data)
    common.write_atomic(HERE / "results" / "claims.md", markdown(data))


def recorded():
    """The numbers in results/claims.json, or none."""
    path = HERE / "results" / "claims.json"
    return common.read_json(path)["runs"] if path.exists() else {}


def run(papers, more, workers):
    """Everything that the claims of these papers need: activations, training in worker processes, measurements."""
    runs, measured = needed(papers)
    texts = collections.defaultdict(list)
    for label, layer, seed in runs:
        texts[experiments.data_of(ROWS[label].script, ROWS[label].flags)].append((label, layer, seed))
    for data, some in texts.items():                     # all layers of a text in one pass of the language model
        layers = ",".join(str(n) for n in sorted({layer for _, layer, _ in some}))
        evals = ",".join(evals_of(label, seed) for label, _, seed in some)
        experiments.prepare(ROWS[some[0][0]].script, data, layers, evals, more)
    command = [sys.executable, __file__, "".join(papers) if len(papers) == 1 else "all", "--worker", "--more=" + more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=env) for _ in range(workers or os.cpu_count() or 1)]
    if sum(process.wait() != 0 for process in started):
        print("a worker process stopped early; the same command goes on where it stopped.")
    numbers = recorded()
    for label in measured:                               # alone on the machine, since they are times
        if f"{label} | layer 19" not in numbers:
            values = {k: {str(i): x for i, x in v.items()} for k, v in MEASURED[label]().items()}
            numbers[f"{label} | layer 19"] = {"command": f"{MEASURED[label].__name__}()", "values": values,
                                               "machine": common.versions()}
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=[*PAPERS, "all"])
    parser.add_argument("--table", action="store_true", help="run nothing: collect and write")
    parser.add_argument("--list", action="store_true", help="the runs that are needed")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one a core)")
    parser.add_argument("--more", default="", help="flags for every run that change no result, such as '--cache DIR'")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    papers = tuple(PAPERS) if args.paper == "all" else (args.paper,)
    runs, _ = needed(papers)
    if args.worker or args.list:
        torch.set_num_threads(1)
        for label, layer, seed in runs:
            if args.worker:
                train(label, layer, seed, args.more)
                continue
            numbers = gather(folder(label, layer, seed))
            state = f"{numbers.get('train_seconds', 0):.0f} s" if numbers else "not run"
            print(f"{state:>8}  {label}, seed {seed}: {ROWS[label].command(layer)}")
        return
    data = ledger(collect(recorded() if args.table else run(papers, args.more, args.workers)))
    write(data)
    for row in data["claims"]:
        if row["id"][0] in papers:
            print(f"{row['id']:<4} {row['verdict']:<18} {row['number']}")


if __name__ == "__main__":
    main()
