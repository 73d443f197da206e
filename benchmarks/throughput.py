"""What a training run costs, against its floors, measured in one run, interleaved and repeated.

    python benchmarks/throughput.py [--layer 19] [--repeats 3] [--expansions 1,4,16] [--dtypes float32,bfloat16]
    python benchmarks/throughput.py readme         # fill benchmarks/README.md from results/throughput.json
    python benchmarks/throughput.py --random_gemma --dtypes bfloat16 --expansions 1,16 --sequences 125 --out runs/gpu
                                                   # on a GPU: Gemma-2-2B's shape with random weights, no download;
                                                   # 125 sequences are paper A's batch, 2048 paper E's

1. The SAE step alone (forward, backward, AdamW, renormalisation; every script, ReLU and TopK 32) on 2048 tokens of
   random activations, against the five dense matrix products of a standard SAE (encode, decode, and in the backward
   pass the gradients of W_dec, f and W_enc), timed with torch.mm in the same dtype. floor / step is above 1 where
   gathered TopK avoids products. Peak memory: the most that a step held beyond what was there before the case.
2. The language model to the layer, and the share of a whole run (harvest once, train one epoch) that it takes:
   share = LM time / (LM time + SAE time) for the same number of tokens. Harvesting and training do not overlap
   on a CPU, so the two times add.
3. The whole loop as it is run: harvest of --loop_tokens tokens into a fresh cache, then one epoch of each script at
   F = D (ReLU) and F = 8 D (TopK 32), by the wall clock.
Medians over interleaved repeats; json and a figure into results/. Rows of a device that is not there say "not run".
"""
import argparse
import contextlib
import ctypes
import importlib
import io
import json
import re
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import torch

import common

TOPK = dict(activation="topk", k=32)
CASES = {  # label: (script, fields that differ); each with ReLU and with TopK 32
    "standard": ("tsae", dict(temporal=False)),
    "TSAE": ("tsae", {}),
    "TemporalLens": ("temporal_lens", {}),
    "MTSAE extraction": ("mtsae", dict(variant="extraction")),
    "MTSAE unlearning": ("mtsae", dict(variant="unlearning")),
    "hierarchical": ("hierarchical_sae", dict(variant="hierarchical")),
    "hierarchical temporal": ("hierarchical_sae", dict(variant="temporal", gru_divisor=4, sim_rows=576,
                                                       checkpointing=False)),   # the laptop preset
}
CASES = {f"{label}, {name}": (script, {**values, **more}) for label, (script, values) in CASES.items()
         for name, more in (("ReLU", {}), ("TopK 32", TOPK))}
LOOPS = {label: 1 for label in CASES if "ReLU" in label} | {       # label: F / D
    label: 8 for label in CASES if "TopK" in label and "hierarchical" not in label}
SEQUENCES = 16            # of one step, of 128 tokens each
TOKENS = 128 * SEQUENCES


class RandomActivations:
    """What train() needs, over fixed random sequences of T tokens, `micro` of them a forward pass."""

    def __init__(self, D, steps, dtype, sequences=SEQUENCES, micro=0, T=128):
        self.D, self.T, self.layer, self.lm, self.truth, self.several = D, T, 0, None, None, False
        self.steps, self.device, self.dtype, self.micro = steps, common.pick_device(), dtype, micro or sequences
        gen = torch.Generator().manual_seed(0)
        self.x = torch.randn(sequences, T, D, generator=gen).to(self.device)
        self.mask = torch.ones(sequences, T, dtype=torch.bool, device=self.device)
        self.mean, self.scale, self.variance = torch.zeros(D, device=self.device), 1.0, float(D)

    def batch(self, step):
        return list(zip(self.x.split(self.micro), self.mask.split(self.micro)))

    autocast = common.Activations.autocast


class Stopwatch:
    """Stands in for common.Run: yields steps, keeps the seconds of each, writes nothing."""
    current = None

    def __init__(self, *args):
        self.acts, self.seconds, self.dir, self.total = args[3], [], None, args[3].steps
        Stopwatch.current = self

    def steps(self):
        for step in range(self.acts.steps):
            start = time.perf_counter()
            yield step
            sync()
            self.seconds.append(time.perf_counter() - start)

    def log(self, *args, **more):
        pass

    log_due = lambda self, step: False
    save_if_due = log

    def evaluate(self, *args, **more):
        return self.seconds


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def floor(D, n_features, dtype, repeats, tokens=TOKENS):
    """Median seconds of the five matrix products of a forward and backward pass over `tokens`, after one untimed."""
    def random(*shape):
        return torch.randn(*shape, device=common.pick_device(), dtype=dtype)
    x, f, W, g = random(tokens, D), random(tokens, n_features), random(D, n_features), random(tokens, D)
    seconds = []
    for _ in range(repeats + 1):
        sync()
        start = time.perf_counter()
        for left, right in ((x, W), (f, W.t()), (f.t(), g), (g, W), (x.t(), f)):
            torch.mm(left, right)
        sync()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def configured(script, values):
    """A script's module and its Config with these values; mtsae.py's variants bring their own defaults."""
    module = importlib.import_module(script)
    defaults = module.VARIANTS.get(values.get("variant"), {}) if script == "mtsae" else {}
    return module, module.Config(**{**defaults, **values})


def step_seconds(script, values, D, dtype, steps, skip=1, sequences=SEQUENCES, micro=0, T=128):
    """Seconds of each training step of one script, without the first `skip`."""
    module, cfg = configured(script, values)
    cfg.batch_size, cfg.micro_batch, cfg.steps, cfg.T = sequences, micro, steps, T
    real, common.Run = common.Run, Stopwatch
    try:
        module.train(cfg, RandomActivations(D, steps, dtype, sequences, micro, T))
    finally:
        common.Run = real
    return Stopwatch.current.seconds[skip:]


def random_gemma(device, dtype, **shape):
    """Gemma-2-2B (transformers' default shape of Gemma 2; shape: other sizes) with random weights: the same arithmetic
    without a download. It reads token numbers only."""
    from transformers import AutoModelForCausalLM, Gemma2Config
    with device:
        model = AutoModelForCausalLM.from_config(Gemma2Config(**shape), dtype=dtype)
    tokenizer = types.SimpleNamespace(bos_token_id=2, eos_token_id=1, all_special_ids=[0, 1, 2])
    return common.LM(model, tokenizer, "Gemma-2-2B's shape, random weights", "random", device, dtype)


def matmul_rate(device, dtype, n=4096, repeats=3):
    """FLOP/s of an n x n x n product in this dtype: what the language model's share is measured against."""
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(repeats + 1):
        sync()
        start = time.perf_counter()
        a @ a
        sync()
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def memory_mark():
    """Start of a peak measurement -> bytes held now, or None where the system cannot say."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")               # the peak counts anew from here
        return status_bytes("VmRSS")
    return None


def memory_peak(mark):
    """Bytes held at the peak since memory_mark, beyond what was held then; None where it cannot be said."""
    if mark is None:
        return None
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")) - mark


def status_bytes(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def buffer_memory(D, n=512, T=128):
    """Bytes of a live buffer of n sequences, bf16: by formula n x T x D x 2, and measured while it is filled
    (32 sequences at a time, which come on top)."""
    device = common.pick_device()

    class Store:
        lm_batch = 32
        get = lambda self, rows, device: (torch.ones(len(rows), T, D, dtype=torch.bfloat16, device=device),
                                          torch.ones(len(rows), T, dtype=torch.bool, device=device))
    mark = memory_mark()
    buffer = common.Buffer(Store(), torch.arange(n), device)
    buffer.harvest(1.0)
    sync()
    peak = memory_peak(mark)
    return {"sequences": n, "T": T, "D": D, "formula_bytes": n * T * D * 2, "one_pass_bytes": 32 * T * D * 2,
            "measured_bytes": peak}


def whole_loop(lm, layer, tokens, cases, data="bundled"):
    """Harvest `tokens` into a fresh cache, then one epoch of each case, 2048 tokens a step, nothing evaluated:
    {label: {tokens, F/D, harvest_s, epoch_s, share = harvest / (harvest + epoch)}}. `train` is whole: model, optimiser,
    log, checkpoint."""
    rows = {}
    with tempfile.TemporaryDirectory() as here, contextlib.redirect_stderr(io.StringIO()):
        def config(label):
            script, values = CASES[label]
            return configured(script, {**values, **dict(
                layer=str(layer), model="auto", data=data, tokens=tokens, steps=0, batch_size=16, lm_batch=16,
                buffer=tokens // 128, dtype="auto", cache=f"{here}/cache", out=f"{here}/{len(rows)}", eval="none",
                expansion=LOOPS[label])})
        start = time.perf_counter()
        store = common.open_stores(config(cases[0])[1], lm, [layer], "train")[layer]
        sync()
        harvest = time.perf_counter() - start
        for label in cases:
            module, cfg = config(label)
            start = time.perf_counter()
            module.train(cfg, common.Activations(cfg, lm, layer, store, store))
            sync()
            epoch = time.perf_counter() - start
            rows[label] = {"tokens": tokens, "F/D": cfg.expansion, "harvest_s": harvest, "epoch_s": epoch,
                           "share": harvest / (harvest + epoch)}
    return rows


def measure(args):
    """Everything in the docstring -> the table for results/throughput.json."""
    device = common.pick_device()
    lm = (random_gemma(device, common.pick_dtype("auto", device)[0]) if args.random_gemma else
          common.load_lm("auto", device, "auto"))
    tokens = torch.randint(0, 1000, (32 if device.type == "cuda" else 8, 129), device=device)
    sizes = dict(sequences=args.sequences, micro=args.micro_batch)
    step_tokens, pass_tokens = 128 * args.sequences, 128 * (args.micro_batch or args.sequences)
    common.hidden_states(lm, tokens, [args.layer])           # untimed: the first call allocates
    cases = {k: v for k, v in CASES.items() if any(text in k for text in args.cases.split(","))}
    widths, dtypes = [int(e) for e in args.expansions.split(",")], args.dtypes.split(",")
    seconds, floors, lms, peaks = {}, {}, [], {}
    for repeat in range(args.repeats):                       # interleaved: every case once a repeat
        start = time.perf_counter()
        common.hidden_states(lm, tokens, [args.layer])
        sync()
        lms.append((time.perf_counter() - start) / tokens[:, 1:].numel())
        for key in ((d, e) for d in dtypes for e in widths):
            dtype, D = getattr(torch, key[0]), lm.D
            floors.setdefault(key, []).append(floor(D, key[1] * D, dtype, 2, pass_tokens) * step_tokens / pass_tokens)
            for label, (script, values) in cases.items():
                mark = memory_mark()
                took = step_seconds(script, {**values, "expansion": key[1]}, D, dtype, 3, **sizes)
                seconds.setdefault((*key, label), []).extend(took)
                peaks[(*key, label)] = memory_peak(mark)
        print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr, flush=True)
    # FLOP a token: without attention's T x T products, under 2 % at T = 128
    work = 2 * sum(p.numel() for block in lm.blocks[:args.layer + 1] for p in block.parameters())
    table = {"device": str(device), "layer": args.layer, "D": lm.D, "model": lm.name, **sizes,
             "versions": common.versions(), "repeats": args.repeats, "lm_seconds_per_token": statistics.median(lms),
             "lm_matmul_share": work / statistics.median(lms) / matmul_rate(device, lm.dtype), "rows": []}
    for (dtype, expansion, label), values in seconds.items():
        value, lowest = statistics.median(values), statistics.median(floors[dtype, expansion])
        table["rows"].append({
            "case": label, "dtype": dtype, "F/D": expansion, "seconds_per_token": value / step_tokens,
            "fastest": min(values) / step_tokens, "slowest": max(values) / step_tokens, "floor/step": lowest / value,
            "lm_share": table["lm_seconds_per_token"] / (table["lm_seconds_per_token"] + value / step_tokens),
            "peak_bytes": peaks[dtype, expansion, label]})
    table["buffer"] = buffer_memory(lm.D)
    looped = [label for label in cases if label in LOOPS]
    loops = [whole_loop(lm, args.layer, args.loop_tokens, looped) for _ in range(args.repeats)
             if args.loop_tokens and looped and not args.random_gemma]
    table["loops"] = {label: {key: statistics.median(row[label][key] for row in loops) for key in loops[0][label]}
                      for label in looped if loops}
    table["loop_dtype"] = str(common.pick_dtype("auto", common.pick_device())).removeprefix("torch.")
    table["peak_rss_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return table


def show(table):
    """The table in lines of text."""
    lines = [f"LM to block {table['layer']}: {1 / table['lm_seconds_per_token']:,.0f} tokens/s on {table['device']}, "
             f"{table['lm_matmul_share']:.2f} of the rate of a 4096^3 product",
             f"{'dtype':<9} {'F/D':>3} {'case':<32} {'tokens/s':>9} {'min-max':>17} {'floor/step':>10} {'LM share':>8} "
             f"{'peak MB':>8}"]
    for row in table["rows"]:
        spread = f"{1 / row['slowest']:,.0f}-{1 / row['fastest']:,.0f}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        rate = 1 / row["seconds_per_token"]
        lines.append(f"{row['dtype']:<9} {row['F/D']:>3} {row['case']:<32} {rate:>9,.0f} {spread:>17} "
                     f"{row['floor/step']:>10.2f} {row['lm_share']:>8.2f} {peak:>8}")
    for label, row in table["loops"].items():
        lines.append(f"whole loop, {label}, F = {row['F/D']} D: harvest {row['harvest_s']:.1f} s, epoch "
                     f"{row['epoch_s']:.1f} s for {row['tokens']:,} tokens; harvest alone is {row['share']:.2f} of it")
    if table["device"] == "cpu":
        lines.append("cuda: not run (no CUDA device here)")
    return "\n".join(lines)


def draw(table, path):
    """floor / step over the width, a panel for each dtype; one line for each case."""
    plt = common.pyplot()
    dtypes = sorted({row["dtype"] for row in table["rows"]}, reverse=True)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(7 * len(dtypes), 6), sharey=True, squeeze=False)
    names = list(dict.fromkeys(row["case"].rsplit(", ", 1)[0] for row in table["rows"]))
    for axis, dtype in zip(axes[0], dtypes):
        for label in dict.fromkeys(row["case"] for row in table["rows"]):
            rows = [row for row in table["rows"] if row["case"] == label and row["dtype"] == dtype]
            axis.plot([row["F/D"] for row in rows], [row["floor/step"] for row in rows],
                      "o-" if "ReLU" in label else "s--", color=f"C{names.index(label.rsplit(', ', 1)[0])}", label=label)
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.set(xscale="log", xlabel="F / D", ylabel="time of five dense products / time of a step",
                 title=f"{dtype} on {table['device']} ({table['versions']['cpu'].split(', ')[1]})")
        axis.set_xticks(sorted({row["F/D"] for row in table["rows"]}), sorted({row["F/D"] for row in table["rows"]}))
        axis.minorticks_off()
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs at scale: arithmetic from published shapes and assumptions stated here, not measurements
# ---------------------------------------------------------------------------------------------------------------------

MODELS = {  # blocks to the layer read, D, width of the MLP, query width, key/value width, parameters of the whole model
    "Gemma-2-2B, layer 19": dict(blocks=20, D=2304, mlp=9216, q=2048, kv=1024, parameters=2.6e9),
    "27B (Gemma-2-27B's shape), layer 35": dict(blocks=36, D=4608, mlp=36864, q=4096, kv=2048, parameters=27.2e9),
}
ASSUMED = {
    "peak_flops": 989e12,     # one H100 SXM, bf16, dense (data sheet)
    "lm_use": 0.40,           # share of the peak that a forward pass reaches (assumed)
    "sae_use": 0.25,          # share of the peak that the SAE step reaches (assumed: memory passes, fp32 weights)
    "link_8": 200e9,          # bytes/s of an all-reduce on each GPU inside a node of 8 (assumed)
    "link_64": 25e9,          # and between nodes (assumed)
    "tokens_per_step": 2048,  # the papers' batch
}


def flops_per_token(model, F_over_D, k=0):
    """(LM forward to the layer, SAE step) of one token.

    LM: 2 x parameters of the blocks (attention's T x T products, under 2 % at T = 128, left out). SAE: five products
    of D x F are 10 D F; with gathered TopK one of them stays dense: 2 D F + 8 D k.
    """
    D, F = model["D"], F_over_D * model["D"]
    block = 2 * D * model["q"] + 2 * D * model["kv"] + 3 * D * model["mlp"]
    return 2 * block * model["blocks"], 2 * D * F + 8 * D * k if k else 10 * D * F


def scaling(model, tokens, gpus, F_over_D, k=0):
    """Hours and GPU-hours of one epoch without a cache, and what the disk and one GPU must hold.

    hours = (LM + SAE arithmetic) / (gpus x peak x use) + all-reduces; an all-reduce moves 2 x 8 D F bytes (fp32
    gradients of W_enc and W_dec, each sent and received) a step over the link of that many GPUs.
    """
    a = ASSUMED
    lm, sae = flops_per_token(model, F_over_D, k)
    compute = tokens * (lm / a["lm_use"] + sae / a["sae_use"]) / (gpus * a["peak_flops"])
    gradient = 8 * model["D"] ** 2 * F_over_D
    link = {1: float("inf")}.get(gpus, a["link_8"] if gpus <= 8 else a["link_64"])
    reduce = tokens / a["tokens_per_step"] * 2 * gradient / link
    return {"hours": (compute + reduce) / 3600, "gpu_hours": gpus * (compute + reduce) / 3600,
            "lm_share": (lm / a["lm_use"]) / (lm / a["lm_use"] + sae / a["sae_use"]),
            "efficiency": compute / (compute + reduce), "disk_TB": 2 * model["D"] * tokens / 1e12,
            # bf16 LM + fp32 weights, gradients and two moments + two bf16 buffers of 2048 x 128 tokens
            "gpu_GB": (2 * model["parameters"] + 4 * gradient + 2 * 2 * 2048 * 128 * model["D"] / gpus) / 1e9}


def scaling_table(F_over_D, k):
    lines = ["| model | tokens | disk with a cache | GPUs | hours | GPU-hours | LM's share | all-reduce leaves | "
             "memory a GPU | measured |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name, model in MODELS.items():
        for tokens in (10e6, 500e6, 4e9):
            for gpus in (1, 8, 64):
                s = scaling(model, tokens, gpus, F_over_D, k)
                lines.append(f"| {name} | {tokens / 1e6:,.0f} M | {s['disk_TB']:.3g} TB | {gpus} | {s['hours']:.3g} | "
                             f"{s['gpu_hours']:.3g} | {s['lm_share']:.0%} | {s['efficiency']:.0%} | {s['gpu_GB']:.0f} GB | not run |")
    return "\n".join(lines)


def memory_table():
    """Bytes by formula: buffer of 2048 x 128 tokens, SAE with gradients and AdamW, activations of a 2048-token step."""
    lines = ["| D | F / D | live buffer (bf16, one process) | weights, gradients, AdamW | dense step's activations |",
             "|---|---|---|---|---|"]
    for D in (576, 2304, 4608):
        for expansion in (1, 16):
            sizes = 2048 * 128 * D * 2, 4 * 4 * 2 * D * D * expansion, 3 * TOKENS * expansion * D * 4
            lines.append(f"| {D} | {expansion} | " + " | ".join(f"{size / 1e9:.2f} GB" for size in sizes) + " |")
    return "\n".join(lines)


def buffer_line(table):
    """The measured buffer in a sentence."""
    row = (table or {}).get("buffer")
    if row is None or row["measured_bytes"] is None:
        return "Measured: not run."
    return (f"Measured: a buffer of {row['sequences']} sequences of {row['T']} tokens at D = {row['D']} held "
            f"{row['measured_bytes'] / 1e6:.1f} MB at its peak; the formula gives {row['formula_bytes'] / 1e6:.1f} MB, "
            f"and {row['one_pass_bytes'] / 1e6:.1f} MB for the pass of the language model that fills it.")


def limits():
    """Where an all-reduce takes as long as the arithmetic, by the same formulas, in sentences."""
    lines = []
    for name, model in MODELS.items():
        for F_over_D, k in ((1, 0), (16, 32)):
            one, many = scaling(model, 1e9, 8, F_over_D, k), scaling(model, 1e9, 64, F_over_D, k)
            faster = one["hours"] / many["hours"]
            lines.append(f"- {name}, F = {F_over_D} D{', TopK 32' if k else ''}: 8 GPUs keep {one['efficiency']:.0%} of "
                         f"their arithmetic, 64 GPUs {many['efficiency']:.0%}; from 8 to 64 the run gets {faster:.1f} "
                         "times as fast.")
    return "\n".join(lines)


def parts_table(table):
    """Measured cost a token of each part: the language model, and every case at F = D and at the widest, by dtype."""
    if table is None:
        return "not run"
    lm = table["lm_seconds_per_token"]
    lines = ["| part | dtype | F / D | microseconds a token | floor / step | LM's share of a run | peak of the step |",
             "|---|---|---|---|---|---|---|",
             f"| LM to block {table['layer']} ({table['lm_matmul_share']:.2f} of a 4096³ product's rate) | | | "
             f"{lm * 1e6:,.0f} | | | |"]
    for row in table["rows"]:
        peak = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"
        lines.append(f"| {row['case']} | {row['dtype']} | {row['F/D']} | {row['seconds_per_token'] * 1e6:,.0f} | "
                     f"{row['floor/step']:.2f} | {row['lm_share']:.2f} | {peak} |")
    for label, row in table["loops"].items():
        whole = (row["harvest_s"] + row["epoch_s"]) / row["tokens"]
        lines.append(f"| whole loop, {label}: {row['tokens']:,} tokens | {table['loop_dtype']} | {row['F/D']} | "
                     f"{whole * 1e6:,.0f} | | {row['share']:.2f} | |")
    lines.append(f"\nDevice: {table['device']}; {table['versions']['cpu']}; {table['model']}, D = {table['D']}; commit "
                 f"{table['versions']['commit']}; at its largest the process held {table['peak_rss_GB']:.2f} GB."
                 + (" CUDA: not run." if table["device"] == "cpu" else ""))
    return "\n".join(lines)


def fill_readme(text, table):
    """Replace what stands between `<!-- throughput NAME -->` and `<!-- end -->`."""
    bodies = {"parts": parts_table(table), "scaling": scaling_table(1, 0), "scaling16": scaling_table(16, 32),
              "limits": limits(), "memory": memory_table(), "buffer": buffer_line(table),
              "assumed": "\n".join(f"- `{name}` = {value:g}" for name, value in ASSUMED.items())}
    return re.sub(r"<!-- throughput (\w+) -->\n.*?<!-- end -->",
                  lambda match: f"<!-- throughput {match[1]} -->\n{bodies[match[1]]}\n<!-- end -->", text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "readme"), default="measure")
    parser.add_argument("--layer", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--expansions", default="1,4,16")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--cases", default="", help="only cases whose label holds one of these texts (comma)")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="sequences of 128 tokens in a step")
    parser.add_argument("--micro_batch", type=int, default=0, help="sequences in a forward pass; 0 = all")
    parser.add_argument("--random_gemma", action="store_true",
                        help="Gemma-2-2B's shape with random weights; no whole loop")
    parser.add_argument("--loop_tokens", type=int, default=16384, help="tokens of the whole loop; 0 = leave it out")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of throughput.json and throughput.png")
    args = parser.parse_args()
    path = Path(args.out) / "throughput.json"
    common.keep_freed_memory()                             # as every script does
    common.fast_products(common.pick_device())
    if args.what == "readme":
        readme = HERE / "benchmarks" / "README.md"
        table = json.loads(path.read_text()) if path.exists() else None
        readme.write_text(fill_readme(readme.read_text(), table if table and "rows" in table else None))
        return
    table = measure(args)
    print(show(table))
    common.write_json(path, table)
    draw(table, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
