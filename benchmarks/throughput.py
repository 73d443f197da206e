"""What a training step costs. Each mode alternates what it compares in one run and takes medians.

    python benchmarks/throughput.py                    steps of every script, the LM's pass
    python benchmarks/throughput.py --busy 1           default steps alone and beside busy loops
    python benchmarks/throughput.py --random_gemma     on a GPU: Gemma-2-2B's shape in bf16, F = D
                                                       and 16k, with and without --compile; then
                                                       every script as a whole, killed, resumed

A step trains on 2048 random tokens: forward, backward, optimiser, renormalisation, bookkeeping.
step/standard compares it with the standard SAE's of the same activation, dtype and F. lm_share is
LM / (LM + SAE) of a run that harvests once and trains one epoch. peak_GB: of the GPU's memory, what
a step takes beyond the language model.
"""
import argparse
import contextlib
import importlib
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
import types
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common

import torch

from data import models

CASES = {f"{label}, {kind}": (script, [*flags, *more]) for label, script, *flags in (
    ("standard", "tsae", "--no-temporal"), ("TSAE", "tsae"), ("TemporalLens", "temporal_lens"),
    ("MTSAE extraction", "mtsae"), ("MTSAE unlearning", "mtsae", "--variant=unlearning"),
    ("hierarchical", "hierarchical_sae", "--variant=hierarchical"),
    ("hierarchical temporal", "hierarchical_sae"))
    for kind, more in (("ReLU", []), ("TopK 32", ["--activation=topk", "--k=32"]))}
SEQUENCES, LENGTH = 16, 128
TOKENS = SEQUENCES * LENGTH
SCRIPTS = ("tsae", "temporal_lens", "mtsae", "hierarchical_sae")
SHORT = ("--data=bundled", f"--tokens={40 * TOKENS}", "--heldout_tokens=4096", "--steps=40",
         f"--batch_size={SEQUENCES}", "--buffer=64", "--save_every=10", "--eval=none")


class RandomActivations:
    """What train() needs, over the same random sequences each step; times: of each request."""
    lm, truth, layer, scale, autocast = None, None, 0, 1.0, common.Activations.autocast

    def __init__(self, D, dtype, steps=1, sequences=SEQUENCES, T=LENGTH):
        self.D, self.T, self.steps, self.dtype = D, T, steps, dtype
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


def now():
    """The time, in seconds, at which all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, repeats):
    """Median seconds of work(), after once untimed, which allocates."""
    def end():
        work()
        return now()
    ends = [end() for _ in range(1 + repeats)]
    return statistics.median(end - start for start, end in itertools.pairwise(ends))


def step_seconds(script, flags, D, dtype, steps, skip=1, sequences=SEQUENCES, T=LENGTH):
    """Seconds of each training step of one script without the first `skip`."""
    module = importlib.import_module(script)
    flags = [*flags, f"--batch_size={sequences}", f"--T={T}", "--model=auto"]
    with contextlib.redirect_stdout(None):                 # the preset's line
        defaults = getattr(module, "defaults", None)
        cfg = common.configure(module.Config, module.LAPTOP, defaults, flags)
    cfg.steps = steps                                      # now: schedules keep their length
    acts, nothing = RandomActivations(D, dtype, steps, sequences, T), lambda *args, **more: None
    run = types.SimpleNamespace(total=steps, steps=lambda: range(steps), log=nothing,
                                log_due=nothing, evaluate=nothing)     # writes nothing
    with mock.patch.object(common, "Run", lambda *args: run):
        module.train(cfg, acts)
    acts.batch()                                           # the end of the last step
    return acts.seconds()[skip:]


def measure(args, lm, layer, sequences, ways):
    """Tokens/s of the language model's pass to a block, and of steps in these ways: (dtype, F / D,
    whether with --compile)."""
    tokens = torch.randint(3, 200, (sequences, 1 + LENGTH), device=lm.device)
    seconds = timed(lambda: common.hidden_states(lm, tokens, [layer]), args.repeats)
    lm_speed, times, cuda = sequences * LENGTH / seconds, {}, torch.cuda.is_available()
    rows = {(label, *way): dict(zip(("case", "dtype", "F/D", "compile"), (label, *way)))
            for way in ways for label in args.labels}
    for (label, dtype, e, fast), row in list(rows.items()) * args.repeats:     # in turn
        script, flags = CASES[label]
        flags = [*flags, f"--expansion={e}", "--compile" if fast else "--no-compile"]
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            times.setdefault((label, dtype, e, fast), []).extend(step_seconds(
                script, flags, lm.D, getattr(torch, dtype), *((6, 3) if fast else (3, 1))))
        except Exception as error:                         # no compiler, no memory: the row says so
            row["error"] = common.one_line(error)
        if cuda:
            row["peak_GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    speed = {case: TOKENS / statistics.median(found) for case, found in times.items() if found}
    for (label, *way), row in rows.items():
        if found := speed.get((label, *way)):
            standard = speed.get((f"standard, {label.split(', ')[1]}", *way), math.nan)
            row |= {"tokens/s": found, "step/standard": standard / found,
                    "lm_share": found / (found + lm_speed)}
    return {"model": lm.name, "D": lm.D, "lm_tokens/s": lm_speed, "rows": list(rows.values())}


def steps(args):
    """Steps of every script, and the language model that there is."""
    lm = models.load("auto", common.pick_device(), "auto")
    ways = itertools.product(("float32", "bfloat16"), (1, 4, 16), (False,))
    return measure(args, lm, 19, 8, ways)


def gemma(args):
    """The same with random weights in the shape of transformers' Gemma2Config, that is
    Gemma-2-2B's, and with ByT5's tokens; --toy: in a tiny one."""
    from transformers import AutoModelForCausalLM, ByT5Tokenizer, Gemma2Config
    toy = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2, head_dim=16, vocab_size=300)
    layer, shape, sequences = (1, toy, 4) if args.toy else (19, {}, 32)
    torch.manual_seed(0)
    with common.pick_device() as device:
        model = AutoModelForCausalLM.from_config(Gemma2Config(**shape), dtype=torch.bfloat16)
    lm = models.LM(model, ByT5Tokenizer(), "random Gemma-2", "random", device, torch.bfloat16)
    ways = itertools.product(("bfloat16",), (1, 7), (False, True))        # 7 x 2304 = 16,128
    table = measure(args, lm, layer, sequences, ways)
    table["rows"] += whole_runs(lm, layer)
    return table


def whole_runs(lm, layer):
    """Rows: each script, shortened, on a copy of this model: alone, in two processes, killed at its
    first checkpoint, and resumed from there, which must end at the loss of the run alone."""
    rows, alone = [], [sys.executable]
    two = [*alone, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as here:
        for part in (lm.model, lm.tokenizer):
            part.save_pretrained(f"{here}/model")
        for script, (what, python, out) in itertools.product(SCRIPTS, (
                ("alone", alone, "alone"), ("two processes", two, "two"),
                ("killed", alone, "killed"), ("resumed", alone, "killed"))):
            out, log = Path(here, f"{script}-{out}"), Path(here, f"{script}-{out}/log.jsonl")
            process = subprocess.Popen([
                *python, f"{script}.py", f"--model={here}/model", f"--layer={layer}", *SHORT,
                f"--out={out}", f"--cache={here}/cache", "--resume=auto"], cwd=HERE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None:
                if what == "killed" and (out / "checkpoint.safetensors").exists():
                    process.kill()
                time.sleep(0.02)
            lines = log.read_text().splitlines() if log.exists() else ()
            rows.append({"case": f"{script}, {what}", "status": process.returncode,
                         "last loss": json.loads(lines[-1])["loss"] if lines else None})
    return rows


def in_process(call, first=""):
    """What a call, written as code, returns in a new process after the line `first`: json."""
    code = f"{first}\nfrom benchmarks import peers, throughput\nprint(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", f"import json\n{code}"], cwd=HERE,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


def default_steps(labels):
    """{label: seconds of each step} in fp32 at F = D = 576."""
    common.fast_process(torch.device("cpu"))
    return {label: step_seconds(*CASES[label], 576, torch.float32, 8, 2) for label in labels}


def busy(args):
    """Steps alone and beside N busy loops, each time in a new process, OpenMP's threads waiting as
    they do by themselves and passively. Fair: a loop shares one of C cores with one of our threads,
    so C - N / 2 are ours."""
    waiting = {"own": "import os; os.environ.pop('OMP_WAIT_POLICY', 0); import torch",
               "passive": "import os; os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'"}
    found, cores, rows = {}, os.cpu_count(), []
    for _, how, loops in itertools.product(range(args.repeats), waiting, (0, args.busy)):
        with contextlib.ExitStack() as stack:
            for _ in range(loops):
                loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(loop.kill)
            times = in_process(f"throughput.default_steps({args.labels})", waiting[how])
        for label, seconds in times.items():
            found.setdefault((label, how, loops), []).extend(seconds)
    ms = {case: 1e3 * statistics.median(seconds) for case, seconds in found.items()}
    fair = 1 - args.busy / 2 / cores if args.busy <= cores else cores / (cores + args.busy)
    for label, how in itertools.product(args.labels, waiting):
        alone, beside = ms[label, how, 0], ms[label, how, args.busy]
        rows.append({"case": label, "waiting": how, "alone_ms": alone, "beside_ms": beside,
                     "speed ratio": alone / beside, "of fair share": alone / beside / fair})
    return {"busy loops": args.busy, "cores": cores, "fair share": fair, "rows": rows}


def markdown(table):
    """A recorded table: its rows, then the rest in a sentence."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)
    columns = list(dict.fromkeys(key for row in table["rows"] for key in row))
    cells = [[cell(row.get(column)) for column in columns] for row in table["rows"]]
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]
    parts = [value if isinstance(value, dict) else {name: value}
             for name, value in table.items() if name != "rows"]
    rest = ", ".join(f"{key} {cell(value)}" for part in parts for key, value in part.items())
    return "\n".join([*lines, "", f"{rest}."])


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
    args.out.mkdir(parents=True, exist_ok=True)
    common.write_json(args.out / f"{name}.json", table)
    print(markdown(table))


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside the steps")
    parser.add_argument("--random_gemma", action="store_true", help="Gemma-2-2B's shape")
    parser.add_argument("--toy", action="store_true", help="with --random_gemma: a tiny one")
    parser.add_argument("--cases", default="", help="cases whose label matches this expression")
    args = parser.parse_args(argv)
    args.labels = [label for label in CASES if re.search(args.cases, label)]
    if not args.busy:                                      # which measures in other processes
        common.fast_process(common.pick_device())
    name, work = (("busy", busy) if args.busy else ("gpu", gemma) if args.random_gemma else
                  ("throughput", steps))
    record(args, name, work(args))


if __name__ == "__main__":
    raise SystemExit(main())
