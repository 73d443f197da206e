"""Runs behind the README's tables: suites of (script, flags, seeds, layers), each run done once and kept.

    python benchmarks/experiments.py compare             every variant and control on one activation stream
    python benchmarks/experiments.py tsae --seeds 42     one suite, one seed
    python benchmarks/experiments.py tsae --table        only collect what is there
    python benchmarks/experiments.py readme              write the README's tables from results/*.json

A run lives in runs/bench/<script>-<flags>/L<layer>-s<seed>, whatever suite asked for it: suites share runs. A
finished run is not repeated (evaluations that it lacks are added), an interrupted one is resumed, and a run that
another process works on is left to it; results/<suite>.json is written anew from the run folders. One worker
process of one thread a core is faster than one process of several threads. The flags are the whole difference to
the scripts' laptop preset.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import torch

import common

RUNS = Path("runs/bench")
TOPK = "--activation topk --k 32"
PLAIN = "--layer_norm off --variance_weights off"
HALF = "--batch_size 2 --steps 1250 --warmup 1000 --lr_warmup 500"
LENS = "--heldout_tokens 128000"
NO_EXTRAS = "--layer_norm off --boost 1 --grad_noise 0 --no-buffers"
METHODS = {       # on the same activations and tokens: temporal_lens.py's own default is Shakespeare
    "standard": ("tsae", "--no-temporal"),
    "TSAE": ("tsae", ""),
    "TSAE, half weights": ("tsae", f"{PLAIN} --temporal_scale 0.5"),
    "MTSAE extraction": ("mtsae", "--steps 2500"),
    "MTSAE unlearning": ("mtsae", "--variant unlearning --steps 2500 --dtype auto"),
    "TemporalLens": ("temporal_lens", "--data bundled"),
    "hierarchical": ("hierarchical_sae", ""),
}
SPARSITIES = (16, 64, 256)


@dataclasses.dataclass
class Suite:
    """Rows {label: (script, flags)} to run with some seeds at some layers, and what to evaluate."""
    rows: dict
    evals: str = "reconstruction,temporal"
    seeds: str = "42,43,44"
    layers: str = "19"
    elsewhere: tuple = ()      # further (part of a label, layer), with the first seed


SUITES = {
    "tsae": Suite({
        "TSAE, paper": ("tsae", ""),
        "standard, L1 0.04": ("tsae", "--no-temporal"),
    }, "core,temporal", "42,43,44,45,46"),
    "tsae_ablation": Suite({          # half the batch (256 tokens a step) and half of every schedule
        "TSAE, paper": ("tsae", HALF),
        "  without clipping": ("tsae", f"--clip 0 {HALF}"),
        "  without boost": ("tsae", f"--boost 1 {HALF}"),
        "  without noise": ("tsae", f"--grad_noise 0 {HALF}"),
        "  without buffers": ("tsae", f"--no-buffers {HALF}"),
        "  without LayerNorm": ("tsae", f"--layer_norm off {HALF}"),
        "  LayerNorm after the ReLU": ("tsae", f"--layer_norm post {HALF}"),
        "  no variance weights": ("tsae", f"--variance_weights off {HALF}"),
        "  none of the safeguards": ("tsae", f"--clip 0 {NO_EXTRAS} --variance_weights off {HALF}"),
        "  error averaged over D": ("tsae", f"--recon_reduction mean {HALF}"),
        "standard": ("tsae", f"--no-temporal {HALF}"),
        "standard, error averaged over D": ("tsae", f"--no-temporal --recon_reduction mean {HALF}"),
    }),
    "tsae_l0": Suite({
        "TopK 32": ("tsae", f"--no-temporal {TOPK}"),
        "TSAE, paper's weights": ("tsae", TOPK),
        "TSAE, paper's weights, no LayerNorm": ("tsae", f"{TOPK} --layer_norm off"),
        "TSAE, no LayerNorm, no variance weights": ("tsae", f"{TOPK} {PLAIN}"),
        "  x 0.5": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 0.5"),
        "  x 3": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 3"),
        "  x 10": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 10"),
    }, "core,temporal"),
    "mtsae": Suite({
        "extraction": ("mtsae", "--steps 2500"),
        "  rates 1,2,4": ("mtsae", "--rates 1,2,4 --steps 2500"),
        "  causal": ("mtsae", "--padding causal --steps 2500"),
        "  no batch norm": ("mtsae", "--batch_norm off --steps 2500"),
        "  no resampling": ("mtsae", "--resample_every 0 --steps 2500"),
        "  error averaged over D": ("mtsae", "--recon_reduction mean --steps 2500"),
        "unlearning": ("mtsae", "--variant unlearning --steps 2500 --dtype auto"),
        "  unlearning, causal": ("mtsae", "--variant unlearning --padding causal --steps 2500 --dtype auto"),
        "  10,000 tokens": ("mtsae", "--variant unlearning --tokens 10000 --steps 0 --batch_size 16"),
    }, "core,temporal"),
    "lens": Suite({       # the paper's 1000 test sequences; the bundled Shakespeare has 657 held-out windows
        "TemporalLens": ("temporal_lens", LENS),
        "  no annealing": ("temporal_lens", f"--no-anneal {LENS}"),
        "  static masks": ("temporal_lens", f"--static_masks {LENS}"),
        "  uniform weights": ("temporal_lens", f"--uniform_weights {LENS}"),
        "  masks of one, uniform weights": ("temporal_lens", f"--no-masks --uniform_weights {LENS}"),
    }, elsewhere=(("TemporalLens", "5"), ("TemporalLens", "12"))),
    "hierarchical": Suite({
        "temporal": ("hierarchical_sae", ""),
        "  causal": ("hierarchical_sae", "--causal"),
        "hierarchical": ("hierarchical_sae", "--variant hierarchical"),
        "disentangled": ("hierarchical_sae", "--variant disentangled"),
        "adversarial": ("hierarchical_sae", "--variant adversarial"),
        "self-aligning": ("hierarchical_sae", "--variant self-aligning"),
    }, "core,temporal"),
    "unlearning": Suite({
        "hierarchical: temporal": ("hierarchical_sae", ""),
        "hierarchical: hierarchical": ("hierarchical_sae", "--variant hierarchical"),
        "hierarchical: disentangled": ("hierarchical_sae", "--variant disentangled"),
        "hierarchical: adversarial": ("hierarchical_sae", "--variant adversarial"),
        "hierarchical: self-aligning": ("hierarchical_sae", "--variant self-aligning"),
        "MTSAE extraction": METHODS["MTSAE extraction"],
        "MTSAE unlearning": METHODS["MTSAE unlearning"],
        "standard": METHODS["standard"],
        "TopK 64": ("tsae", "--no-temporal --activation topk --k 64"),
        "TopK 32, F = 8 D": ("tsae", f"--no-temporal {TOPK} --expansion 8"),
        "hierarchical: temporal, TopK 64": ("hierarchical_sae", "--activation topk --k 64"),
        "MTSAE unlearning, TopK 64": (
            "mtsae", "--variant unlearning --steps 2500 --dtype auto --activation topk --k 64"),
    }, "unlearning"),
    "compare": Suite({
        **{f"{name}, TopK {k}": (script, f"{flags} --activation topk --k {k}".strip())
           for k in (64, 16, 256) for name, (script, flags) in METHODS.items()},
        **{f"{name}, paper's ReLU": row for name, row in METHODS.items()},
    }, "core,temporal,probing", elsewhere=(("TopK 64", "5"), ("TopK 64", "12"))),
}


def run_folder(script, flags, seed, layer):
    """Where this run lives, whatever suite asks for it; flags in any order give one folder."""
    parts = sorted(" ".join(part.split()) for part in f" {flags}".split(" --") if part.strip())
    name = "-".join([script, *parts]).replace(" ", "-").replace(",", "+")
    return RUNS / name / f"L{layer}-s{seed}"


def lacks(folder, evals):
    """The evaluations among `evals` (comma) that a finished run has not seen; None if it is not finished."""
    path = folder / "eval.json"
    if not path.exists():
        return None
    results = common.read_json(path)
    core = results.get("core", {})
    have = {"core": "ce_loss_score" in core, "reconstruction": "EV" in core, "temporal": "EV_by_scale" in
            results.get("temporal", {})}
    return [name for name in evals.split(",") if not have.get(name, name in results)]


def one(script, flags, seed, layer, evals, more=""):
    """Train and evaluate one run as far as that is not done; its output goes to output.txt beside it.

    more: flags that change no result, such as --cache. A run that another process holds is left alone.
    """
    out = run_folder(script, flags, seed, layer)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        missing = lacks(out, evals)
        if missing == []:
            return
        if missing:
            argv = ["--run", str(out), "--eval", ",".join(missing)]
        elif (out / "checkpoint.safetensors").exists():
            argv = ["--resume", str(out), "--eval", evals]
        else:
            argv = ["--layer", str(layer), "--seed", str(seed), "--out", str(out), "--overwrite", "--eval", evals,
                    "--save_every", "1000", *flags.split()]
        start, errors = time.time(), io.StringIO()
        with (open(out / "output.txt", "a") as file, contextlib.redirect_stdout(file),
              contextlib.redirect_stderr(errors)):
            status = importlib.import_module(script).main([*argv, *more.split()])
        if status:                           # a run that stopped leaves a trace: its log, and why
            common.write_json(out / "status.json", {"status": status, "error": errors.getvalue().strip()[-500:]})
        if status == 130:                    # Ctrl-C: saved; the rest of the suite is not wanted now either
            raise SystemExit(130)
        tail = errors.getvalue().strip().splitlines()[-1:] if status else ""
        print(f"{time.strftime('%H:%M:%S')} {out.parent.name} {out.name} {'+'.join(missing or ['all'])}: "
              f"status {status} ({time.time() - start:.0f} s) {tail}", flush=True)


def jobs_of(suite, seeds="", layers="", rows="", full=False):
    """The runs of a suite: [(label, seed, layer)], the first seed of every row first."""
    spec = SUITES[suite]
    seeds, layers = (seeds or spec.seeds).split(","), (layers or spec.layers).split(",")
    if full:
        layers = sorted({*layers, *(layer for _, layer in spec.elsewhere)}, key=int)
    chosen = [label for label in spec.rows if re.search(rows, label)]
    jobs = [(label, seed, layer) for seed in seeds for layer in layers for label in chosen]
    jobs += [(label, seeds[0], layer) for part, layer in spec.elsewhere for label in chosen if part in label]
    return list(dict.fromkeys(jobs))


def run_suite(suite, seeds="", layers="", rows="", full=False, more="", workers=0):
    """All runs of a suite in worker processes (0: one a core), then results/<suite>.json -> the collected rows."""
    spec, jobs = SUITES[suite], jobs_of(suite, seeds, layers, rows, full)
    sources = {data_of(*spec.rows[label]): spec.rows[label][0] for label, _, _ in jobs}
    for data, script in sources.items():
        prepare(script, data, ",".join(sorted({layer for _, _, layer in jobs}, key=int)), spec.evals, more)
    command = [sys.executable, __file__, suite, "--worker", "--seeds", seeds, "--layers", layers, "--rows", rows,
               "--more=" + more] + ["--full"] * full
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=env) for _ in range(workers or os.cpu_count() or 1)]
    try:
        failed = sum(process.wait() != 0 for process in started)
    except KeyboardInterrupt:            # the workers got it too: they save their runs and stop
        failed = sum(process.wait() != 0 for process in started)
    if failed:
        print(f"{failed} worker processes stopped early; the same command goes on where they stopped.")
    if suite == "lens":
        paired_tests(more)
    return collect(suite)


def data_of(script, flags):
    """The text that a row trains on, as the scripts resolve it on a CPU."""
    found = re.search(r"--data (\S+)", flags)
    data = found[1] if found else importlib.import_module(script).Config().data
    return "bundled" if data == "auto" and common.pick_device().type == "cpu" else data


def prepare(script, data, layers, evals, more):
    """Harvest the activations (and the probe texts' states) of all layers in one pass of the language model."""
    out = RUNS / f"prepare-{data}-{layers.replace(',', '+')}"
    if all((out / (f"L{layer}" if "," in layers else "") / "eval.json").exists() for layer in layers.split(",")):
        return                                             # what the cache lost since then, the workers harvest
    flags = ["--layer", layers, "--steps", "1", "--out", str(out), "--overwrite", "--data", data, *more.split()]
    status = importlib.import_module(script).main(flags + ["--eval", "probing" if "probing" in evals else "none"])
    if status:
        raise SystemExit(status)


def paired_tests(more=""):
    """Each ablation of TemporalLens against the full one with the same seed: paired t-tests of the squared error over
    held-out sequences (Sec. 5, 6.4) -> paired.json in the ablation's run folder: paired.a_against_b, .t, .p."""
    import temporal_lens
    (_, base), *others = SUITES["lens"].rows.items()
    cache = re.search(r"--cache (\S+)", more)
    for folder in sorted(run_folder(*base, 0, 0).parent.glob("L*-s*")):
        layer, seed = folder.name[1:].split("-s")
        todo = [run_folder(*row, seed, layer) for _, row in others]
        todo = [f for f in todo if (f / "eval.json").exists() and not (f / "paired.json").exists()]
        if not todo or not (folder / "eval.json").exists():
            continue

        def saved(folder):
            cfg = temporal_lens.Config(**common.read_json(folder / "config.json")["config"])
            sae = temporal_lens.TemporalLens(common.read_json(folder / "cfg.json")["d_in"], cfg)
            sae.load_state_dict(common.load_tensors(folder / "sae_weights.safetensors")[0])
            return cfg, sae.eval()
        cfg, full = saved(folder)
        acts = next(common.open_activations(dataclasses.replace(cfg, cache=cache[1] if cache else cfg.cache)))
        for other in todo:
            result = temporal_lens.compare(saved(other)[1], full, acts)
            common.write_json(other / "paired.json", {"paired": result})


def collect(suite):
    """results/<suite>.json from the run folders -> {"label | layer N": row}; a row has the command, seeds, steps,
    versions and, per flat metric name ("core.EV"), {seed: value}, mean and deviation. What results/<suite>.json
    holds of seeds that have no run folder here is kept, as long as the command is the same."""
    path, table, spec = HERE / "results" / f"{suite}.json", {}, SUITES[suite]
    kept = common.read_json(path) if path.exists() else {}
    for label, (script, flags) in spec.rows.items():
        found = {}
        for key, row in kept.items():
            name, layer = key.split(" | layer ")
            if name == label.rstrip() and row["command"] == f"python {script}.py --layer {layer} {flags}".strip():
                found[layer] = row
        folders = run_folder(script, flags, 0, 0).parent.glob("L*-s*")
        for folder in sorted(folders, key=lambda p: [int(n) for n in p.name[1:].split("-s")]):
            if lacks(folder, spec.evals) != []:
                continue
            config = common.read_json(folder / "config.json")
            flat = common.flatten(common.read_json(folder / "eval.json"))
            if (folder / "paired.json").exists():
                flat.update(common.flatten(common.read_json(folder / "paired.json")))
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            layer, seed = str(config["layer"]), str(config["config"]["seed"])
            command = f"python {script}.py --layer {layer} {flags}".strip()
            row = found.setdefault(layer, {"command": command, "steps": {}, "values": {}})
            row["steps"][seed] = log[-1]["step"] + 1 if log else 0
            row["versions"] = config["versions"]
            for values in row["values"].values():       # nothing of an earlier run with this seed stays
                values.pop(seed, None)
            for name, value in flat.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    row["values"].setdefault(name, {})[seed] = value
        for layer in sorted(found, key=int):
            table[f"{label.rstrip()} | layer {layer}"] = found[layer]
    for row in table.values():
        row["values"] = {name: dict(sorted(values.items())) for name, values in row["values"].items() if values}
        row["seeds"] = sorted(map(int, row["steps"]))
        row["mean"] = {k: statistics.fmean(v.values()) for k, v in row["values"].items()}
        row["sd"] = {k: statistics.stdev(v.values()) if len(v) > 1 else None for k, v in row["values"].items()}
    if table:
        path.parent.mkdir(exist_ok=True)
        common.write_json(path, table)
    return table


COLUMNS = {"EV": "core.EV", "L0": "core.L0", "neighbour cosine": "temporal.neighbour_cosine",
           "total variation": "temporal.total_variation", "dead": "core.dead", "CE score": "core.ce_loss_score",
           "span": "temporal.span", "probe k=1": "probing.sae_top_1", "probe k=5": "probing.sae_top_5",
           "early error": "position.no_sink.early_error", "with the sink": "position.sink_fitted.early_error",
           "weight-error r": "position.weight_difficulty_r", "mean mask": "masks.mean_mask",
           "r with first draw": "masks.r_with_first_draw", "span by position": "span.median",
           "error against full": "paired.a_against_b", "routing entropy": "levels.entropy",
           "seconds": "train_seconds", "score": "unlearning.score", "crossed": "unlearning.crossed_drop",
           "kept": "unlearning.crossed_kept", "random features": "unlearning.random",
           "most active": "unlearning.most_active", "eligible features": "unlearning.eligible"}


def causal(command):
    """Whether this row's encoder sees no later token."""
    script = re.search(r"(\w+)\.py", command)[1]
    mixes = script == "mtsae" or script == "hierarchical_sae" and "--variant" not in command
    return not mixes or "causal" in command


def show(table, columns=None):
    """A markdown table: mean ± sd over seeds, `steps` the fewest any seed completed, `seconds` of training the fastest
    seed's (others may have shared the machine); columns: those with values."""
    columns = columns or [c for c, name in COLUMNS.items() if any(name in row["mean"] for row in table.values())]
    lines = ["| row | seeds | steps | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for label, row in table.items():
        cells = []
        for title in columns:
            name = COLUMNS.get(title, title)
            mean, sd = row["mean"].get(name), row["sd"].get(name)
            digits = 1 if mean is not None and abs(mean) >= 10 else 3
            if title == "seconds" and mean is not None:
                mean, sd, digits = min(row["values"][name].values()), None, 0
            cells.append("" if mean is None else f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}"))
        label = label.removesuffix(" | layer 19").replace(" | ", ", ").strip()
        if "core.ce_loss_score" in row["mean"] and "CE score" in columns and not causal(row["command"]):
            label += " †"
        lines.append(f"| {label} | {len(row['seeds'])} | {min(row['steps'].values())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill_readme(text):
    """Replace what stands between `<!-- table SUITE: columns -->` and `<!-- end -->` by results/SUITE.json."""
    def table(match):
        path = HERE / "results" / f"{match[1]}.json"
        columns = [column.strip() for column in match[2].split(",")]
        body = show(json.loads(path.read_text()), columns) if path.exists() else "not run"
        return f"<!-- table {match[1]}: {match[2]} -->\n{body}\n<!-- end -->"
    return re.sub(r"<!-- table (\w+): (.*?) -->\n.*?<!-- end -->", table, text, flags=re.S)


def figures(table, folder):
    """compare.png: explained variance against L0, and smoothness against explained variance, layer 19."""
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
    colours = dict(zip(METHODS, ("black", "tab:blue", "tab:cyan", "tab:orange", "tab:red", "tab:green", "tab:purple")))
    marks = {"TopK 16": "v", "TopK 64": "o", "TopK 256": "^", "paper's ReLU": "s"}
    for label, row in table.items():
        label, layer = label.split(" | layer ")
        name, kind = label.rsplit(", ", 1)
        if layer != "19":
            continue
        for axis, x, y in ((axes[0], "core.L0", "core.EV"), (axes[1], "core.EV", "temporal.neighbour_cosine")):
            error = {f"{k}err": [row["sd"].get(v) or 0.0] for k, v in (("x", x), ("y", y))}
            axis.errorbar(row["mean"][x], row["mean"][y], **error, color=colours[name], marker=marks[kind],
                          markersize=7, linestyle="", alpha=0.85)
    for axis, shown in ((axes[0], {n: (c, "o") for n, c in colours.items()}),
                        (axes[1], {n: ("grey", m) for n, m in marks.items()})):
        for name, (colour, mark) in shown.items():
            axis.plot([], [], color=colour, marker=mark, linestyle="", label=name)
        axis.legend(fontsize=9)
    axes[0].set(xscale="log", xlabel="L0 (active features a token)", ylabel="explained variance (held-out)",
                title="Reconstruction at a given sparsity")
    axes[1].set(xlabel="explained variance (held-out)", ylabel="cosine of neighbouring codes",
                title="Smoothness at a given reconstruction")
    axes[0].set_xticks([16, 64, 256, 512], [16, 64, 256, 512])
    axes[0].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "compare.png", dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "readme"], help="a suite, or readme: fill the README's tables")
    parser.add_argument("--seeds", default="", help="such as 42,43 (default: the suite's)")
    parser.add_argument("--layers", default="", help="such as 5,12,19 (default: the suite's)")
    parser.add_argument("--rows", default="", help="only rows whose label matches this regular expression")
    parser.add_argument("--full", action="store_true", help="every seed and row at every layer")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one a core)")
    parser.add_argument("--more", default="", help="flags for every run that change no result, such as '--cache DIR'")
    parser.add_argument("--table", action="store_true", help="run nothing: collect and print")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.suite == "readme":
        readme = HERE / "README.md"
        readme.write_text(fill_readme(readme.read_text()))
        return
    chosen = dict(seeds=args.seeds, layers=args.layers, rows=args.rows, full=args.full)
    if args.worker:
        torch.set_num_threads(1)
        for label, seed, layer in jobs_of(args.suite, **chosen):
            one(*SUITES[args.suite].rows[label], seed, layer, SUITES[args.suite].evals, args.more)
        return
    table = collect(args.suite) if args.table else run_suite(args.suite, **chosen, more=args.more, workers=args.workers)
    print(show(table))
    if args.suite == "compare" and table:
        figures(table, HERE / "results")


if __name__ == "__main__":
    main()
