"""Runs behind the README's tables: suites of (script, flags, seeds), each run once and kept.

    python benchmarks/experiments.py tsae [--seeds 42,43,44] [--threads 1] [--part 0/2] [--list]
    python benchmarks/experiments.py tsae --table        # only collect what is there

A finished run is not repeated, an interrupted one is resumed; after every run results/<suite>.json is
written anew from the run folders below runs/<suite>/. Two processes with --part 0/2 and --part 1/2 share a
suite (one thread each is faster than two threads on one run). The flags are the whole difference to the
scripts' laptop preset.
"""
import argparse
import contextlib
import importlib
import io
import json
import re
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import torch

import common

TOPK = "--activation topk --k 32"
FAST = "--eval reconstruction,temporal"
PLAIN = "--layer_norm off --variance_weights off"
HALF = f"--batch_size 2 --steps 1250 --warmup 1000 --lr_warmup 500 {FAST}"
NO_EXTRAS = "--layer_norm off --boost 1 --grad_noise 0 --no-buffers"
SUITES = {
    # label: (script, flags)
    "tsae": {
        "TSAE, paper": ("tsae", ""),
        "standard, L1 0.04": ("tsae", "--no-temporal"),
    },
    "tsae_ablation": {          # half the batch (256 tokens a step) and half of every schedule
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
    },
    "tsae_l0": {
        "TopK 32": ("tsae", f"--no-temporal {TOPK} {FAST}"),
        "TSAE, paper's weights": ("tsae", f"{TOPK} {FAST}"),
        "TSAE, paper's weights, no LayerNorm": ("tsae", f"{TOPK} --layer_norm off {FAST}"),
        "TSAE, no LayerNorm, no variance weights": ("tsae", f"{TOPK} {PLAIN} {FAST}"),
        "  x 0.5": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 0.5 {FAST}"),
        "  x 3": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 3 {FAST}"),
        "  x 10": ("tsae", f"{TOPK} {PLAIN} --temporal_scale 10 {FAST}"),
    },
    "mtsae": {
        "extraction": ("mtsae", ""),
        "  rates 1,2,4": ("mtsae", f"--rates 1,2,4 {FAST}"),
        "  causal": ("mtsae", "--padding causal"),
        "  no batch norm": ("mtsae", f"--batch_norm off {FAST}"),
        "  no resampling": ("mtsae", f"--resample_every 0 {FAST}"),
        "  error averaged over D": ("mtsae", f"--recon_reduction mean {FAST}"),
        "unlearning": ("mtsae", "--variant unlearning"),
        "  unlearning, causal": ("mtsae", "--variant unlearning --padding causal"),
        "  10,000 tokens": ("mtsae", f"--variant unlearning --tokens 10000 --steps 0 --batch_size 16 {FAST}"),
    },
    "lens": {
        "TemporalLens": ("temporal_lens", FAST),
        "  no annealing": ("temporal_lens", f"--no-anneal {FAST}"),
        "  static masks": ("temporal_lens", f"--static_masks {FAST}"),
        "  uniform weights": ("temporal_lens", f"--uniform_weights {FAST}"),
        "  masks of one, uniform weights": ("temporal_lens", f"--no-masks --uniform_weights {FAST}"),
    },
    "hierarchical": {
        "temporal": ("hierarchical_sae", "--variant temporal"),
        "temporal, causal": ("hierarchical_sae", "--variant temporal --causal"),
        "hierarchical": ("hierarchical_sae", "--variant hierarchical"),
        "disentangled": ("hierarchical_sae", "--variant disentangled"),
        "adversarial": ("hierarchical_sae", "--variant adversarial"),
        "self-aligning": ("hierarchical_sae", "--variant self-aligning"),
    },
}


def run_folder(suite, label, seed, layer):
    name = "".join(c if c.isalnum() else "-" for c in label.strip() + "-").strip("-")
    return Path("runs") / suite / f"{name}-L{layer}-s{seed}"


def one(suite, label, script, flags, seed, layer):
    """Train and evaluate one row with one seed unless that is done; the output goes to the run folder."""
    out = run_folder(suite, label, seed, layer)
    if (out / "eval.json").exists():
        return
    module = importlib.import_module(script)
    if (out / "checkpoint.safetensors").exists():
        argv = ["--resume", str(out)]
    else:
        argv = f"--layer {layer} --seed {seed} --overwrite --save_every 1000 {flags}".split() + ["--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(out / "output.txt", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(io.StringIO()) as err:
        status = module.main(argv)
    (out / "status.json").write_text(json.dumps({"status": status, "seconds": round(time.time() - start, 1)}))
    tail = err.getvalue().strip().splitlines()[-1:] if status else ""
    print(f"{time.strftime('%H:%M:%S')} {suite} {label.strip()} L{layer} s{seed}: status {status} "
          f"({time.time() - start:.0f} s) {tail}", flush=True)


def collect(suite, rows):
    """results/<suite>.json from the run folders: per row the flags and, per metric, mean, sd and n over seeds."""
    table = {}
    for label, (script, flags) in rows.items():
        for folder in sorted(Path("runs", suite).glob(run_folder(suite, label, "*", "*").name)):
            if not (folder / "eval.json").exists():
                continue
            config = common.read_json(folder / "config.json")
            flat = common.flatten(common.read_json(folder / "eval.json"))
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            key = f"{label.rstrip()} | layer {config['layer']}"
            row = table.setdefault(key, {"command": f"python {script}.py --layer {config['layer']} {flags}".strip(),
                                         "seeds": [], "steps": [], "values": {}})
            row["seeds"].append(config["config"]["seed"])
            row["steps"].append(log[-1]["step"] + 1 if log else 0)
            row["versions"] = config["versions"]
            for name, value in flat.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    row["values"].setdefault(name, []).append(value)
    for row in table.values():
        row["mean"] = {k: statistics.fmean(v) for k, v in row["values"].items()}
        row["sd"] = {k: statistics.stdev(v) if len(v) > 1 else None for k, v in row["values"].items()}
    (HERE / "results").mkdir(exist_ok=True)
    common.write_json(HERE / "results" / f"{suite}.json", table)
    return table


COLUMNS = {"EV": "core.EV", "L0": "core.L0", "neighbour cosine": "temporal.neighbour_cosine",
           "total variation": "temporal.total_variation", "dead": "core.dead", "CE score": "core.ce_loss_score",
           "span": "temporal.span"}


def show(table, columns=tuple(COLUMNS)):
    """A markdown table: mean ± sd over seeds, `steps` the fewest any seed completed."""
    lines = ["| row | seeds | steps | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for label, row in table.items():
        cells = []
        for title in columns:
            name = COLUMNS.get(title, title)
            mean, sd = row["mean"].get(name), row["sd"].get(name)
            digits = 1 if mean is not None and abs(mean) >= 10 else 3
            cells.append("" if mean is None else f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}"))
        label = label.removesuffix(" | layer 19").replace(" | ", ", ").strip()
        lines.append(f"| {label} | {len(row['seeds'])} | {min(row['steps'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill_readme(text):
    """Replace what stands between `<!-- table SUITE: columns -->` and `<!-- end -->` by results/SUITE.json."""
    def table(match):
        path = HERE / "results" / f"{match[1]}.json"
        body = show(json.loads(path.read_text()), [c.strip() for c in match[2].split(",")]) if path.exists() else "not run"
        return f"<!-- table {match[1]}: {match[2]} -->\n{body}\n<!-- end -->"
    return re.sub(r"<!-- table (\w+): (.*?) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "readme"], help="a suite, or readme: fill the README's tables")
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--layers", default="19")
    parser.add_argument("--rows", default="", help="only rows whose label holds this text")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run, from the i-th")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.suite == "readme":
        readme = HERE / "README.md"
        readme.write_text(fill_readme(readme.read_text()))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = SUITES[args.suite]
    part, parts = map(int, args.part.split("/"))
    jobs = [(label, *rows[label], seed, layer) for seed in args.seeds.split(",") for layer in args.layers.split(",")
            for label in rows if args.rows in label]
    if not args.table:
        for label, script, flags, seed, layer in jobs[part::parts]:
            one(args.suite, label, script, flags, int(seed), int(layer))
            collect(args.suite, rows)
    print(show(collect(args.suite, rows)))


if __name__ == "__main__":
    main()
