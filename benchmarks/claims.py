"""The ledger of claims: what each paper says in numbers, beside what this repository measures.

    python benchmarks/claims.py C                    run what paper C's claims lack, then write
    python benchmarks/claims.py all --table          run nothing: collect what is there and write

Reads benchmarks/claims.toml: quotes, criteria, and the readings of the papers' open points that
each claim is tried under, with their runs. Writes results/claims.json (numbers by run and seed, and
the judged claims) and results/claims.md. A verdict is computed, never typed: a reading holds,
fails, or is undecided where a bound lies within two standard errors of the mean over seeds; a claim
is refuted only if it fails in all its readings. The papers give no tolerances: the bounds are ours.
"""
import collections
import json
import math
import re
import statistics
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common
import mtsae
import torch

from benchmarks import experiments, throughput
from benchmarks.experiments import COLUMNS, Row, mean_sd
from evals.saebench import max_cosine

PAPERS = {"A": ("MTSAE: multi-scale temporal feature extraction", "mtsae.py"),
          "B": ("Hierarchical temporal-aware SAE", "hierarchical_sae.py"),
          "C": ("TSAE: time-aware sparse autoencoders", "tsae.py"),
          "D": ("MTSAE for selective unlearning", "mtsae.py --variant unlearning"),
          "E": ("TemporalLens", "temporal_lens.py")}
VERDICTS = ("reproduced", "refuted (in all readings tried)", "depends on the reading",
            "within the noise of the seeds", "not testable here", "not run")

# --- Claims and their runs: claims.toml ---

@dataclass
class Claim:
    """One table of claims.toml; see there."""
    id: str
    place: str
    quote: str
    reported: str
    criterion: str = ""
    readings: dict = field(default_factory=dict)
    note: str = ""
    points: str = ""
    any: bool = False
    by_construction: str = ""
    untestable: str = ""

    def __post_init__(self):
        """criterion -> metric, low, high."""
        self.metric, how, rest = re.fullmatch(
            "(?:(.+) (at most|at least|from) (.+))?", self.criterion).groups()
        found = [float(x) / (100 if "%" in rest else 1) for x in re.findall(r"[-\d.]+", rest or "")]
        self.low = found[0] if how in ("from", "at least") else -math.inf
        self.high = found[-1] if how in ("from", "at most") else math.inf


def tidy(value):
    """A value of the file: texts on one line, lists as tuples."""
    if isinstance(value, dict):
        return {key: tidy(v) for key, v in value.items()}
    return (" ".join(value.split()) if isinstance(value, str) else
            tuple(value) if isinstance(value, list) else value)


def runs_of(script, flags, shared="", **fields):
    """A group of runs -> {name: Row}."""
    return {name: Row(script, f"{own} {shared}".strip(), **fields) for name, own in flags.items()}


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
RUNS = {name: row for group in TABLES.pop("runs") for name, row in runs_of(**tidy(group)).items()}
CLAIMS = [Claim(id, **tidy(table)) for id, table in TABLES.items()]

# --- Numbers ---

def read(folder):
    """All numbers of a run folder: eval.json flat, log.*, and a few that follow from them. A run
    that was interrupted is not run; one that stopped on a non-finite loss has finished = 0."""
    out, output = experiments.numbers(folder), folder.with_suffix(".txt")
    stopped = output.exists() and re.search(r"the term .* is (nan|-?inf) at", output.read_text())
    if not out and not stopped or not (folder / "config.json").exists():
        return {}
    config, finished = common.read_json(folder / "config.json"), float(bool(out))
    lines = (folder / "log.jsonl").read_text().splitlines()
    out.update(log_summary([json.loads(line) for line in lines]))
    out.update({"finished": finished, "log.spike": out["log.spike"] if finished else 1e9})
    if finished:
        for task in common.read_json(folder / "eval.json").get("probing", {}).get("per_task", ()):
            out.update({f"probing.{task['task']}.{k}": v for k, v in task.items() if k != "task"})
        tensors = common.load_tensors(folder / "sae_weights.safetensors")[0]
        n, D = tensors["W_dec"].shape
        out["decoder_cosine"] = max_cosine(tensors["W_dec"]).mean().item()
        directions = torch.randn(n, D, generator=common.generator(0, "directions"))
        out["cosine_over_random"] = out["decoder_cosine"] / max_cosine(directions).mean().item()
        units, l1 = D / tensors["scale"].item() ** 2, config["config"]["l1"]
        out.update(derived(lambda name: out.get(name, math.nan), units, l1))
    return {k: v for k, v in out.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def derived(get, units, l1):
    """What follows from other metrics; NaN where they are missing."""
    means = [get(f"branches.mean_{r}") for r in (1, 2, 4, 8)]
    falling = min(means) > 0 and means == sorted(means, reverse=True)
    return {
        "core.FVU": 1 - get("core.EV"),
        "core.ce_rise": get("core.ce_loss_with_sae") - get("core.ce_loss_without_sae"),
        "heldout_loss": get("core.MSE") * units + l1 * get("core.L1"),    # Eq. E.8 with w_t = 1
        "probing.all_against_residual": get("probing.sae_all") - get("probing.residual_all"),
        "unlearning.above_random": get("unlearning.score") - get("unlearning.random"),
        "levels.smallest_share": min(get(f"levels.share_{n}") for n in (1, 2, 3)),
        "branches.std_trend": get("branches.std_8") / get("branches.std_1") - 1,
        "branches.means_fall": falling + 0 * means[0],
        "positions.early_size": abs(get("positions.no_sink.early_error")),
        "positions.learnt": get("positions.decided") * (get("positions.r_with_first_draw") < 0.5)}


def log_summary(log):
    """Numbers from the lines of log.jsonl, NaN where there are none. noise: deviation about a
    straight line over the mean, in the last third or (early) the first tenth; loss_variance: its
    square without the mean."""
    def column(name):
        return [row[name] for row in log if name in row] or [math.nan]
    def late(name):
        return column(name)[-max(1, len(column(name)) // 3):]
    n, loss = len(log), column("loss")
    early, above = loss[:max(3, n // 10)], [v - 0.1 - 1e-6 for v in column("lambda_adv")]
    return {"log.steps": log[-1]["step"] + 1, "log.loss_variance": spread(late("loss")) ** 2,
            "log.loss_noise": spread(late("loss")) / fmean(late("loss")),
            "log.active_noise": spread(late("active")) / max(fmean(late("active")), 1e-12),
            "log.early_noise": spread(early) / fmean(early),
            "log.spike": max(loss[n // 2:]) / statistics.median(loss[n // 2:]),
            "log.EV_early": fmean(column("EV")[n // 5:n // 4 + 1]),
            "log.grad_norm": statistics.median(column("grad_norm")),
            "log.temporal_share": fmean(late("temporal")) / fmean(late("loss")),
            "log.above_floor": fmean((v > 0) + 0 * v for v in above),
            "log.over_margin": fmean(column("over_margin"))}


def spread(values):
    """Deviation of a series about the straight line through it."""
    if len(values) < 3:
        return 0.0
    slope, start = statistics.linear_regression(range(len(values)), values)
    return statistics.pstdev(v - start - slope * t for t, v in enumerate(values))


def saved_bytes(script, *flags, n):
    """Bytes that autograd keeps for one step on n sequences, each storage once."""
    kept = {}
    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        throughput.step_seconds(script, flags, 576, torch.float32, 1, 0, sequences=n)
    return sum(storage.nbytes() for storage in kept.values())


def step_times(repeats=5):
    """Ratios of step times, all cases once a repeat, and of bytes: {metric: {repeat: value}}."""
    def step(script, *flags, T=128, D=576):
        return statistics.median(
            throughput.step_seconds(script, flags, D, torch.float32, 6, 2, T=T))
    out, plain, coding = collections.defaultdict(dict), ("tsae", "--no-temporal"), {}
    for i in range(repeats):
        multi = step("mtsae")
        out["MTSAE over standard"][i] = multi / step(*plain)
        out["three rates over one"][i] = multi / step("mtsae", "--rates=1")
        out["exponent in T"][i] = math.log(
            step("temporal_lens", T=256) / step("temporal_lens", T=64), 4)
        for D in (512, 2048):                              # encode and decode, without gradients
            cfg = mtsae.Config(variant="unlearning", **mtsae.VARIANTS["unlearning"])
            sae, x, mask = mtsae.MTSAE(D, cfg).eval(), torch.randn(8, 128, D), torch.ones(8, 128)
            with torch.no_grad():
                coding[D] = throughput.timed(lambda: sae(x, mask.bool()), 3)
        out["exponent in d"][i] = math.log(coding[2048] / coding[512], 4)
    out["MTSAE over standard, D 2304"][0] = step("mtsae", D=2304) / step(*plain, D=2304)
    grown = [saved_bytes(*case, n=4) - saved_bytes(*case, n=2)        # weights, constants cancel
             for case in (("mtsae",), plain)]
    out["MTSAE over standard, bytes"][0] = grown[0] / grown[1]
    return out


MEASURED = {"step times": step_times}

# --- Verdicts ---

def parse(item, metric):
    """"RUN@5 / RUN: metric" -> ["RUN | layer 5", "RUN | layer 19"], "/", metric."""
    runs, _, own = item.partition(": ")
    sign = next((s for s in "/-" if f" {s} " in runs), "")
    pairs = [run.partition("@") for run in (runs.split(f" {sign} ") if sign else [runs])]
    return [f"{run} | layer {layer or 19}" for run, _, layer in pairs], sign, own or metric


def asked(claims):
    """{"RUN | layer N": {metrics}} that these claims judge or show."""
    used = collections.defaultdict(set)
    for claim in claims:
        items = [item for text in claim.readings.values() for item in text.split("; ")]
        for item in items + re.findall(r"\{(.+?)\}", claim.note):
            keys, _, metric = parse(item, claim.metric)
            for key in keys:
                used[key].add(metric)
    return used


def values(table, item, metric=""):
    """An item's values, one a seed; [] before all seeds of its runs are there."""
    keys, sign, metric = parse(item, metric)
    for name, layer in (key.split(" | layer ") for key in keys if key.split(" | ")[0] in RUNS):
        wanted = {str(seed) for at, seed in RUNS[name].jobs() if at == int(layer)}
        if wanted - set(table.get(f"{name} | layer {layer}", {}).get("seeds", ())):
            return []
    found = [table.get(key, {}).get("values", {}).get(metric, {}) for key in keys]
    both = [(a, found[-1][seed]) for seed, a in found[0].items() if seed in found[-1]]
    return [a if not sign else a - b if sign == "-" else a / b - 1
            for a, b in both if b or sign != "/"]


def state(numbers, low, high):
    """Whether the mean lies within the bounds, or a bound within two standard errors of it."""
    mean, n = fmean(numbers), len(numbers)
    error = 2 * statistics.stdev(numbers) / math.sqrt(n) if n > 2 else 0.0
    if min(abs(mean - low), abs(mean - high)) < error:
        return "undecided"
    return "holds" if low - 1e-12 <= mean <= high + 1e-12 else "fails"


def judge(claim, table):
    """-> {"verdict", "readings": {name: {"state", "numbers"}}}."""
    out = {}
    for name, text in claim.readings.items():
        found = {item: values(table, item, claim.metric) for item in text.split("; ")}
        states = {state(v, claim.low, claim.high) if v else "not run" for v in found.values()}
        order = ("holds", "not run", "undecided", "fails")
        order = order if claim.any else ("not run", "fails", "undecided", "holds")
        out[name] = {"state": next(s for s in order if s in states), "numbers": "; ".join(
            num(v, " / " in item) for item, v in found.items())}
    states = {reading["state"] for reading in out.values()}
    verdict = ("not testable here" if claim.untestable else
               "depends on the reading" if {"holds", "fails"} <= states else
               "not run" if "not run" in states else
               "within the noise of the seeds" if "undecided" in states else
               "reproduced" if "holds" in states else "refuted (in all readings tried)")
    return {"verdict": verdict, "readings": out}


def num(numbers, percent=False):
    """mean ± sd (n seeds)."""
    if not numbers:
        return "not run"
    parts = [(100 if percent else 1) * value for value in mean_sd(numbers)]
    size = max(map(abs, parts))
    digits = 1 if percent or size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    text = " ± ".join(f"{round(part, digits) + 0.0:.{digits}f}" for part in parts)
    return text + " %" * percent + f" (n {len(numbers)})" * (len(numbers) > 1)


# --- The ledger ---

def ledger(table):
    """What results/claims.json holds: the claims judged, and the numbers."""
    out = []
    for claim in CLAIMS:
        note = [f"Because {claim.untestable}." * bool(claim.untestable),
                f"By construction: {claim.by_construction}." * bool(claim.by_construction),
                re.sub(r"\{(.+?)\}", lambda m: num(values(table, m[1])), claim.note)]
        fields = ("id", "place", "quote", "reported", "criterion", "points", "by_construction")
        out.append({**{k: getattr(claim, k) for k in fields}, **judge(claim, table),
                    "note": " ".join(filter(None, note))})
    return {"claims": out, "runs": table}


HEADER = """# The papers' claims, one by one

Made by `benchmarks/claims.py` from `benchmarks/claims.toml` and the recorded runs; nothing here is
entered by hand. SmolLM2-135M-Instruct, layer 19 unless one is named, the scripts' laptop preset,
attention sinks out of every number unless it says otherwise. The papers used Gemma-2-2B (paper D:
Pythia-70m): a verdict is about the method, on this model and at this size.

Each claim is tried under the readings named in the column "here". **Reproduced**: "holds if" (the
bounds are ours: the papers give no tolerances) is met in all of them; **refuted**: in none;
**depends on the reading**: in some; **within the noise of the seeds**: a bound lies within two
standard errors of the mean. Numbers are mean ± standard deviation over n seeds (draws, repeats).
"""


def markdown(data):
    """results/claims.md."""
    lines = [HEADER, "| paper | " + " | ".join(VERDICTS) + " |", "|---" * 7 + "|"]
    for paper, (title, script) in PAPERS.items():
        mine = [row["verdict"] for row in data["claims"] if row["id"][0] == paper]
        counts = " | ".join(str(mine.count(verdict)) for verdict in VERDICTS)
        lines.append(f"| {paper}: {title} (`{script}`) | {counts} |")
    for paper, (title, _) in PAPERS.items():
        lines += [f"\n## Paper {paper}: {title}\n",
                  "| | the paper says | its number | here | holds if | verdict | note |",
                  "|---" * 7 + "|"]
        for row in (row for row in data["claims"] if row["id"][0] == paper):
            here = "<br>".join(f"{name}: {reading['numbers']} ({reading['state']})"
                               for name, reading in row["readings"].items())
            cells = (row["id"], f"\"{row['quote']}\" ({row['place']})", row["reported"], here,
                     row["criterion"], f"**{row['verdict']}**", row["note"])
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("\nRuns\n")
        for key in asked(claim for claim in CLAIMS if claim.id[0] == paper):
            name, layer = key.split(" | layer ")
            seeds = ", ".join(data["runs"].get(key, {}).get("seeds", ())) or "not run"
            what = (f"`{RUNS[name].command(layer)}`, seeds {seeds}" if name in RUNS else
                    f"`{MEASURED[name].__name__}()` in `benchmarks/claims.py`")
            lines.append(f"- {name}: {what}")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = experiments.arguments(__doc__)
    parser.add_argument("paper", choices=[*PAPERS, "all"])
    args = parser.parse_args(argv)
    chosen, used = [c for c in CLAIMS if args.paper in (c.id[0], "all")], asked(CLAIMS)
    names = dict.fromkeys(key.split(" | ")[0] for key in asked(chosen))
    wanted = [*RUNS] if args.paper == "all" else [name for name in names if name in RUNS]
    old = experiments.recorded("claims")
    experiments.prepare(args, {name: RUNS[name] for name in wanted}, old)
    table = experiments.collect(RUNS, old, set().union(*used.values(), COLUMNS.values()), read)
    for key, row in table.items():
        row["values"] = {metric: v for metric, v in row["values"].items()
                         if metric in used[key] or metric in COLUMNS.values()}
    for name, measure in MEASURED.items():                 # alone on the machine: they are times
        if (key := f"{name} | layer 19") in old:
            table[key] = old[key]
        elif name in names and not args.table:
            where = experiments.provenance(f"{measure.__name__}()", common.versions())
            table[key] = {"command": where["command"], "seeds": {"0": where}, "values": measure()}
    data, path = ledger(table), experiments.RESULTS / "claims.json"
    common.write_json(path, data)
    common.write_atomic(path.with_suffix(".md"), markdown(data))
    for claim, row in zip(CLAIMS, data["claims"]):
        if claim in chosen:
            print(f"{claim.id:<5} {row['verdict']}")


if __name__ == "__main__":
    raise SystemExit(common.guard(main))
