"""Runs behind the tables: suites of (script, flags, seeds, layers), each run made once and kept.

    python benchmarks/experiments.py compare              what is missing, then the table and figure
    python benchmarks/experiments.py compare --seeds 42 --rows "TopK 64" --more "--cache DIR"
    python benchmarks/experiments.py settings             what each common setting is worth
    python benchmarks/experiments.py tables               write the tables of README.md and docs/

The runs of single papers, their ablations and readings are those of benchmarks/claims.py. A run
lives in runs/bench/<script>-<flags>/L<layer>-s<seed>, whoever asked for it. A run that is finished
there, or recorded in results/<suite>.json, is not repeated (--again: the recorded ones are); an
evaluation that it lacks is added, an interrupted run goes on. Every run is a process of one thread,
as many at a time as there are cores. Flags are the whole difference to the scripts' laptop preset.
results/<suite>.json holds the metrics of COLUMNS and, by seed, command, commit, versions, machine.
"""
import argparse
import concurrent.futures
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common

import evals
from benchmarks import throughput

RUNS, RESULTS = HERE / "runs" / "bench", HERE / "results"

# --- Suites ---

@dataclasses.dataclass(frozen=True)
class Row:
    """One script with flags, for some seeds and layers."""
    script: str                    # module with train(cfg, acts)
    flags: str = ""
    evals: str = "core,temporal"
    seeds: tuple = (42, 43, 44)
    layers: tuple = (19,)
    elsewhere: tuple = ()          # further layers, first seed only

    def jobs(self):
        """[(layer, seed)], the first seed first."""
        first = [(layer, self.seeds[0]) for layer in (*self.layers, *self.elsewhere)]
        return first + [(layer, seed) for seed in self.seeds[1:] for layer in self.layers]

    def command(self, layer):
        return f"python {self.script.replace('.', '/')}.py --layer {layer} {self.flags}".strip()

    def folder(self, layer, seed):
        """Where this run lives: the same for the same flags in any order."""
        parts = sorted(" ".join(p.split()) for p in f" {self.flags}".split(" --") if p.strip())
        name = "-".join([self.script, *parts]).replace(" ", "-").replace(",", "+")
        return RUNS / name / f"L{layer}-s{seed}"


METHODS = {      # name in the comparison: (script, flags that make the method)
    "standard": ("tsae", "--no-temporal"), "TSAE": ("tsae", ""),
    "TSAE, half weights":
        ("tsae", "--layer_norm off --variance_weights off --temporal_scale 0.5"),
    "MTSAE extraction": ("mtsae", ""),
    "MTSAE unlearning": ("mtsae", "--variant unlearning --schedule constant --dtype auto"),
    "TemporalLens": ("temporal_lens", ""), "hierarchical": ("hierarchical_sae", ""),
    **{name: ("benchmarks.published", f"--method {method}") for name, method in (
        ("T-SAE", "tsae"), ("Matryoshka", "matryoshka"), ("TFA", "tfa"), ("pooled", "pooled"),
        ("random decoder", "random"))}}
ONE_TOKEN = ("standard", "Matryoshka", "random decoder")   # no use of the order of tokens
# One text, optimiser, schedule and clipping for every method: a safeguard would be worth more than
# a paper's idea (clipping alone 0.009 EV). Suite "settings" shows what each is worth.
SAME = ("--data bundled --steps 2500 --batch_size 4 --lr 3e-4 --lr_warmup 500 --weight_decay 0 "
        "--clip 0 --project_gradient --recon_reduction sum")
ALL = "core,temporal,probing"


def stage(method, k, more="", **fields):
    """A method on the common stage, k features active at a token; later flags win."""
    script, flags = METHODS[method]
    both = {p.split()[0].removeprefix("no-"): p for p in f" {flags} {SAME} {more}".split(" --")[1:]}
    flags = " ".join(f"--{p.strip()}" for p in both.values())
    return Row(script, f"{flags} --activation topk --k {k}", ALL, **fields)


SUITES = {
    "compare": {
        **{f"{m}, TopK {k}": stage(m, k, elsewhere=(5, 12) if k == 64 else ())
           for k in (64, 16, 256) for m in METHODS},
        **{f"{m}, shuffled, TopK 64": stage(m, 64, "--shuffle train")
           for m in METHODS if m not in ONE_TOKEN},
        **{f"{m}, paper's ReLU": Row(METHODS[m][0], flags, ALL) for m, flags in (
            ("standard", "--no-temporal"), ("TSAE", ""), ("MTSAE extraction", "--steps 2500"),
            ("MTSAE unlearning", "--variant unlearning --steps 2500 --dtype auto"),
            ("TemporalLens", "--data bundled"), ("hierarchical", ""))}},
    "settings": {     # what each setting of the common stage is worth alone
        **{f"{m}, clip {c}": stage(m, 64, f"--clip {c}", seeds=(42,))
           for m in METHODS for c in (0, 2)},
        **{f"standard, {what}": stage("standard", 64, flag, seeds=(42,)) for what, flag in (
            ("weight decay 0.01", "--weight_decay 0.01"), ("no warm-up", "--lr_warmup 0"),
            ("gradient not projected", "--no-project_gradient"))}},
}

# --- Running ---

def lacks(folder, evals):
    """Evaluations that a finished run has not seen; None if it is not finished."""
    path = folder / "eval.json"
    return None if not path.exists() else [
        name for name in evals.split(",") if name not in common.read_json(path)]


def one(row, job, more=""):
    """Train or resume one run, or add what it lacks; its output beside the folder -> success."""
    out, python = row.folder(*job), [sys.executable, "-m"]
    missing = lacks(out, row.evals)
    if missing == []:
        return True
    cache = " ".join(re.findall(r"--cache \S+", more)).split()
    commands = [[*python, f"evals.{name}", out, *cache] for name in missing or ()]
    if missing is None:
        begun = (out / "checkpoint.safetensors").exists()
        flags = ["--resume", out, *cache] if begun else [
            "--layer", str(job[0]), "--seed", str(job[1]), "--out", out, "--overwrite",
            *f"{row.flags} {more}".split()]
        commands = [[*python, row.script, "--eval", row.evals, *flags]]
    out.parent.mkdir(parents=True, exist_ok=True)
    start, output = time.time(), out.with_suffix(".txt")
    with open(output, "a") as file:
        codes = [subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT, env={
            **os.environ, "OMP_NUM_THREADS": "1"}).returncode for command in commands]
    good = set(codes) <= {0, 3}                            # 3: an evaluation could not be had
    last = re.split(r"[\r\n]", output.read_text().strip())[-1][:200]
    print(time.strftime("%H:%M:%S"), out.parent.name, f"{out.name}:", "done" if good else
          f"failed: {last}", f"({time.time() - start:.0f} s)", flush=True)
    return good


def run(pairs, more="", workers=0):
    """What these (Row, job) lack, the first seed of each Row first."""
    jobs = {}                      # by folder: rows that share a run share its evaluations
    for row, job in sorted(pairs, key=lambda pair: pair[0].jobs().index(pair[1])):
        before = jobs[row.folder(*job)][0].evals.split(",") if row.folder(*job) in jobs else []
        names = ",".join(dict.fromkeys([*before, *row.evals.split(",")]))
        jobs[row.folder(*job)] = dataclasses.replace(row, evals=names), job
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        failed = list(pool.map(lambda job: one(*job, more), jobs.values())).count(False)
    if failed:
        print(f"{failed} of {len(jobs)} runs failed; the same command goes on.")


# --- Collecting ---

def numbers(folder):
    """All metrics of a finished run, flat; {} if there is none."""
    path = folder / "eval.json"
    found = evals.flatten(common.read_json(path)) if path.exists() else {}
    return {k: v for k, v in found.items() if type(v) in (int, float)}


def provenance(command, versions):
    parts = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "commit")
    return {"command": command, "commit": versions["commit"], "versions": parts}


def collect(table, old, metrics, read=numbers):
    """{label: Row} -> {"label | layer N": {command, seeds: {seed: provenance}, values: {metric:
    {seed: value}}}} from the run folders; read: folder -> metrics. What `old` has of the same
    command and of seeds without a folder here is kept."""
    out = {}
    for label, row in table.items():
        for layer, seed in row.jobs():
            key, command = f"{label} | layer {layer}", row.command(layer)
            kept = old.get(key) if old.get(key, {}).get("command") == command else None
            entry = out.setdefault(key, kept or {"command": command, "seeds": {}, "values": {}})
            found = read(row.folder(layer, seed))
            if found:
                config = common.read_json(row.folder(layer, seed) / "config.json")
                where = provenance(f"{command} --seed {seed}", config["versions"])
                entry["seeds"][str(seed)] = where
                for metric in metrics:
                    entry["values"].setdefault(metric, {}).pop(str(seed), None)
                    if metric in found:
                        entry["values"][metric][str(seed)] = float(f"{found[metric]:.6g}")
    for entry in out.values():
        entry["values"] = {metric: v for metric, v in entry["values"].items() if v}
    return {key: entry for key, entry in out.items() if entry["values"]}


COLUMNS = {
    "EV": "core.EV", "L0": "core.L0", "CE score": "core.ce_loss_score", "dead": "core.dead",
    "neighbour cosine": "temporal.neighbour_cosine", "total variation": "temporal.total_variation",
    "span": "temporal.span", "probe k=1": "probing.sae_top_1", "probe k=5": "probing.sae_top_5",
    "probe k=20": "probing.sae_top_20", "seconds": "train_seconds", "steps": "steps",
    "early error": "positions.no_sink.early_error", "mean mask": "positions.mean_mask",
    "with the sink": "positions.sink_fitted.early_error", "decided": "positions.decided",
    "weight-error r": "positions.weight_difficulty_r", "span by position": "positions.span",
    "r with first draw": "positions.r_with_first_draw", "masks at 1-3": "positions.prefer_first",
    "masks at 4-64": "positions.prefer_early", "routing entropy": "levels.entropy",
    "lambda_adv above floor": "log.above_floor", "kernels' reach": "mixing.reach",
    "energy on others": "mixing.neighbours", "score": "unlearning.score",
    "crossed": "unlearning.crossed_drop", "kept": "unlearning.crossed_kept",
    "random features": "unlearning.random", "eligible features": "unlearning.eligible"}


def show(table, columns=()):
    """A markdown table, mean ± sd over seeds; columns: {name: metric} [those with values]. Seconds
    are the fastest seed's, since others may have shared the machine."""
    there = {metric for row in table.values() for metric in row["values"]}
    columns = columns or {name: metric for name, metric in COLUMNS.items() if metric in there}
    lines = ["| row | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for label, row in table.items():
        cells = [label.removesuffix(" | layer 19").replace(" | ", ", "), str(len(row["seeds"]))]
        for metric in columns.values():
            values = list(row["values"].get(metric, {}).values())
            values = [min(values)] if values and metric == "train_seconds" else values
            digits = 1 if values and abs(statistics.fmean(values)) >= 10 else 3
            cells.append(" ± ".join(f"{value:.{digits}f}" for value in mean_sd(values)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_sd(values):
    """[mean, standard deviation], as far as there are values for them."""
    return [function(values) for function in (statistics.fmean, statistics.stdev)[:len(values)]]


def fill(pattern, body):
    """In README.md, docs/ and benchmarks/README.md: what stands between a line `<!-- pattern -->`
    and `<!-- end -->` becomes body(match)."""
    for page in (HERE / "README.md", HERE / "benchmarks/README.md", *HERE.glob("docs/*.md")):
        before = page.read_text()
        after = re.sub(rf"(<!-- {pattern} -->\n)(?s:.*?)(?=<!-- end -->)",
                       lambda m: f"{m[1]}{body(m)}\n", before)
        if after != before:
            common.write_atomic(page, after)


def table_of(match):
    """`<!-- table SUITE: rows (an expression): columns -->` -> the recorded rows."""
    table = {key: row for key, row in recorded(match[2]).items()
             if re.match(rf"({match[3]}) \|", key)}
    return show(table, {c: COLUMNS[c] for c in match[4].split(", ")}) if table else "not run"


def recorded(suite):
    """The rows of results/<suite>.json, without those of an older format."""
    path = RESULTS / f"{suite}.json"
    table = common.read_json(path) if path.exists() else {}
    return {key: row for key, row in table.get("runs", table).items()
            if isinstance(row, dict) and isinstance(row.get("seeds"), dict)}


def draw(table, path):
    """L0 against EV and against the CE score at layer 19: one line a method through its means, a
    dot a seed; hollow: trained on shuffled tokens."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 6), layout="tight")
    axes = figure.subplots(1, 2)
    for axis, title in zip(axes, ("EV", "CE score")):
        for number, name in enumerate(METHODS):
            line, color, dashes = [], f"C{number % 10}", "-" if number < 10 else "--"
            for label, row in table.items():
                found = re.fullmatch(rf"{name}(, shuffled)?, TopK \d+ \| layer 19", label)
                if found and COLUMNS[title] in row["values"]:
                    x, y = (list(row["values"][COLUMNS[c]].values()) for c in ("L0", title))
                    axis.plot(x, y, "o", color=color, markerfacecolor="none" if found[1] else color)
                    line += [] if found[1] else [(statistics.fmean(x), statistics.fmean(y))]
            if line:
                axis.plot(*zip(*sorted(line)), dashes, label=name, color=color)
        axis.set(xscale="log", xlabel="L0 (active features a token)", ylabel=title,
                 title="a dot a seed; hollow: trained on shuffled tokens")
        axis.set_xticks([16, 64, 256], [16, 64, 256])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def arguments(doc):
    """A parser with the flags of all benchmarks that run Rows."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing: collect and write")
    parser.add_argument("--again", action="store_true", help="repeat recorded runs, too")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time (0: one a core)")
    parser.add_argument("--more", default="",
                        help="flags for every run that change no result, such as '--cache DIR'")
    return parser


def prepare(args, table, old):
    """Run what {label: Row} and the recorded rows `old` lack."""
    pairs = []
    for label, row in table.items():
        for layer, seed in row.jobs():
            entry, command = old.get(f"{label} | layer {layer}", {}), row.command(layer)
            there = entry.get("command") == command and str(seed) in entry["seeds"]
            pairs += [] if there and not args.again else [(row, (layer, seed))]
    if not args.table:
        run(pairs, args.more, args.workers)


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("suite", choices=[*SUITES, "tables"])
    parser.add_argument("--seeds", default="", help="such as 42,43 [the suite's]")
    parser.add_argument("--rows", default="", help="rows whose label matches this expression")
    args = parser.parse_args(argv)
    if args.suite == "tables":
        fill(r"table (\w+): (.+): (.+)", table_of)
        return fill(r"speed (\w+)", lambda m: throughput.markdown(common.read_json(
            RESULTS / f"{m[2]}.json")) if (RESULTS / f"{m[2]}.json").exists() else "not run")
    seeds = tuple(map(int, filter(None, args.seeds.split(","))))
    chosen = {label: dataclasses.replace(row, seeds=seeds or row.seeds)
              for label, row in SUITES[args.suite].items() if re.search(args.rows, label)}
    old = recorded(args.suite)
    prepare(args, chosen, old)
    table = collect(SUITES[args.suite], old, COLUMNS.values())
    if table:
        common.write_json(RESULTS / f"{args.suite}.json", table)
        print(show(table))
        if args.suite == "compare":
            draw(table, RESULTS / "compare.png")


if __name__ == "__main__":
    raise SystemExit(main())
