"""One training step here against the same step in other SAE libraries: same tokens, same machine, taken in turn.

    pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3
    pip uninstall torchvision        # only with a CPU build of torch: the one that nnsight brings does not fit it
    python benchmarks/peers.py [--repeats 3] [--expansions 1,4,16] [--dtypes float32,bfloat16]
    python benchmarks/peers.py readme              # fill benchmarks/README.md from results/peers.json

Work: 2048 tokens a step, always the same random activations (throughput.RandomActivations), D = 576, F = 1, 4 and 16 D;
ReLU + L1 and TopK with k = 32; fp32, and bf16 autocast with fp32 weights. Each library runs its own code with its
own defaults; nothing of it is copied or replaced. A step is what passes from one request for a batch to the next, the
first one of each case left out. What that includes (read in the versions 6.54, 0.1.0 and 1.3.3):

ours                 tsae.train's loop body, standard SAE (--no-temporal): AdamW (fused), learning-rate warm-up, decoder
                     gradient projected, gradient norm clipped at 2, decoder rows renormalised, active features
                     counted. No dead-feature counts, no auxiliary loss, no progress bar (throughput.Stopwatch).
SAELens              SAETrainer.fit, StandardTrainingSAE (L1 times decoder norms) and TopKTrainingSAE (rescaled by
                     decoder norms; use_sparse_activations off, which is the default; on, it fails on a CPU). Adam,
                     norm clipped at 1, dead-feature and frequency counts, learning-rate scheduler, progress
                     bar. No projection, no renormalisation. bf16: its `autocast`, around the forward pass.
dictionary_learning  StandardTrainer.update and TopKTrainer.update. Both: Adam, gradient projected, decoder
                     renormalised, learning-rate scheduler. Standard: no clipping, no dead-feature counts. TopK: norm
                     clipped at 1, tokens since each feature fired, loss.item(). bf16: the batch in bf16 and
                     torch.autocast around update, as trainSAE has it on a GPU; on a CPU trainSAE leaves the
                     autocast out, so its own bf16 is fp32 work there.
sparsify             Trainer.fit, SparseCoder with TopK; a module that returns the batch stands in for the language
                     model. Sign descent with schedule-free momentum (its default; not Adam), gradient projected,
                     decoder renormalised, encoder gradient and decoder by index, fired features, masked copies of
                     the batch, the loss read each step, progress bar. No clipping. No ReLU SAE. Its autocast is
                     for CUDA only and always on there. Without a GPU its Triton decoder must be switched off,
                     which this program does (SPARSIFY_DISABLE_TRITON=1).

No feature counts as dead so early, so no auxiliary loss for dead features runs (SAELens and dictionary_learning have
one in TopK). Each library runs in a process of its own, started in turn --repeats times, in another order each time,
with torch's default number of threads. Our scripts set two things for the whole process: freed memory is kept
(common.keep_freed_memory), and fp32 products go through TF32 on a GPU and oneDNN on a CPU (common.fast_products). The
others do not (sparsify's fit asks for TF32 too), so "ours (plain process)" is our step without both. The floor is
throughput.floor, five torch.mm, in the process of "ours". A library that is not installed is one row that says so.
"""
import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "benchmarks"))
import torch

import common
import throughput

ACTIVATIONS = {"ReLU": dict(activation="relu"), "TopK 32": throughput.TOPK}
K = throughput.TOPK["k"]
SEQUENCES, LENGTH = throughput.SEQUENCES, throughput.TOKENS // throughput.SEQUENCES
LONG = 10_000        # steps of the run that a step belongs to: schedules need a length; none of it is reached


# ---------------------------------------------------------------------------------------------------------------------
# Drivers: (activation, D, F, dtype, steps) -> seconds of each of `steps` training steps after the first
# ---------------------------------------------------------------------------------------------------------------------


def batch(D, dtype):
    """The random activations of every step: (2048, D) fp32, on the device."""
    return throughput.RandomActivations(D, 1, dtype).x.flatten(0, 1)


def clock(x, seconds):
    """Yield x for ever; each time another is asked for, `seconds` gets the time since the last one was handed out."""
    while True:
        throughput.sync()
        start = time.perf_counter()
        yield x
        throughput.sync()
        seconds.append(time.perf_counter() - start)


def ours(activation, D, n_features, dtype, steps):
    """tsae.train, standard SAE."""
    values = dict(ACTIVATIONS[activation], temporal=False, expansion=n_features // D)
    return throughput.step_seconds("tsae", values, D, dtype, steps + 1, skip=1)


def saelens(activation, D, n_features, dtype, steps):
    """SAELens: SAETrainer.fit over the clock, defaults but for sizes and k."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    device, seconds = str(common.pick_device()), []
    sizes = dict(d_in=D, d_sae=n_features, device=device)
    if activation == "ReLU":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**sizes))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=K, **sizes))
    # fit asks for a batch a step; the last step, and the first, are not among `steps`
    cfg = SAETrainerConfig(total_training_samples=(steps + 2) * throughput.TOKENS, lr_end=3e-4, device=device,
                           train_batch_size_samples=throughput.TOKENS, autocast=dtype == torch.bfloat16)
    SAETrainer(cfg, sae, clock(batch(D, dtype), seconds)).fit()
    return seconds[1:]


def dictionary_learning(activation, D, n_features, dtype, steps):
    """dictionary_learning: the trainer's update in trainSAE's loop, defaults but for sizes and k."""
    from dictionary_learning.trainers import StandardTrainer, TopKTrainer
    device, seconds = common.pick_device(), []
    values = dict(steps=LONG, activation_dim=D, dict_size=n_features, layer=0, lm_name="none", device=str(device))
    trainer = StandardTrainer(**values) if activation == "ReLU" else TopKTrainer(k=K, **values)
    autocast = throughput.RandomActivations(D, 1, dtype).autocast
    for step, x in zip(range(steps + 2), clock(batch(D, dtype), seconds)):
        with autocast():
            trainer.update(step, x.to(dtype))
    return seconds[1:]


class FixedModel(torch.nn.Module):
    """What sparsify's Trainer asks of a language model; the output of its only block is the next of `batches`."""
    base_model = property(lambda self: self)
    dummy_inputs = property(lambda self: {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.device)})

    def __init__(self, batches, device):
        super().__init__()
        self.block, self.batches, self.device = torch.nn.Identity(), batches, device

    def forward(self, input_ids):
        return self.block(next(self.batches).unflatten(0, (SEQUENCES, LENGTH)))


def sparsify(activation, D, n_features, dtype, steps):
    """sparsify: Trainer.fit on a model that returns the batch, defaults but for sizes and k."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    x, seconds = batch(D, dtype), []
    model = FixedModel(itertools.chain([x], clock(x, seconds)), common.pick_device())    # the first: to learn D
    data = [{"input_ids": torch.zeros(LENGTH, dtype=torch.long)}] * (SEQUENCES * (steps + 2))
    with tempfile.TemporaryDirectory() as here:                                          # it saves what it trained
        Trainer(TrainConfig(SparseCoderConfig(num_latents=n_features, k=K), batch_size=SEQUENCES, hookpoints=["block"],
                            log_to_wandb=False, save_dir=here), data, model).fit()
    return seconds[1:]


LIBRARIES = {  # name: (package, driver, whether the process has our scripts' settings)
    "ours": ("", ours, True),
    "ours (plain process)": ("", ours, False),
    "SAELens": ("sae-lens", saelens, False),
    "dictionary_learning": ("dictionary-learning", dictionary_learning, False),
    "sparsify": ("eai-sparsify", sparsify, False),
}


def refusal(library, activation, dtype, device):
    """Why a library has no such case; "" where it has."""
    if library != "sparsify":
        return ""
    if activation == "ReLU":
        return "no ReLU SAE"
    always = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if always == (dtype == torch.bfloat16):
        return ""
    return "always bf16 autocast on this GPU" if always else "bf16 autocast on CUDA only"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: one process a library and repeat
# ---------------------------------------------------------------------------------------------------------------------


def steps_at(width, widths, steps):
    """Steps measured at one width: `steps` at the widest, three times as many at those 3 and more times narrower."""
    return steps * min(3, max(widths) // width)


def one(library, args):
    """Every case of one library in this process -> {rows: [{activation, dtype, F, seconds or reason}], floors}."""
    _, driver, settings = LIBRARIES[library]
    if settings:                                           # as every script of ours does
        common.keep_freed_memory()
        common.fast_products(common.pick_device())
    widths, rows, floors = [int(e) * args.D for e in args.expansions.split(",")], [], []
    for activation, name in itertools.product(ACTIVATIONS, args.dtypes.split(",")):
        dtype, case = getattr(torch, name), {"activation": activation, "dtype": name}
        reason = refusal(library, activation, dtype, common.pick_device())
        if reason:
            rows.append({**case, "F": None, "reason": reason})
            continue
        for width in widths:
            try:
                seconds = driver(activation, args.D, width, dtype, steps_at(width, widths, args.steps))
                rows.append({**case, "F": width, "seconds": seconds})
            except Exception as error:                     # theirs: said in the table, the other cases go on
                if not LIBRARIES[library][0]:
                    raise
                rows.append({**case, "F": width, "reason": brief(f"{type(error).__name__}: {error}")})
            if settings:
                floors.append({"dtype": name, "F": width, "seconds": throughput.floor(args.D, width, dtype, 2)})
    return {"rows": rows, "floors": floors}


def brief(text):
    """The first line of an error, short enough for a table."""
    return (text.strip().splitlines() or ["no message"])[0].replace("|", "/")[:90]


def version(package):
    """Version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def start(library, args):
    """`one` in a fresh process of the same Python; a process that fails is a row with the last line of its errors."""
    command = [sys.executable, __file__, "one", "--library", library]
    for name in ("D", "steps", "expansions", "dtypes"):
        command += [f"--{name}", str(getattr(args, name))]
    env = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        env["SPARSIFY_DISABLE_TRITON"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if not LIBRARIES[library][0]:
        raise SystemExit(f"{library}: {done.stderr}")
    return {"rows": [{"activation": "", "dtype": "", "F": None,
                      "reason": brief((done.stderr.strip().splitlines() or ["stopped"])[-1])}], "floors": []}


def measure(args):
    """Everything in the docstring -> the table for results/peers.json. seconds_per_token: median over all steps of
    all repeats; ours/this: how many times as fast as the row's library ours is, plain/this: ours in a plain process;
    floor/step as in throughput.py."""
    names = [name for name in LIBRARIES if not args.libraries or name in args.libraries.split(",")]
    packages = {package: version(package) for package, _, _ in map(LIBRARIES.get, names) if package}
    here = [name for name in names if packages.get(LIBRARIES[name][0], True)]
    seconds, floors, reasons = {}, {}, {}
    for repeat in range(args.repeats):
        for name in here[repeat % len(here):] + here[:repeat % len(here)] if here else []:
            found = start(name, args)
            for row in found["rows"]:
                key = row["activation"], row["dtype"], row["F"], name
                seconds.setdefault(key, []).extend(row.get("seconds", []))
                reasons.setdefault(key, row.get("reason"))
            for row in found["floors"]:
                floors.setdefault((row["dtype"], row["F"]), []).append(row["seconds"])
        print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr, flush=True)
    table = {"device": str(common.pick_device()), "D": args.D, "tokens": throughput.TOKENS, "repeats": args.repeats,
             "versions": common.versions(), "packages": packages, "rows": []}
    order = {name: place for place, name in enumerate([*ACTIVATIONS, *args.dtypes.split(","), *LIBRARIES])}
    for key in sorted(seconds, key=lambda k: [order.get(k[0], 0), order.get(k[1], 0), k[2] or math.inf, order[k[3]]]):
        activation, dtype, width, name = key
        row = {"library": name, "activation": activation, "dtype": dtype, "F": width}
        if seconds[key]:
            value = statistics.median(seconds[key])
            mine, plain = (seconds.get((*key[:3], ours)) for ours in ("ours", "ours (plain process)"))
            row |= {"seconds_per_token": value / throughput.TOKENS, "fastest": min(seconds[key]) / throughput.TOKENS,
                    "slowest": max(seconds[key]) / throughput.TOKENS, "steps": len(seconds[key]),
                    "ours/this": value / statistics.median(mine) if mine else None,
                    "plain/this": value / statistics.median(plain) if plain else None,
                    "floor/step": statistics.median(floors[key[1:3]]) / value if key[1:3] in floors else None}
        else:
            row["reason"] = reasons[key]
        table["rows"].append(row)
    table["rows"] += [{"library": name, "activation": "", "dtype": "", "F": None, "reason": "not installed"}
                      for name in names if name not in here]
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------


def markdown(table):
    """The table of benchmarks/README.md; "not run" without one. Numbers in thousand tokens a second."""
    if table is None:
        return "not run"
    lines = ["| activation | dtype | F | library | thousand tokens/s (slowest to fastest step) | ours (plain process) "
             "/ this | ours / this | floor / step |", "|---|---|---|---|---|---|---|---|"]
    for row in table["rows"]:
        head = f"| {row['activation']} | {row['dtype']} | {row['F'] or ''} | {row['library']} | "
        if "reason" in row:
            lines.append(head + f"{row['reason']} | | | |")
            continue
        rate, low, high = (f"{1e-3 / row[name]:,.1f}" for name in ("seconds_per_token", "slowest", "fastest"))
        ratios = (f"{row[name]:.2f}" if row.get(name) else "" for name in ("plain/this", "ours/this", "floor/step"))
        lines.append(head + f"{rate} ({low} to {high}) | {' | '.join(ratios)} |")
    found = ", ".join(f"{name} {number or 'not installed'}" for name, number in table["packages"].items())
    lines.append(f"\nMedians over {table['repeats']} interleaved process(es) a library. Device: {table['device']}; "
                 f"{table['versions']['cpu']}; torch {table['versions']['torch']}; {found}; D = {table['D']}; commit "
                 f"{table['versions']['commit']}." + (" CUDA: not run." if table["device"] == "cpu" else ""))
    return "\n".join(lines)


def fill_readme(text, table):
    """Replace what stands between `<!-- peers -->` and `<!-- end -->`."""
    return re.sub(r"<!-- peers -->\n.*?<!-- end -->", lambda _: f"<!-- peers -->\n{markdown(table)}\n<!-- end -->",
                  text, flags=re.S)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "readme", "one"), default="measure",
                        help="one: one library in this process, json on the last line (what measure starts)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured steps at the widest F; more at narrower ones")
    parser.add_argument("--expansions", default="1,4,16", help="F / D")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--libraries", default="", help=f"only these of {', '.join(LIBRARIES)} (comma)")
    parser.add_argument("--library", default="ours", choices=LIBRARIES, help="for one")
    parser.add_argument("--D", type=int, default=576)
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of peers.json")
    args = parser.parse_args(argv)
    if args.what == "one":
        with contextlib.redirect_stdout(io.StringIO()):     # the libraries print; the result is the only line
            found = one(args.library, args)
        print(json.dumps(found))
        return 0
    path = Path(args.out) / "peers.json"
    if args.what == "readme":
        readme = HERE / "benchmarks" / "README.md"
        readme.write_text(fill_readme(readme.read_text(), json.loads(path.read_text()) if path.exists() else None))
        return 0
    table = measure(args)
    print(markdown(table))
    common.write_json(path, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
