"""What a training step costs. Each mode alternates what it compares in one run and takes medians.

    python benchmarks/throughput.py                    steps of every script against their floor
    python benchmarks/throughput.py --busy 1           default steps alone and beside busy loops
    python benchmarks/throughput.py --against ../old   default steps against another checkout's
    python benchmarks/throughput.py --random_gemma     Gemma-2-2B's shape on a GPU (--toy: tiny)

A step trains on 2048 random tokens: forward, backward, optimiser, renormalisation, bookkeeping.
floor/step compares it with the five matrix products of a standard SAE (encode, decode, gradients of
W_dec, f and W_enc) in the same dtype: above 1 where TopK reads k rows instead. lm_share is
LM / (LM + SAE) of a run that harvests once and trains one epoch.
"""
import argparse
import contextlib
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common

import torch

SCRIPTS = ("tsae", "temporal_lens", "mtsae", "hierarchical_sae")
CASES = {f"{label}, {kind}": (script, [*flags, *more]) for label, script, *flags in (
    ("standard", "tsae", "--no-temporal"), ("TSAE", "tsae"), ("TemporalLens", "temporal_lens"),
    ("MTSAE extraction", "mtsae"), ("MTSAE unlearning", "mtsae", "--variant=unlearning"),
    ("hierarchical", "hierarchical_sae", "--variant=hierarchical"),
    ("hierarchical temporal", "hierarchical_sae"))
    for kind, more in (("ReLU", []), ("TopK 32", ["--activation=topk", "--k=32"]))}
SEQUENCES, LENGTH = 16, 128
TOKENS = SEQUENCES * LENGTH


class RandomActivations:
    """What train() needs, over the same random sequences each step; times: of each request."""
    lm, truth, layer, scale, autocast = None, None, 0, 1.0, common.Activations.autocast

    def __init__(self, D, steps, dtype, sequences=SEQUENCES, T=LENGTH, cfg=None):
        self.D, self.T, self.steps, self.dtype, self.cfg = D, T, steps, dtype, cfg
        self.device, self.variance, self.times = common.pick_device(), float(D), []
        self.x = torch.randn(sequences, T, D, generator=common.generator(0, "x")).to(self.device)
        self.mask = torch.ones(sequences, T, dtype=torch.bool, device=self.device)
        self.mean = torch.zeros(D, device=self.device)

    def batch(self, step=0):
        self.times.append(now())
        return self.x, self.mask

    def seconds(self):
        """From each request to the next: a step."""
        return [end - start for start, end in itertools.pairwise(self.times)]


class NoRun:
    """Stands in for common.Run: yields the steps, writes nothing, reads no value back."""
    def __init__(self, script, variant, cfg, acts, sae, opt):
        self.total = acts.steps

    def steps(self):
        return range(self.total)

    log = evaluate = log_due = lambda self, *args, **more: None


def now():
    """The time, in seconds, at which all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work):
    start = now()
    work()
    return now() - start


def step_seconds(script, flags, D, dtype, steps, skip=1, sequences=SEQUENCES, T=LENGTH):
    """Seconds of each training step of one script without the first `skip`."""
    module = importlib.import_module(script)
    flags = [*flags, f"--batch_size={sequences}", f"--T={T}", "--model=auto"]
    with contextlib.redirect_stdout(None):                 # the preset's line
        defaults = getattr(module, "defaults", None)
        cfg = common.configure(module.Config, module.LAPTOP, defaults, flags)
    cfg.steps = steps                                      # now: schedules keep their length
    acts = RandomActivations(D, steps, dtype, sequences, T, cfg)
    with mock.patch.object(common, "Run", NoRun):
        module.train(cfg, acts)
    acts.batch()                                           # the end of the last step
    return acts.seconds()[skip:]


def floor(D, width, dtype, repeats):
    """Median seconds of the five matrix products of a step, after one untimed."""
    x, f, W, g = (torch.randn(*shape, device=common.pick_device(), dtype=dtype) for shape in (
        (TOKENS, D), (TOKENS, width), (D, width), (TOKENS, D)))
    pairs = (x, W), (f, W.t()), (f.t(), g), (g, W), (x.t(), f)
    work = lambda: [torch.mm(left, right) for left, right in pairs]
    return statistics.median([timed(work) for _ in range(repeats + 1)][1:])


def lm_seconds(model, dtype, layer, sequences, repeats):
    """The language model, and the median seconds a token of a pass to a block."""
    lm = importlib.import_module("data.models").load(model, common.pick_device(), dtype)
    tokens = torch.randint(3, 200, (sequences, 1 + LENGTH), device=lm.device)
    seconds = [timed(lambda: common.hidden_states(lm, tokens, [layer])) for _ in range(1 + repeats)]
    return lm, statistics.median(seconds[1:]) / (sequences * LENGTH)      # the first one allocates


def measure(args):
    """Steps, their floors and the language model's pass."""
    (lm, lm_token), found, rows = lm_seconds("auto", "auto", 19, 8, args.repeats), {}, []
    cases = list(itertools.product(("float32", "bfloat16"), (1, 4, 16)))  # F / D
    for _, (name, e) in itertools.product(range(args.repeats), cases):    # each once a repeat
        dtype = getattr(torch, name)
        found.setdefault((name, e), []).append(floor(lm.D, e * lm.D, dtype, 2))
        for label in args.labels:
            script, flags = CASES[label]
            found.setdefault((name, e, label), []).extend(
                step_seconds(script, [*flags, f"--expansion={e}"], lm.D, dtype, 3))
    median = {case: statistics.median(seconds) / TOKENS for case, seconds in found.items()}
    for (name, e), label in itertools.product(cases, args.labels):
        token = median[name, e, label]
        rows.append({"case": label, "dtype": name, "F/D": e, "us/token": 1e6 * token,
                     "floor/step": median[name, e] / token,
                     "lm_share": lm_token / (lm_token + token)})
    return {"model": lm.name, "D": lm.D, "lm_us/token": 1e6 * lm_token, "rows": rows}


def in_process(code, here, **env):
    """What a new process, started in the folder `here`, prints as json on its last line."""
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True,
                          env={**os.environ, **env})
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


CHILD = """
import json, sys
{first}
sys.path[:0] = [{here!r}, {here!r} + "/benchmarks"]
import common, throughput, torch
common.fast_process(torch.device("cpu"))
print(json.dumps({{label: throughput.step_seconds(*throughput.CASES[label], 576, torch.float32, 8,
                                                 2) for label in {labels!r}}}))
"""


def in_turn(args, ways):
    """Step times (fp32, F = D = 576) of the ways {name: (checkout, busy loops beside, first line of
    the process)}, each in a new process, in turn: {label: {name: ms a step}}."""
    found = {}
    for name, (here, loops, first) in list(ways.items()) * args.repeats:
        code = CHILD.format(first=first, here=str(here), labels=args.labels)
        with contextlib.ExitStack() as stack:
            for _ in range(loops):
                loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(loop.kill)
            times = in_process(code, here)
        for label, seconds in times.items():
            found.setdefault(label, {}).setdefault(name, []).extend(seconds)
    return {label: {name: 1e3 * statistics.median(values) for name, values in both.items()}
            for label, both in found.items()}


def busy(args):
    """Steps alone and beside N busy loops, OpenMP's threads waiting as they do by themselves and
    passively. Fair: a loop shares one of C cores with one of our threads, so C - N / 2 are ours."""
    waiting = {"own": "import os; os.environ.pop('OMP_WAIT_POLICY', 0); import torch",
               "passive": "import os; os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'"}
    found = in_turn(args, {(how, n): (HERE, n, first) for how, first in waiting.items()
                           for n in (0, args.busy)})
    cores, rows = os.cpu_count(), []
    fair = 1 - args.busy / 2 / cores if args.busy <= cores else cores / (cores + args.busy)
    for (label, ms), how in itertools.product(found.items(), waiting):
        alone, beside = ms[how, 0], ms[how, args.busy]
        rows.append({"case": label, "waiting": how, "alone_ms": alone, "beside_ms": beside,
                     "speed ratio": alone / beside, "of fair share": alone / beside / fair})
    return {"busy loops": args.busy, "cores": cores, "fair share": fair, "rows": rows}


def against(args):
    """Steps of another checkout and of this one, in turn."""
    found = in_turn(args, {"old": (Path(args.against).resolve(), 0, ""), "new": (HERE, 0, "")})
    return {"against": args.against, "rows": [
        {"case": label, "old_ms": ms["old"], "new_ms": ms["new"], "new/old": ms["new"] / ms["old"]}
        for label, ms in found.items()]}


# --- Gemma-2-2B's shape with random weights ---

TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
           num_key_value_heads=2, head_dim=16, vocab_size=300)


def write_gemma(folder, shape):
    """A folder for --model without a download: the shape of transformers' Gemma2Config (that is
    Gemma-2-2B's) with `shape` in it, random weights, and ByT5's tokens, which are bytes."""
    from transformers import AutoModelForCausalLM, ByT5Tokenizer, Gemma2Config
    ByT5Tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    with common.pick_device():
        model = AutoModelForCausalLM.from_config(Gemma2Config(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def command(script, model, out, layer, more, processes=1, kill=False):
    """One script as a user runs it -> {status, seconds, tokens/s, last loss, error}. kill: SIGKILL
    at its first checkpoint."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = [sys.executable, *(torchrun if processes > 1 else ()), f"{script}.py", f"--model={model}",
           f"--layer={layer}", f"--out={out}", *more]
    start, text = time.perf_counter(), Path(f"{out}.txt")
    with text.open("w") as output:
        process = subprocess.Popen(run, cwd=HERE, stdout=output, stderr=output)
        while process.poll() is None:
            if kill and (out / "checkpoint.safetensors").exists():
                process.kill()
            time.sleep(0.02)
    row = {"status": process.returncode, "seconds": time.perf_counter() - start}
    for shown, file, name in (("tokens/s", "timing", "tokens_per_s"), ("last loss", "log", "loss")):
        path = out / f"{file}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else ()
        row[shown] = json.loads(lines[-1])[name] if lines else None
    return {**row, "error": text.read_text().strip()[-200:] if process.returncode > 0 else ""}


def gemma_step(label, D, e, fast):
    """A row: tokens/s of a step, and on a GPU the memory held at its peak beyond that before."""
    script, flags = CASES[label]
    row, cuda = {"case": label, "F": e * D, "compile": fast}, torch.cuda.is_available()
    flags = [*flags, f"--expansion={e}", "--compile" if fast else "--no-compile"]
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = cuda and torch.cuda.memory_allocated()
        took = step_seconds(script, flags, D, torch.bfloat16, 6, 3)
        row["tokens/s"] = TOKENS / statistics.median(took)
        row["peak_GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else None
    except Exception as error:                             # no compiler, no memory: the row says so
        row["error"] = common.one_line(error)
    return row


def gemma(args):
    """The LM's tokens/s; steps at F = D and 16k with and without --compile; each script as a
    shortened run, in two processes, and killed and resumed (to the same last loss)."""
    layer, D, wide = (1, 64, 2) if args.toy else (19, 2304, 7)            # 7 D = 16,128
    with tempfile.TemporaryDirectory() as here:
        model, runs = f"{here}/model", []
        write_gemma(model, TOY if args.toy else {})
        seconds = lm_seconds(model, "bfloat16", layer, 4 if args.toy else 32, 3)[1]
        importlib.import_module("data.models").load.cache_clear()         # frees it
        rows = [gemma_step(label, D, *how) for label in args.labels
                for how in itertools.product((1, wide), (False, True))]
        flags = ["--data=bundled", f"--tokens={40 * TOKENS}", "--heldout_tokens=4096", "--steps=40",
                 f"--batch_size={SEQUENCES}", "--buffer=64", "--save_every=10", "--eval=core",
                 "--dtype=bfloat16", f"--cache={here}/cache"]
        for script, (what, out, more) in itertools.product(SCRIPTS, (
                ("run", "one", {}), ("two processes", "two", dict(processes=2)),
                ("killed", "killed", dict(kill=True)), ("resumed", "killed", {}))):
            row = command(script, model, Path(here, f"{script}-{out}"), layer,
                          [*flags, *["--resume=auto"] * (what == "resumed")], **more)
            runs.append({"script": script, "what": what, **row})
    return {"lm_tokens/s": 1 / seconds, "rows": rows, "runs": runs}


def markdown(table):
    """A recorded table: its lists of rows, then the rest in a sentence."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)
    parts, rest = [], []
    for name, value in table.items():
        if isinstance(value, list):
            columns = list(dict.fromkeys(key for row in value for key in row))
            cells = [[cell(row.get(column)) for column in columns] for row in value]
            parts += [f"| {' | '.join(c)} |" for c in (columns, ["---"] * len(columns), *cells)]
            parts.append("")
        else:
            pairs = value if isinstance(value, dict) else {name: value}
            rest += [f"{key} {cell(v)}" for key, v in pairs.items()]
    return "\n".join([*parts, ", ".join(rest) + "."])


def arguments(doc):
    """A parser with the flags of all benchmarks that time steps."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the table")
    return parser


def record(args, name, table):
    """Write a table to <out>/<name>.json and print it."""
    table = {**table, "repeats": args.repeats, "versions": common.versions()}
    common.write_json(args.out / f"{name}.json", table)
    print(markdown(table))


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside the steps")
    parser.add_argument("--against", default="", help="another checkout of this repository")
    parser.add_argument("--random_gemma", action="store_true", help="Gemma-2-2B's shape")
    parser.add_argument("--toy", action="store_true", help="with --random_gemma: a tiny shape")
    parser.add_argument("--cases", default="", help="cases whose label matches this expression")
    args = parser.parse_args(argv)
    args.labels = [label for label in CASES if re.search(args.cases, label)]
    if not (args.busy or args.against):                    # those measure in other processes
        common.fast_process(common.pick_device())
    name, work = (("busy", busy) if args.busy else ("against", against) if args.against else
                  ("gpu", gemma) if args.random_gemma else ("throughput", measure))
    record(args, name, work(args))


if __name__ == "__main__":
    raise SystemExit(main())
