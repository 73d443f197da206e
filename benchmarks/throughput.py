"""What a training step costs. Each mode alternates what it compares in one run and takes medians.

    python benchmarks/throughput.py                    every script: floors, LM, whole loop, memory
    python benchmarks/throughput.py --busy 1           default steps alone and beside busy loops
    python benchmarks/throughput.py --against ../old   default steps against another checkout's
    python benchmarks/throughput.py --random_gemma     Gemma-2-2B's shape on a GPU (--toy: a tiny
                                                       one on any machine)

A step trains on 2048 random tokens: forward, backward, optimiser, renormalisation, bookkeeping.
floor/step compares it with the five matrix products of a standard SAE (encode, decode, gradients of
W_dec, f and W_enc) in the same dtype: above 1 where TopK reads k rows instead. lm_share is
LM / (LM + SAE) of a run that harvests once and trains one epoch; peak what a step held at most
beyond what was there before.
"""
import argparse
import contextlib
import ctypes
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

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common

import torch

TOPK = dict(activation="topk", k=32)
SCRIPTS = ("tsae", "temporal_lens", "mtsae", "hierarchical_sae")
CASES = {f"{label}, {kind}": (script, {**values, **more}) for label, script, values in (
    ("standard", "tsae", dict(temporal=False)), ("TSAE", "tsae", {}),
    ("TemporalLens", "temporal_lens", {}), ("MTSAE extraction", "mtsae", {}),
    ("MTSAE unlearning", "mtsae", dict(variant="unlearning")),
    ("hierarchical", "hierarchical_sae", dict(variant="hierarchical")),
    ("hierarchical temporal", "hierarchical_sae", {}))
    for kind, more in (("ReLU", {}), ("TopK 32", TOPK))}
SEQUENCES, LENGTH = 16, 128
TOKENS = SEQUENCES * LENGTH

# ----------------------------------------------------------------------------------------------
# One step
# ----------------------------------------------------------------------------------------------


class RandomActivations:
    """What train() needs, over the same random sequences each step."""
    lm, truth, layer, scale, autocast = None, None, 0, 1.0, common.Activations.autocast

    def __init__(self, D, steps, dtype, sequences=SEQUENCES, T=LENGTH, cfg=None):
        self.D, self.T, self.steps, self.dtype, self.cfg = D, T, steps, dtype, cfg
        self.device, self.variance = common.pick_device(), float(D)
        self.x = torch.randn(sequences, T, D, generator=common.generator(0, "x")).to(self.device)
        self.mask = torch.ones(sequences, T, dtype=torch.bool, device=self.device)
        self.mean = torch.zeros(D, device=self.device)

    def batch(self, step):
        return self.x, self.mask


class Stopwatch:
    """Stands in for common.Run: yields the steps, keeps the seconds of each, writes nothing."""
    last = dir = None

    def __init__(self, script, variant, cfg, acts, sae, opt):
        self.total, self.seconds, Stopwatch.last = acts.steps, [], self

    def steps(self):
        for step in range(self.total):
            sync()
            start = time.perf_counter()
            yield step
            sync()
            self.seconds.append(time.perf_counter() - start)

    log = evaluate = log_due = lambda self, *args, **more: None     # no value is read back


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work):
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def step_seconds(script, fields, D, dtype, steps, skip=1, sequences=SEQUENCES, T=LENGTH):
    """Seconds of each training step of one script without the first `skip`; fields: Config's."""
    flags, module = [], importlib.import_module(script)
    for name, value in {**fields, "batch_size": sequences, "T": T, "model": "auto"}.items():
        flags.append(f"--{name}={value}" if type(value) is not bool else
                     f"--{name}" if value else f"--no-{name}")
    with contextlib.redirect_stdout(None):                 # the preset's line
        defaults = getattr(module, "defaults", None)
        cfg = common.configure(module.Config, module.LAPTOP, defaults, flags)
    cfg.steps, real, common.Run = steps, common.Run, Stopwatch    # schedules keep their length
    try:
        module.train(cfg, RandomActivations(D, steps, dtype, sequences, T, cfg))
    finally:
        common.Run = real
    return Stopwatch.last.seconds[skip:]


def floor(D, width, dtype, repeats, tokens=TOKENS):
    """Median seconds of the five matrix products of a step, after one untimed."""
    x, f, W, g = (torch.randn(*shape, device=common.pick_device(), dtype=dtype) for shape in (
        (tokens, D), (tokens, width), (D, width), (tokens, D)))
    pairs = (x, W), (f, W.t()), (f.t(), g), (g, W), (x.t(), f)
    work = lambda: [torch.mm(left, right) for left, right in pairs]
    return statistics.median([timed(work) for _ in range(repeats + 1)][1:])


def lm_seconds(lm, layer, sequences):
    """Seconds a token of one pass of the language model to a block."""
    tokens = torch.randint(3, 200, (sequences, 1 + LENGTH), device=lm.device)
    return timed(lambda: common.hidden_states(lm, tokens, [layer])) / (sequences * LENGTH)


def load(name, dtype="auto"):
    return importlib.import_module("data.models").load(name, common.pick_device(), dtype)


def peak(work):
    """work(), and the bytes held at its peak beyond those before (None: cannot be said)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before
    held = lambda name: 1024 * int(re.search(
        rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")      # the peak counts anew from here
        before = held("VmRSS")
        return work(), held("VmHWM") - before
    return work(), None


def measure(args):
    """Steps, floors, the language model's pass, whole commands, one buffer."""
    lm, tokens, found, rows = load("auto"), args.sequences * LENGTH, {}, []
    lms = [lm_seconds(lm, 19, 8) for _ in range(1 + args.repeats)][1:]    # the first one allocates
    cases = list(itertools.product(args.dtypes.split(","), map(int, args.expansions.split(","))))
    for _, (name, e) in itertools.product(range(args.repeats), cases):    # each once a repeat
        dtype = getattr(torch, name)
        found.setdefault((name, e), []).append(floor(lm.D, e * lm.D, dtype, 2, tokens))
        for label in args.labels:
            script, fields = CASES[label]
            took, found[name, e, label, "peak"] = peak(lambda: step_seconds(
                script, {**fields, "expansion": e}, lm.D, dtype, 3, 1, args.sequences))
            found.setdefault((name, e, label), []).extend(took)
    lm_step = statistics.median(lms) * tokens
    for (name, e), label in itertools.product(cases, args.labels):
        step, held = statistics.median(found[name, e, label]), found[name, e, label, "peak"]
        rows.append({"case": label, "dtype": name, "F/D": e, "us/token": 1e6 * step / tokens,
                     "floor/step": statistics.median(found[name, e]) / step,
                     "lm_share": lm_step / (lm_step + step), "peak_MB": held and held / 1e6})
    return {"model": lm.name, "D": lm.D, "lm_us/token": 1e6 * lm_step / tokens, "rows": rows,
            "loops": loops() if args.loops else [], **buffer()}


def loops():
    """Each script as a command: one epoch of 16,384 tokens, with an empty cache and with a full
    one; share: what the harvest takes of the first, start-up left out."""
    rows = []
    with tempfile.TemporaryDirectory() as here:
        for script in SCRIPTS:
            flags = ["--data=bundled", "--tokens=16384", "--heldout_tokens=1024", "--steps=0",
                     f"--batch_size={SEQUENCES}", "--eval=none", f"--cache={here}/{script}"]
            cold, warm = (command(script, "auto", Path(here, f"{script}-{name}"), 19, flags)
                          for name in ("cold", "warm"))
            harvest, epoch = cold["seconds"] - warm["seconds"], 16_384 / warm["tokens/s"]
            rows.append({"command": f"{script}.py", "harvest_s": harvest, "epoch_s": epoch,
                         "share": harvest / (harvest + epoch)})
    return rows


def buffer():
    """Peak of filling a live buffer of 512 sequences, pass included, beside N T D 2 bytes."""
    tsae = importlib.import_module("tsae")
    acts = next(common.open_activations(common.configure(tsae.Config, tsae.LAPTOP, None, [
        "--cache=none", "--data=bundled", "--buffer=512", "--batch_size=16"])))
    acts.buffer = acts.filled = None
    held = peak(lambda: acts.batch(0))[1]
    return {"buffer_MB": held and held / 1e6, "by formula": 512 * LENGTH * acts.D * 2 / 1e6}


CHILD = """
import json, sys
{first}
sys.path[:0] = [{here!r}, {here!r} + "/benchmarks"]
import common, throughput, torch
if hasattr(common, "fast_process"):
    common.fast_process(torch.device("cpu"))
else:                                          # a checkout from before they were one function
    common.keep_freed_memory(), common.fast_products(torch.device("cpu"))
print(json.dumps({{label: throughput.step_seconds(*throughput.CASES[label], 576, torch.float32,
                                                 {steps}, 2) for label in {labels!r}}}))
"""


def child(here, args, first="", loops=0, **env):
    """Step times of a checkout's cases (fp32, F = D = 576) in a new process, beside busy loops:
    {label: [seconds]}."""
    code = CHILD.format(first=first, here=str(here), labels=args.labels, steps=args.steps)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    env, run = {k: v for k, v in {**os.environ, **env}.items() if v}, [sys.executable, "-c", code]
    try:
        done = subprocess.run(run, cwd=here, capture_output=True, text=True, env=env)
    finally:
        for process in busy:
            process.kill()
    if done.returncode:
        raise SystemExit(f"{here}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(args, ways):
    """Medians over --repeats of the ways {name: arguments of child}: {label: {name: ms a step}}."""
    found = {}
    for _ in range(args.repeats):
        for name, more in ways.items():
            for label, seconds in child(args=args, **more).items():
                found.setdefault(label, {}).setdefault(name, []).extend(seconds)
    return {label: {name: 1e3 * statistics.median(values) for name, values in both.items()}
            for label, both in found.items()}


def busy(args):
    """Steps alone and beside N busy loops, OpenMP's threads waiting as they do by themselves and
    passively. Fair: a loop shares one of C cores with one of our threads, so C - N / 2 are ours."""
    waiting = {"own": dict(first="import torch", OMP_WAIT_POLICY=""),     # before common sets it
               "passive": dict(OMP_WAIT_POLICY="PASSIVE")}
    found = in_turn(args, {(how, n): dict(here=HERE, loops=n, **more)
                           for how, more in waiting.items() for n in (0, args.busy)})
    cores, rows = os.cpu_count(), []
    fair = 1 - args.busy / 2 / cores if args.busy <= cores else cores / (cores + args.busy)
    for label, ms in found.items():
        for how in waiting:
            ratio = ms[how, 0] / ms[how, args.busy]
            rows.append({"case": label, "waiting": how, "alone_ms": ms[how, 0], "beside_ms":
                         ms[how, args.busy], "speed ratio": ratio, "of fair share": ratio / fair})
    return {"busy loops": args.busy, "cores": cores, "fair share": fair, "rows": rows}


def against(args):
    """Steps of another checkout and of this one, in turn."""
    found = in_turn(args, {"old": dict(here=Path(args.against).resolve()), "new": dict(here=HERE)})
    return {"against": args.against, "rows": [
        {"case": label, "old_ms": ms["old"], "new_ms": ms["new"], "new/old": ms["new"] / ms["old"]}
        for label, ms in found.items()]}


# ----------------------------------------------------------------------------------------------
# Gemma-2-2B's shape with random weights
# ----------------------------------------------------------------------------------------------

TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
           num_key_value_heads=2, head_dim=16, vocab_size=300)


def write_gemma(folder, shape):
    """A folder for --model without a download: the shape of transformers' Gemma2Config (that is
    Gemma-2-2B's) with `shape` in it, random weights, a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast
    letters = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                            bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    with common.pick_device():
        model = AutoModelForCausalLM.from_config(Gemma2Config(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def command(script, model, out, layer, more, processes=1, kill=False):
    """One script as a user runs it -> {status, seconds, tokens/s, error}. kill: SIGKILL at its
    first checkpoint."""
    start, run = time.perf_counter(), [sys.executable] + [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (
        processes > 1)
    run += [f"{script}.py", f"--model={model}", f"--layer={layer}", f"--out={out}", *more]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(run, cwd=HERE, stdout=output, stderr=output)
        while process.poll() is None:
            if kill and (out / "checkpoint.safetensors").exists():
                process.kill()
            time.sleep(0.02)
        output.seek(0)
        text = output.read().strip().splitlines()
    return {"status": process.returncode, "seconds": time.perf_counter() - start, "tokens/s":
            [None, *column(out / "timing.jsonl", "tokens_per_s")][-1],
            "error": text[-1] if process.returncode > 0 else ""}


def column(path, name):
    """One field of each line of a .jsonl file; [] without the file."""
    return [json.loads(line)[name] for line in path.open()] if path.exists() else []


def gemma(args):
    """The LM's tokens/s; steps at F = D and 16k with and without --compile, and their peaks; each
    script as a shortened run, in two processes, and killed and resumed."""
    layer, D, wide = (1, 64, 2) if args.toy else (19, 2304, 7)            # 7 D = 16,128
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as here:
        model = f"{here}/model"
        write_gemma(model, TOY if args.toy else {})
        lm = load(model, "bfloat16")
        rates = [1 / lm_seconds(lm, layer, 4 if args.toy else 32) for _ in range(4)][1:]
        lm = importlib.import_module("data.models").load.cache_clear()    # frees it
        for label, e, fast in itertools.product(args.labels, (1, wide), (False, True)):
            script, fields = CASES[label]
            fields, row = {**fields, "expansion": e, "compile": fast}, {}
            try:
                took, held = peak(lambda: step_seconds(
                    script, fields, D, torch.bfloat16, 6, 3, args.sequences))
                row = {"tokens/s": args.sequences * LENGTH / statistics.median(took),
                       "peak_GB": held and held / 1e9}
            except Exception as error:                     # no compiler, no memory: the row says so
                row["error"] = common.one_line(error)
            rows.append({"case": label, "F": e * D, "compile": fast, **row})
        flags = ["--data=bundled", f"--tokens={40 * TOKENS}", "--heldout_tokens=4096", "--steps=40",
                 f"--batch_size={SEQUENCES}", "--buffer=64", "--save_every=10", "--eval=core",
                 "--dtype=bfloat16", f"--cache={here}/cache"]
        for script in SCRIPTS:
            one, two, killed = (Path(here, f"{script}-{name}") for name in ("one", "two", "killed"))
            found = {"run": command(script, model, one, layer, flags),
                     "two processes": command(script, model, two, layer, flags, processes=2),
                     "killed": command(script, model, killed, layer, flags, kill=True),
                     "resumed": command(script, model, killed, layer, [*flags, "--resume", "auto"])}
            loss = (column(out / "log.jsonl", "loss") for out in (one, killed))
            found["resumed"]["largest loss difference"] = max(
                (abs(a - b) for a, b in zip(*loss)), default=None)
            runs += [{"script": script, "what": what, **row} for what, row in found.items()]
    return {"lm_tokens/s": statistics.median(rates), "rows": rows, "runs": runs}


def markdown(table):
    """A recorded table: its lists of rows, then the rest in a sentence."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)
    parts, rest = [], []
    for name, value in table.items():
        if isinstance(value, list) and value:
            columns = list(dict.fromkeys(key for row in value for key in row))
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (
                columns, ["---"] * len(columns),
                *([cell(row.get(column)) for column in columns] for row in value))))
        elif isinstance(value, dict):
            rest += [f"{key} {cell(v)}" for key, v in value.items()]
        elif value not in (None, []):
            rest.append(f"{name} {cell(value)}")
    return "\n\n".join([*parts, ", ".join(rest) + "."])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside the steps")
    parser.add_argument("--against", default="", help="another checkout of this repository")
    parser.add_argument("--random_gemma", action="store_true", help="Gemma-2-2B's shape")
    parser.add_argument("--toy", action="store_true", help="with --random_gemma: a tiny shape")
    parser.add_argument("--cases", default="", help="cases whose label matches this expression")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="a process, the first 2 untimed")
    parser.add_argument("--expansions", default="1,4,16", help="F / D")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of 128 tokens, a step")
    parser.add_argument("--no-loops", dest="loops", action="store_false", help="no whole commands")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    args.labels = [label for label in CASES if re.search(args.cases, label)]
    if not (args.busy or args.against):                    # those measure in other processes
        common.fast_process(common.pick_device())
    name, work = (("busy", busy) if args.busy else ("against", against) if args.against else
                  ("gpu", gemma) if args.random_gemma else ("throughput", measure))
    table = {**work(args), "repeats": args.repeats, "sequences": args.sequences,
             "versions": common.versions()}
    common.write_json(args.out / f"{name}.json", table)
    print(markdown(table))


if __name__ == "__main__":
    raise SystemExit(main())
