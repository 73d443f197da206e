"""What the four scripts share and no paper claims. Read it after your first script, top to bottom:

    Basics          errors in one sentence, seeded generators, files with checksums
    Configuration   RunConfig, the command line made of its fields, the laptop preset, launch
    Processes       sums over torchrun's processes; identities in a single one
    TopK            two functions that give what the plain formula gives and touch k of F features
    Language model  outputs of its blocks 0..L, no later block and no head; interventions
    Activations     windows of text -> harvest -> cache -> shuffled buffer -> x, mask of each step
    Run             the run folder: log, checkpoint, exact resume

One direction: text -> windows (N, 1+T) -> blocks -> x (B, T, D), mask (B, T) -> the script's loop
-> run folder. Opened by name, when asked for: data/texts.py (text sources), data/models.py (loads
a language model), data/planted.py (--model synthetic), evals/ (evaluations and the table).
"""
import os

# OpenMP's threads sleep while they wait, where something else runs at the start: beside a busy loop
# on two cores a step took 2.0 to 2.6 times as long with spinning threads, 1.6 to 1.8 times with
# sleeping ones; alone 1 and 1.1 (results/busy.json). Read when torch is loaded: set before.
running = lambda: open("/proc/loadavg").read().split()[3].split("/")[0]        # of all, right now
if not os.path.exists("/proc/loadavg") or all(running() != "1" for _ in range(500)):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed.nn.functional
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent

# --- Basics ----------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: printed as one sentence, exit status 2."""


class Stopped(Exception):
    """(status, sentence): by Ctrl-C (130) or SIGTERM (143), after what can be was saved."""


def say(text):
    """Print a line from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def progress(n, label, unit="it", start=0):
    from tqdm import tqdm
    return tqdm(total=n, initial=start, desc=label, unit=unit, disable=rank() != 0)


def size_text(n):
    return f"{n / 1e6:.0f} MB" if n < 1e8 else f"{n / 1e9:.1f} GB"


def one_line(error, limit=200):
    return " ".join(str(error).split())[:limit] or type(error).__name__


def generator(seed, name, device="cpu"):
    """A torch.Generator that is a pure function of (seed, name): resuming needs no saved state."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def write_atomic(path, data):
    """Write bytes or text to a temporary file beside path, flush it to the disk, rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Readable json; NaN and infinities are refused by most readers, so they become null."""
    text = json.dumps(value, default=lambda array: array.tolist())
    clean = json.loads(text, parse_constant=lambda number: None)
    write_atomic(path, json.dumps(clean, indent=1) + "\n")


def read_json(path):
    """Read a json object written by this project; UserError if it is missing or damaged."""
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} holds no readable json object ({one_line(error)}).") from None


def checksum(tensors, meta=None):
    """sha256 over meta and the names, types, shapes and bytes of a dict of tensors."""
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path, tensors, meta=None):
    """Write a safetensors file atomically, with its checksum; meta is any json value."""
    from safetensors.torch import save
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = json.dumps({"meta": meta, "sha256": checksum(tensors, meta)})
    write_atomic(path, save(tensors, {"json": header}))


def load_tensors(path):
    """Read such a file -> (CPU tensors, meta); UserError if a byte is not as it was written."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = {**json.loads((file.metadata() or {}).get("json", "{}"))}
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} holds no readable tensors ({one_line(error)}).") from None
    if header.get("sha256") != checksum(tensors, header.get("meta")):
        raise UserError(f"{path} is damaged: its contents do not fit its checksum.")
    return tensors, header["meta"]


# --- Configuration: a dataclass is the command line ------------------------------------------

# A field's type says which values it takes: kind, least, most, in words. Checked on the command
# line and in saved runs. Steps: a number of optimiser steps, which the laptop preset scales.
Count = Annotated[int, 1, 2 ** 53, "1 or more"]
Natural = Annotated[int, 0, 2 ** 53, "0 or more"]
Steps = Annotated[int, 0, 2 ** 53, "0 or more", "steps"]
Positive = Annotated[float, 5e-324, 1e300, "above 0"]
NonNegative = Annotated[float, 0, 1e300, "0 or more"]
Fraction = Annotated[float, 0, 1, "from 0 to 1"]


@dataclasses.dataclass
class RunConfig:
    # model, text, machine and run
    model: str = "auto"              # auto, synthetic, or any causal LM of transformers
    layer: str = "19"                # block whose output is read; 5,12,19 trains one SAE each
    data: str = "auto"               # text: auto, pile, shakespeare, bundled, or a path
    tokens: Count = 10_000_000       # tokens of text harvested
    heldout_tokens: Count = 131_072  # held-out tokens for the evaluation
    T: Annotated[int, 2, 2 ** 20, "2 to 1,048,576"] = 128   # tokens per sequence
    plant: Literal["states", "noisy", "flicker", "windows", "tree",
                   "domains"] = "states"   # the truth in --model synthetic (data/planted.py)
    shuffle: Literal["off", "train"] = "off"   # permute each training sequence's tokens: a control
    seed: Natural = 42               # weights and order of the data
    device: str = "auto"             # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products
    compile: bool = False            # torch.compile of the losses (C++ compiler or Triton)
    preset: Literal["auto", "paper", "laptop"] = "auto"      # laptop on a CPU
    lm_batch: Count = 32             # sequences per pass of the language model
    buffer: Count = 2048             # sequences harvested and shuffled at a time
    cache: str = "cache"             # folder for harvested activations; none = keep nothing
    out: str = "auto"                # run folder; auto = runs/<script>-<variant>-<model>-...
    resume: str = ""                 # run folder to go on with, or auto: what this command began
    overwrite: bool = False          # replace an earlier run, once the new one works
    eval: str = "core,temporal"      # evaluations at the end: core, a file of evals/, or none
    log_every: Count = 10            # steps between lines of log.jsonl
    save_every: Count = 500          # steps between checkpoints


MAY_CHANGE = {"resume", "overwrite", "eval", "cache", "log_every", "save_every", "device",
              "lm_batch", "out", "compile"}            # on resume
SYNTHETIC = dict(tokens=65_536, heldout_tokens=8_192, T=64, steps=1500, batch_size=16, lr=3e-3)
field_types = functools.partial(typing.get_type_hints, include_extras=True)


def refusal(name, value, hint):
    """The sentence that refuses a field's value, or None. hint: the field's declared type."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return None if value in args else f"--{name} is {', '.join(args)}; not {value!r}."
    if typing.get_origin(hint) is Annotated:
        number = type(value) is int or type(value) is float and args[0] is float
        if not number or not args[1] <= value <= args[2]:
            kind = "a whole number" if args[0] is int else "a number"
            return f"--{name} is {kind}, {args[3]}; not {value!r}."
    elif type(value) is not hint:
        return f"--{name} is a {hint.__name__}; not {value!r}."
    elif hint is str and ("\0" in value or not value and name not in ("resume", "eval")):
        return f"--{name} takes a name or a path; not {value!r}."


def parse_args(Config, argv, doc):
    """Command line from a dataclass -> (cfg, set of the fields the user gave)."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (--help lists the flags).")

    parser = Parser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, group = field_types(Config), parser
    source = "".join(inspect.getsource(c) for c in Config.__mro__ if dataclasses.is_dataclass(c))
    # a comment line is the title of a group of flags, the comment behind a field its help
    for title, name, text in re.findall(r"^    (?:# (\w.*)|(\w+): [^#]*?# (.*))$", source, re.M):
        if title:
            group = parser.add_argument_group(title)
        if (hint := hints.pop(name, None)) is None:        # a title, or in the script's Config too
            continue
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        text = f"{text} [{getattr(Config, name)}]".replace("%", "%%")
        if hint is bool:
            group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            shown = "|".join(choices) or name.upper()
            group.add_argument(*flags, dest=name, metavar=shown, help=text)
    given, hints = vars(parser.parse_args(argv)), field_types(Config)
    for name, value in given.items():
        if typing.get_origin(hints[name]) is Annotated:
            with contextlib.suppress(ValueError):
                given[name] = typing.get_args(hints[name])[0](value)
        if sentence := refusal(name, given[name], hints[name]):
            raise UserError(sentence)
    return Config(**given), set(given)


def configure(Config, LAPTOP, defaults=None, argv=None, doc=""):
    """The run's configuration: command line, defaults, preset, or a saved run's.

    defaults(cfg) -> {field: value} for fields the user did not give, such as those of a variant.
    """
    cfg, given = parse_args(Config, argv, doc)
    if cfg.resume not in ("", "auto"):
        return config_of_run(Config, Path(cfg.resume), cfg, given)
    derived = defaults(cfg).items() if defaults else ()
    cfg = dataclasses.replace(cfg, **{k: v for k, v in derived if k not in given})
    if cfg.preset == "auto":
        small = cfg.model == "synthetic" or pick_device(cfg.device).type == "cpu"
        cfg.preset = "laptop" if small else "paper"
    return check(laptop(cfg, given, LAPTOP) if cfg.preset == "laptop" else cfg)


def laptop(cfg, given, LAPTOP):
    """The laptop preset: sizes, and every schedule scaled with the number of steps. Says so."""
    sizes = {**LAPTOP, **(SYNTHETIC if cfg.model == "synthetic" else {})}
    if "model" in given:                               # the preset's layer belongs to its model
        sizes.pop("layer", None)
    new = {k: v for k, v in sizes.items() if k not in given}
    full, steps = type(cfg).steps, new.get("steps", cfg.steps)
    for name, hint in field_types(type(cfg)).items():
        if hint == Steps and steps and name not in {"steps", *given, *new}:
            new[name] = math.ceil(getattr(cfg, name) * steps / full)
    changes = [f"{k} {getattr(cfg, k)} -> {v}" for k, v in new.items() if getattr(cfg, k) != v]
    if changes:
        say("laptop preset (paper's value -> this run): " + ", ".join(changes))
    return dataclasses.replace(cfg, **new)


def check(cfg):
    """What no single field's type can say; UserError, or the configuration."""
    pick_device(cfg.device)
    parse_layers(cfg.layer)
    found = {p.stem: p.read_text() for p in sorted((HERE / "evals").glob("[a-z]*.py"))}
    known = ["none"] + [name for name, text in found.items() if "\ndef evaluate(" in text]
    for name in filter(None, cfg.eval.split(",")):
        if name not in known:
            raise UserError(f"--eval knows {', '.join(known)}; not {name!r}.")
        if cfg.model == "synthetic" and "NEEDS_TEXT = True" in found.get(name, ""):
            raise UserError(f"--eval {name} needs a language model; --model synthetic has none.")
    if cfg.batch_size > cfg.buffer:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds --buffer {cfg.buffer} sequences.")
    for name in ("tokens", "heldout_tokens"):
        if getattr(cfg, name) < cfg.T:
            raise UserError(f"--{name} {getattr(cfg, name)} is less than one sequence of {cfg.T}.")
    if cfg.model == "synthetic" and cfg.data != type(cfg).data:
        raise UserError(f"--data {cfg.data}: --model synthetic has no text.")
    return cfg


def parse_layers(text):
    """'5,12,19' -> [5, 12, 19]."""
    layers = [int(p) if re.fullmatch(r"[0-9]{1,6}", p) else -1 for p in text.split(",")]
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise UserError(f"--layer takes different blocks, such as 19 or 5,12,19; not {text!r}.")
    return layers


def config_of_run(Config, folder, cfg=None, given=()):
    """The configuration saved in a run folder with the flags given now; what must stay, stays."""
    saved, hints = read_json(folder / "config.json").get("config"), field_types(Config)
    if not isinstance(saved, dict) or set(saved) != set(hints):
        raise UserError(f"{folder}/config.json is not a run of this script and version.")
    for name, value in saved.items():
        if sentence := refusal(name, value, hints[name]):
            raise UserError(f"{folder}/config.json is damaged: {sentence}")
    for name in set(given) - MAY_CHANGE:
        if getattr(cfg, name) != saved[name]:
            raise UserError(f"--{name} {getattr(cfg, name)} differs from the {saved[name]} of "
                            f"{folder}; a resumed run keeps its settings.")
    new = {name: getattr(cfg, name) for name in set(given) & MAY_CHANGE}
    return check(Config(**{**saved, **new, "out": str(folder)}))


def launch(doc, Config, train, LAPTOP, defaults=None, argv=None):
    """A script's main: configure, open the activations once, train each layer -> exit status:
    0 done, 2 a sentence says what to mend, 3 an evaluation could not be had, 130 or 143 stopped.
    """
    def job():
        cfg = configure(Config, LAPTOP, defaults, argv, doc)
        start_processes(cfg)
        fast_process(pick_device(cfg.device))
        skipped = []
        for acts in open_activations(cfg):
            check_memory(cfg, acts)
            for part in train(dataclasses.replace(cfg, layer=str(acts.layer)), acts).values():
                skipped += part.get("skipped", []) if isinstance(part, dict) else []
        for text in skipped:
            print(f"skipped: {text}", file=sys.stderr)
        return 3 if skipped else 0
    return guard(job)


def guard(job):
    """Run job() -> exit status; what the user can mend, or stopped, ends in one sentence."""
    def terminate(*_):
        raise Stopped(143, "terminated; what was saved before is intact.")
    with contextlib.suppress(ValueError):              # only the main thread may
        signal.signal(signal.SIGTERM, terminate)
    try:
        return job() or 0
    except UserError as error:
        status, text = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, text = 130, "interrupted; what was saved before is intact."
    except Stopped as stop:
        status, text = stop.args
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = "the disk is full; free some space, --resume goes on from what was saved."
        status, text = 2, f"error: {one_line(error)}"
    except torch._dynamo.exc.TorchDynamoException as error:
        status, text = 2, (f"error: --compile: torch.compile does not work here ({one_line(error)})"
                           "; it needs a C++ compiler, or Triton on a GPU.")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status, text = 2, "error: out of memory; lower --batch_size, --T, --expansion or --buffer."
    print(text, file=sys.stderr)
    return status


def check_memory(cfg, acts):
    """Refuse an SAE that cannot fit, before anything is allocated; say what it would take."""
    width, sequences = acts.D * cfg.expansion, getattr(cfg, "micro_batch", 0) or cfg.batch_size
    if cfg.activation == "topk" and cfg.k > width:
        raise UserError(f"--k {cfg.k} exceeds this SAE's {width} features.")
    need = 32 * acts.D * width + 4 * sequences * acts.T * (4 * width + 6 * acts.D) // world()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if acts.device.type == "cuda":
        there = torch.cuda.get_device_properties(acts.device).total_memory
    if need > there:
        raise UserError(f"weights, optimiser and a step would take about {size_text(need)} of the "
                        f"{size_text(there)} there are; lower --expansion or --batch_size.")


def fast_process(device):
    """Settings of the whole process. On a GPU TF32 for fp32 products; on a CPU (Linux) the C
    library keeps freed memory (else the pages of each block above 32 MB are cleared anew, 0.4
    of a bf16 step at F = 16 D: results/peers.json), and fp32 products are oneDNN's (on AMD 1.2 to 2
    times MKL's speed) where they keep fp32's precision: with matrix units they would round to bf16.
    """
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-1, 2 ** 31 - 1), (-4, 0)):   # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL("libc.so.6").mallopt(option, value)
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        x = torch.randn(256, 256, generator=generator(0, "fast_products"))
        exact = x.double() @ x.double()
        torch.set_float32_matmul_precision("medium")
        if (x @ x - exact).norm() > 1e-5 * exact.norm():
            torch.set_float32_matmul_precision("high")


# --- Processes: data-parallel over text with torchrun; in one process every function is identity -


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start_processes(cfg):
    """Join torchrun's process group when there is one."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        if cuda := pick_device(cfg.device).type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo",
                                             timeout=datetime.timedelta(hours=12))
        if cfg.batch_size < world():
            raise UserError(f"--batch_size {cfg.batch_size} is less than {world()} processes.")


def total(tensor):
    """Sum of a tensor over all processes, without a gradient (itself in one process)."""
    if world() > 1:
        tensor = tensor.detach().clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def total_with_gradient(tensor):
    """Sum of a tensor over all processes, and of its gradient."""
    with warnings.catch_warnings(action="ignore"):         # "deprecated"; the other one is private
        return torch.distributed.nn.functional.all_reduce(tensor) if world() > 1 else tensor


def sum_gradients(module):
    """Add up gradients over processes: exact, as losses are sums over tokens / global count."""
    for p in module.parameters() if world() > 1 else ():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)


def barrier():
    return torch.distributed.barrier() if world() > 1 else None


def compiled(losses, cfg):
    """A script's `losses`, with --compile through torch.compile: the same terms up to rounding."""
    return torch.compile(losses) if cfg.compile else losses


# --- TopK: of F features k are active, so only k rows of a matrix need to be read ------------

# Smallest F / k at which reading k rows beats the dense product (2048 tokens, D = 576: 1.1 to 1.2
# times as fast at 9 in fp32; in bf16 0.8 at 9, 1.0 at 18, 1.3 at 36). On a GPU not measured: from
# an H100's ratio of arithmetic to memory bandwidth.
GATHER_FROM = {"cpu": 7, "cpu bf16": 18, "cuda": 256, "cuda bf16": 256}


def gather_pays(x, n_features, k):
    kind = x.device.type                               # "meta" has neither autocast nor a threshold
    kind += " bf16" * (kind != "meta" and torch.is_autocast_enabled(kind))
    return n_features >= GATHER_FROM.get(kind, math.inf) * k


def encode_topk(h, W, b, k):
    """ReLU(TopK(h W + b)): h (..., D), W (D, F), b (F,) -> f (..., F) with at most k entries > 0.
    The plain formula in values and gradients. Where that is faster, W's gradient is made of the k
    active features of each token alone (fastest where W is a transposed (F, D) tensor).
    """
    if not gather_pays(h, W.shape[1], k):
        pre = (h @ W).float() + b
        values, index = pre.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, F.relu(values))
    f, f.active = EncodeTopK.apply(h, W, b, k)         # decode_topk need not look for them again
    return f


class EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, b, k):
        pre = (h @ W).float().add_(b)                                         # (..., F)
        values, index = pre.topk(k, dim=-1, sorted=False)                     # (..., k)
        ctx.save_for_backward(h, W, index, values > 0)
        ctx.mark_non_differentiable(index)
        return pre.zero_().scatter_(-1, index, F.relu(values)), index

    @staticmethod
    def backward(ctx, grad_f, _):
        h, W, index, on = ctx.saved_tensors
        (k, n_features), grad = (index.shape[-1], W.shape[1]), grad_f.gather(-1, index) * on
        grad_h = decode_rows(grad, index, W.t()) if ctx.needs_input_grad[0] else None
        grad, flat = grad.flatten(), index.flatten()
        feature, order = flat.sort(stable=True)                               # then by token
        first = torch.searchsorted(feature, torch.arange(n_features, device=h.device))
        grad_W = F.embedding_bag(order // k, h.flatten(0, -2).to(grad), first, mode="sum",
                                 per_sample_weights=grad[order])              # (F, D)
        return grad_h, grad_W.t(), grad.new_zeros(n_features).index_add_(0, flat, grad), None


def decode_rows(values, index, W):
    """sum_i values_i W[index_i]: (..., k), (..., k), (F, D) -> (..., D), fp32; reads those rows."""
    k = index.shape[-1]
    out = F.embedding_bag(index.reshape(-1, k), W, mode="sum",
                          per_sample_weights=values.reshape(-1, k).to(W.dtype))
    return out.view(*index.shape[:-1], -1)


def decode_topk(f, W, k):
    """f W for f (..., F) with at most k entries not 0, W (F, D) -> (..., D).

    f's gradient exists at its active entries only: TopK passes none to the others.
    """
    if not gather_pays(f, len(W), k):
        return f @ W
    index = getattr(f, "active", None)
    index = f.detach().abs().topk(k, dim=-1, sorted=False).indices if index is None else index
    return decode_rows(f.gather(-1, index), index, W)


# --- Language model --------------------------------------------------------------------------


def pick_device(name="auto"):
    """'auto' -> cuda when there is one; a GPU that is not there is a UserError."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise UserError(f"--device is auto, cpu, cuda or cuda:N; not {name!r}.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or name == "auto" and not count:
        return torch.device("cpu")
    if int(name[5:] or 0) >= count:
        raise UserError(f"--device {name}: torch sees {count} CUDA GPUs.")
    return torch.device(name if ":" in name else f"cuda:{torch.cuda.current_device()}")


class _Stop(Exception):
    """Raised behind the deepest layer asked for: no later block, no head is computed."""


@torch.no_grad()
def hidden_states(lm, tokens, layers):
    """Outputs of these blocks (before any final norm): tokens (B, L) -> {layer: (B, L, D)}."""
    found = {}

    def keep(layer, module, inputs, output):
        found[layer] = output[0] if isinstance(output, tuple) else output
        if layer == max(layers):
            raise _Stop
    with contextlib.ExitStack() as stack:
        for layer in layers:
            hook = functools.partial(keep, layer)
            stack.enter_context(lm.blocks[layer].register_forward_hook(hook))
        with contextlib.suppress(_Stop):
            lm.model(input_ids=tokens, use_cache=False)
    return found


@contextlib.contextmanager
def intervene(lm, layer, edit):
    """Within the context, the output h (B, L, D) of block `layer` is replaced by edit(h)."""
    def hook(module, inputs, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)
    with lm.blocks[layer].register_forward_hook(hook):
        yield


# --- Activations: windows of text -> harvest -> cache -> buffer -> batches -------------------

SINK_RATIO = 10.0      # a token whose norm exceeds this many medians is an attention sink (~100)


def scored_mask(x, tokens, lengths, special, threshold):
    """Which positions 1..T count: real, not special, no sink. x (B, T, D) -> (B, T) bool."""
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None].to(x.device)
    plain = ~torch.isin(tokens[:, 1:].to(x.device), special)
    return real & plain & (x.float().norm(dim=-1) <= threshold)


def sink_thresholds(lm, tokens, lengths, layers):
    """{layer: norm above which a token is a sink}: 10 medians over some windows."""
    n = min(32, len(tokens))
    states = hidden_states(lm, tokens[:n].long().to(lm.device), layers)
    real = torch.arange(tokens.shape[1] - 1, device=lm.device) < lengths[:n, None].to(lm.device)
    return {layer: SINK_RATIO * h[:, 1:].float().norm(dim=-1)[real].median().item()
            for layer, h in states.items()}


class Store:
    """Activations of one layer and split: x (N, T, D) in memory or a mapped file, or None: live.

    tokens (N, 1+T), lengths (N,); threshold: norm of a sink; sink (D,): position 0, ever the same.
    """
    lm_batch = 32

    def __init__(self, x=None, mask=None, lm=None, layer=0, tokens=None, lengths=None,
                 threshold=math.inf, sink=None):
        self.x, self.mask, self.lm, self.layer, self.sink = x, mask, lm, layer, sink
        self.tokens, self.lengths, self.threshold = tokens, lengths, threshold
        self.N, self.T = (len(tokens), tokens.shape[1] - 1) if x is None else x.shape[:2]

    def get(self, rows, device):
        """Sequences by index (n,) -> x (n, T, D) on the device, mask (n, T)."""
        if self.x is not None:
            return self.x[rows].to(device), self.mask[rows].to(device)
        x = torch.empty(len(rows), self.T, self.lm.D, dtype=torch.bfloat16, device=device)
        mask = torch.empty(len(rows), self.T, dtype=torch.bool, device=device)
        for part in torch.arange(len(rows)).split(self.lm_batch):
            tokens = self.tokens[rows[part]].long().to(self.lm.device)
            h = hidden_states(self.lm, tokens, [self.layer])[self.layer][:, 1:].bfloat16()
            x[part], mask[part] = h.to(device), scored_mask(
                h, tokens, self.lengths[rows[part]], self.lm.special, self.threshold).to(device)
        return x, mask


def open_stores(cfg, lm, layers, split, thresholds=None):
    """{layer: Store} for one split; harvests what the cache lacks, all layers in one pass."""
    texts = importlib.import_module("data.texts")
    if cfg.cache == "none":
        tokens, lengths = texts.windows(cfg, lm, split)
        thresholds = thresholds or sink_thresholds(lm, tokens, lengths, layers)
        sinks = hidden_states(lm, tokens[:1, :1].long().to(lm.device), layers)
        return {layer: Store(None, None, lm, layer, tokens, lengths, thresholds[layer],
                             sinks[layer][0, 0].float().cpu()) for layer in layers}
    key = dict(model=lm.name, weights=lm.revision, dtype=str(lm.dtype), T=cfg.T, split=split,
               tokens=cfg.tokens if split == "train" else cfg.heldout_tokens,
               data=texts.content(cfg.data), format=3)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cfg.cache) / f"{split}-{Path(lm.name).name}-{digest}"
    path, known = folder / "windows.safetensors", True
    try:
        windows = load_tensors(path)[0]
    except UserError as error:
        if path.exists():
            say(f"cache: {error} Making it again.")
        known, windows = False, dict(zip(("tokens", "lengths"), texts.windows(cfg, lm, split)))
    folder.mkdir(parents=True, exist_ok=True)              # behind: bad text leaves none
    with open(folder / ".lock", "w") as file:              # a second job waits, then finds it done
        if rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not known:                                  # the same bytes, whoever made them
                save_tensors(path, windows)
        barrier()
        stores = {layer: open_cached(folder, lm, layer, windows) for layer in layers}
        missing = [layer for layer, store in stores.items() if store is None]
        if missing:
            harvest(lm, missing, folder, windows, cfg.lm_batch, thresholds)
            stores.update({layer: open_cached(folder, lm, layer, windows) for layer in missing})
        else:
            say(f"cache: {split} activations of layer {', '.join(map(str, layers))} from {folder}")
    return stores


def open_cached(folder, lm, layer, windows):
    """A Store over a cached layer, or None where it is missing or damaged (then it says so)."""
    path, (N, L) = folder / f"L{layer}.bf16", windows["tokens"].shape
    if not path.exists():
        return None
    try:
        side, meta = load_tensors(folder / f"L{layer}.safetensors")
        x = torch.from_file(str(path), False, N * (L - 1) * lm.D, dtype=torch.bfloat16)
        x = x.view(N, L - 1, -1)
        if meta["sha256"] != checksum({"": x}):
            raise UserError(f"{path} is damaged: its contents do not fit its checksum.")
        return Store(x, side["mask"], lm, layer, **windows,
                     threshold=meta["threshold"], sink=side["sink"])
    except (UserError, KeyError, TypeError, RuntimeError) as error:
        say(f"cache: {one_line(error)} Harvesting layer {layer} again.")


@torch.no_grad()
def harvest(lm, layers, folder, windows, lm_batch, thresholds=None):
    """Run the LM once over all windows; write each layer's activations (bf16), mask and sink."""
    tokens, lengths = windows["tokens"], windows["lengths"]
    N, T = len(tokens), tokens.shape[1] - 1
    need, free = N * T * lm.D * 2 * len(layers), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"the activations need {size_text(need)} of disk and {folder} has "
                        f"{size_text(free)} free; lower --tokens or use --cache none.")
    thresholds = thresholds or sink_thresholds(lm, tokens, lengths, layers)
    maps, sinks, masks = {}, {}, {layer: torch.zeros(N, T, dtype=torch.bool) for layer in layers}
    for layer in layers:
        file, size = folder / f".L{layer}.tmp", N * T * lm.D
        if rank() == 0:
            with open(file, "wb") as handle:               # a full disk shows here, not later
                os.posix_fallocate(handle.fileno(), 0, 2 * size)
        barrier()
        maps[layer] = torch.from_file(str(file), True, size, dtype=torch.bfloat16).view(N, T, -1)
    with progress(N * T, f"harvesting {folder.name.split('-')[0]}", "tok") as bar:
        for rows in torch.arange(rank(), N, world()).split(lm_batch):
            batch = tokens[rows].long().to(lm.device)
            for layer, h in hidden_states(lm, batch, layers).items():
                if not h.isfinite().all():
                    raise UserError(f"the language model's block {layer} gives NaN or infinity in "
                                    f"{lm.dtype}; try another --dtype.")
                x, sinks[layer] = h[:, 1:].bfloat16(), h[0, 0].float().cpu()
                mask = scored_mask(x, batch, lengths[rows], lm.special, thresholds[layer])
                maps[layer][rows], masks[layer][rows] = x.cpu(), mask.cpu()
            bar.update(len(rows) * T * world())
    for layer in layers:
        mask, file = total(masks[layer].int().to(lm.device)).bool().cpu(), folder / f".L{layer}.tmp"
        if rank() == 0:
            save_tensors(folder / f"L{layer}.safetensors", {"mask": mask, "sink": sinks[layer]},
                         {"sha256": checksum({"": maps[layer]}), "threshold": thresholds[layer]})
            os.replace(file, folder / f"L{layer}.bf16")
    barrier()


def open_activations(cfg):
    """Iterator over Activations, one for each layer of cfg.layer; the LM runs once for them all."""
    if cfg.model == "synthetic":
        x, truth = importlib.import_module("data.planted").make(cfg)
        n, mask = cfg.tokens // cfg.T, torch.ones(x.shape[:2], dtype=torch.bool)
        yield Activations(cfg, None, 0, Store(x[:n], mask[:n]), Store(x[n:], mask[n:]), truth)
        return
    models = importlib.import_module("data.models")
    layers, lm = parse_layers(cfg.layer), models.load(cfg.model, pick_device(cfg.device), cfg.dtype)
    if max(layers) >= lm.n_layers:
        raise UserError(f"--layer {max(layers)}: {lm.name} has blocks 0 to {lm.n_layers - 1}.")
    if cfg.T >= lm.longest:
        raise UserError(f"--T {cfg.T}: {lm.name} reads at most {lm.longest - 1} tokens after BOS.")
    cfg, Store.lm_batch = dataclasses.replace(cfg, data=models.pick_data(cfg)), cfg.lm_batch
    train = open_stores(cfg, lm, layers, "train")
    held = open_stores(cfg, lm, layers, "heldout", {n: s.threshold for n, s in train.items()})
    for layer in layers:
        yield Activations(cfg, lm, layer, train[layer], held[layer])


class Activations:
    """Training batches and held-out activations of one layer.

    D, T; scale: mean norm / sqrt(D); mean (D,) and variance () (mean ||x - mean||^2) of the scored
    tokens of the first buffer, raw units. One rule, whether they come from the cache, live from the
    language model or planted: fill a buffer of cfg.buffer sequences in the order of the epoch's
    permutation, serve it. batch(step) is a pure function of seed and step, so resume is exact.
    Memory: buffer / processes x T x D x 2 bytes.
    """

    def __init__(self, cfg, lm, layer, train, heldout, truth=None):
        self.cfg, self.lm, self.layer, self.truth = cfg, lm, layer, truth
        self.train_store, self.heldout_store, self.T = train, heldout, train.T
        self.device, self.filled = pick_device(cfg.device), None
        self.dtype = lm.dtype if lm else getattr(torch, cfg.dtype.replace("auto", "float32"))
        self.per_fill = min(cfg.buffer, max(train.N, cfg.batch_size)) // cfg.batch_size
        self.steps = cfg.steps or max(1, train.N * train.T // (cfg.batch_size * cfg.T))
        x, mask = self.fill(0)
        self.D, sums = x.shape[-1], 0.0
        for a, m in zip(x.split(256), mask.split(256)):
            a = a[m].double()
            parts = a.new_full((), len(a)), a.norm(dim=-1).sum(), a.square().sum()
            sums = sums + torch.cat([torch.stack(parts), a.sum(0)])
        count, norm, square, *_ = sums = total(sums)
        if count == 0:
            raise UserError("no token to train on: all are special, padding or attention sinks.")
        mean = sums[3:] / count
        self.mean, self.scale = mean.float(), (norm / count).item() / math.sqrt(self.D)
        self.variance = (square / count - mean.square().sum()).item()
        if not (sums.isfinite().all() and self.scale > 0):
            raise UserError("the activations are not finite or all zero: delete the cache folder.")

    def order(self, positions):
        """Position in the training sequence -> window index: one fresh permutation an epoch."""
        N, seed = self.train_store.N, self.cfg.seed
        perm = {epoch: torch.randperm(N, generator=generator(seed, f"epoch{epoch}"))
                for epoch in (positions // N).unique().tolist()}
        return torch.stack([perm[p // N][p % N] for p in positions.tolist()])

    def fill(self, number):
        """The buffer of steps number * per_fill and the following: x (n, T, D), mask (n, T)."""
        if self.filled != number:
            self.buffer = None                             # free the old one before the next
            B, start = self.cfg.batch_size, number * self.per_fill * self.cfg.batch_size
            rows = self.order(torch.arange(start, start + self.per_fill * B)).view(-1, B)
            rows = rows[:, rank()::world()].flatten()
            x, mask = self.train_store.get(rows, self.device)
            if self.cfg.shuffle == "train":    # the negative control: a new order in each sequence
                gen = generator(self.cfg.seed, f"shuffle-train{number}/{rank()}")
                order = torch.rand(mask.shape, generator=gen).argsort(1).to(x.device)
                x, mask = x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order)
            self.buffer, self.filled = (x, mask), number
        return self.buffer

    def batch(self, step):
        """This process's share of a step: x (b, T, D), mask (b, T)."""
        slot, share = step % self.per_fill, len(range(rank(), self.cfg.batch_size, world()))
        here = slice(slot * share, (slot + 1) * share)
        x, mask = (t[here] for t in self.fill(step // self.per_fill))
        return (x.float() if self.dtype == torch.float32 else x), mask

    def autocast(self):
        """bf16 matrix products where the hardware has them; nothing in fp32."""
        bf16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, self.dtype) if bf16 else contextlib.nullcontext()

    def heldout(self, size=16):
        """Held-out windows in a fixed order: (x (b, T, D) fp32, mask (b, T))."""
        for rows in torch.arange(self.heldout_store.N).split(size):
            x, mask = self.heldout_store.get(rows, self.device)
            yield x.float(), mask


# --- Run: log, checkpoint, exact resume, results ---------------------------------------------

RUN_FILES = ("eval.json", "checkpoint.safetensors", "sae_weights.safetensors", "cfg.json",
             "timing.jsonl", "features.html", "position.json")   # and *.png
ADAM = ("step", "exp_avg", "exp_avg_sq")                          # AdamW's state of a parameter


def versions():
    """Versions, last commit of the code that runs, machine: a recorded figure needs them."""
    from importlib.metadata import version
    git = subprocess.run(["git", "-C", HERE, "log", "-1", "--format=%h", "--", ":(glob)*.py",
                          "data", "evals", "benchmarks/published.py"], capture_output=True)
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            **{name: version(name) for name in ("transformers", "numpy", "safetensors")},
            "commit": git.stdout.decode().strip() or "unknown",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}


class Run:
    """The run folder of one SAE, and the loop's clock.

    A checkpoint holds the SAE, the optimiser's state and the length of log.jsonl; everything random
    is a pure function of (seed, step). So a resumed run goes on exactly: on a CPU the same bytes in
    log and weights. Nothing is written or replaced before a first step with finite gradients.
    """

    def __init__(self, script, variant, cfg, acts, sae, opt):
        path = Path(script).resolve()
        inside = path.relative_to(HERE) if HERE in path.parents else Path(path.name)
        self.script, self.variant = ".".join(inside.with_suffix("").parts), variant
        self.cfg, self.acts, self.sae, self.opt = cfg, acts, sae, opt
        self.start, self.total, self.earlier, self.train_seconds = 0, acts.steps, 0.0, None
        self.stop, self.begun, self.saved, self.held = 0, False, 0, None
        model = Path(acts.lm.name).name if acts.lm else f"synthetic-{cfg.plant}"
        name = f"{path.stem}-{variant}-{model}-L{acts.layer}-s{cfg.seed}"
        name += "" if cfg.shuffle == "off" else f"-shuffle-{cfg.shuffle}"
        self.dir = Path("runs") / name if cfg.out == "auto" else Path(cfg.out)
        if cfg.out != "auto" and acts.lm and "," in acts.cfg.layer:    # several layers, one folder
            self.dir = self.dir / f"L{acts.layer}"
        self.finished = (self.dir / "eval.json").exists()
        if cfg.resume == "auto" and self.finished:         # of several layers, this one is done
            self.check_saved(read_json(self.dir / "config.json").get("stands_on"))
        elif cfg.resume and (cfg.resume != "auto" or (self.dir / "config.json").exists()):
            self.restore()
        elif self.dir.exists():
            self.check_folder()

    def check_folder(self):
        """A folder that holds anything but an earlier run, or a run to be kept, is refused."""
        ours = (self.dir / "config.json").exists() and (self.dir / "log.jsonl").exists()
        if not self.dir.is_dir() or not ours and {p.name for p in self.dir.iterdir()} - {".lock"}:
            raise UserError(f"--out {self.dir} holds something other than a run; choose another.")
        there = self.finished or (self.dir / "checkpoint.safetensors").exists()
        if there and not self.cfg.overwrite:
            raise UserError(f"{self.dir} holds a run: --overwrite replaces it" +
                            f", --resume {self.dir} goes on with it." * (not self.finished))
        self.finished = False                              # once the new one works
        self.lock()

    def lock(self):
        """One writer at a time; the lock goes with the process."""
        self.held = open(self.dir / ".lock", "w")
        try:
            if rank() == 0:
                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {self.dir}.") from None

    @functools.cached_property
    def stands_on(self):
        """Everything that a resumed run must find as it was, in the form json gives back."""
        lm, store = self.acts.lm, self.acts.train_store
        kept = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in MAY_CHANGE}
        return json.loads(json.dumps({
            **kept, "name of the model": lm.name if lm else "synthetic",
            "weights of the model": lm.revision if lm else "none", "dtype": str(self.acts.dtype),
            "text": checksum({"": store.tokens if lm else store.x})[:16], "scale": self.acts.scale,
            "last step": self.total}))

    def check_saved(self, saved):
        """Refuse to go on where settings, model, text or scale differ from the saved run's."""
        for name, value in self.stands_on.items():
            if not isinstance(saved, dict) or saved.get(name) != value:
                raise UserError(f"{self.dir} does not have the {name} that is here: {value!r}.")

    def begin(self):
        """The first step worked: make the folder, or replace the earlier run in it."""
        for name, p in self.sae.named_parameters():
            fine = p.grad is not None and p.grad.any() and (p + p.grad).isfinite().all()
            if p.requires_grad and not fine:
                raise UserError(f"{name} or its gradient is not finite, or it has none, at the "
                                "first step; nothing was saved.")
        if rank() == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            if not self.held:
                self.lock()
            for old in [*(self.dir / name for name in RUN_FILES), *self.dir.glob("*.png")]:
                old.unlink(missing_ok=True)
            write_json(self.dir / "config.json", {
                "script": self.script, "class": type(self.sae).__name__, "variant": self.variant,
                "layer": self.acts.layer, "config": dataclasses.asdict(self.cfg),
                "stands_on": self.stands_on, "versions": versions()})
            (self.dir / "log.jsonl").write_bytes(b"")
        self.begun = True
        barrier()

    def restore(self):
        """Back to the last checkpoint: weights, optimiser, step; the logs cut to their length."""
        if self.finished:
            raise UserError(f"{self.dir} is finished: evaluate it with python -m evals.NAME "
                            f"{self.dir}, or train anew with --overwrite.")
        if not (self.dir / "checkpoint.safetensors").exists():
            raise UserError(f"{self.dir} has no checkpoint; begin again with --overwrite.")
        self.lock()
        tensors, meta = load_tensors(self.dir / "checkpoint.safetensors")
        state, params = self.opt.state_dict(), sum((g["params"] for g in self.opt.param_groups), [])
        try:
            self.check_saved(meta["stands_on"])
            self.start, self.earlier = meta["step"], meta["seconds"] + 0.0
            if type(self.start) is not int or not 0 < self.start <= self.total:
                raise ValueError(f"a step up to {self.total}: it is at {self.start}")
            self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k[:4] == "sae."})
            for index, p in enumerate(params):
                if p.requires_grad:                        # moments in p's own memory order
                    step, *moments = (tensors[f"opt.{index}.{key}"] for key in ADAM)
                    moments = [torch.empty_like(p).copy_(moment) for moment in moments]
                    state["state"][index] = dict(zip(ADAM, (step, *moments)))
            self.opt.load_state_dict(state)
            for name in ("log", "timing"):
                file, length = self.dir / f"{name}.jsonl", meta[f"{name}_bytes"]
                if file.stat().st_size < length:
                    raise UserError(f"{file} is shorter than at the checkpoint: no exact way on.")
                if rank() == 0:
                    os.truncate(file, length)
        except (KeyError, TypeError, RuntimeError, ValueError, FileNotFoundError) as error:
            raise UserError(f"{self.dir} lacks {one_line(error)}: it cannot be resumed.") from None
        self.begun, self.saved = True, self.start
        say(f"resuming {self.dir} at step {self.start} of {self.total}")
        if meta.get("world") != world():
            say(f"begun with {meta.get('world')} processes, now {world()}: equal up to rounding")

    def steps(self):
        """Yield the steps still to do; Ctrl-C and SIGTERM save first."""
        if self.finished:
            say(f"{self.dir} is finished.")
            return
        before, self.clock = {}, time.perf_counter()
        self.bar = progress(self.total, f"{self.script} {self.variant} L{self.acts.layer}", "step",
                            self.start)
        with contextlib.suppress(ValueError):              # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self.interrupt)
        try:
            for step in range(self.start, self.total):
                yield step
                self.bar.update()
                stop = self.stop
                if world() > 1:                            # agreed on, so that none waits
                    flag = torch.tensor(stop, device=self.acts.device)
                    stop = total(flag).item() if self.log_due(step) else 0
                if stop:
                    self.save(step + 1)
                    raise Stopped(143 if stop >= 1000 else 130, f"stopped and saved after step "
                                  f"{step + 1}; go on with --resume {self.dir}")
            self.train_seconds = round(self.earlier + time.perf_counter() - self.clock, 1)
            self.save(self.total)
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupt(self, number, _):
        self.stop = 1 if number == signal.SIGINT else 1000

    def log_due(self, step):
        """Whether this step is logged; only then may a script read values from the device."""
        return step % self.cfg.log_every == 0 or step == self.total - 1

    def log(self, step, sums, **scalars):
        """On log steps: sum over processes, stop if not finite, one line each; save when due.

        sums: 0-dim tensors; 'error' (squared error a token, units of scale^2) and 'active'
        (features a token) are not part of the loss. scalars: further floats or 0-dim tensors.
        """
        if self.log_due(step):
            values = total(torch.stack([v.detach().double() for v in sums.values()]))
            row = dict(zip(sums, values.tolist()))
            for name, value in row.items():
                if not math.isfinite(value):
                    raise UserError(f"the term {name!r} is {value} at step {step}; last "
                                    f"saved: step {self.saved or 'none'}.")
            if not self.begun:
                self.begin()
            loss = sum(v for k, v in row.items() if k not in ("error", "active"))
            row["EV"] = 1 - row["error"] * self.acts.scale ** 2 / self.acts.variance
            row = {"step": step, "loss": loss, **row, **{k: float(v) for k, v in scalars.items()}}
            seconds = time.perf_counter() - self.clock
            rate = (step + 1 - self.start) * self.cfg.batch_size * self.acts.T / max(seconds, 1e-9)
            times = {"step": step, "seconds": self.earlier + seconds, "tokens_per_s": round(rate)}
            for name, line in (("log", row), ("timing", times)) if rank() == 0 else ():
                with open(self.dir / f"{name}.jsonl", "a") as file:    # log: the same bytes always
                    file.write(json.dumps(line) + "\n")
            shown = f"loss {loss:.3g} EV {row['EV']:.3f} L0 {row['active']:.0f} {rate:,.0f} tok/s"
            self.bar.set_postfix_str(shown, refresh=False)
        if (step + 1) % self.cfg.save_every == 0 and step + 1 < self.total:
            self.save(step + 1)

    def save(self, step):
        """Write a checkpoint after `step` steps, in one atomic file, if all of it is finite."""
        if rank() == 0:
            tensors = {"sae." + k: v for k, v in self.sae.state_dict().items()}
            for index, state in self.opt.state_dict()["state"].items():
                tensors.update({f"opt.{index}.{k}": torch.as_tensor(v) for k, v in state.items()})
            for name, value in tensors.items():
                if not value.isfinite().all():
                    raise UserError(f"{name} is not finite after step {step}; last saved: step "
                                    f"{self.saved or 'none'}.")
            meta = {"step": step, "stands_on": self.stands_on, "world": world(),
                    "seconds": self.earlier + time.perf_counter() - self.clock}
            for name in ("log", "timing"):
                with open(self.dir / f"{name}.jsonl", "ab") as file:
                    os.fsync(file.fileno())
                    meta[f"{name}_bytes"] = file.tell()
            save_tensors(self.dir / "checkpoint.safetensors", tensors, meta)
        self.saved = step
        barrier()

    def evaluate(self, paper, *extras):
        """Save the weights, run the evaluations of --eval and the script's own, print the table.

        paper: {metric: what the paper reports}; extras: functions (sae, acts) -> {name: results}.
        """
        if self.finished:
            return read_json(self.dir / "eval.json")
        self.sae.eval()
        results = {}
        if rank() == 0:
            results = importlib.import_module("evals").finish(self, paper, extras)
        barrier()
        if self.held:
            self.held.close()
        return results
