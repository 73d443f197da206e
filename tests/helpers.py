"""What several test files need: quiet runs, tiny language models, texts and autoencoders."""
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import lzma
import os
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("MPLBACKEND", "Agg")
import common                   # before torch: it sets how idle threads wait
import torch
from torch import nn

import hierarchical_sae
import mtsae
import temporal_lens
import tsae
from data import models as loader, texts
from evals import figures

inspect.getsource = functools.cache(inspect.getsource)     # each command line reads its script's
HERE = Path(__file__).resolve().parent.parent
SCRIPTS = {module.__name__: module for module in (tsae, temporal_lens, mtsae, hierarchical_sae)}
SAES = dict(zip(SCRIPTS, ("TSAE", "TemporalLens", "MTSAE", "HierarchicalSAE")))
TINY = ("--model", "synthetic", "--tokens", 4096, "--heldout_tokens", 1024, "--T", 32,
        "--batch_size", 4, "--cache", "none", "--save_every", 10)
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
WORDS = [f"{letter}{i}" for letter in "ab" for i in range(12)]            # two languages
replaced = mock.patch.object    # with replaced(owner, "name", value): for a while


@contextlib.contextmanager
def folder():
    """A temporary working directory."""
    with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
        yield Path(path)


def run(module, *flags):
    """module.main(flags) with its output caught -> (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            replaced(figures, "training", lambda folder: None):     # takes a second
        try:
            status = module.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def tiny(module, out, steps=30, *flags):
    """Train on a small synthetic set; returns the run folder's eval.json."""
    status, _, err = run(module, *TINY, "--steps", steps, "--out", out, *flags)
    assert status == 0, err
    return json.loads((Path(out) / "eval.json").read_text())


def log(out):
    """The rows of a run's log."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out):
    return common.load_tensors(Path(out) / "sae_weights.safetensors")[0]


def same_files(a, b):
    """Two runs have the same log and weights, byte for byte."""
    for name in ("log.jsonl", "sae_weights.safetensors"):
        assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), (a, name)


def refused(*flags, words=(), module=tsae):
    """The command ends with status 2 and one sentence that holds the words; no file changes."""
    files = lambda: {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    before = files()
    status, _, err = run(module, *flags)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(said) == 1, (flags, status, err[-300:])
    assert all(word in said[0] for word in words), (words, said)
    assert files() == before, f"the folder has changed; {said}"


def refused_with(word, function, *args):
    """function(*args) raises a UserError that holds the word."""
    with unittest.TestCase().assertRaisesRegex(common.UserError, re.escape(word)):
        function(*args)


def configured(module, flags):
    """The Config that a command line gives."""
    with contextlib.redirect_stdout(io.StringIO()):
        return common.configure(module.Config, module.LAPTOP, getattr(module, "defaults", None),
                                list(flags))


def config(module, **values):
    """A Config with the paper's values, small synthetic sizes, and the values given."""
    cfg = module.Config(**{**dict(model="synthetic", tokens=4096, heldout_tokens=1024, T=32,
                                  batch_size=4, steps=30, cache="none"), **values})
    derived = getattr(module, "defaults", lambda cfg: {})(cfg)
    return dataclasses.replace(cfg, **{**derived, **values})


def model(script, D=16, **values):
    """A script's untrained SAE; what starts at a constant (biases, gains) is random: it counts."""
    cfg = config(SCRIPTS[script], **{"expansion": 2, **values})
    sae, gen = getattr(SCRIPTS[script], SAES[script])(D, cfg), torch.Generator().manual_seed(0)
    for p in sae.parameters():
        if p.dim() == 1:
            p.data.add_(0.3 * torch.randn(p.shape, generator=gen))
    sae.scale.fill_(2.0)
    return sae


def mixed(B=3, T=20, D=6, seed=4):
    """Windows (B, T, D) and masks: with holes, short (padded at the end), without a token."""
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=gen) > 0.3
    mask[1], mask[2] = torch.arange(T) < T // 2 + 1, False
    return 2 * torch.randn(B, T, D, generator=gen) + 0.5, mask


def relative(a, b):
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def close(ours, theirs, name="", tolerance=1e-5):
    assert abs(ours - theirs) <= tolerance * max(1e-3, abs(theirs)), (name, ours, theirs)


class LinearSAE(tsae.TSAE):
    """The standard SAE of given weights in raw units: f = relu((x - b_dec) W_enc + b_enc)."""

    def __init__(self, W_enc, W_dec, b_enc=0.0, b_dec=0.0):
        super().__init__(len(W_enc), config(tsae, temporal=False))
        biases = torch.zeros(len(W_dec)) + b_enc, torch.zeros(len(W_enc)) + b_dec
        for name, value in zip(("W_enc", "W_dec", "b_enc", "b_dec"), (W_enc, W_dec, *biases)):
            setattr(self, name, nn.Parameter(value.float()))


def zero_sae(D, n_features):
    """What an untrained or collapsed SAE is: no feature is ever on."""
    return LinearSAE(torch.zeros(D, n_features), torch.zeros(n_features, D))


def activations(x, mask=None):
    """common.Activations of given windows (n, T, D), in training and held out."""
    store = common.Store(x, torch.ones(x.shape[:2]).bool() if mask is None else mask)
    return common.Activations(config(tsae, batch_size=1), None, 0, store, store)


def tiny_lm(kind="Llama", words=tuple(f"w{i}" for i in range(97)), layers=4, gain=5):
    """A random language model of an architecture, width 32, and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    transformers.utils.logging.disable_progress_bar()
    vocab = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    cfg = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocab), bos_token_id=0, eos_token_id=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, hidden_size=32, num_hidden_layers=layers, intermediate_size=64)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(cfg)
    for p in lm.parameters():              # larger weights: blocks and tokens differ visibly
        p.data.mul_(gain if p.dim() > 1 else 1)
    return loader.LM(lm, tokenizer, f"tiny-{kind}", "random", torch.device("cpu"), torch.float32)


words_lm = functools.partial(tiny_lm, words=WORDS, layers=3, gain=1)       # of the two languages


def saved_lm(here):
    """The tiny Llama in here/lm, for --model, and random words in here/t.jsonl, for --data."""
    if not (here / "lm").exists():
        lm, words = tiny_lm(), torch.randint(97, (12, 250), generator=common.generator(1, "words"))
        lm.model.save_pretrained(here / "lm")
        lm.tokenizer.save_pretrained(here / "lm")
        rows = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n" for row in words]
        (here / "t.jsonl").write_text("".join(rows))
    return ("--model", here / "lm", "--data", here / "t.jsonl", "--T", 16, "--tokens", 2048,
            "--heldout_tokens", 256, "--batch_size", 4, "--dtype", "float32")


def walk(letter, n, seed):
    """Text in which the next word follows from the last: x_i -> x_(i+1), with a start at random."""
    start = int(torch.randint(12, (1,), generator=common.generator(seed, f"walk{letter}{seed}")))
    return " ".join(f"{letter}{(start + i) % 12}" for i in range(n))


def make_acts(lm, layer=1, T=16):
    """Activations of a tiny model's block on both languages, harvested by the real stores."""
    tokens, lengths = texts.make_windows([walk("ab"[i % 2], T, i) for i in range(8)], lm, T, 8)
    store = common.Store(None, None, lm, layer, tokens, lengths)
    return common.Activations(config(tsae, T=T, layer=str(layer)), lm, layer, store, store)


@contextlib.contextmanager
def data_folder(**files):
    """A made-up data/ folder instead of the bundled one: name -> rows of <name>.jsonl.xz."""
    with folder() as here, replaced(texts, "HERE", here), replaced(common, "HERE", here):
        (here / "data").mkdir()
        for name, rows in files.items():
            with lzma.open(here / "data" / f"{name}.jsonl.xz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        yield
