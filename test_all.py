"""Every test. `python test_all.py` runs all, `python test_all.py tsae resume` those whose name holds a word,
`python test_all.py exercise_3` one exercise's check; the same file passes under pytest.

Order: maths by hand · language models and text · data and buffer · run folder and resume · command line and
bad input · tsae · mtsae · temporal_lens · hierarchical · evaluation · real model · hygiene · exercises.
Tests of the real model are skipped, with the reason printed, where its weights cannot be had.
"""
import ast
import base64
import contextlib
import dataclasses
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import hierarchical_sae
import mtsae
import temporal_lens
import tsae

HERE = Path(__file__).resolve().parent
SCRIPTS = ("mtsae", "hierarchical_sae", "tsae", "temporal_lens")


# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


class Skip(Exception):
    """Raised by skip(): the test cannot run here, with the reason."""


def skip(reason):
    if "pytest" in sys.modules:
        import pytest
        pytest.skip(reason)
    raise Skip(reason)


@contextlib.contextmanager
def folder():
    """A temporary working directory."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as path:
        os.chdir(path)
        try:
            yield Path(path)
        finally:
            os.chdir(before)


REAL_PLOT = common.plot_training


def run(module, *flags, curve=False):
    """module.main(flags) with its output caught -> (exit status, stdout, stderr); the curve takes a second."""
    out, err = io.StringIO(), io.StringIO()
    common.plot_training = REAL_PLOT if curve else lambda folder: None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = module.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


TINY = ("--model", "synthetic", "--tokens", 4096, "--heldout_tokens", 1024, "--T", 32, "--batch_size", 4,
        "--cache", "none", "--save_every", 10)


def tiny(module, out, steps=30, *flags):
    """Train on a small synthetic set; returns the run folder's eval.json."""
    status, _, err = run(module, *TINY, "--steps", steps, "--out", out, *flags)
    assert status == 0, err
    return json.loads((Path(out) / "eval.json").read_text())


def config(module, **values):
    """A Config with the small synthetic sizes."""
    base = dict(model="synthetic", tokens=4096, heldout_tokens=1024, T=32, batch_size=4, steps=30, cache="none")
    names = module.Config.__dataclass_fields__
    return module.Config(**{k: v for k, v in {**base, **values}.items() if k in names})


def tiny_lm(kind="llama"):
    """A random language model of one architecture with 4 blocks and width 32, and a word tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(97)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>",
                                                     eos_token="<eos>", unk_token="<unk>")
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, bos_token_id=0,
                 eos_token_id=1)
    if kind == "llama":
        cfg = transformers.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
    elif kind == "gemma2":
        cfg = transformers.Gemma2Config(**sizes, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    elif kind == "neox":
        cfg = transformers.GPTNeoXConfig(**sizes, intermediate_size=64)
    else:
        cfg = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    with torch.no_grad():                           # larger weights, so that blocks and tokens differ visibly
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return common.LM(model, tokenizer, f"tiny-{kind}", "random", torch.device("cpu"), torch.float32)


def saved_lm(path):
    """The tiny Llama and its tokenizer in a folder that --model can take."""
    lm = tiny_lm()
    import transformers
    transformers.utils.logging.disable_progress_bar()
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


def some_text(path, n=3000, documents=12):
    """A jsonl file of random words."""
    gen = torch.Generator().manual_seed(1)
    with open(path, "w") as file:
        for _ in range(documents):
            words = torch.randint(3, 100, (n // documents,), generator=gen).tolist()
            file.write(json.dumps({"text": " ".join(f"w{w - 3}" for w in words)}) + "\n")
    return path


# ---------------------------------------------------------------------------------------------
# Maths by hand
# ---------------------------------------------------------------------------------------------


def test_core_metrics_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    x_hat = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    f = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.0, 0.5], [7.0, 7.0, 7.0]]])
    mask = torch.tensor([[True, True, False]])
    m = common.core_metrics([(x, x_hat, f, mask)])
    # errors 1 and 1; mean (0.5, 1); squared distances to it 1.25 and 1.25
    assert abs(m["EV"] - (1 - 2 / 2.5)) < 1e-9
    assert abs(m["MSE"] - 0.5) < 1e-9                      # 2 / (2 tokens * 2 dimensions)
    assert m["L0"] == 1.5 and m["L1"] == 1.75 and m["tokens"] == 2
    assert abs(m["l2_ratio"] - (math.sqrt(2) / 1 + 1 / 2) / 2) < 1e-9
    assert abs(m["cosine"] - (1 / math.sqrt(2) + 1) / 2) < 1e-9
    assert abs(m["relative_reconstruction_bias"] - ((2 + 1) / 2) / ((1 + 2) / 2)) < 1e-9
    assert abs(m["dead"] - 1 / 3) < 1e-9
    bench = m["saebench"]
    assert abs(bench["explained_variance_legacy"] - (1 - 1 / 1.25)) < 1e-9
    assert abs(bench["explained_variance"] - (1 - 1 / (2.5 - 1.25 ** 2))) < 1e-9
    assert abs(bench["mse"] - 0.5) < 1e-9                  # 1 / 2 tokens, averaged over tokens
    assert abs(bench["frac_alive"] - 2 / 3) < 1e-9


def test_core_metrics_do_not_depend_on_batches():
    gen = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(6, 8, 5, generator=gen), torch.randn(6, 8, 5, generator=gen)
    f = torch.rand(6, 8, 7, generator=gen)
    mask = torch.rand(6, 8, generator=gen) > 0.2
    whole = common.core_metrics([(x, x_hat, f, mask)])
    parts = common.core_metrics([(x[i:i + 2], x_hat[i:i + 2], f[i:i + 2], mask[i:i + 2]) for i in (0, 2, 4)])
    for name in ("EV", "MSE", "L0", "L1", "cosine", "l2_ratio", "dead", "relative_reconstruction_bias"):
        assert abs(whole[name] - parts[name]) < 1e-9, name
    # SAEBench's depends on the batch size: that is why ours stands beside it
    assert abs(whole["saebench"]["mse"] - parts["saebench"]["mse"]) > 1e-3


def saebench():
    """Tensors and values that SAEBench 0.6.0's own code computed (data/fixtures/README.md)."""
    path = HERE / "data" / "fixtures"
    return common.load_tensors(path / "saebench.safetensors")[0], json.loads((path / "saebench.json").read_text())


def close(ours, theirs, name, tolerance=1e-5):
    assert abs(ours - theirs) <= tolerance * max(1e-3, abs(theirs)), (name, ours, theirs)


def test_core_metrics_equal_saebench():
    tensors, values = saebench()

    def batches(parts, masked=True, zero=False):
        for i in parts:
            x, x_hat, f, mask = (tensors[f"core.{i}.{k}"] for k in ("x", "x_hat", "f", "mask"))
            mask = mask.bool() if masked else torch.ones_like(mask).bool()
            yield x, x_hat * (not zero), f * (not zero), mask
    W_enc, W_dec = tensors["core.sae.W_enc"], tensors["core.sae.W_dec"]
    for name, got in (("core", common.core_metrics(batches((0, 1, 2)), W_dec, W_enc)),
                      ("core_batch_0_only", common.core_metrics(batches((0,)), W_dec, W_enc)),
                      ("core_no_mask", common.core_metrics(batches((0, 1, 2), masked=False), W_dec, W_enc))):
        for metric, value in {**values[name]["metrics"], **values[name]["misc"]}.items():
            close(got["saebench"][metric], value, (name, metric))
    zero = common.core_metrics(batches((0, 1, 2), zero=True))["saebench"]
    for metric, value in values["core_zero_sae"]["metrics"].items():
        assert (math.isnan(zero[metric]) if value == "nan" else abs(zero[metric] - value) < 1e-5), metric


def test_splice_scores_equal_saebench():
    tensors, values = saebench()
    for name, parts in (("recon", ("0", "1", "2")), ("recon_specials_spliced", ("0",)), ("recon_zero_sae", ("0",)),
                        ("recon_underflow", ("0",))):
        sums = {}
        for i in parts:
            t = {k: tensors[f"{name}.{i}.{k}"] for k in ("tokens", "logits_orig", "logits_spliced", "logits_ablated")}
            tokens = t["tokens"].long()
            part = common.splice_sums(t["logits_orig"], t["logits_spliced"], t["logits_ablated"], tokens,
                                      tokens > 2, torch.ones_like(tokens).bool())     # 0, 1, 2: BOS, PAD, EOS
            sums = {k: sums.get(k, 0) + v for k, v in part.items()}
        got = common.splice_scores(sums)
        for metric, value in values[name]["metrics"].items():
            if value == "nan":                             # SAEBench: log(softmax) underflows; ours does not
                assert math.isfinite(got[metric])
            else:
                close(got[metric], value, (name, metric))


def test_max_cosine_in_blocks():
    W = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    full = F.normalize(W, dim=1) @ F.normalize(W, dim=1).t()
    full.fill_diagonal_(-1)
    assert torch.allclose(common.max_cosine(W, block=7), full.max(1).values, atol=1e-6)


def test_temporal_metrics_by_hand():
    class Passthrough(nn.Module):
        def forward(self, x, mask=None):
            return x, x

    class Acts:
        T = 4

        def heldout(self):
            f = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
            yield f, torch.ones(1, 4, dtype=torch.bool)
    m = common.temporal(Passthrough(), Acts())
    assert abs(m["neighbour_cosine"] - 2 / 3) < 1e-6       # cosines 1, 0, 1
    assert abs(m["total_variation"] - (2 / 3) / 1.0) < 1e-6
    assert m["span"] == 2.0
    # values +-0.5 about the mean: products over lag 1 are .25, -.25, .25 a feature -> mean 1/12 over 1/4
    assert abs(m["autocorrelation"]["1"] - 1 / 3) < 1e-6
    assert abs(m["autocorrelation"]["2"] + 1.0) < 1e-6
    # means of blocks of 2 tokens carry everything: (1, 0), (0, 1) about (.5, .5)
    assert m["variance_share"] == {"1": 0.0, "2": 1.0, "mean": 0.0}


def test_temporal_metrics_skip_masked_tokens():
    gen = torch.Generator().manual_seed(0)
    f = (torch.rand(4, 11, 3, generator=gen) - 0.4).relu()
    mask = torch.rand(4, 11, generator=gen) > 0.3

    class Same(nn.Module):
        def forward(self, x, mask=None):
            return x, x

    class Acts:
        T = 11

        def __init__(self, x):
            self.x = x

        def heldout(self):
            yield self.x, mask
    got = common.temporal(Same(), Acts(f))
    assert got == common.temporal(Same(), Acts(torch.where(mask[..., None], f, 99.0)))
    mean = f[mask].mean(0)
    for lag in (1, 2, 4):
        a, b = (v[mask[:, lag:] & mask[:, :-lag]] for v in (f[:, :-lag], f[:, lag:]))
        want = ((a - mean) * (b - mean)).sum(1).mean() / (f[mask] - mean).square().sum(1).mean()
        assert abs(got["autocorrelation"][str(lag)] - want) < 1e-5
        if lag == 1:
            assert abs(got["neighbour_cosine"] - F.cosine_similarity(a, b, dim=1).mean()) < 1e-5


def test_no_scored_held_out_token_is_one_sentence():
    class Acts:
        T, lm = 4, None

        def __init__(self, mask):
            self.mask = mask

        def heldout(self):
            yield torch.ones(1, 4, 2), self.mask
    sae = LinearSAE(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
    for metrics in (common.core, common.temporal):
        try:
            metrics(sae, Acts(torch.zeros(1, 4, dtype=torch.bool)))
        except common.UserError as error:
            assert "no scored held-out token" in str(error)
        else:
            raise AssertionError(metrics)
    alone = common.temporal(sae, Acts(torch.tensor([[True, False, True, False]])))      # tokens, but no pair of them
    assert alone["neighbour_cosine"] == 0 and alone["span"] == 1


def test_splice_counts_and_replaces_scored_positions_only():
    gen = torch.Generator().manual_seed(0)
    h, mask = torch.randn(2, 6, 4, generator=gen), torch.rand(2, 5, generator=gen) > 0.4
    out, keep = common.reconstruct_edit(lambda x, mask: (x * 0, x), mask)(h), ~F.pad(mask, (1, 0))
    assert torch.equal(out[keep], h[keep]) and (out[~keep] == 0).all() and keep[:, 1:].any()
    counted = torch.arange(6) < torch.tensor([[6], [4]])                  # the second window ends in padding
    full = counted.clone()
    full[:, 0] = False
    sums = common.splice_sums(*torch.randn(3, 2, 6, 7, generator=gen), torch.zeros(2, 6).long(), full, counted)
    assert sums["ce_tokens"] == 4 + 2 and sums["kl_tokens"] == 5 + 3


def test_time_scales_add_up_to_the_explained_variance():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(6, 21, 5, generator=gen) + 3 * torch.randn(6, 1, 5, generator=gen)
    mask = torch.rand(6, 21, generator=gen) < 0.7
    parts = common.time_scales(x, mask)
    assert len(parts) == 6 and (parts > 0).all()                       # blocks of 1, 2, 4, 8, 16 tokens, the mean
    assert torch.isclose(parts.sum(), x[mask].double().square().sum())
    constant = torch.ones(2, 21, 5)                                    # nothing changes: all in the last part
    assert torch.allclose(common.time_scales(constant, mask[:2])[:-1], torch.zeros(5, dtype=torch.float64))
    ends = torch.tensor([1.0, -1.0]).repeat(8)[None, :, None]          # changes at every token: all in the first
    assert torch.allclose(common.time_scales(ends, torch.ones(1, 16, dtype=torch.bool))[1:].sum(), torch.tensor(0.0).double())

    class Shrink(nn.Module):                                           # explains a part of every scale
        W_dec = torch.eye(5)

        def forward(self, x, mask=None):
            return 0.9 * x, x.relu()

    class Acts:
        T, mean = 21, x[mask].mean(0)

        def heldout(self):
            return iter([(x, mask)])
    m = common.temporal(Shrink(), Acts())
    mixed = sum(m["EV_by_scale"][k] * m["variance_share"][k] for k in m["EV_by_scale"])
    assert abs(mixed - common.reconstruction(Shrink(), Acts())["EV"]) < 1e-6


# ---------------------------------------------------------------------------------------------
# Language models and text
# ---------------------------------------------------------------------------------------------


def test_hidden_states_of_four_architectures():
    for kind in ("llama", "gemma2", "neox", "gpt2"):
        lm = tiny_lm(kind)
        tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            want = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states
        calls = []
        handle = lm.blocks[3].register_forward_hook(lambda *_: calls.append(1))
        got = common.hidden_states(lm, tokens, [0, 2])
        handle.remove()
        assert set(got) == {0, 2} and not calls, f"{kind}: a block behind the deepest layer ran"
        for layer, h in got.items():                        # hidden_states[0] is the embedding
            assert torch.allclose(h, want[layer + 1], atol=1e-5), (kind, layer)
        last = common.hidden_states(lm, tokens, [3])[3]     # transformers norms its last entry; we do not
        assert not torch.allclose(last, want[4], atol=1e-3), kind


def test_dtype_follows_the_cpu_not_the_clock():
    with folder():
        for flags, units, dtype in (("fpu avx512f avx512_bf16 amx_bf16 bf16x", "amx_bf16, avx512_bf16", torch.bfloat16),
                                    ("fpu avx2", "", torch.float32), ("fp asimd bf16", "bf16", torch.bfloat16)):
            Path("cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
            assert common.bf16_units("cpuinfo") == units
            with replaced(common, "bf16_units", lambda: units):
                assert common.pick_dtype("auto", torch.device("cpu"))[0] == dtype
        assert common.bf16_units("nothing") is None
        with replaced(common, "bf16_units", lambda: None):
            assert "of the fp32 speed" in common.pick_dtype("auto", torch.device("cpu"))[1]


def test_intervene_identity_and_effect():
    for kind in ("llama", "gemma2", "neox", "gpt2"):
        lm = tiny_lm(kind)
        tokens = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = lm.model(input_ids=tokens).logits
            with common.intervene(lm, 1, lambda h: h):
                same = lm.model(input_ids=tokens).logits
            with common.intervene(lm, 1, lambda h: h * 0):
                other = lm.model(input_ids=tokens).logits
            again = lm.model(input_ids=tokens).logits
        assert torch.equal(plain, same) and torch.equal(plain, again) and not torch.allclose(plain, other), kind


def test_windows_never_cross_documents():
    lm = tiny_lm()
    texts = [" ".join(["w1"] * 70), " ".join(["w2"] * 10), " ".join(["w3"] * 20)]
    tokens, lengths = common.make_windows(texts, lm, 32, 100)
    assert lengths.tolist() == [32, 32, 20]                 # 6 tokens of text 1 and all of text 2 are too few
    assert (tokens[:, 0] == lm.bos).all() and tokens.shape == (3, 33)
    for row, length in zip(tokens, lengths):
        assert len(row[1:].unique()) == 1                   # one document each; the tail repeats its last token


def test_scored_mask():
    lm = tiny_lm()
    tokens = torch.tensor([[0, 5, 1, 7, 8, 8]])             # BOS, word, EOS, word, word, padding
    x = torch.ones(1, 5, 4)
    x[0, 3] = 100                                           # a sink
    mask = common.scored_mask(x, tokens, torch.tensor([4]), lm.special, threshold=20.0)
    assert mask.tolist() == [[True, False, True, False, False]]


def test_documents_of_a_path_are_split():
    with folder() as here:
        (here / "a.txt").write_text("".join(f"line {i} of the file\n" for i in range(6000)))
        (here / "b.txt").write_text("short\n" * 3)
        cfg = config(tsae, data=str(here))
        train, held = list(common.documents(cfg, "train")), list(common.documents(cfg, "heldout"))
        assert train and held and not set(train) & set(held)
        assert "".join(sorted(train + held)).count("line") == 6000


# ---------------------------------------------------------------------------------------------
# Data and buffer
# ---------------------------------------------------------------------------------------------


def open_tiny(here, **values):
    """Activations of the tiny Llama on random text."""
    values = {**dict(model=str(here / "lm"), layer="1,2", data=str(here / "text.jsonl"), cache=str(here / "cache"),
                     tokens=2048, heldout_tokens=256, T=16, batch_size=4, buffer=16, preset="paper", lm_batch=8), **values}
    if not (here / "lm").exists():
        saved_lm(here / "lm")
        some_text(here / "text.jsonl")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        acts = list(common.open_activations(tsae.Config(**values)))
    return acts, out.getvalue()


def test_cached_and_live_batches_agree():
    with folder() as here:
        cached, _ = open_tiny(here)
        live, _ = open_tiny(here, cache="none")
        assert [a.layer for a in cached] == [1, 2] and cached[0].D == 32
        for a, b in zip(cached, live):
            assert abs(a.scale - b.scale) < 1e-3 and torch.allclose(a.mean, b.mean, atol=1e-3)
            for step in (0, 3, 4, 70):                       # within a buffer, across buffers, across epochs
                (x, mask), = a.batch(step)
                (y, other), = b.batch(step)
                assert torch.equal(mask, other) and torch.allclose(x, y, atol=2e-2), step


def test_batches_visit_every_window_once_an_epoch():
    with folder() as here:
        (acts, _), _ = open_tiny(here, batch_size=4)
        n = acts.train_store.N
        order = acts.order(torch.arange(3 * n))
        for epoch in range(3):
            assert sorted(order[epoch * n:(epoch + 1) * n].tolist()) == list(range(n))
        assert order[:n].tolist() != order[n:2 * n].tolist()
        again, _ = open_tiny(here, batch_size=4)
        assert torch.equal(acts.batch(9)[0][0], again[0].batch(9)[0][0])


def test_scale_makes_mean_norm_sqrt_d():
    with folder() as here:
        (acts, _), _ = open_tiny(here, buffer=2048)
        x = torch.cat([(acts.train_store.x[i].float() / acts.scale)[acts.train_store.mask[i]]
                       for i in range(acts.train_store.N)])
        assert abs(x.norm(dim=1).mean() - math.sqrt(32)) < 1e-2


def test_cache_is_used_and_repaired():
    with folder() as here:
        _, first = open_tiny(here)
        _, second = open_tiny(here)
        assert "cache:" not in first and second.count("cache: ") == 2
        big = next((here / "cache").glob("train-*/L1.bf16"))
        os.truncate(big, big.stat().st_size - 10)
        _, third = open_tiny(here)
        assert "truncated" in third and "harvesting layer 1 again" in third
        windows = next((here / "cache").glob("train-*/windows.safetensors"))
        windows.write_bytes(b"not a safetensors file")
        acts, fourth = open_tiny(here)
        assert "not usable" in fourth and acts[0].train_store.N == common.load_tensors(windows)[0]["tokens"].shape[0]


def test_held_out_and_training_windows_are_disjoint():
    with folder() as here:
        (acts, _), _ = open_tiny(here)
        train = {tuple(row.tolist()) for row in acts.train_store.tokens}
        held = {tuple(row.tolist()) for row in acts.heldout_store.tokens}
        assert held and not train & held


def test_heldout_with_sink_has_position_0():
    with folder() as here:
        (acts, _), _ = open_tiny(here, dtype="float32")
        x, mask = next(iter(acts.heldout_with_sink()))
        want = common.hidden_states(acts.lm, torch.tensor([[acts.lm.bos]]), [1])[1][0, 0]
        assert x.shape[1] == acts.T + 1 and mask[:, 0].all() and torch.allclose(x[0, 0], want, atol=1e-4)
        (live, _), _ = open_tiny(here, cache="none", dtype="float32")
        assert torch.allclose(next(iter(live.heldout_with_sink()))[0][0, 0], want, atol=1e-4)


def test_splice_of_a_perfect_and_of_a_zero_sae():
    class Fake(nn.Module):
        causal = True

        def __init__(self, keep):
            super().__init__()
            self.keep, self.W_dec = keep, torch.eye(32)

        def forward(self, x, mask=None):
            return (x if self.keep else x * 0), F.relu(x)
    with folder() as here:
        (acts, _), _ = open_tiny(here)
        perfect = common.splice_metrics(Fake(True), acts)
        broken = common.splice_metrics(Fake(False), acts)
        assert abs(perfect["ce_loss_score"] - 1) < 1e-4 and abs(perfect["kl_div_with_sae"]) < 1e-5
        store = acts.heldout_store
        mask, place = store.get(torch.arange(min(16, store.N)), "cpu")[1], torch.arange(2, acts.T + 1)
        scored = mask[:, :-1] & (place <= store.lengths[:len(mask), None])      # a scored token, a real next one
        assert perfect["ce_tokens"] == scored.sum()
        assert broken["kl_div_with_sae"] > 1e-3 and broken["ce_loss_with_sae"] != perfect["ce_loss_with_sae"]


# ---------------------------------------------------------------------------------------------
# Run folder and resume
# ---------------------------------------------------------------------------------------------


def test_weights_round_trip():
    with folder():
        tiny(tsae, "a")
        cfg = json.loads(Path("a/config.json").read_text())
        sae = tsae.TSAE(64, tsae.Config(**cfg["config"]))
        tensors, _ = common.load_tensors("a/sae_weights.safetensors")
        sae.load_state_dict(tensors)
        peers = json.loads(Path("a/cfg.json").read_text())
        assert peers["d_in"] == 64 and peers["d_sae"] == 64 and {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(tensors)
        x = torch.randn(2, 32, 64)
        f = sae.encode(x)
        again = tsae.TSAE(64, tsae.Config(**cfg["config"]))
        again.load_state_dict(common.load_tensors("a/sae_weights.safetensors")[0])
        assert torch.equal(sae.decode(f), again.decode(again.encode(x)))
        status, out, _ = run(tsae, "--run", "a", "--eval", "temporal")       # evaluation alone
        assert status == 0 and "temporal.span" in out


def killed_and_resumed(script, *flags):
    """kill -9 a run in the middle, resume it, and compare with an uninterrupted run byte for byte."""
    with folder() as here:
        command = [sys.executable, str(HERE / f"{script}.py"), *map(str, TINY), "--steps", "60", "--overwrite",
                   *map(str, flags)]
        env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
        process = subprocess.Popen(command + ["--out", "killed"], **quiet)
        checkpoint, deadline = here / "killed/checkpoint.safetensors", time.time() + 900
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.kill()                                     # SIGKILL: nothing can be saved on the way out
        error = process.communicate()[1].decode()[-500:]
        assert not (here / "killed/eval.json").exists(), "the run ended before it could be killed"
        assert checkpoint.exists(), f"no checkpoint in {time.time() + 900 - deadline:.0f} s: {error}"
        steps_done = len((here / "killed/log.jsonl").read_text().splitlines())
        for args in (["--resume", "killed"], ["--out", "whole"]):
            done = subprocess.run(command + args if "whole" in args else command[:2] + args, **quiet)
            assert done.returncode == 0, done.stderr.decode()[-500:]
        for name in ("log.jsonl", "sae_weights.safetensors"):
            assert (here / "killed" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
        assert steps_done < len((here / "whole/log.jsonl").read_text().splitlines()) + 1
        times = [json.loads(line) for line in (here / "killed/timing.jsonl").read_text().splitlines()]
        steps, seconds = ([row[key] for row in times] for key in ("step", "seconds"))
        assert steps == sorted(set(steps)) and seconds == sorted(seconds)     # both parts, each step once
        total = json.loads((here / "killed/eval.json").read_text())["train_seconds"]
        assert total >= seconds[-1] - 0.1, "the seconds before the kill are not counted"


def test_killed_run_resumes_exactly():
    killed_and_resumed("tsae", "--warmup", 40, "--log_every", 1)


def test_same_command_same_bytes():
    with folder() as here:
        for out in ("a", "b"):
            tiny(tsae, out, 20)
        assert (here / "a/log.jsonl").read_bytes() == (here / "b/log.jsonl").read_bytes()
        tiny(tsae, "c", 20, "--seed", 7)
        assert (here / "a/log.jsonl").read_bytes() != (here / "c/log.jsonl").read_bytes()


def test_micro_batches_add_up():
    with folder():
        tiny(tsae, "split", 10, "--log_every", 1, "--temporal_scale", 50, "--micro_batch", 2)
        tiny(tsae, "whole", 10, "--log_every", 1, "--temporal_scale", 50)
        rows = {name: [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]
                for name in ("split", "whole")}
        for a, b in zip(rows["split"], rows["whole"]):
            assert abs(a["loss"] - b["loss"]) < 1e-4 * abs(b["loss"])


def test_fused_adamw_is_adamw_on_transposed_parameters():
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    ends = []
    for fused in (False, True):
        p = nn.Parameter(W.t().clone())                      # as W_enc: in the decoder's memory order
        opt = torch.optim.AdamW([p], lr=1e-2, fused=fused)
        for _ in range(5):
            opt.zero_grad()
            (x @ p).relu().square().sum().backward()
            opt.step()
        ends.append(p.detach().clone())
    assert torch.allclose(*ends, atol=1e-5) and not torch.allclose(ends[0], W.t(), atol=1e-2)


def test_ctrl_c_saves_and_says_how_to_resume():
    with folder() as here:
        command = [sys.executable, str(HERE / "tsae.py"), *map(str, TINY), "--steps", "100000", "--save_every", "1000000",
                   "--out", "run"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (here / "run/log.jsonl").exists() or (here / "run/log.jsonl").stat().st_size < 300:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "--resume run" in err and "Traceback" not in err
        assert (here / "run/checkpoint.safetensors").exists()


def test_two_processes_equal_one():
    """torchrun with gloo: the same losses as one process with the same global batch, for each script."""
    cases = [("tsae",), ("temporal_lens",), ("mtsae",), ("mtsae", "--variant", "unlearning"),
             ("hierarchical_sae", "--gru_divisor", "4")]
    flags = [*map(str, TINY), "--steps", "50", "--log_every", "1", "--eval", "none", "--dtype", "float32"]
    with folder() as here:                                 # in bf16 the order of a sum shows earlier
        (here / "both.py").write_text(
            "import importlib, json, sys\n"
            "for out, script, argv in json.loads(sys.argv[1]):\n"
            "    assert importlib.import_module(script).main(argv + ['--out', out]) == 0, out\n")
        jobs = [(f"two{i}", case[0], [*flags, *case[1:]]) for i, case in enumerate(cases)]
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               str(here / "both.py"), json.dumps(jobs)], capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        for i, (_, script, argv) in enumerate(jobs):
            status, _, err = run(sys.modules[script], *argv, "--out", f"one{i}")
            assert status == 0, err
            one, two = ([json.loads(line) for line in Path(f"{n}{i}/log.jsonl").read_text().splitlines()]
                        for n in ("one", "two"))
            assert len(one) == len(two) == 50
            for a, b in zip(one, two):
                difference = abs(a["loss"] - b["loss"])
                assert difference <= 1e-4 * abs(a["loss"]), (cases[i], a["step"], a["loss"], b["loss"])


# ---------------------------------------------------------------------------------------------
# Command line and bad input: one clear sentence, exit status 2, nothing lost
# ---------------------------------------------------------------------------------------------


def refused(*flags, words=(), module=tsae):
    status, _, err = run(module, *flags)
    assert status == 2, (flags, status, err)
    assert "Traceback" not in err
    for word in words:
        assert word in err, (word, err)


def test_bad_flags():
    refused("--lair", "19", words=["unrecognized"])
    refused("--laye", "19", words=["unrecognized"])            # abbreviations are refused too
    refused("--activation", "tanh", words=["topk"])
    refused(*TINY, "--k", 65, words=["64 features"])
    refused(*TINY, "--k", 0, words=["positive"])
    refused(*TINY, "--batch_size", -1, words=["positive"])
    refused(*TINY, "--steps", -5, words=["steps"])
    for script in (tsae, mtsae, temporal_lens, hierarchical_sae):
        refused(*TINY, "--T", 1, words=["--T", "2 tokens"], module=script)
    refused(*TINY, "--eval", "nothing", words=["--eval knows"])
    refused(*TINY, "--layer", "x", words=["block numbers"])
    refused(*TINY, "--layer", "-1", words=["from 0"])
    if not torch.cuda.is_available():
        refused(*TINY, "--device", "cuda", words=["no CUDA GPU"])


def test_bad_model_and_layer():
    with folder() as here:
        saved_lm(here / "lm")
        some_text(here / "t.jsonl")
        refused("--model", here / "lm", "--data", here / "t.jsonl", "--layer", 4, words=["blocks 0 to 3"])
        os.environ["HF_HUB_OFFLINE"] = "1"
        start = time.time()
        refused("--model", "no-such/model", "--data", here / "t.jsonl", words=["no-such/model", "--model auto"])
        assert time.time() - start < 20


def test_bad_text():
    with folder() as here:
        saved_lm(here / "lm")
        base = ("--model", here / "lm", "--layer", 1, "--T", 16)
        (here / "empty.txt").write_text("")
        (here / "short.txt").write_text("w1 w2 w3")
        (here / "binary.txt").write_bytes(bytes(range(256)) * 20)
        (here / "nul.txt").write_bytes(b"w1 w2\0w3 " * 50)
        (here / "bad.jsonl").write_text('{"txt": 1}\n')
        for name, word in (("missing.txt", "does not exist"), ("empty.txt", "holds no text"), ("short.txt", "too short"),
                           ("binary.txt", "not UTF-8"), ("nul.txt", "binary"), ("bad.jsonl", "field 'text'")):
            refused(*base, "--data", here / name, words=[word])


def test_existing_runs_are_not_lost():
    with folder() as here:
        tiny(tsae, "a", 12)
        before = (here / "a/sae_weights.safetensors").read_bytes()
        refused(*TINY, "--steps", 12, "--out", "a", words=["already holds a finished run", "--overwrite"])
        refused("--resume", "a", words=["is finished"])
        refused("--run", "nowhere", words=["does not exist"])
        assert (here / "a/sae_weights.safetensors").read_bytes() == before
        (here / "a/eval.json").unlink()                    # as if it had been killed in its evaluation
        (here / "a/checkpoint.safetensors").write_bytes(before[:-50])
        refused("--resume", "a", words=["truncated"])      # never silently restarted
        (here / "a/checkpoint.safetensors").write_bytes(before)
        refused("--resume", "a", words=["not a checkpoint"])
        refused("--resume", "a", "--lr", "1", words=["keeps its settings"])


def test_full_disk_is_one_sentence():
    with folder():
        write = common.write_atomic

        def full(path, data):
            raise OSError(28, "No space left on device", str(path))
        common.write_atomic = full
        try:
            refused(*TINY, "--steps", 12, "--out", "a", words=["disk is full", "--resume"])
        finally:
            common.write_atomic = write


def test_non_finite_loss_names_the_term():
    with folder():
        refused(*TINY, "--steps", 30, "--out", "a", "--l1", "nan", words=["'l1'", "is nan"])


# ---------------------------------------------------------------------------------------------
# tsae.py
# ---------------------------------------------------------------------------------------------


def naive_temporal(f, mask, cfg):
    """Eq. 2's temporal term as printed: a double loop over lags and positions."""
    B, T, n_features = f.shape
    out = f.new_zeros(())
    for b in range(B):
        m = mask[b]
        centred = f[b] - f[b][m].mean(0)
        variance = centred[m].pow(2).mean(0).detach()
        variance = torch.where(variance < cfg.min_variance, torch.zeros_like(variance), variance)
        weight = {"off": torch.ones_like(variance), "printed": variance / variance.sum(),
                  "mean": n_features * variance / variance.sum()}[cfg.variance_weights]
        for first, last, value in ((1, 3, cfg.lambda_short), (4, 15, cfg.lambda_medium), (16, 127, cfg.lambda_long)):
            for lag in range(first, last + 1):
                for t in range(T - lag):
                    if m[t] and m[t + lag]:
                        per_lag = value / (last - first + 1) if cfg.lag_reduction == "mean" else value
                        out = out + per_lag * (weight * (f[b, t + lag] - f[b, t]).pow(2)).sum()
    return out


def test_tsae_temporal_loss_equals_the_double_loop():
    gen = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 24, generator=gen) > 0.15
    for weights in ("printed", "mean", "off"):
        for reduction in ("sum", "mean"):
            cfg = config(tsae, variance_weights=weights, lag_reduction=reduction)
            f = torch.rand(2, 24, 6, generator=gen, dtype=torch.float64).float().requires_grad_()
            g = f.detach().clone().double().requires_grad_()
            fast, slow = tsae.temporal_loss(f, mask, cfg), naive_temporal(g, mask, cfg)
            fast.backward(), slow.backward()
            assert abs(fast - slow) < 1e-5 * slow, (weights, reduction)
            assert torch.allclose(f.grad.double(), g.grad, atol=1e-6, rtol=1e-4)
            assert (f.grad[~mask] == 0).all()


def test_tsae_temporal_loss_does_not_cancel():
    gen = torch.Generator().manual_seed(0)
    f = 100 + 0.01 * torch.randn(1, 64, 8, generator=gen)
    mask = torch.ones(1, 64, dtype=torch.bool)
    cfg = config(tsae, variance_weights="off")
    slow = naive_temporal(f.double(), mask, cfg)
    assert abs(tsae.temporal_loss(f, mask, cfg) - slow) < 1e-3 * slow


def test_tsae_schedules():
    cfg = config(tsae, warmup=2000)
    assert [tsae.recon_boost(s, cfg) for s in (0, 999, 1000, 1500, 2000, 5000)] == [2, 2, 2, 1.5, 1, 1]
    assert [tsae.temporal_ramp(s, cfg) for s in (0, 1000, 2000, 3000)] == [0, 0.5, 1, 1]
    assert tsae.noise_level(0, cfg) == 0.01 and tsae.noise_level(2000, cfg) == 0 == tsae.noise_level(3000, cfg)
    assert tsae.lr_factor(0, cfg) == 1 / 1000 and tsae.lr_factor(999, cfg) == 1 == tsae.lr_factor(9999, cfg)


def test_tsae_buffers_and_noise_stop_after_warmup():
    cfg = config(tsae, warmup=10)
    sae = tsae.TSAE(8, cfg)
    f, mask = torch.rand(2, 32, 8), torch.ones(2, 32, dtype=torch.bool)
    before = sae.temporal_buffer.clone()
    assert torch.equal(sae.blend(f, mask, 10), f) and torch.equal(sae.temporal_buffer, before)
    assert torch.allclose(sae.blend(f, mask, 9), 0.75 * f + 0.25 * before)
    assert torch.equal(sae.temporal_buffer, before)
    sae.update_buffers()
    assert torch.allclose(sae.temporal_buffer, 0.75 * before + 0.25 * f.mean(0), atol=1e-6)
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    tsae.add_gradient_noise(sae, 10, cfg)
    assert all((p.grad == 1).all() for p in sae.parameters())
    tsae.add_gradient_noise(sae, 0, cfg)
    assert 0.005 < (sae.W_enc.grad - 1).std() < 0.015


def test_tsae_without_weights_is_the_standard_sae_bit_for_bit():
    with folder() as here:
        off = ("--temporal_scale", 0, "--layer_norm", "off", "--boost", 1, "--grad_noise", 0, "--no-buffers")
        tiny(tsae, "tsae", 20, *off)
        tiny(tsae, "standard", 20, "--no-temporal")
        a, b = (common.load_tensors(here / n / "sae_weights.safetensors")[0] for n in ("tsae", "standard"))
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_tsae_topk():
    pre = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-3.0, -1.0, -2.0, 0.5]])
    assert tsae.topk(pre, 2).tolist() == [[3, 0, 0, 5], [0, 0, 0, 0.5]]
    x = torch.randn(4, 8)
    assert torch.equal(tsae.topk(x, 8), F.relu(x))


def moved(module, *flags, steps=12):
    """Every parameter differs after a few steps, decoder rows have norm 1, the loss falls."""
    with folder():
        tiny(module, "a", 1, *flags)
        tiny(module, "b", steps, "--log_every", 1, "--lr", 3e-3, *flags)
        a, b = (common.load_tensors(f"{n}/sae_weights.safetensors")[0] for n in ("a", "b"))
        names = [k for k in a if a[k].dtype.is_floating_point and a[k].numel() > 1]
        still = [k for k in names if torch.equal(a[k], b[k])]
        assert torch.allclose(b["W_dec"].norm(dim=1), torch.ones(len(b["W_dec"])), atol=1e-5)
        log = [json.loads(line) for line in Path("b/log.jsonl").read_text().splitlines()]
        assert all(math.isfinite(row["loss"]) for row in log)
        return still, log


def test_tsae_every_parameter_moves_and_the_loss_falls():
    for flags in ((), ("--no-temporal",), ("--activation", "topk", "--k", 4), ("--layer_norm", "post")):
        still, log = moved(tsae, *flags, "--lr_warmup", 1, steps=40)
        assert not still, (flags, still)
        assert log[-1]["error"] < 0.9 * log[0]["error"], flags


def test_tsae_standard_recovers_known_features():
    with folder():
        status, _, err = run(tsae, "--no-temporal", "--model", "synthetic", "--out", "a", "--batch_size", 8)
        assert status == 0, err
        found = json.loads(Path("a/eval.json").read_text())["recovery"]
        assert found["mean_max_cosine"] > 0.8 > found["random_dictionary"] + 0.3, found


def test_tsae_reduction_collapse():
    with folder():
        good = tiny(tsae, "sum", 200, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--l1", 4)
        bad = tiny(tsae, "mean", 200, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--l1", 4, "--recon_reduction", "mean")
        assert good["core"]["L0"] > 3 and bad["core"]["L0"] < 0.1 * good["core"]["L0"]


# ---------------------------------------------------------------------------------------------
# mtsae.py
# ---------------------------------------------------------------------------------------------


def mts(variant="extraction", D=6, seed=0, **values):
    """An untrained MTSAE with random kernels, and its Config."""
    base = {**mtsae.VARIANTS[variant], "variant": variant, "T": 40, "k": 4, **values}
    cfg = config(mtsae, **{k: v for k, v in base.items() if k != "model"})
    sae = mtsae.MTSAE(D, cfg)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.kernels.copy_(0.5 * torch.randn(sae.kernels.shape, generator=gen))
        sae.b_enc.copy_(0.3 * torch.randn(sae.b_enc.shape, generator=gen))
        sae.scale.fill_(2.0)
    return sae, cfg


def mts_data(B=3, T=40, D=6, seed=1):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=gen) > 0.2
    return 2 * torch.randn(B, T, D, generator=gen), mask


def reference_branch(x, kernel, rate, causal=False):
    """One dilated depth-wise convolution by torch.nn.Conv1d: x (B, T, D), kernel (3, D)."""
    D = x.shape[-1]
    if causal:
        conv = nn.Conv1d(D, D, 3, dilation=rate, groups=D, bias=False)
        h = F.pad(x.transpose(1, 2), (2 * rate, 0))
    else:
        conv = nn.Conv1d(D, D, 3, dilation=rate, groups=D, bias=False, padding=rate, padding_mode="circular")
        h = x.transpose(1, 2)
    with torch.no_grad():
        conv.weight.copy_(kernel.t()[:, None])
    return conv(h).transpose(1, 2), conv


def test_mtsae_convolutions_equal_conv1d():
    """Eq. A.3: values and kernel gradients of the merged 7-tap filter, circular and causal."""
    for padding in ("circular", "causal"):
        sae, _ = mts(padding=padding, batch_norm="off")
        x, _ = mts_data()
        weight = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(3))
        h = sae.temporal(x)
        (h * weight).sum().backward()
        want, convs = x / 2, []
        for kernel, rate in zip(sae.kernels.detach(), (1, 4, 16)):
            branch, conv = reference_branch(x / 2, kernel, rate, padding == "causal")
            want = want + branch / 3
            convs.append(conv)
        assert torch.allclose(h, want, atol=1e-5), padding
        (want * weight).sum().backward()
        for grad, conv in zip(sae.kernels.grad, convs):
            assert torch.allclose(grad, conv.weight.grad[:, 0].t(), atol=1e-4), padding


def test_mtsae_paper_d_branches_equal_conv1d_and_layernorm():
    """Eq. D.2, D.3: one LayerNorm a branch, concatenated."""
    sae, _ = mts("unlearning")
    x, _ = mts_data()
    z = [F.layer_norm(reference_branch(x / 2, kernel, rate)[0], (6,)) for kernel, rate in zip(sae.kernels, (1, 2, 4, 8))]
    want = torch.cat(z, -1)
    assert sae.W_enc.shape == (24, 6)
    assert torch.allclose(sae.temporal(x), want, atol=1e-5)
    assert torch.allclose(sae.encode(x), F.relu(want @ sae.W_enc + sae.b_enc), atol=1e-5)


def test_mtsae_receptive_field_is_16_tokens_not_128():
    """The reach is the largest rate, 16, not 128; and a causal encoder never sees t + 1."""
    for padding, reach in (("circular", {24, 28, 30 - 1, 30, 31, 34, 14, 46 % 40}), ("causal", None)):
        sae, _ = mts(padding=padding, batch_norm="off")
        sae.b_enc.data.fill_(10.0)                          # every feature on: the code is linear
        x, _ = mts_data()
        y = x.clone()
        y[:, 20] += 1
        moved_at = set((sae.encode(x) - sae.encode(y)).abs().amax((0, 2)).gt(1e-5).nonzero().flatten().tolist())
        assert sae.causal == (padding == "causal")
        if padding == "causal":
            assert moved_at == {20 + r * i for r in (1, 4, 16) for i in (0, 1, 2) if 20 + r * i < 40}
        else:
            assert moved_at == {(20 + s * r) % 40 for r in (1, 4, 16) for s in (-1, 0, 1)}


def test_mtsae_masked_tokens_do_not_matter():
    for variant in ("extraction", "unlearning"):
        sae, _ = mts(variant)
        sae.eval()
        x, mask = mts_data()
        y = torch.where(mask[..., None], x, torch.full_like(x, 1e3))
        assert torch.allclose(sae.encode(x, mask)[mask], sae.encode(y, mask)[mask], atol=1e-5), variant


def test_mtsae_fill_masked():
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    mask = torch.tensor([[True, False, True, True, False, False]])
    assert mtsae.fill_masked(x, mask).flatten().tolist() == [1, 0, 3, 4, 4, 4]
    assert mtsae.fill_masked(x, ~mask & False).flatten().tolist() == [0] * 6


def test_mtsae_batch_norm_skips_masked_tokens():
    bn = mtsae.MaskedBatchNorm((6,), 0.1)
    h, mask = mts_data()
    y = bn(h, mask)[mask]
    assert torch.allclose(y.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(y.var(0, unbiased=False), torch.ones(6), atol=1e-3)
    assert torch.allclose(bn.running_mean, h[mask].mean(0), atol=1e-5)
    bn.eval()
    assert torch.allclose(bn(h)[mask], y, atol=1e-3)
    g = h.clone().requires_grad_()                          # gradient against torch's own batch norm
    bn.train()
    weight = torch.randn(h[mask].shape, generator=torch.Generator().manual_seed(0))
    (bn(g, mask)[mask] * weight).sum().backward()
    k = h.clone().requires_grad_()
    (F.batch_norm(k[mask], None, None, bn.weight, bn.bias, training=True) * weight).sum().backward()
    assert torch.allclose(g.grad[mask], k.grad[mask], atol=1e-4)


def test_mtsae_losses_by_hand():
    x, mask = mts_data()
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])
    sae, cfg = mts()
    terms, stats = mtsae.losses(sae, x, mask, n, 0, cfg)
    sae.eval()
    sae.bn.training = True
    h = sae.temporal(x, mask)
    f = sae.code(h)[0]
    error = ((sae.decode(f) - x) / 2)[mask].pow(2).sum(-1)
    both = mask[:, 1:] & mask[:, :-1]
    cosine = F.cosine_similarity(f[:, 1:], f[:, :-1], dim=-1)[both]
    assert abs(terms["recon"] - 2 * error.mean()) < 1e-4 * error.mean()
    assert abs(terms["l1"] - 0.04 * f[mask].sum(-1).mean()) < 1e-5
    assert abs(terms["coherence"] + 0.15 * cosine.mean()) < 1e-5
    assert abs(stats["active"] - (f[mask] > 0).sum(-1).float().mean()) < 1e-4
    sae, cfg = mts("unlearning")
    terms, _ = mtsae.losses(sae, x, mask, n, 0, cfg)
    z = sae.temporal(x, mask).unflatten(2, (4, 6))[mask]   # (n, 4, 6)
    pairs = [F.cosine_similarity(z[:, i], z[:, j], dim=-1).clamp(min=0) for i in range(4) for j in range(4) if i != j]
    error = ((sae(x, mask)[0] - x) / 2)[mask].norm(dim=-1)
    assert abs(terms["recon"] - error.mean()) < 1e-4 * error.mean()
    assert abs(terms["separation"] - 0.1 * torch.stack(pairs).mean()) < 1e-5


def test_mtsae_neighbour_cosine_gradient():
    f = torch.rand(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f[0, 3] = 0                                             # a token without features: cosine 0
    pair = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    a, b = f.clone().requires_grad_(), f.clone().requires_grad_()
    ours = mtsae.NeighbourCosine.apply(a, pair)
    keep = pair & (f[:, 1:].norm(dim=-1) > 0) & (f[:, :-1].norm(dim=-1) > 0)
    theirs = F.cosine_similarity(b[:, 1:], b[:, :-1], dim=-1)[keep].sum()
    ours.backward(), theirs.backward()
    assert abs(ours - theirs) < 1e-9 and torch.allclose(a.grad, b.grad, atol=1e-7)


def test_mtsae_schedules():
    cfg = config(mtsae, lr_warmup=1000)
    assert [mtsae.lr_factor(s, cfg, 4000) for s in (0, 999, 3999)] == [0.001, 1, 1]
    cfg = config(mtsae, lr_warmup=1000, schedule="cosine")
    assert mtsae.lr_factor(1000, cfg, 3000) == 1 and abs(mtsae.lr_factor(2000, cfg, 3000) - 0.5) < 1e-9
    assert mtsae.lr_factor(2999, cfg, 3000) < 1e-5
    cfg = config(mtsae, resample_every=1000)
    assert [s for s in range(3001) if mtsae.resample_due(s, cfg)] == [1000, 2000, 3000]


def test_mtsae_resampling_resets_the_right_rows():
    sae, cfg = mts(resample_every=5, dead_after=3)
    opt = torch.optim.AdamW(sae.parameters())
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    dead = torch.tensor([False, True, False, False, True, False])
    sae.inactive[dead] = 10
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    mtsae.resample(sae, opt, [mts_data()], 5, cfg)
    assert sae.resampled.tolist() == [0, 1, 0, 0, 1, 0] and (sae.inactive[dead] == 0).all()
    for name, rows in (("W_dec", lambda t: t), ("W_enc", lambda t: t.t()), ("b_enc", lambda t: t)):
        p = dict(sae.named_parameters())[name]
        assert (rows(before[name])[~dead] == rows(p)[~dead]).all(), name
        state = opt.state[p]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (rows(state[key])[dead] == 0).all() and (rows(state[key])[~dead] != 0).all(), (name, key)
    assert not torch.equal(before["W_dec"][dead], sae.W_dec[dead])
    assert torch.allclose(sae.W_dec.norm(dim=1)[dead], torch.ones(2), atol=1e-5)
    others = [p for n, p in sae.named_parameters() if n not in ("W_dec", "W_enc", "b_enc")]
    assert others and all((opt.state[p]["exp_avg"] != 0).all() for p in others)


def test_mtsae_every_parameter_moves_and_the_loss_falls():
    for flags in ((), ("--variant", "unlearning"), ("--batch_norm", "branch", "--padding", "causal"), ("--activation", "topk",
                                                                                                   "--k", 8)):
        still, log = moved(mtsae, *flags, "--lr_warmup", 1, steps=40)
        assert set(still) <= {"mean"}, (flags, still)
        assert log[-1]["error"] < 0.95 * log[0]["error"], flags


def test_mtsae_reduction_collapse():
    with folder():
        flags = ("--lr", 3e-3, "--lr_warmup", 1, "--l1", 4)
        good, bad = tiny(mtsae, "sum", 200, *flags), tiny(mtsae, "mean", 200, *flags, "--recon_reduction", "mean")
        assert good["core"]["L0"] > 3 and bad["core"]["L0"] < 0.3 * good["core"]["L0"]


def test_mtsae_four_steps_from_ten_thousand_tokens():
    with folder():
        status, _, err = run(mtsae, "--variant", "unlearning", "--model", "synthetic", "--T", 128, "--tokens", 10000,
                             "--steps", 0, "--batch_size", 16, "--heldout_tokens", 1024, "--out", "a")
        assert status == 0, err
        assert json.loads(Path("a/eval.json").read_text())["steps"] == 4       # 10,000 // 2,048


def test_mtsae_micro_batches_add_up_without_batch_norm():
    with folder():
        for out, flags in (("whole", ()), ("split", ("--micro_batch", 1))):
            tiny(mtsae, out, 8, "--variant", "unlearning", "--log_every", 1, *flags)
        rows = [[json.loads(line)["loss"] for line in Path(n, "log.jsonl").read_text().splitlines()] for n in ("whole", "split")]
        assert all(abs(a - b) < 1e-4 * abs(a) for a, b in zip(*rows))


def test_mtsae_recovers_known_features():
    with folder():
        found = {}
        for name, module, flags in (("standard", tsae, ("--no-temporal",)), ("extraction", mtsae, ()),
                                    ("unlearning", mtsae, ("--variant", "unlearning"))):
            status, _, err = run(module, "--model", "synthetic", "--out", name, "--eval", "reconstruction",
                                 "--batch_size", 8, *flags)
            assert status == 0, err
            found[name] = json.loads(Path(name, "eval.json").read_text())["recovery"]["mean_max_cosine"]
        for name in ("extraction", "unlearning"):
            assert found[name] >= 0.8 and found[name] > found["standard"] - 0.05, found


def test_mtsae_killed_run_resumes_exactly():
    killed_and_resumed("mtsae", "--log_every", 1, "--resample_every", 7, "--dead_after", 3)


def test_mtsae_refuses_single_vectors_and_bad_rates():
    sae, _ = mts()
    try:
        sae.encode(torch.zeros(5, 6))
        raise AssertionError("accepted (N, D)")
    except ValueError as error:
        assert "sequences" in str(error)
    refused(*TINY, "--rates", "1,x", module=mtsae, words=["dilation rates"])
    refused(*TINY, "--rates", "0,2", module=mtsae, words=["dilation rates"])




def test_mtsae_separation_equals_the_loop_over_pairs():
    """Eq. D.4: value and gradient, with negative cosines and masked tokens; limits 1 and 0."""
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(2, 7, 4, 5, dtype=torch.float64, generator=gen)
    mask = torch.rand(2, 7, generator=gen) > 0.3
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    fast = mtsae.Separation.apply(a, mask)
    slow = sum(F.cosine_similarity(b[:, :, i], b[:, :, j], dim=-1).clamp(min=0)[mask].sum() / 12
               for i in range(4) for j in range(4) if i != j)
    fast.backward(), slow.backward()
    assert abs(fast - slow) < 1e-6 and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert (a.grad[~mask] == 0).all() and (a.grad[mask] != 0).any()
    same = torch.ones(1, 3, 4, 5)
    every = torch.ones(1, 3, dtype=torch.bool)
    assert abs(mtsae.Separation.apply(same, every) - 3) < 1e-5
    assert mtsae.Separation.apply(torch.eye(4).expand(1, 3, 4, 4).contiguous(), every) == 0


def test_mtsae_filter_has_the_gradient_of_its_input():
    sae, _ = mts(batch_norm="off")
    x, _ = mts_data()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = b / 2 + sum(reference_branch(b / 2, kernel, rate)[0] for kernel, rate in zip(sae.kernels.detach(), (1, 4, 16))) / 3
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    (sae.temporal(a) * weight).sum().backward()
    (want * weight).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_mtsae_branch_norm_equals_one_batch_norm_a_branch():
    sae, _ = mts(batch_norm="branch")
    x, mask = mts_data()
    filled = mtsae.fill_masked(x / 2, mask)
    want = 0
    for kernel, rate in zip(sae.kernels.detach(), (1, 4, 16)):
        h = filled + reference_branch(filled, kernel, rate)[0]
        want = want + (h - h[mask].mean(0)) / (h[mask].var(0, unbiased=False) + 1e-5).sqrt() / 3
    assert torch.allclose(sae.temporal(x, mask), want, atol=1e-4)


def test_mtsae_centring_changes_nothing_behind_batch_norm():
    """DEVIATION D1: exactly the same codes in paper A, others in paper D."""
    x, mask = mts_data()
    for variant, same in (("extraction", True), ("unlearning", False)):
        codes = []
        for center in (True, False):
            sae, _ = mts(variant, center=center)
            with torch.no_grad():
                sae.mean.copy_(x[mask].mean(0) / 2 + 1)
                codes.append(sae.encode(x, mask)[mask])
        assert torch.allclose(*codes, atol=1e-4) == same, variant


def test_mtsae_short_sequences_are_replicated():
    """Sec. A.4.4: 25 tokens alone, padded and masked, or padded by hand with the last one to T = 40."""
    for variant in ("extraction", "unlearning"):
        for padding in ("circular", "causal"):
            sae, _ = mts(variant, padding=padding)
            sae.eval()
            x, _ = mts_data()
            mask = (torch.arange(40) < 25).expand(3, 40)
            byhand = torch.cat([x[:, :25], x[:, 24:25].expand(-1, 15, -1)], 1)
            short, masked, full = sae.encode(x[:, :25]), sae.encode(x, mask)[:, :25], sae.encode(byhand)[:, :25]
            assert torch.allclose(short, full, atol=1e-5) and torch.allclose(masked, full, atol=1e-5), (variant, padding)


def test_mtsae_resampling_draws_from_scored_tokens_of_high_error():
    """UNSPECIFIED U2: proportional to the squared error; new rows point where a sampled token points."""
    x, mask = mts_data(B=4)
    mask[1] = False
    sae, cfg = mts(D=6, expansion=20, batch_size=4, batch_norm="off", padding="causal")
    with torch.no_grad():
        sae.W_dec.zero_(), sae.b_dec.zero_()                # reconstruction 0: the error is |x|^2
        x[2, 10] *= 30                                      # one token carries most of it
        mask[2, 10] = True
    opt = torch.optim.AdamW(sae.parameters())
    for p in sae.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    sae.inactive.fill_(1000)
    mtsae.resample(sae, opt, [(x[:3], mask[:3]), (x[3:], mask[3:])], 5, cfg)
    tokens = F.normalize(x.flatten(0, 1), dim=1)
    cosine, token = (sae.W_dec @ tokens.t()).max(1)
    assert (cosine > 0.999).all() and mask.flatten()[token].all()
    share = (x[2, 10].square().sum() / x[mask].square().sum()).item()
    assert abs((token == 2 * 40 + 10).float().mean() - share) < 0.15 and share > 0.5
    kept = sae.W_dec.detach().clone()
    mtsae.resample(sae, opt, [(x, mask)], 6, cfg)           # nobody is dead: nothing happens
    assert torch.equal(kept, sae.W_dec) and (sae.resampled == 1).all()


def test_mtsae_counts_silence_resamples_and_resumes_exactly():
    """A7 in a real train(): neurons die, restart, and an interrupted run equals the whole one byte for byte."""
    with folder():
        def cfg(out, **more):
            return config(mtsae, out=out, steps=24, T=16, log_every=1, resample_every=8, dead_after=4, eval="core",
                          activation="topk", k=1, lr=3e-3, lr_warmup=1, **more)
        whole = cfg("whole")
        result = mtsae.train(whole, next(common.open_activations(whole)))
        assert result["resampling"]["events"] > 5 and 0 < result["resampling"]["features"] <= 1
        cut = cfg("cut")
        acts = next(common.open_activations(cut))
        batch = acts.batch

        def interrupted(step):
            if step == 12:                                  # between the resamplings at 8 and 16
                os.kill(os.getpid(), signal.SIGINT)
            return batch(step)
        acts.batch = interrupted
        try:
            mtsae.train(cut, acts)
            raise AssertionError("not interrupted")
        except common.Interrupted:
            pass
        again = dataclasses.replace(cut, resume="cut")
        mtsae.train(again, next(common.open_activations(again)))
        for name in ("log.jsonl", "sae_weights.safetensors"):
            assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
        rows = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
        assert rows[8]["resampled"] == 0 and rows[9]["resampled"] > 0      # step 8 logs what it saw before


def test_mtsae_two_processes_resample_alike():
    """Batch-norm statistics and the draw are over the whole batch, and process 0 evaluates alone."""
    with folder():
        env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        base = [str(HERE / "mtsae.py"), *map(str, TINY), "--steps", "14", "--log_every", "1", "--eval", "core", "--resample_every",
                "5", "--dead_after", "2", "--activation", "topk", "--k", "1", "--lr_warmup", "1"]
        for out, start in (("one", [sys.executable]),
                           ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
            done = subprocess.run(start + base + ["--out", out], capture_output=True, env=env, timeout=300)
            assert done.returncode == 0, done.stderr.decode()[-2000:]
        one, two = ([json.loads(line) for line in Path(n, "log.jsonl").read_text().splitlines()] for n in ("one", "two"))
        assert one[-1]["resampled"] > 0
        for a, b in zip(one, two):
            assert abs(a["loss"] - b["loss"]) <= 1e-3 * abs(a["loss"]) and a["resampled"] == b["resampled"], a["step"]


def test_mtsae_variant_defaults_are_the_papers():
    """Flags the user did not give take the variant's values, then the laptop's sizes."""
    cfg = mtsae.Config(variant="unlearning", preset="paper", lr=1e-2, rates="1,2")
    common.apply_presets(cfg, {"variant", "lr", "rates", "preset"}, mtsae.LAPTOP, mtsae.VARIANTS)
    assert (cfg.model, cfg.layer, cfg.recon, cfg.schedule, cfg.weight_decay) == ("EleutherAI/pythia-70m", "3", "norm", "cosine", 0.01)
    assert (cfg.lr, cfg.rates, cfg.resample_every, cfg.batch_size * cfg.T) == (1e-2, "1,2", 0, 2048)
    cfg = mtsae.Config()
    assert (cfg.rates, cfg.batch_size, cfg.lr, cfg.lr_warmup, cfg.seed) == ("1,4,16", 125, 3e-4, 1000, 42)
    assert (cfg.recon_weight, cfg.l1, cfg.coherence, cfg.resample_every, cfg.dead_after) == (2.0, 0.04, 0.15, 1000, 500)


def test_mtsae_mixing_measures_the_reach():
    with folder():
        for flags, reach in ((("--rates", "1,2,4"), 4), (("--variant", "unlearning"), 8), (("--padding", "causal", "--rates", 2), 4)):
            found = tiny(mtsae, "a", 2, "--overwrite", "--eval", "reconstruction", *flags)["mixing"]
            assert found["reach"] == reach and 0 < found["neighbours"] < 1, (flags, found)


def test_mtsae_statistics_stay_fp32_under_autocast():
    """Matrix products may be bf16; batch norm's moments, the L1 term and the separation may not."""
    x, mask = mts_data(B=8, D=16)
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])
    for variant in ("extraction", "unlearning"):
        sae, cfg = mts(variant, D=16)
        with torch.autocast("cpu", torch.bfloat16):
            h = sae.temporal(x, mask)
            terms, _ = mtsae.losses(sae, x, mask, n, 0, cfg)
            f = sae.code(h)[0]
            assert h.dtype == torch.float32 and (h @ sae.W_enc).dtype == torch.bfloat16
        assert abs(terms["l1"] - 0.04 * f.float()[mask].sum() / n[0]) < 1e-6
        if variant == "extraction":
            assert h[mask].mean(0).abs().max() < 1e-5 and (h[mask].var(0, unbiased=False) - 1).abs().max() < 1e-3
        else:
            exact = mtsae.Separation.apply(h.unflatten(2, (4, 16)), mask) / n[0]
            assert abs(terms["separation"] - 0.1 * exact) < 1e-6


# ---------------------------------------------------------------------------------------------
# temporal_lens.py
# ---------------------------------------------------------------------------------------------


def lens(D=6, seed=0, **values):
    """An untrained TemporalLens with random biases, masks and error averages, and its Config."""
    cfg = config(temporal_lens, **{"k": 4, "T": 5, **values})
    sae = temporal_lens.TemporalLens(D, cfg)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.scale.fill_(2.0)
        for p in (sae.b_enc, sae.b_dec, *([sae.alpha] if cfg.masks else [])):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
        sae.error_ema.copy_(1 + torch.rand(cfg.T, generator=gen))
        sae.tau.fill_(0.5)
    return sae, cfg


def some(B, T, D, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, T, D, generator=gen), torch.rand(B, T, generator=gen) > 0.3


# --- Eq. 3 to 5 ------------------------------------------------------------------------------


def test_temporal_lens_encode_by_hand():
    """Eq. 3, 4 with Python floats."""
    sae, cfg = lens()
    x, _ = some(2, 5, 6)
    f = sae.encode(x)
    for b, t, k in ((0, 0, 0), (1, 3, 2), (0, 4, 5), (1, 1, 1)):
        pre = sum(x[b, t, d].item() / 2.0 * sae.W_enc[d, k].item() for d in range(6)) + sae.b_enc[k].item()
        m = 1 / (1 + math.exp(-sae.alpha[t, k].item() / 0.5))
        assert abs(f[b, t, k].item() - max(0.0, pre) * m) < 1e-5
    x_hat = sae.decode(f)
    assert torch.allclose(x_hat, 2.0 * (f @ sae.W_dec + sae.b_dec))
    assert (f > 0).any() and (f == 0).any()


def test_temporal_lens_sees_one_token_only():
    sae, _ = lens()
    x, _ = some(2, 5, 6)
    y = x.clone()
    y[:, 3] += 1
    same = [torch.equal(sae.encode(x)[:, t], sae.encode(y)[:, t]) for t in range(5)]
    assert same == [True, True, True, False, True] and sae.causal


def test_temporal_lens_temperature():
    cfg = config(temporal_lens)
    tau = [temporal_lens.temperature(s, 301, cfg) for s in range(301)]
    assert tau[0] == 5.0 and abs(tau[-1] - 0.1) < 1e-12
    ratio = [b / a for a, b in zip(tau, tau[1:])]
    assert max(ratio) - min(ratio) < 1e-12 and abs(tau[150] - math.sqrt(5.0 * 0.1)) < 1e-12
    assert temporal_lens.temperature(0, 1, cfg) == 5.0                     # a run of one step divides by nothing
    fixed = config(temporal_lens, anneal=False, tau_end=0.7)
    assert {temporal_lens.temperature(s, 301, fixed) for s in (0, 150, 300)} == {0.7}


def test_temporal_lens_initial_logits():
    """N(0, 1/T): variance by default, deviation on request."""
    for reading, std in (("variance", 64 ** -0.5), ("deviation", 1 / 64)):
        alpha = temporal_lens.initial_alpha(400, config(temporal_lens, T=64, alpha_init=reading))
        assert alpha.shape == (64, 400) and abs(alpha.std() / std - 1) < 0.02 and abs(alpha.mean()) < 0.02 * std * 10
    sae, _ = lens(T=64)
    assert sae.alpha.shape == (64, 6) and isinstance(sae.alpha, torch.nn.Parameter)


def test_temporal_lens_other_lengths():
    """U4: shorter = first rows, longer = last row repeated, single vectors = mean mask."""
    sae, _ = lens()
    x, _ = some(2, 9, 6)
    m = torch.sigmoid(sae.alpha / 0.5)
    pre = F.relu(x / 2 @ sae.W_enc + sae.b_enc)
    assert torch.allclose(sae.encode(x[:, :3]), pre[:, :3] * m[:3])
    assert torch.allclose(sae.encode(x)[:, :5], pre[:, :5] * m)
    assert torch.allclose(sae.encode(x)[:, 5:], pre[:, 5:] * m[4])
    assert torch.allclose(sae.encode(x[:, 7]), pre[:, 7] * m.mean(0))
    assert sae.position_mask(1).shape == (1, 6) and sae.position_mask().shape == (6,)


def test_temporal_lens_fold_makes_masks_hard():
    sae, _ = lens()
    sae.alpha.data[0, 0], sae.alpha.data[0, 1] = 1e-4, -1e-4
    soft = sae.position_mask(5)
    sae.fold()
    m = sae.position_mask(5)
    assert torch.equal(m, (sae.alpha > 0).float()) and not torch.equal(m, soft)
    assert torch.isfinite(sae.encode(some(2, 5, 6)[0])).all()


def test_temporal_lens_topk_counts_after_the_mask():
    """With hard masks, k features are active wherever k unmasked ones are positive."""
    sae, _ = lens(D=24, activation="topk", k=3)
    sae.b_enc.data.fill_(5.0)
    sae.fold()
    f = sae.encode(some(2, 5, 24)[0])
    open_features = (sae.alpha > 0).sum(1)
    assert open_features.min() >= 3 and ((f > 0).sum(-1) == 3).all()


# --- Eq. 6 to 8 ------------------------------------------------------------------------------


def naive_loss(sae, x, mask, cfg):
    """Eq. 8 token by token, in float64, averaged over scored tokens; weights sum to T."""
    ema = sae.error_ema.double()
    w = ema / ema.sum() * len(ema)
    recon = l1 = 0.0
    x_hat, f = sae(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            if mask[b, t]:
                error = ((x[b, t].double() - x_hat[b, t].double()) / sae.scale.double()).pow(2).sum()
                recon = recon + (1 if cfg.uniform_weights else w[t]) * error
                l1 = l1 + (1 if cfg.uniform_weights else w[t]) * cfg.l1 * f[b, t].double().abs().sum()
    return recon / mask.sum(), l1 / mask.sum()


def test_temporal_lens_loss_equals_the_sum_over_tokens():
    for uniform in (False, True):
        sae, cfg = lens(uniform_weights=uniform, l1=0.3)
        x, mask = some(3, 5, 6)
        terms, stats, errors = temporal_lens.losses(sae, x, mask, mask.sum(), 0, cfg)
        recon, l1 = naive_loss(sae, x, mask, cfg)
        assert abs(terms["recon"] - recon) < 1e-5 * recon and abs(terms["l1"] - l1) < 1e-5 * l1
        sum(terms.values()).backward()
        grads = [p.grad.clone() for p in sae.parameters()]
        sae.zero_grad()
        sum(naive_loss(sae, x, mask, cfg)).backward()
        assert all(torch.allclose(a, p.grad, atol=1e-5, rtol=1e-4) for a, p in zip(grads, sae.parameters()))
        assert torch.equal(errors[1], mask.sum(0).float()) and abs(errors[0].sum() / mask.sum() - stats["error"]) < 1e-4
        assert not errors.requires_grad
        mean = temporal_lens.losses(sae, x, mask, mask.sum(), 0, config(temporal_lens, recon_reduction="mean",
                                                                        uniform_weights=uniform))[0]
        assert torch.allclose(mean["recon"] * 6, terms["recon"])


def test_temporal_lens_masked_tokens_do_not_exist():
    sae, cfg = lens()
    x, mask = some(3, 5, 6)
    y = torch.where(mask[..., None], x, 1000.0)
    out = [temporal_lens.losses(sae, z, mask, mask.sum(), 0, cfg) for z in (x, y)]
    grads = []
    for terms, _, _ in out:
        sae.zero_grad()
        sum(terms.values()).backward()
        grads.append([p.grad.clone() for p in sae.parameters()])
    assert all(torch.equal(out[0][0][k], out[1][0][k]) for k in out[0][0])
    assert torch.equal(out[0][2], out[1][2]) and torch.equal(out[0][1]["active"], out[1][1]["active"])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_temporal_lens_position_weights_by_hand():
    sae, cfg = lens(T=4)
    sae.error_ema.copy_(torch.tensor([1.0, 2.0, 3.0, 2.0]))
    assert torch.allclose(temporal_lens.position_weights(sae), torch.tensor([0.5, 1.0, 1.5, 1.0]))
    errors = torch.tensor([[40.0, 30.0, 0.0, 8.0], [4.0, 2.0, 0.0, 1.0]])        # means 10, 15, none, 8
    temporal_lens.update_position_weights(sae, errors, cfg)
    expected = torch.tensor([0.99 + 0.10, 1.98 + 0.15, 3.0, 1.98 + 0.08])
    assert torch.allclose(sae.error_ema, expected)
    assert abs(temporal_lens.position_weights(sae).sum() - 4) < 1e-5
    stored, cfg = lens(T=4, ema_norm="store")
    stored.error_ema.copy_(torch.tensor([1.0, 2.0, 3.0, 2.0]))
    temporal_lens.update_position_weights(stored, errors, cfg)
    assert torch.allclose(stored.error_ema, 4 * expected / expected.sum())
    assert not sae.error_ema.requires_grad


def test_temporal_lens_weights_carry_no_gradient():
    """The gradient is that of fixed weights: twice the average changes nothing (only ratios count)."""
    sae, cfg = lens()
    x, mask = some(3, 5, 6)
    grads = []
    for factor in (1.0, 2.0):
        sae.error_ema.mul_(factor)
        sae.zero_grad()
        sum(temporal_lens.losses(sae, x, mask, mask.sum(), 0, cfg)[0].values()).backward()
        grads.append(sae.W_enc.grad.clone())
    assert torch.allclose(*grads, atol=1e-6) and sae.error_ema.grad is None


def test_temporal_lens_decoder_stays_on_the_sphere():
    """Eq. 7: rows of norm 1; the gradient along a row is gone, the rest untouched."""
    sae, cfg = lens()
    x, mask = some(3, 5, 6)
    sum(temporal_lens.losses(sae, x, mask, mask.sum(), 0, cfg)[0].values()).backward()
    before, W = sae.W_dec.grad.clone(), sae.W_dec.detach()
    temporal_lens.remove_parallel_gradient(sae)
    assert (before * W).sum(1).abs().max() > 0.1 and (sae.W_dec.grad * W).sum(1).abs().max() < 1e-5
    removed = before - sae.W_dec.grad
    assert torch.allclose(removed, (removed * W).sum(1, keepdim=True) * W, atol=1e-5)
    sae.W_dec.data.mul_(3)
    temporal_lens.normalize_decoder(sae)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(6))


# --- training --------------------------------------------------------------------------------


def weights(path):
    return common.load_tensors(Path(path) / "sae_weights.safetensors")[0]


def test_temporal_lens_without_position_is_the_standard_sae_bit_for_bit():
    with folder():
        off = ("--no-masks", "--uniform_weights", "--pre_bias")
        for more in ((), ("--activation", "topk", "--k", 4)):
            tiny(temporal_lens, "lens", 20, *off, *more, "--overwrite", "--eval", "none")
            tiny(tsae, "standard", 20, "--no-temporal", "--clip", 0, *more, "--overwrite", "--eval", "none")
            a, b = weights("lens"), weights("standard")
            names = ["W_enc", "W_dec", "b_enc", "b_dec", "scale"]
            assert set(names) == set(b) and all(torch.equal(a[k], b[k]) for k in names)


def test_temporal_lens_ablations_do_what_they_say():
    with folder():
        tiny(temporal_lens, "lens", 12, "--log_every", 1, "--eval", "none")
        tiny(temporal_lens, "static", 12, "--static_masks", "--log_every", 1, "--eval", "none")
        tiny(temporal_lens, "uniform", 12, "--uniform_weights", "--log_every", 1, "--eval", "none")
        tiny(temporal_lens, "fixed", 12, "--no-anneal", "--log_every", 1, "--eval", "none")
        log = {n: [json.loads(line) for line in Path(n, "log.jsonl").read_text().splitlines()]
               for n in ("lens", "static", "uniform", "fixed")}
        cfg = config(temporal_lens)
        first = temporal_lens.initial_alpha(weights("lens")["alpha"].shape[1], cfg)
        assert torch.equal(weights("static")["alpha"], first) and not torch.equal(weights("lens")["alpha"], first)
        assert log["lens"][0]["tau"] == log["static"][0]["tau"] == 5.0 and abs(log["lens"][-1]["tau"] - 0.1) < 1e-9
        assert {row["tau"] for row in log["fixed"]} == {0.1}
        assert abs(weights("lens")["tau"] - 0.1) < 1e-6
        assert all(abs(row["recon"] - row["error"]) < 1e-4 * row["error"] for row in log["uniform"])
        assert any(abs(row["recon"] - row["error"]) > 1e-4 * row["error"] for row in log["lens"])
        assert log["lens"][0]["recon"] == log["uniform"][0]["recon"]             # w_t = 1 at the first step
        history = weights("lens")["weight_history"]
        rows = history[history.sum(1) > 0]
        assert len(rows) == 12 and torch.allclose(rows.sum(1), torch.full((12,), 32.0), atol=1e-3)
        last = weights("lens")["error_ema"]
        assert torch.allclose(rows[-1], last * 32 / last.sum(), atol=1e-5)


def test_temporal_lens_every_parameter_moves_and_the_loss_falls():
    for flags in ((), ("--no-masks",), ("--activation", "topk", "--k", 4),
                  ("--alpha_init", "deviation", "--ema_norm", "store", "--no-project_gradient", "--no-anneal")):
        still, log = moved(temporal_lens, *flags, "--lr_warmup", 1, "--eval", "none", steps=40)
        assert not still, (flags, still)
        assert log[-1]["error"] < 0.9 * log[0]["error"], flags
    still, _ = moved(temporal_lens, "--static_masks", "--lr_warmup", 1, "--eval", "none")
    assert still == ["alpha"]


def test_temporal_lens_resumes_exactly():
    killed_and_resumed("temporal_lens", "--log_every", 1, "--eval", "none")


def test_temporal_lens_refuses_a_temperature_of_zero():
    with folder() as here:
        status, _, err = run(temporal_lens, "--model", "synthetic", "--tau_end", 0, "--out", "a")
        assert status == 2 and "--tau_end" in err and "Traceback" not in err and not (here / "a").exists()


def test_temporal_lens_micro_batches_add_up():
    with folder():
        tiny(temporal_lens, "split", 10, "--micro_batch", 1, "--eval", "none")
        tiny(temporal_lens, "whole", 10, "--eval", "none")
        a, b = weights("split"), weights("whole")
        assert all(torch.allclose(a[k], b[k], atol=1e-4, rtol=1e-3) for k in a)


# --- analysis --------------------------------------------------------------------------------


def naive_span(column):
    T = len(column)
    return min(e - s for s in range(T) for e in range(s + 1, T + 1) if column[s:e].sum() >= column.sum() / 2 - 1e-9)


def test_temporal_lens_spans():
    assert temporal_lens.spans(np.full((128, 3), 0.3)).tolist() == [64, 64, 64]
    one, two = np.zeros((128, 1)), np.zeros((128, 1))
    one[17] = 5
    two[[10, 99]] = 1
    assert temporal_lens.spans(one).tolist() == [1] and temporal_lens.spans(two).tolist() == [1]
    block = np.zeros((128, 1))
    block[40:72] = 1
    assert temporal_lens.spans(block).tolist() == [16]
    random = np.random.default_rng(0).random((20, 30)) ** 4
    assert temporal_lens.spans(random).tolist() == [naive_span(random[:, k]) for k in range(30)]


class Windows:
    """Held-out windows in memory with what the analysis asks of common.Activations."""
    lm, layer, device = None, "0", torch.device("cpu")

    def __init__(self, x, mask, sink=None):
        self.x, self.mask, self.sink, self.T, self.D = x, mask, sink, x.shape[1], x.shape[2]
        self.mean = x[mask].mean(0)

    def heldout(self, size=16):
        return zip(self.x.split(size), self.mask.split(size))

    def heldout_with_sink(self, size=16):
        if self.sink is None:
            return None
        return ((torch.cat([self.sink.expand(len(x), 1, -1), x], 1), F.pad(mask, (1, 0), value=True))
                for x, mask in self.heldout(size))


def test_temporal_lens_measure_by_hand():
    sae, cfg = lens()
    x, mask = some(37, 5, 6)
    errors, profiles, off = temporal_lens.measure(sae, Windows(x, mask))
    x_hat, f = sae(x)
    error = ((x - x_hat) / 2).pow(2).sum(-1).detach()
    assert errors.shape == (3, 37, 5)
    assert np.allclose(errors[0], (error * mask).numpy(), atol=1e-4) and (errors[2] == mask.numpy()).all()
    f = f.detach()
    for t in range(5):
        for half in (0, 1):
            rows = f[half::2, t][mask[half::2, t]]
            assert np.allclose(profiles[half, t], rows.mean(0).numpy(), atol=1e-5)
        assert abs(off[t] - (f[:, t][mask[:, t]] == 0).float().mean().item()) < 1e-6


def test_temporal_lens_early_late_and_compare():
    rng = np.random.default_rng(0)
    error = 1 + 0.1 * rng.random((50, 128))
    error[:, :32] *= 0.85
    scored = np.ones_like(error)
    out = temporal_lens.early_late(error, 2 * np.ones_like(error), scored)
    assert abs(out["early_error"] + 0.15) < 0.01 and out["p"] < 1e-10 and abs(out["early_unexplained"] + 0.15) < 0.01
    error[:, 40], scored[:, 40] = 0, 0                              # not scored: must not pull the late mean down
    assert abs(temporal_lens.early_late(error, scored, scored)["early_error"] - out["early_error"]) < 2e-3
    none = temporal_lens.early_late(1 + 0.1 * rng.random((50, 128)), scored, np.ones_like(error))
    assert abs(none["early_error"]) < 0.01 and none["p"] > 0.001

    sae, cfg = lens()
    worse, _ = lens()
    worse.b_dec.data += 0.05
    x, mask = some(40, 5, 6)
    x = sae(x)[0].detach() + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    same, better = (temporal_lens.compare(sae, other, Windows(x, mask)) for other in (sae, worse))
    assert same["a_against_b"] == 0 and better["sequences"] == 40
    twin, _ = lens()                                                # the same function, kept in other units
    with torch.no_grad():
        for p, factor in ((twin.scale, 3), (twin.W_enc, 3), (twin.W_dec, 1 / 3), (twin.b_dec, 1 / 3)):
            p.mul_(factor)
    assert torch.allclose(twin(x)[0], sae(x)[0], atol=1e-4)
    assert abs(temporal_lens.compare(worse, twin, Windows(x, mask))["a_against_b"]
               / temporal_lens.compare(worse, sae, Windows(x, mask))["a_against_b"] - 1) < 1e-4
    expected = [(((x - s(x)[0]) / 2).pow(2).sum(-1) * mask).sum(1) / mask.sum(1).clip(1) for s in (sae, worse)]
    assert abs(better["a_against_b"] - (expected[0].mean() / expected[1].mean() - 1)) < 1e-5
    d = (expected[0] - expected[1]).double().detach()
    assert abs(better["t"] - d.mean() / d.std() * math.sqrt(40)) < 1e-2 * abs(better["t"])


def test_temporal_lens_sink_alone_lowers_the_early_error():
    """A constant sink that is fitted exactly: 1 of 8 early positions free, so early error falls by 1/8."""
    sae, cfg = lens(T=32)
    x, mask = some(20, 32, 6)
    sink = torch.full((6,), 300.0)
    errors = np.ones((3, 20, 32)) + 1e-6 * np.random.default_rng(0).random((3, 20, 32))
    errors[2] = 1
    cases = temporal_lens.sink_cases(sae, Windows(x, mask | True, sink), errors)
    out = {name: temporal_lens.early_late(*case) for name, case in cases.items()}
    assert abs(out["no_sink"]["early_error"]) < 1e-6 and abs(out["sink_fitted"]["early_error"] + 1 / 8) < 1e-5
    assert out["sink_fitted"]["early_unexplained"] < -0.99
    ramp = errors * np.arange(1, 33)
    moved = temporal_lens.sink_cases(sae, Windows(x, mask | True, sink), ramp)["sink_fitted"]
    assert np.array_equal(moved[..., 1:], ramp[..., :-1])            # every token one position later
    coded = ((sae(sink[None, None])[0] - sink) / 2).pow(2).sum().item()     # with the mask of position 1
    assert abs(cases["sink_as_coded"][0, 0, 0] / coded - 1) < 1e-5
    assert abs(coded / ((sae(sink[None])[0] - sink) / 2).pow(2).sum().item() - 1) > 1e-3     # not the mean mask's
    assert abs(out["sink_as_coded"]["early_error"] - (7 + coded) / 8 + 1) < 1e-3 * coded
    assert list(temporal_lens.sink_cases(sae, Windows(x, mask), errors)) == ["no_sink"]


def test_temporal_lens_clusters_find_planted_groups():
    from sklearn.metrics import adjusted_rand_score
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 10)
    profile = 0.1 * rng.random((128, 80))
    for k, g in enumerate(group):
        profile[16 * g:16 * (g + 1), k] += 1 + rng.random()
    tree, labels = temporal_lens.cluster(profile)
    assert adjusted_rand_score(group, labels) == 1.0 and tree.shape == (79, 4)
    noise = [temporal_lens.cluster(rng.random((128, 80)))[1] for _ in range(2)]
    assert abs(adjusted_rand_score(*noise)) < 0.1


def planted(n=1024, T=32, D=32, n_features=32, seed=0):
    """Sequences whose feature i is active only at positions starts[i] <= t < ends[i] -> x, dictionary, range (T, K)."""
    gen = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(n_features, D, generator=gen), dim=1)
    start = torch.randint(0, T - 8, (n_features,), generator=gen)
    end = (start + torch.randint(8, 17, (n_features,), generator=gen)).clamp(max=T)
    t = torch.arange(T)[:, None]
    inside = (t >= start) & (t < end)                                           # (T, K)
    on = (torch.rand(n, T, n_features, generator=gen) < 0.25) & inside
    values = on * (1 + torch.rand(n, T, n_features, generator=gen))
    x = values @ dictionary * math.sqrt(D) + 0.05 * math.sqrt(D) * torch.randn(n, T, D, generator=gen)
    return x, dictionary, inside


def mask_auc(sae, dictionary, inside):
    """Mean AUC of the masks as scores for "inside the planted range", over true features found (cosine > 0.8)."""
    from sklearn.metrics import roc_auc_score
    cosine = dictionary @ sae.W_dec.detach().t()
    found = (cosine.max(1).values > 0.8).nonzero().flatten().tolist()
    m = sae.position_mask(inside.shape[0]).detach()
    return float(np.mean([roc_auc_score(inside[:, i], m[:, cosine[i].argmax()]) for i in found])), len(found)


def test_temporal_lens_masks_recover_planted_ranges():
    x, dictionary, inside = planted()
    flags = dict(T=32, batch_size=16, steps=700, lr=4e-3, lr_warmup=50, l1=0.3, heldout_tokens=2048, log_every=700,
                 save_every=5000, micro_batch=0, eval="none")
    with folder():
        scores = {}
        for name, more in (("learnt", {}), ("static", {"static_masks": True})):
            cfg = config(temporal_lens, out=name, **flags, **more)
            acts = common.Activations(cfg, None, "0", common.ArrayStore(x[:960]), common.ArrayStore(x[960:]))
            temporal_lens.train(cfg, acts)
            sae = temporal_lens.TemporalLens(32, cfg)
            sae.load_state_dict(weights(name))
            scores[name] = mask_auc(sae, dictionary, inside)
        assert scores["learnt"][1] >= 24, scores
        assert scores["learnt"][0] > 0.95 and abs(scores["static"][0] - 0.5) < 0.1, scores


def test_temporal_lens_analysis_writes_numbers_and_figures():
    with folder():
        for out, flags in (("lens", ()), ("plain", ("--no-masks", "--uniform_weights"))):
            results = tiny(temporal_lens, out, 30, *flags)
            for name in ("positions.png", "clusters.png"):
                size = Path(out, name).stat().st_size
                assert 5_000 < size < 150_000, (name, size)
            arrays = json.loads(Path(out, "position.json").read_text())
            assert len(arrays["error"]) == len(arrays["weight"]) == 32 and abs(sum(arrays["weight"]) - 32) < 1e-3
            assert abs(np.mean(arrays["off"]) - results["masks"]["features_off"]) < 1e-4
            assert abs(results["masks"]["features_off"] - results["core"]["inactive"]) < 1e-3
            assert "synthetic" in results["claims"]["early_error"] and results["span"]["ignoring_position"] == 16
        assert results["masks"]["mean_mask"] == 1 and results["masks"]["EV_lost_by_folding"] == 0
        lens_results = json.loads(Path("lens/eval.json").read_text())
        assert "not used" in results["claims"]["weight_difficulty_r"]
        assert "not used" not in lens_results["claims"]["weight_difficulty_r"]
        assert lens_results["masks"]["r_with_first_draw"] > 0.95         # 30 steps hardly move the logits
        status, out, err = run(temporal_lens, "--run", "lens", "--eval", "core")
        again = json.loads(Path("lens/eval.json").read_text())
        assert status == 0 and again["masks"] == lens_results["masks"], err


def test_temporal_lens_analysis_by_hand_and_of_a_dead_sae():
    """What folding costs, what is left of the first draw; then nothing active anywhere: no crash."""
    sae, cfg = lens(D=12, T=32, k=4)
    x, mask = some(20, 32, 12)
    windows = Windows(x, mask)
    with folder() as here:
        numbers = temporal_lens.analyse(sae, windows, here)
        r = torch.corrcoef(torch.stack([temporal_lens.initial_alpha(12, cfg), sae.alpha.detach()]).flatten(1))[0, 1]
        assert abs(numbers["masks"]["r_with_first_draw"] - r) < 1e-5 and sae.tau == 0.5

        def explained():
            return common.core_metrics((x, *sae(x), mask) for x, mask in windows.heldout())["EV"]
        soft = explained()
        sae.fold()
        assert abs(numbers["masks"]["EV_lost_by_folding"] - (soft - explained())) < 1e-4 and soft != explained()
        sae.b_enc.data.fill_(-1e6)
        numbers = temporal_lens.analyse(sae, windows, here)
        assert numbers["masks"]["features_off"] == 1.0 and "clusters" not in numbers
        assert math.isnan(numbers["span"]["median"]) and (here / "positions.png").exists()


def test_temporal_lens_claims_verdicts():
    class Real:
        lm, layer = "a language model", 5
    numbers = {"position": {"no_sink": {"early_error": -0.15, "p": 0.01}, "weight_difficulty_r": 0.82},
               "masks": {"features_off": 0.73, "mean_mask": 0.3}, "span": {"median": 16.0, "ignoring_position": 64}}
    verdicts = {k: v.split(": ")[1] for k, v in temporal_lens.claims(numbers, Real).items()}
    assert verdicts == {"early_error": "reproduced", "features_off": "reproduced", "weight_difficulty_r": "reproduced",
                        "mean_mask": "refuted on this model", "span": "reproduced"}
    numbers["position"]["no_sink"]["p"] = 0.2
    Real.layer = 19
    verdicts = {k: v.split(": ")[1] for k, v in temporal_lens.claims(numbers, Real).items()}
    assert verdicts["early_error"] == verdicts["span"] == "refuted on this model"
    numbers["span"]["median"] = 63.0
    assert temporal_lens.claims(numbers, Real)["span"].startswith("63: reproduced, but a feature that ignores")
    assert set(temporal_lens.PAPER) == {f"claims.{k}" for k in verdicts}


def test_temporal_lens_copies_and_map():
    """Every name in the paper -> code map exists and every mapped equation is cited in the body."""
    source = Path(temporal_lens.__file__).read_text()
    rows = re.findall(r"^    (Eq\. \d|Sec\. [\d., ]+|Fig\. 1, 6\.3) +(\w+(?:\.\w+)?(?:, \w+)*)",
                      temporal_lens.__doc__.split("Paper -> code")[1].split("What the paper leaves")[0], re.M)
    body = source.split('"""', 2)[2]
    assert len(rows) >= 12
    for where, names in rows:
        for name in names.split(", "):
            owner = temporal_lens
            for part in name.split("."):
                owner = getattr(owner, part)
        assert not where.startswith("Eq") or where in body, where
    for mark in set(re.findall(r"(?:AMBIGUOUS|UNSPECIFIED|DEVIATION) ([AUD]\d)", temporal_lens.__doc__)):
        assert re.search(rf"\b{mark}\b", body), mark


# ---------------------------------------------------------------------------------------------
# hierarchical_sae.py
# ---------------------------------------------------------------------------------------------


ALL = tuple(hierarchical_sae.VARIANTS)


def hs_config(**values):
    base = dict(model="synthetic", tokens=4096, heldout_tokens=1024, T=32, batch_size=4, steps=6, cache="none",
                checkpointing=False, log_every=1, lr=3e-3, eval="none", gru_divisor=4)
    return hierarchical_sae.Config(**{**base, **values})


def hs_sae(D=16, seed=0, **values):
    """A model whose zero-initialised parameters are random too, so that every path counts."""
    sae = hierarchical_sae.HierarchicalSAE(D, hs_config(seed=seed, k=min(8, D), **values))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name.startswith(("b_", "log_psi", "W_route")):
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))
        sae.scale.fill_(1.7)
    return sae


def hs_data(B=3, T=12, D=16, seed=0, masked=(2, 7)):
    gen = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(B, T, D, generator=gen)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, list(masked)] = False
    return x, mask


def hs_train(out, **values):
    """Real train() on synthetic data -> (state dict, log rows)."""
    cfg = hs_config(out=str(out), **values)
    for acts in common.open_activations(cfg):
        hierarchical_sae.train(cfg, acts)
    state = common.load_tensors(Path(out) / "sae_weights.safetensors")[0]
    return state, [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# --- encoder: limits, levels, routing, local and global mixing, masks, causality ----------------


def test_hierarchical_one_level_is_the_standard_sae():
    x, mask = hs_data()
    sae = hs_sae(variant="hierarchical", levels=1)
    plain = tsae.TSAE(16, tsae.Config(temporal=False, k=8))
    plain.load_state_dict({k: v for k, v in sae.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(sae.encode(x, mask), plain.encode(x)) and torch.equal(sae(x)[0], plain(x)[0])
    assert not hasattr(sae, "W_route")
    assert not torch.allclose(hs_sae(variant="hierarchical").encode(x), plain.encode(x))


def test_hierarchical_levels_code_what_is_left_over():
    x, _ = hs_data()
    sae = hs_sae(variant="hierarchical")
    W, V, b = sae.W_enc, sae.W_dec, sae.b_enc
    assert sae.sizes == [6, 5, 5] and hierarchical_sae.split(576, 3) == [192] * 3 and hierarchical_sae.split(8, 3) == [3, 3, 2]
    h = x[1, 4] / sae.scale - sae.b_dec
    g = torch.softmax(h @ sae.W_route + sae.b_route, 0)
    z1 = 3 * g[0] * F.relu(h @ W[:, :6] + b[:6])
    z2 = 3 * g[1] * F.relu((h - z1 @ V[:6]) @ W[:, 6:11] + b[6:11])
    z3 = 3 * g[2] * F.relu((h - z1 @ V[:6] - z2 @ V[6:11]) @ W[:, 11:] + b[11:])
    assert torch.allclose(sae.encode(x)[1, 4], torch.cat([z1, z2, z3]), atol=1e-5)
    top = hs_sae(variant="hierarchical", activation="topk")                # k = 8 = 3 + 3 + 2
    active = (top.encode(x) > 0).sum(-1)
    assert active.max() <= 8 and ((top.encode(x)[..., :6] > 0).sum(-1) <= 3).all()


def test_hierarchical_position_wise_variants_take_vectors_and_temporal_refuses():
    x, _ = hs_data()
    for name in ALL:
        sae = hs_sae(variant=name)
        if name == "temporal":
            try:
                sae.encode(x[0])
            except common.UserError as error:
                assert "sequences" in str(error)
                continue
            raise AssertionError("a single vector was accepted")
        assert torch.allclose(sae.encode(x[0]), sae.encode(x)[0], atol=1e-6), name
        assert sae.causal
        a, b = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        assert torch.allclose(sae.decode(a + b) + sae.b_dec * sae.scale, sae.decode(a) + sae.decode(b), atol=1e-5)
    try:
        hs_sae(D=12, variant="temporal")
    except common.UserError as error:
        assert "heads" in str(error)
    else:
        raise AssertionError("a width that 8 heads do not divide was accepted")


def test_hierarchical_local_equals_conv1d():
    x, mask = hs_data(masked=())
    for causal in (False, True):
        sae = hs_sae(causal=causal)
        weights = [w.view(3, 16, 16).permute(2, 1, 0) for w in (sae.W_conv1, sae.W_conv2)]   # (out, in, kernel)
        h = x.transpose(1, 2)
        for i, (w, b) in enumerate(zip(weights, (sae.b_conv1, sae.b_conv2))):
            h = F.relu(h) if i else h
            h = F.conv1d(F.pad(h, (2, 0)), w, b) if causal else F.conv1d(h, w, b, padding=1)
        assert torch.allclose(sae.local(x, mask), h.transpose(1, 2), atol=1e-4)


def test_hierarchical_attention_equals_multihead_attention():
    x, mask = hs_data()
    for causal in (False, True):
        sae = hs_sae(causal=causal)
        ref = nn.MultiheadAttention(16, 8, bias=False, batch_first=True)
        with torch.no_grad():
            ref.in_proj_weight.copy_(sae.W_qkv.t())
            ref.out_proj.weight.copy_(sae.W_out.t())
        hide = torch.ones(12, 12, dtype=torch.bool).triu(1) if causal else torch.zeros(12, 12, dtype=torch.bool)
        y = ref(x, x, x, key_padding_mask=~mask, attn_mask=hide, need_weights=False)[0]
        assert torch.allclose(sae.attend(x, mask)[mask], y[mask], atol=1e-5)
    sae.attend(x, torch.zeros_like(mask))                                  # no key at all ...
    assert torch.isfinite(sae.encode(x, torch.zeros_like(mask))).all()     # ... and still finite


def test_hierarchical_causality():
    x, mask = hs_data(T=12, masked=(3,))
    later = x.clone()
    later[:, 8:] = 3 * torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    for compose in ("residual", "literal", "parallel"):
        for causal in (True, False):
            sae = hs_sae(causal=causal, compose=compose)
            same = torch.allclose(sae.encode(x, mask)[:, :8], sae.encode(later, mask)[:, :8], atol=1e-6)
            assert same == causal == sae.causal, (compose, causal)
            assert torch.allclose(sae.route(x)[:, :8], sae.route(later)[:, :8])   # the router never looks ahead
    image = torch.randn(2, 12, 16)
    changed = image.clone()
    changed[:, 8:] = 0
    assert torch.allclose(sae.predict(image)[:, :8], sae.predict(changed)[:, :8], atol=1e-6)


def test_hierarchical_masked_tokens_influence_nobody():
    x, mask = hs_data()
    loud = torch.where(mask[..., None], x, 1e4 * torch.ones_like(x))
    for compose in ("residual", "literal", "parallel"):
        sae = hs_sae(compose=compose)
        assert torch.allclose(sae.encode(x, mask)[mask], sae.encode(loud, mask)[mask], atol=1e-5)
        padded = torch.cat([x[:, :9], 1e4 * torch.ones(3, 3, 16)], 1)      # padding = the end of the text
        real = torch.ones(3, 9, dtype=torch.bool)
        assert torch.allclose(sae.encode(x[:, :9]), sae.encode(padded, F.pad(real, (0, 3)))[:, :9], atol=1e-5)
    n = mask.sum()
    for name in ALL:
        sae = hs_sae(variant=name)
        quiet, noisy = (hierarchical_sae.losses(sae, t, mask, n, 0, sae.cfg)[0] for t in (x, loud))
        for term in quiet:
            assert torch.allclose(quiet[term], noisy[term], rtol=1e-4), (name, term)


# --- losses -------------------------------------------------------------------------------------


def test_hierarchical_routing_loss_by_hand():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    even = torch.full((2, 4, 3), 1 / 3)
    one = F.one_hot(torch.zeros(2, 4, dtype=torch.long), 3).float()
    turn = torch.eye(3)[torch.tensor([[0, 1, 2, 0], [0, 1, 2, 2]])]
    assert abs(hierarchical_sae.routing_loss(even, mask)) < 1e-5
    assert torch.allclose(hierarchical_sae.routing_loss(one, mask), torch.tensor(6 * math.log(3)), atol=1e-5)
    # window 1: shares 1/2, 1/4, 1/4 (entropy 1.5 log 2), window 2: 1/2, 1/2 (log 2): choosing is free, starving is not
    want = 4 * (math.log(3) - 1.5 * math.log(2)) + 2 * (math.log(3) - math.log(2))
    assert torch.allclose(hierarchical_sae.routing_loss(turn, mask), torch.tensor(want), atol=1e-5)


def test_hierarchical_temporal_losses_equal_loops():
    x, mask = hs_data(D=16)
    sae = hs_sae()
    f = F.relu(torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3)))
    got = hierarchical_sae.temporal_losses(sae, f, x, mask, sae.cfg)
    psi = sae.log_psi.exp()
    image = (x / sae.scale - sae.b_dec) * mask[..., None]
    predicted = sae.predict(image)

    def c(b, t, u):
        return F.cosine_similarity(psi * f[b, t], psi * f[b, u], dim=0)
    want = dict.fromkeys(got, 0.0)
    for b in range(3):
        for t in range(11):
            if mask[b, t] and mask[b, t + 1]:
                logits = torch.stack([c(b, t, u) / 2.0 for u in range(12) if u != t and mask[b, u]])
                want["consistency"] += 1 - c(b, t, t + 1)
                want["contrastive"] += logits.logsumexp(0) - c(b, t, t + 1) / 2.0
                want["prediction"] += (predicted[b, t] - image[b, t + 1]).square().mean()
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-4), name


def test_hierarchical_consistency_is_in_0_1_and_constant_codes_are_perfect():
    f = F.relu(torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)))
    c = hierarchical_sae.consistency_matrix(f, torch.randn(16, generator=torch.Generator().manual_seed(1)))
    assert c.min() >= 0 and c.max() <= 1 + 1e-6
    f[:, 3] = 0                                                            # a token without a feature: no NaN
    f.requires_grad_()
    hierarchical_sae.consistency_matrix(f).sum().backward()
    assert torch.isfinite(f.grad).all()
    sae, mask = hs_sae(), torch.ones(2, 9, dtype=torch.bool)
    constant = f.detach()[:, :1].expand(-1, 9, -1)
    terms = hierarchical_sae.temporal_losses(sae, constant, torch.zeros(2, 9, 16), mask, sae.cfg)
    assert abs(terms["consistency"]) < 1e-4
    # 8 pairs a window, 8 candidates each (all but the token itself): the contrast sees nothing to prefer
    assert torch.allclose(terms["contrastive"], torch.tensor(16 * math.log(8)), rtol=1e-5)


def test_hierarchical_prediction_target_has_no_gradient():
    sae, mask = hs_sae(), torch.ones(1, 2, dtype=torch.bool)
    x_hat = torch.randn(1, 2, 16, requires_grad=True)                      # one pair: token 0 predicts token 1
    hierarchical_sae.temporal_losses(sae, torch.ones(1, 2, 16), x_hat, mask, sae.cfg)["prediction"].backward()
    assert x_hat.grad[0, 0].abs().max() > 0 and x_hat.grad[0, 1].abs().max() == 0


def test_hierarchical_losses_by_hand_and_reductions():
    x, mask = hs_data()
    n = mask.sum()
    for name in ALL:
        sae = hs_sae(variant=name)
        terms, stats = hierarchical_sae.losses(sae, x, mask, n, 0, sae.cfg)
        x_hat, f = sae(x, mask)
        error = ((x_hat - x) / 1.7)[mask].square().sum(1).mean()
        assert torch.allclose(terms["recon"], error, rtol=1e-5)
        assert torch.allclose(terms["l1"], 0.04 * f[mask].sum(1).mean(), rtol=1e-5)
        assert set(terms) - {"recon", "l1"} == (
            {"routing", "consistency", "contrastive", "prediction"} if name == "temporal" else
            {"routing"} if name == "hierarchical" else set()), name
        if name == "temporal":
            for term, value in hierarchical_sae.temporal_losses(sae, f, x_hat, mask, sae.cfg).items():
                assert torch.allclose(terms[term], 0.2 * value / n, rtol=1e-5), term
        sum(terms.values()).backward()
        whole = {k: p.grad.clone() for k, p in sae.named_parameters() if p.grad is not None}
        sae.zero_grad()
        halves = [hierarchical_sae.losses(sae, x[i], mask[i], n, 0, sae.cfg)[0] for i in (slice(1), slice(1, 3))]
        for half in halves:                                                # micro-batches add up exactly
            sum(half.values()).backward()
        for term in terms:
            assert torch.allclose(halves[0][term] + halves[1][term], terms[term], rtol=1e-4), (name, term)
        for k, p in sae.named_parameters():
            assert torch.allclose(p.grad, whole[k], rtol=1e-3, atol=1e-6), (name, k)
    mean = hierarchical_sae.losses(hs_sae(variant="adversarial", recon_reduction="mean"), x, mask, n, 0,
                     hs_config(recon_reduction="mean"))[0]["recon"]
    assert torch.allclose(16 * mean, hierarchical_sae.losses(hs_sae(variant="adversarial"), x, mask, n, 0, hs_config())[0]["recon"])


def test_hierarchical_checkpointing_changes_no_gradient():
    x, mask = hs_data()
    grads = []
    for checkpointing in (False, True):
        sae = hs_sae(checkpointing=checkpointing)
        sum(hierarchical_sae.losses(sae, x, mask, mask.sum(), 0, sae.cfg)[0].values()).backward()
        grads.append({k: p.grad for k, p in sae.named_parameters()} | {"tally": sae.tally})
    for k in grads[0]:
        assert torch.equal(grads[0][k], grads[1][k]), k


# --- margins, attribution, the adversarial term ---------------------------------------------------


def test_hierarchical_similarity_in_blocks_equals_the_full_matrix():
    W = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    rows = torch.tensor([3, 49, 0, 17, 18])
    full = (W @ W.t()).fill_diagonal_(-2).max(1).values[rows]
    fast = hierarchical_sae.similarity(W, rows, block=2)
    assert torch.allclose(fast, full, atol=1e-6)
    grads = [torch.autograd.grad(s.square().sum(), W, retain_graph=True)[0] for s in (fast, full)]
    assert torch.allclose(*grads, atol=1e-6)


def test_hierarchical_margin_by_hand():
    sae = hs_sae(D=16, variant="self-aligning")
    rows = torch.tensor([1, 4])
    first = hierarchical_sae.update_margin(sae, torch.tensor([0.2, 0.5]), rows, sae.cfg)
    assert torch.allclose(first, torch.tensor([0.2, 0.5]))                 # mu_0 = s_0, sigma_0 = 0
    second = hierarchical_sae.update_margin(sae, torch.tensor([0.4, 0.5]), rows, sae.cfg)
    mean = 0.95 * 0.2 + 0.05 * 0.4                                         # Eq. 3
    std = math.sqrt(0.05 * (0.4 - mean) ** 2)                              # Eq. 4
    assert torch.allclose(second, torch.tensor([mean + 2 * std, 0.5]))     # Eq. 5
    assert mean + 2 * std < 0.4                                            # a jump is over its margin
    third = hierarchical_sae.update_margin(sae, torch.tensor([0.4, 0.4]), rows, sae.cfg)
    mean2 = 0.95 * mean + 0.05 * 0.4
    std2 = math.sqrt(0.95 * std ** 2 + 0.05 * (0.4 - mean2) ** 2)
    assert torch.allclose(third[0], torch.tensor(mean2 + 2 * std2))
    assert sae.margin_mean.isnan().sum() == 14                             # the others were not touched
    fixed = dataclasses.replace(sae.cfg, adapt=False)
    assert torch.allclose(hierarchical_sae.update_margin(sae, torch.tensor([0.9]), torch.tensor([7]), fixed), torch.tensor(0.9))
    assert torch.allclose(hierarchical_sae.update_margin(sae, torch.tensor([0.1]), torch.tensor([7]), fixed), torch.tensor(0.9))


def test_hierarchical_margin_ignores_drift():
    """The finding of the docstring: a steady drift is never over the margin, noise in about 2 % of the steps."""
    sae = hs_sae(D=16, variant="self-aligning")
    rows, over = torch.arange(16), []
    for step in range(300):
        s = torch.full((16,), 0.1 + 0.002 * step)
        over.append((s > hierarchical_sae.update_margin(sae, s, rows, sae.cfg)).any().item())
    assert any(over[:10]) and not any(over[60:])
    gen, count = torch.Generator().manual_seed(0), 0
    for step in range(2000):
        s = 0.3 + 0.05 * torch.randn(16, generator=gen)
        margin = hierarchical_sae.update_margin(sae, s, rows, sae.cfg)
        count += (s > margin).sum().item() if step >= 200 else 0
    assert 0.01 < count / (1800 * 16) < 0.025


def test_hierarchical_adversarial_weight_by_hand():
    got = hierarchical_sae.adversarial_weight(torch.tensor([0.0, 0.3, 0.55, 0.6, 0.9, 1.0]))
    assert torch.allclose(got, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.4, 0.5]))


def test_hierarchical_attribution_is_the_gradient_at_the_code():
    """For a linear decoder: dL/dz = (2 / n) (x_hat - x) W_dec^T + lambda_1 / n at scored tokens."""
    x, mask = hs_data()
    sae = hs_sae(variant="adversarial")
    n = mask.sum()
    for part in (slice(0, 1), slice(1, 3)):                                # two micro-batches
        sum(hierarchical_sae.losses(sae, x[part], mask[part], n, 0, sae.cfg)[0].values()).backward()
    hierarchical_sae.update_monitor(sae, n, 0, sae.cfg)
    with torch.no_grad():
        x_hat, f = sae(x, mask)
        grad = (2 * ((x_hat - x) / 1.7) @ sae.W_dec.t() + 0.04)[mask] / n
        assert torch.allclose(sae.attribution, grad.norm(dim=0), rtol=1e-4)
        assert torch.allclose(sae.feature_ema[0], f[mask].mean(0), atol=1e-6)     # first step: the plain mean
        assert torch.allclose(sae.feature_ema[2], (f[mask] > 0).float().mean(0))
    assert sae.tally.abs().sum() == 0 and "tally" not in sae.state_dict()


def test_hierarchical_monitor_averages_steps_by_hand():
    """Plain means until their weight falls to 1 - 0.99; then the newest step counts 1 %."""
    (x, mask), sae = hs_data(), hs_sae(variant="hierarchical")
    means, routes = [], []
    for step, batch in ((0, x), (1, 2 * x), (1000, 3 * x)):
        terms = hierarchical_sae.losses(sae, batch, mask, mask.sum(), step, sae.cfg)[0]
        sum(terms.values()).backward()
        hierarchical_sae.update_monitor(sae, mask.sum(), step, sae.cfg)
        with torch.no_grad():
            f, gate = sae(batch, mask)[1][mask], sae.route(batch)[mask]
            means.append(torch.stack([f.mean(0), f.square().mean(0), (f > 0).float().mean(0)]))
            routes.append(torch.stack([gate.mean(0), torch.special.entr(gate).mean(0)]))
        if step == 1:
            assert torch.allclose(sae.feature_ema, (means[0] + means[1]) / 2, rtol=1e-4, atol=1e-6)
            assert torch.allclose(sae.route_ema, (routes[0] + routes[1]) / 2, rtol=1e-4, atol=1e-6)
    for ema, values in ((sae.feature_ema, means), (sae.route_ema, routes)):
        want = 0.99 * (values[0] + values[1]) / 2 + 0.01 * values[2]
        assert torch.allclose(ema, want, rtol=1e-4, atol=1e-6)
    assert hierarchical_sae.monitor_rate(49, hs_config(monitor_decay=0.9)) == 1 - 0.9


def test_hierarchical_adversarial_loss_by_hand():
    for name, strength in (("adversarial", 1.0), ("disentangled", 10.0)):
        sae = hs_sae(D=16, variant=name)
        with torch.no_grad():
            sae.W_dec[1] = F.normalize(sae.W_dec[0] + 0.1 * sae.W_dec[1], dim=0)     # two near copies
        sae.attribution.copy_(torch.arange(16.0).flip(0))                  # features 0, 1, 2 are above 85 %
        term, log = hierarchical_sae.adversarial_loss(sae, 0, sae.cfg)
        cosine = (sae.W_dec @ sae.W_dec.t()).fill_diagonal_(-2).max(1).values
        A = torch.tensor([15.0, 14.0, 13.0])
        spurious = (A * cosine[:3].clamp(min=0)).sum() / A.sum()
        weight = max(spurious.item() - 0.5, 0.1)
        want = weight * strength * ((A / 15) * cosine[:3].clamp(min=0).square()).sum()
        assert torch.allclose(term, want, rtol=1e-5) and abs(log["A_spurious"] - spurious) < 1e-6
        term.backward()
        assert sae.W_dec.grad[0].abs().max() > 0
        sae.attribution.zero_()                                            # nothing known yet (step 0): no penalty
        assert hierarchical_sae.adversarial_loss(sae, 0, sae.cfg)[0] == 0


def test_hierarchical_adversarial_loss_separates_copies():
    sae = hs_sae(D=16, variant="disentangled")
    with torch.no_grad():
        sae.W_dec[1] = F.normalize(sae.W_dec[0] + 0.1 * sae.W_dec[1], dim=0)
    sae.attribution[:2] = 1.0
    before = (sae.W_dec[0] @ sae.W_dec[1]).item()
    for step in range(50):
        sae.zero_grad()
        hierarchical_sae.adversarial_loss(sae, step, sae.cfg)[0].backward()
        with torch.no_grad():
            sae.W_dec -= 0.05 * sae.W_dec.grad
        hierarchical_sae.normalize_decoder(sae)
    assert before > 0.9 and (sae.W_dec[0] @ sae.W_dec[1]).item() < 0.6


def test_hierarchical_random_rows_are_unbiased_and_seeded():
    sae = hs_sae(D=64, variant="disentangled", sim_rows=16)
    sae.attribution.copy_(torch.rand(64, generator=torch.Generator().manual_seed(0)))
    whole = hierarchical_sae.adversarial_loss(sae, 0, dataclasses.replace(sae.cfg, sim_rows=64))[0].item()
    parts = [hierarchical_sae.adversarial_loss(sae, step, sae.cfg)[0].item() for step in range(400)]
    assert abs(sum(parts) / 400 - whole) < 0.1 * whole
    assert hierarchical_sae.adversarial_loss(sae, 7, sae.cfg)[0].item() == parts[7]


# --- training -------------------------------------------------------------------------------------


def test_hierarchical_every_variant_trains_and_every_parameter_moves():
    with tempfile.TemporaryDirectory() as folder:
        for name in ALL:
            first = hierarchical_sae.HierarchicalSAE(64, hs_config(variant=name)).state_dict()
            last, log = hs_train(f"{folder}/{name}", variant=name, steps=30)
            still = [k for k in first if first[k].numel() > 1 and torch.equal(first[k], last[k])]
            assert not still, (name, still)
            assert torch.allclose(last["W_dec"].norm(dim=1), torch.ones(64), atol=1e-5)
            assert log[-1]["error"] < 0.8 * log[0]["error"], name
            parts = hierarchical_sae.VARIANTS[name]
            assert ("share_3" in log[-1]) == parts["hierarchy"] and ("over_margin" in log[-1]) == parts["margin"]
            assert ("A_spurious" in log[-1]) == (parts["orthogonality"] > 0)
            if parts["hierarchy"]:
                assert abs(sum(log[-1][f"share_{i}"] for i in (1, 2, 3)) - 1) < 1e-4
                assert sum(log[-1][f"entropy_{i}"] for i in (1, 2, 3)) <= math.log(3) + 1e-4


def test_hierarchical_every_flag_reaches_every_parameter():
    x, mask = hs_data()
    for flags in (dict(compose="literal"), dict(compose="parallel"), dict(conv=False), dict(causal=True),
                  dict(conv=False, compose="parallel"), dict(levels=1), dict(levels=5), dict(consistency="cosine"),
                  dict(activation="topk"), dict(adapt=False), dict(gru_divisor=1), dict(lambda_temp=0.0),
                  dict(routing_weight=0.0), dict(sim_rows=10), dict(expansion=3, checkpointing=True)):
        cfg = hs_config(k=8, **flags)
        sae = hierarchical_sae.HierarchicalSAE(16, cfg)                                  # as at step 0 of a real run
        terms = hierarchical_sae.losses(sae, x, mask, mask.sum(), 0, cfg)[0]
        terms["adversarial"] = hierarchical_sae.adversarial_loss(sae, 0, cfg)[0]
        sum(terms.values()).backward()
        common.assert_gradients(sae, terms)
        assert ("gru.weight_hh_l1" in sae.state_dict()) == (cfg.lambda_temp > 0), flags
    for bad in (dict(levels=0), dict(percentile=1.5), dict(tau=0.0), dict(levels=17),       # 16 features, k = 8
                dict(levels=9, activation="topk")):
        try:
            hierarchical_sae.HierarchicalSAE(16, hs_config(k=8, **bad))
        except common.UserError:
            continue
        raise AssertionError(bad)


def test_hierarchical_resume_is_exact():
    """Ctrl-C in the middle, then --resume: same log and weights, byte for byte (margins, attribution and EMAs too)."""
    with tempfile.TemporaryDirectory() as folder:
        hs_train(f"{folder}/whole", steps=6, sim_rows=20)
        cfg = hs_config(out=f"{folder}/cut", steps=6, sim_rows=20)
        acts = next(common.open_activations(cfg))
        batch = acts.batch

        def interrupted(step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return batch(step)
        acts.batch = interrupted
        try:
            hierarchical_sae.train(cfg, acts)
        except common.Interrupted:
            pass
        assert not (Path(folder) / "cut/sae_weights.safetensors").exists()
        again = dataclasses.replace(cfg, resume=cfg.out)
        hierarchical_sae.train(again, next(common.open_activations(again)))
        for file in ("log.jsonl", "sae_weights.safetensors"):
            assert (Path(folder) / "cut" / file).read_bytes() == (Path(folder) / "whole" / file).read_bytes(), file


def test_hierarchical_evaluation_of_levels():
    with tempfile.TemporaryDirectory() as folder:
        cfg = hs_config(out=f"{folder}/run", eval="core", steps=1)
        acts = next(common.open_activations(cfg))
        found = hierarchical_sae.train(cfg, acts)
        sae = hierarchical_sae.HierarchicalSAE(64, cfg)
        sae.load_state_dict(common.load_tensors(f"{folder}/run/sae_weights.safetensors")[0])
        x, mask = (torch.cat(t) for t in zip(*acts.heldout()))
        with torch.no_grad():
            f, gate = sae.encode(x, mask)[mask].double(), sae.route(x)[mask]
        levels = found["levels"]
        top, low = (f[:, part].var(0, unbiased=False).mean().item() for part in (slice(43, 64), slice(0, 22)))
        assert abs(levels["variance_3"] - top) < 1e-4 * top and abs(levels["variance_drop"] - (1 - top / low)) < 1e-3
        assert abs(levels["entropy"] - torch.special.entr(gate).sum(1).mean().item()) < 1e-4
        assert abs(levels["L0_2"] - (f[:, 22:43] > 0).sum(1).double().mean().item()) < 1e-4
        assert math.isfinite(found["evolution"]["skill"]) and found["core"]["EV"] < 1


# ---------------------------------------------------------------------------------------------
# Evaluation: probing, unlearning, steering, export
# ---------------------------------------------------------------------------------------------


class LinearSAE(torch.nn.Module):
    """f = relu((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, from given weights."""
    causal, scale = True, 1.0                             # features in raw units

    def __init__(self, W_enc, W_dec, b_enc, b_dec):
        super().__init__()
        for name, value in dict(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec).items():
            setattr(self, name, torch.nn.Parameter(value.float()))

    def encode(self, x, mask=None):
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f):
        return f @ self.W_dec + self.b_dec

    def forward(self, x, mask=None):
        f = self.encode(x, mask)
        return self.decode(f), f


def fixture_sae(tensors, prefix):
    return LinearSAE(*(tensors[f"{prefix}.{name}"] for name in ("W_enc", "W_dec", "b_enc", "b_dec")))


def zero_sae(D, n_features):
    """What an untrained or collapsed SAE is: no feature is ever on."""
    return LinearSAE(torch.zeros(D, n_features), torch.zeros(n_features, D), torch.zeros(n_features), torch.zeros(D))


WORDS = [f"a{i}" for i in range(12)] + [f"b{i}" for i in range(12)]
CHAT = ("{{ '<bos><start_of_turn>user\n' }}{{ messages[0]['content'] }}{{ '<end_of_turn>\n' }}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")


def words_lm(layers=3, seed=0, words=WORDS, chat=None):
    """A random Llama of width 32 and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(["<unk>", "<bos>", "<eos>", "<pad>", *words])}
    tok = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
                                  pad_token="<pad>")
    tok.chat_template = chat
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)
    return common.LM(LlamaForCausalLM(config), tok, "tiny", f"r{layers}{seed}", torch.device("cpu"), torch.float32)


def walk(letter, n, seed):
    """Text in which the next word follows from the last: x_i -> x_(i+1), with a start at random."""
    start = int(torch.randint(12, (1,), generator=common.generator(seed, f"walk{letter}{seed}")))
    return " ".join(f"{letter}{(start + i) % 12}" for i in range(n))


def train_lm(lm, steps=60):
    """Teach the tiny model both languages; seconds."""
    texts = [walk("ab"[i % 2], 16, i) for i in range(48)]
    tokens, _ = common.make_windows(texts, lm, 16, 48)
    lm.model.requires_grad_(True).train()
    opt = torch.optim.Adam(lm.model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = tokens[step % 3::3].long()
        logits = lm.model(input_ids=rows).logits[:, :-1]
        opt.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        opt.step()
    lm.model.requires_grad_(False).eval()
    return lm


def tiny_acts(lm, layer=1, T=16, cache="none", lm_batch=4):
    """Activations of the tiny model's block `layer`, harvested by the real stores."""
    cfg = tsae.Config(T=T, cache=cache, lm_batch=lm_batch, batch_size=2, buffer=8, device="cpu", dtype="float32",
                      layer=str(layer))
    tokens, lengths = common.make_windows([walk("ab"[i % 2], T, i) for i in range(8)], lm, T, 8)
    threshold = common.sink_threshold(lm, tokens, lengths, [layer], 4)[layer]
    stores = [common.Store(lm, layer, tokens, lengths, threshold) for _ in range(2)]
    return common.Activations(cfg, lm, layer, *stores)


@contextlib.contextmanager
def data_folder(**files):
    """A made-up data/ folder instead of the bundled one: name -> rows of <name>.jsonl.xz."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        for name, rows in files.items():
            with lzma.open(Path(folder) / "data" / f"{name}.jsonl.xz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        before = common.HERE, common.HERE
        common.HERE = common.HERE = Path(folder)
        try:
            yield Path(folder)
        finally:
            common.HERE, common.HERE = before


def probe_rows(n=40):
    """A task of two labels that the words give away, one of three labels, and one about tokens."""
    rows = []
    for i in range(n):
        split = "train" if i % 5 else "test"
        rows.append({"task": "letter", "split": split, "label": "ab"[i % 2], "text": walk("ab"[i % 2], 3 + i % 7, i)})
        rows.append({"task": "start", "split": split, "label": str(i % 3), "text": f"a{i % 3} " * 4 + walk("b", 1 + i % 5, i)})
        quote = walk("a", 4, i)
        text = walk("b", 3, i) + " " + quote + " " + walk("b", 2, i)
        at = text.index(quote)
        rows.append({"task": "inside_quotation", "split": split, "text": text, "spans": [[at, at + len(quote)]]})
    return rows


# ------------------------------------------------------------------------------------ probing


def test_eval_pooling_matches_saebench():
    tensors, _ = saebench()
    sae = fixture_sae(tensors, "pool.sae")
    for name in ("a", "b"):
        x = tensors[f"pool.{name}.x"]
        mask = (x != 0).any(-1)                    # BOS and padding are zero there
        assert torch.allclose(common.pool(x, x, mask), tensors[f"pool.{name}.mean_x"], rtol=1e-5, atol=1e-6)
        f = sae.encode(x, mask).detach()
        assert torch.allclose(common.pool(f, x, mask), tensors[f"pool.{name}.mean_f"], rtol=1e-5, atol=1e-6)
    x = tensors["pool.odd.x"]                      # [1, -1] adds up to 0: SAEBench drops it, it is not a zero vector
    mask = torch.tensor([[True, True, False]])
    assert torch.allclose(common.pool(x, x, mask)[0, :2], torch.tensor([1.5, 0.0]))
    assert (common.pool(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16), mask) == 0).all()      # no position: 0, not NaN


def test_eval_probe_matches_saebench():
    tensors, values = saebench()
    x, x_test = (torch.cat([tensors[f"probe.{part}.pos"], tensors[f"probe.{part}.neg"]]).numpy() for part in ("train", "test"))
    y, y_test = np.repeat([1, 0], 100), np.repeat([1, 0], 50)
    for k, want in values["probe"].items():
        columns = common.top_columns(x, y, int(k))
        assert sorted(columns.tolist()) == want["features"], k
        columns = np.sort(columns)
        assert math.isclose(common.probe_accuracy(x[:, columns], y, x_test[:, columns], y_test), want["accuracy"], rel_tol=1e-5)


def test_eval_one_vs_rest_is_balanced_and_even():
    labels = list("w" * 12 + "x" * 12 + "y" * 12 + "z" * 12)
    rows, y = common.one_vs_rest(labels, "x")
    assert len(rows) == 24 and len(set(rows)) == 24 and y.sum() == 12
    assert all((labels[i] == "x") == bool(t) for i, t in zip(rows, y))
    negatives = [labels[i] for i, t in zip(rows, y) if not t]
    assert all(negatives.count(c) == 4 for c in "wyz")
    rows, y = common.one_vs_rest(list("xxxxxxxxy"), "x")          # too few negatives: positives are cut as well
    assert len(rows) == 2 and y.sum() == 1


def test_eval_probing_finds_the_words_and_a_zero_sae_scores_a_half():
    lm = words_lm()
    acts = tiny_acts(lm)
    rng = common.generator(0, "w")
    W = torch.nn.functional.normalize(torch.randn(64, 32, generator=rng), dim=1)
    with data_folder(probes=probe_rows()):
        good = common.probing(LinearSAE(W.t().clone(), W, torch.zeros(64), torch.zeros(32)), acts)
        zero = common.probing(zero_sae(32, 64), acts)
    assert {row["task"] for row in good["per_task"]} == {"letter", "start", "inside_quotation"}
    assert good["sae_all"] > 0.9 and good["residual_all"] > 0.9 and good["pca_top_5"] > 0.8, good
    for k in common.PROBE_KS:
        assert zero[f"sae_top_{k}"] == 0.5 and zero[f"residual_top_{k}"] == good[f"residual_top_{k}"]
    assert zero["sae_all"] == 0.5


def test_eval_probing_keeps_the_baselines_of_a_layer():
    W = torch.nn.functional.normalize(torch.randn(64, 32, generator=common.generator(0, "w")), dim=1)
    sae = LinearSAE(W.t().clone(), W, torch.zeros(64), torch.zeros(32))
    with data_folder(probes=probe_rows()) as folder:
        acts = tiny_acts(words_lm(), cache=str(folder / "c"))
        first, scored, real = common.probing(sae, acts), [], common.probe_task
        common.probe_task = lambda *a, only, **k: (scored.append(only), real(*a, only=only, **k))[1]
        try:
            assert common.probing(sae, acts) == first and set(scored) == {("sae",)}      # read, not fitted again
            acts.heldout_store.threshold *= 2              # other sinks, other states: fitted anew
            common.probing(sae, acts)
        finally:
            common.probe_task = real
        assert scored[-1] == ("sae", "residual", "pca")


def test_eval_probing_fits_damaged_baselines_again():
    scored, real = [], common.probe_task

    def probe_task(train, test, only):
        scored.append(only)
        return {f"{view}_all": 0.5 + 0.1 * len(view) for view in only}
    samples = {"letter": {"train": (None, None, [0, 1]), "test": (None, None, [0])}}
    with tempfile.TemporaryDirectory() as here:
        file = Path(here) / "baselines.json"
        try:
            common.probe_task = probe_task
            first = common.probe_report(samples, file)
            assert common.probe_report(samples, file) == first and scored.pop() == ("sae",)
            for damaged in (file.read_text()[:20], "null", '{"letter": 1}'):
                file.write_text(damaged)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    assert common.probe_report(samples, file) == first, damaged
                assert scored.pop() == ("sae", "residual", "pca") and "fitting the baselines again" in out.getvalue()
            assert common.probe_report(samples, file) == first and scored.pop() == ("sae",)     # and kept
        finally:
            common.probe_task = real


def test_eval_probing_ignores_batch_size_padding_side_and_cache():
    lm = words_lm()
    W = torch.nn.functional.normalize(torch.randn(48, 32, generator=common.generator(1, "w")), dim=1)
    sae = LinearSAE(W.t().clone(), W, torch.zeros(48), torch.zeros(32))
    found = []
    with data_folder(probes=probe_rows()) as folder:
        for side, lm_batch, cache in (("right", 3, "none"), ("left", 7, str(folder / "c")), ("left", 5, str(folder / "c"))):
            lm.tokenizer.padding_side = lm.tokenizer.truncation_side = side
            acts = tiny_acts(lm, cache=cache, lm_batch=lm_batch)
            items = [dict(row, split="test") for row in probe_rows()]
            found.append(common.probe_samples(sae, acts, items, 8, "" if cache == "none" else "key"))
        assert len(list((folder / "c").glob("probes-*"))) == 1
    for other in found[1:]:
        for task in found[0]:
            (x, f, labels), (x2, f2, labels2) = found[0][task]["test"], other[task]["test"]
            assert labels == labels2
            assert torch.allclose(x, x2, rtol=0.02, atol=0.02) and torch.allclose(f, f2, rtol=0.05, atol=0.05)   # bf16


def test_eval_probing_cuts_long_texts_at_their_end_and_maps_spans():
    lm = words_lm()
    acts = tiny_acts(lm)
    text = "b0 b1 a0 a1 b2 b3"
    items = [{"task": "q", "split": "train", "text": text, "spans": [[6, 11]]}]
    x, _, labels = common.probe_samples(zero_sae(32, 8), acts, items, 8)["q"]["train"]
    assert labels.count("inside") == 2 and labels.count("outside") == 4
    x, _, labels = common.probe_samples(zero_sae(32, 8), acts, items, 3)["q"]["train"]
    assert labels == ["outside", "outside", "inside"]
    ids = torch.tensor([[lm.bos] + lm.tokenizer(text, add_special_tokens=False)["input_ids"][:3]])
    want = common.hidden_states(lm, ids, [1])[1][0, 1:]
    assert torch.allclose(x, want, rtol=0.01, atol=0.01)


def test_eval_probing_damaged_cache_is_made_again():
    lm = words_lm()
    items = [dict(row, split="test") for row in probe_rows(12)]
    with tempfile.TemporaryDirectory() as folder:
        acts = tiny_acts(lm, cache=folder)
        first = common.probe_samples(zero_sae(32, 8), acts, items, 8, "key")
        file = next(Path(folder).glob("probes-*"))
        file.write_bytes(file.read_bytes()[:100])
        second = common.probe_samples(zero_sae(32, 8), acts, items, 8, "key")
        assert all(torch.equal(first[t]["test"][0], second[t]["test"][0]) for t in first)


def test_eval_saebench_sets_that_cannot_be_had_are_named():
    acts = tiny_acts(words_lm())
    before = common.hub_reachable, common.saebench_texts
    rows = [dict(row, split="train" if i % 3 else "test") for i, row in enumerate(r for r in probe_rows() if r["task"] == "letter")]

    def texts(name):
        if name == "fancyzhx/ag_news":
            return [dict(row, task=name) for row in rows]
        raise ConnectionError("no route to the hub")
    try:
        common.hub_reachable, common.saebench_texts = lambda: False, texts
        out = common.probing_saebench(zero_sae(32, 8), acts)
    finally:
        common.hub_reachable, common.saebench_texts = before
    assert out["tasks"] == 1 and len(out["skipped"]) == 7 and "no route" in out["skipped"][0] and out["sae_top_1"] == 0.5


# --------------------------------------------------------------------------------- unlearning


def test_eval_sparsity_and_selection_match_saebench():
    tensors, values = saebench()
    table, on = tensors["unlearn.f_table"], {}
    for name in ("forget", "retain"):
        tokens = tensors[f"unlearn.tokens_{name}"].long()
        on[name] = common.feature_sparsity(table[tokens], tokens > 2)
        assert torch.allclose(on[name], tensors[f"unlearn.sparsity_{name}"], rtol=1e-5, atol=0)
    for threshold, want in values["unlearn_features"].items():
        for n in ("10", "20"):
            assert common.select_features(on["forget"], on["retain"], float(threshold), int(n)) == want[n]
        assert common.select_features(on["forget"], on["retain"], float(threshold), 64) == want["all"]


def test_eval_clamp_matches_saebench():
    tensors, values = saebench()
    sae, h = fixture_sae(tensors, "clamp"), tensors["clamp.h"]
    for n, multiplier in ((10, 25), (20, 200)):
        out = common.clamp_edit(sae, values["unlearn_features"]["0.01"][str(n)], multiplier)(h)
        want = tensors[f"clamp.out_n{n}_m{multiplier}"]
        assert torch.allclose(out, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        assert torch.equal(out[:, 0], h[:, 0])
    assert torch.allclose(common.clamp_edit(sae, [], 25)(h), h, rtol=1e-6, atol=1e-6)


def test_eval_clamp_leaves_masked_and_sink_positions_alone():
    tensors, values = saebench()
    sae, h = fixture_sae(tensors, "clamp"), tensors["clamp.h"].clone()
    h[0, 3] *= 100
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2] = False
    out = common.clamp_edit(sae, list(range(64)), 25, mask, limit=50.0)(h)
    same = (out == h).all(-1)
    assert same[0, 3] and same[1, 3] and same[:, 0].all() and same.sum() == 5


def test_eval_score_matches_saebench():
    _, values = saebench()
    for case in values["unlearn_score"]:
        runs = [(w / 533, p / 308) for w, p in zip(case["wmdp"], case["pooled"])]
        assert math.isclose(common.unlearning_score(runs), case["score"], rel_tol=1e-9, abs_tol=1e-12)
    assert common.unlearning_score([]) == 0


def domains():
    """A forget and a retain language, as corpus rows."""
    return [{"split": split, "domain": {"a": "code", "b": "prose"}[c], "source": "made up",
             "text": walk(c, 64, i + 100 * (split == "train"))} for c in "ab" for split in ("train", "heldout") for i in range(12)]


def direction_sae(acts, forget, retain, n_features=40):
    """Feature 0 is on exactly along the difference of the two languages; the others never are."""
    (_, h, _), (_, g, _) = forget["select"], retain["select"]
    a, b = h[:, 1:].reshape(-1, 32), g[:, 1:].reshape(-1, 32)
    d = torch.nn.functional.normalize(a.mean(0) - b.mean(0), dim=0)
    W = torch.zeros(n_features, 32)
    W[0] = d
    bias = torch.full((n_features,), -1e6)
    bias[0] = -(b @ d).max() - 0.01                        # never on in the language to keep
    return LinearSAE(W.t().clone(), W, bias, torch.zeros(32))


def test_eval_unlearning_forgets_one_language_and_keeps_the_other():
    lm = train_lm(words_lm(layers=2))
    acts = tiny_acts(lm, layer=0)
    with data_folder(corpus=domains()):
        forget, retain = common.domain_states(acts, "corpus", ["code"]), common.domain_states(acts, "corpus", ["prose"])
        assert all(len(forget[part][0]) == n for part, n in common.UNLEARN_WINDOWS.items())
        out = common.unlearn_pair(direction_sae(acts, forget, retain), acts, forget, retain)
        zero = common.unlearn_pair(zero_sae(32, 40), acts, forget, retain)
    assert out["accuracy_forget"] > 0.9 and out["accuracy_retain"] > 0.9
    assert out["score"] > 0.5 and out["retain_kept"] >= 0.99 and out["methods"][0]["setting"]["features"] == [0], out
    assert out["crossed_drop"] > 0.5 and out["crossed_kept"] >= 0.98 and out["random"] < 0.1, out
    assert out["methods"][0]["perplexity_forget"] > 2 * out["perplexity_forget"]
    # The papers' 0.0: an all-zero SAE has no feature that is on, nothing is selected, nothing changes
    assert zero["score"] == 0 and zero["methods"][0]["settings_tried"] == 0 and set(zero["eligible_features"].values()) == {0}
    assert zero["random"] == 0 and zero["accuracy_forget"] == out["accuracy_forget"]


def test_eval_resume_from_equals_the_full_pass():
    for kind in ("llama", "gemma2", "neox", "gpt2"):
        lm = tiny_lm(kind)
        tokens = torch.randint(3, 100, (2, 9), generator=common.generator(0, "t"))
        h = common.hidden_states(lm, tokens, [1])[1]
        with common.intervene(lm, 1, lambda x: x * 1.1):
            want = lm.model(input_ids=tokens).logits
        ran, inner = [], next(m for m in lm.blocks[0].modules() if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm)))
        resume = common.resume_from(lm, 1, tokens)
        inner.register_forward_hook(lambda *_: ran.append(1))
        with resume(h * 1.1):
            assert torch.allclose(lm.model(input_ids=tokens).logits, want, rtol=1e-4, atol=1e-4), kind
        assert not ran, f"{kind}: the blocks below should not have run"
        lm.model(input_ids=tokens)
        assert ran and "forward" not in vars(lm.blocks[0]), "the blocks must be themselves again"


def test_eval_choice_prompt_matches_saebench():
    tok = words_lm(chat=CHAT).tokenizer
    want = ("<bos><start_of_turn>user\nThe following are multiple choice questions (with answers) about biology.\n"
            "Q?\nA. y\nB. w\nC. z\nD. x<end_of_turn>\n<start_of_turn>model\nAnswer: (")
    assert common.choice_prompt(tok, "Q?", list("wxyz"), (2, 0, 3, 1), "biology") == want


def chat_lm(answer):
    """A tiny chat model; its head is set to answer with fixed preferences for the letters."""
    lm = words_lm(words=[*"ABCD", *"wxyz", "Q", *WORDS], chat=CHAT)
    head = lm.model.lm_head.weight.data
    head.zero_()
    h = lm.model.model.norm.weight.data
    h.fill_(1.0)
    if answer is not None:
        lm.model.model.norm = torch.nn.Identity()
        hook = torch.zeros(head.shape[1])
        hook[0] = 1.0
        lm.model.model.register_forward_hook(
            lambda m, i, o: o.__class__(last_hidden_state=hook.expand_as(o.last_hidden_state)))
        head[lm.tokenizer.convert_tokens_to_ids(answer), 0] = 1.0
    return lm


def test_eval_permutation_filter():
    questions = [{"question": f"Q {i}", "choices": list("wxyz"), "answer": i % 4} for i in range(6)]
    lm = chat_lm("B")                                     # always says B: right in a quarter of the orders
    right = common.answer_right(lm, questions, (0, 1, 2, 3), "biology")
    assert right == [q["answer"] == 1 for q in questions]
    assert common.answer_right(lm, questions, (1, 0, 2, 3), "biology") == [q["answer"] == 0 for q in questions]
    assert common.always_right(questions, lambda some, order: common.answer_right(lm, some, order, "biology")) == []
    seen = []

    def oracle(some, order):                              # knows questions 1 and 4 whatever the order
        seen.append(order)
        return [q["question"] in ("Q 1", "Q 4") or order[0] == 0 for q in some]
    assert [q["question"] for q in common.always_right(questions, oracle)] == ["Q 1", "Q 4"]
    assert len(set(seen)) == 24


def test_eval_answers_do_not_depend_on_the_batch():
    lm = words_lm(words=[*"ABCD", *"wxyz", "Q", *WORDS], chat=CHAT)
    questions = [{"question": walk("a", 1 + 5 * i, i), "choices": list("wxyz"), "answer": i % 4} for i in range(7)]
    one = common.answer_right(lm, questions, (3, 1, 0, 2), "t", batch=1)
    assert one == common.answer_right(lm, questions, (3, 1, 0, 2), "t", batch=4)


def test_eval_wmdp_says_when_no_question_counts_and_scores_otherwise():
    questions = {name: [{"question": f"Q {i}", "choices": list("wxyz"), "answer": i % 4} for i in range(4)] for name in common.WMDP}
    lm = chat_lm("B")
    acts = tiny_acts(lm)
    texts = [walk("a", 40, 1)] * 4
    out = common.wmdp_sweep(zero_sae(32, 8), acts, lm, questions, texts, texts, n_tokens=64)
    assert "score" not in out and "no score" in out["skipped"][0] and out["questions"]["wmdp-bio"] == 0
    before = common.always_right
    try:                                                  # let every question count that is right as printed
        common.always_right = lambda rows, right: [q for q, ok in zip(rows, right(rows, (0, 1, 2, 3))) if ok]
        out = common.wmdp_sweep(zero_sae(32, 8), acts, lm, questions, texts, texts, n_tokens=64)
        assert out["score"] == 0 and out["runs"] == [] and out["questions"]["wmdp-bio"] == 1
        texts = [[walk(c, 40, 1)] * 4 for c in "ab"]
        a, b = (common.hidden_states(lm, common.make_windows(t, lm, 16, 4)[0].long(), [1])[1][:, 1:] for t in texts)
        d = torch.nn.functional.normalize(a.mean((0, 1)) - b.mean((0, 1)), dim=0)     # on in one language only
        bias = torch.full((40,), -1e6)
        bias[0] = -(b @ d).max() - 1e-4
        W = torch.zeros(40, 32)
        W[0] = d
        sae = LinearSAE(W.t().clone(), W, bias, torch.zeros(32))
        out = common.wmdp_sweep(sae, acts, lm, questions, *texts, n_tokens=64)
        assert len(out["runs"]) == 2 * 2 * 4, out                      # and the head of this model ignores every edit:
        assert all(run["mmlu"] == 1 and run["wmdp"] == 1 for run in out["runs"]) and out["score"] == 0
    finally:
        common.always_right = before


class Knows(nn.Module):
    """A model whose block 0 writes direction 0 at the words a0, a1 ... (biology). It finds the option "w", the right
    one of every question, and names its letter; where biology words stand but direction 0 is gone, the next letter."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(hidden_size=32, num_hidden_layers=2))
        number = tokenizer.convert_tokens_to_ids
        self.letters = [(number(f"{letter}."), number(letter)) for letter in "ABCD"]
        self.right = [number("w"), number("w<end_of_turn>")]
        E = 0.1 * torch.randn(len(tokenizer), 32, generator=common.generator(0, "knows"))
        E[:, 0] = 0.0
        self.biology = torch.zeros(len(tokenizer), dtype=torch.bool)
        self.biology[[number(f"a{i}") for i in range(12)]] = True
        E[self.biology, 0] = 3.0
        self.E, self.layers = nn.Parameter(E), nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, input_ids, use_cache=False):
        h = self.layers[1](self.layers[0](self.E[input_ids]))
        logits = torch.zeros(*input_ids.shape, len(self.E))
        for row, ids in enumerate(input_ids.tolist()):
            place = next((t for t, i in enumerate(ids) if i in self.right), None)
            if place is not None:
                about = self.biology[input_ids[row]]
                letter = [i for i, _ in self.letters].index(ids[place - 1])
                forgot = about.any() and h[row, about, 0].max() <= 0
                logits[row, :, self.letters[(letter + forgot) % 4][1]] = 1.0
        return types.SimpleNamespace(logits=logits)


def test_eval_wmdp_scores_one_when_the_feature_that_knows_is_clamped():
    words = [*"ABCD", *(f"{letter}." for letter in "ABCD"), *"wxyz", *(f"{x}<end_of_turn>" for x in "wxyz"), "Q", *WORDS]
    tokenizer = words_lm(words=words, chat=CHAT).tokenizer
    lm = common.LM(Knows(tokenizer), tokenizer, "knows", "r", torch.device("cpu"), torch.float32)
    questions = {name: [{"question": walk("a" if name == "wmdp-bio" else "b", 3, i), "choices": list("wxyz"), "answer": 0}
                        for i in range(5)] for name in common.WMDP}
    texts = [[walk(c, 40, i) for i in range(8)] for c in "ab"]
    scores = {}
    for name, row in (("knows", 0), ("knows nothing", 1)):
        W, bias = torch.zeros(40, 32), torch.full((40,), -1e6)
        W[0, row], bias[0] = 1.0, 0.0                      # direction 0, or one that is on in all texts and unused
        sae = LinearSAE(W.t().clone(), W, bias, torch.zeros(32))
        scores[name] = common.wmdp_sweep(sae, tiny_acts(lm, layer=0), lm, questions, *texts, n_tokens=256)
    out = scores["knows"]
    assert out["questions"] == dict.fromkeys(common.WMDP, 5), "every question is right under all 24 orders"
    assert out["score"] == 1 and len(out["runs"]) == 16 and all(r["wmdp"] == 0 and r["mmlu"] == 1 for r in out["runs"])
    assert scores["knows nothing"]["score"] == 0


def test_eval_wmdp_multipliers_are_raw_units():
    seen, old = [], (common.clamp_edit, common.always_right, common.select_features)

    def spy(sae, features, multiplier, mask=None, limit=math.inf):
        seen.append((multiplier, mask is not None, limit))
        return old[0](sae, features, multiplier, mask, limit)
    questions = {name: [{"question": "Q", "choices": list("wxyz"), "answer": 1}] for name in common.WMDP}
    lm = chat_lm("B")
    acts = tiny_acts(lm)
    acts.scale = 5.0                                      # of these activations, not of the SAE
    sae = LinearSAE(torch.eye(32), torch.eye(32), torch.zeros(32), torch.zeros(32))
    sae.scale = torch.tensor(3.0)
    texts = [[walk(c, 40, 1)] * 4 for c in "ab"]
    try:
        common.clamp_edit, common.always_right, common.select_features = spy, lambda rows, _: rows, lambda *a: [0]
        common.wmdp_sweep(sae, acts, lm, questions, *texts, n_tokens=64)
    finally:
        common.clamp_edit, common.always_right, common.select_features = old
    assert {multiplier for multiplier, *_ in seen} == {k / 3 for k in (25, 50, 100, 200)}
    assert all(ok and limit == acts.heldout_store.threshold for _, ok, limit in seen)


# ----------------------------------------------------------------------------------- steering


def test_eval_steer_parses_and_changes_what_is_said():
    assert common.parse_steer("123:+8,77:off, 5:=3,6:-2.5", 200) == [(123, 1, 8), (77, 0, 0), (5, 0, 3), (6, 1, -2.5)]
    for bad in ("x:+1", "5", "5:8", "300:off", "", "5:+", "5:+-3", "5:=.."):
        try:
            common.parse_steer(bad, 200)
        except common.UserError as error:
            assert "--steer" in str(error)
        else:
            raise AssertionError(bad)
    lm = train_lm(words_lm(layers=2))
    acts = tiny_acts(lm, layer=0)
    with data_folder(corpus=domains()):
        sae = direction_sae(acts, common.domain_states(acts, "corpus", ["code"]), common.domain_states(acts, "corpus", ["prose"]))
    same = common.steer(sae, acts, "3:off", walk("b", 4, 0), n=6)
    assert same["plain"] == same["steered"] and set(same["plain"].split()) <= {f"b{i}" for i in range(12)}
    out = common.steer(sae, acts, "0:=30", walk("b", 4, 0), n=6)
    assert out["plain"] == same["plain"] and out["steered"] != out["plain"], out


# ------------------------------------------------------------------------------------- export


def exported(cfg, seed=0):
    """A tsae.TSAE with every tensor random, on synthetic activations with scale 7."""
    acts = common.synthetic_activations(tsae.Config(model="synthetic", tokens=4096, heldout_tokens=1024, T=64, cache="none"))
    acts.scale = 7.0
    sae = tsae.TSAE(acts.D, cfg)
    gen = common.generator(seed, "export")
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen))
        sae.scale.fill_(acts.scale)
        tsae.normalize_decoder(sae)
    return sae, acts


def test_eval_export_gives_the_same_code():
    for activation in ("relu", "topk"):
        sae, acts = exported(tsae.Config(temporal=False, activation=activation, k=8, expansion=2, T=64))
        x, mask = next(iter(acts.heldout()))
        f = sae.encode(x, mask).detach()
        with tempfile.TemporaryDirectory() as folder:
            common.export(sae, acts, folder, "saelens")
            w, _ = common.load_tensors(Path(folder) / "sae_weights.safetensors")
            cfg = common.read_json(Path(folder) / "cfg.json")
            assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec"} and cfg["architecture"] == ("topk" if activation == "topk" else "standard")
            assert w["W_enc"].shape == (cfg["d_in"], cfg["d_sae"]) and cfg["apply_b_dec_to_input"] is True
            pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
            g = tsae.topk(pre, cfg["k"]) if activation == "topk" else pre.relu()
            assert torch.allclose(g, acts.scale * f, rtol=1e-5, atol=1e-4)
            assert torch.allclose(g @ w["W_dec"] + w["b_dec"], sae.decode(f), rtol=1e-5, atol=1e-4)
            assert torch.allclose(w["W_dec"].norm(dim=1), torch.ones(128), atol=1e-5)
        with tempfile.TemporaryDirectory() as folder:
            common.export(sae, acts, folder, "dictionary_learning")
            d = torch.load(Path(folder) / "ae.pt", weights_only=True)
            trainer = common.read_json(Path(folder) / "config.json")["trainer"]
            bias = d["b_dec"] if activation == "topk" else d["bias"]
            pre = torch.nn.functional.linear(x - bias, d["encoder.weight"], d["encoder.bias"])
            g = tsae.topk(pre, trainer["k"]) if activation == "topk" else pre.relu()
            assert torch.allclose(g, acts.scale * f, rtol=1e-5, atol=1e-4)
            assert torch.allclose(torch.nn.functional.linear(g, d["decoder.weight"]) + bias, sae.decode(f), rtol=1e-5, atol=1e-4)


def test_eval_export_refuses_what_the_formats_cannot_hold():
    class Smooth(tsae.TSAE):
        def encode(self, x, mask=None):
            return super().encode(x, mask) + super().encode(x.roll(1, 1), mask)
    sae, acts = exported(tsae.Config(T=64, k=8))
    cases = [(sae, "ln.bias")]
    plain, acts = exported(tsae.Config(temporal=False, T=64, k=8))
    smooth = Smooth(acts.D, plain.cfg)
    smooth.load_state_dict(plain.state_dict())
    cases.append((smooth, "another code"))
    with tempfile.TemporaryDirectory() as folder:
        for sae, reason in cases:
            try:
                common.export(sae, acts, Path(folder) / "x", "saelens")
            except common.UserError as error:
                assert reason in str(error)
            else:
                raise AssertionError(reason)
        assert not (Path(folder) / "x").exists()
        try:
            common.export(plain, acts, folder, "other")
        except common.UserError:
            pass
        else:
            raise AssertionError("unknown format")
        no_norm, acts = exported(tsae.Config(T=64, k=8, layer_norm="off"))      # TSAE without LayerNorm is position-wise
        common.export(no_norm, acts, folder, "saelens")


def test_eval_saelens_loads_the_export():
    try:
        from sae_lens import SAE
    except ImportError:
        skip("sae_lens is not installed")
    sae, acts = exported(tsae.Config(temporal=False, activation="topk", k=8, T=64))
    x, mask = next(iter(acts.heldout()))
    with tempfile.TemporaryDirectory() as folder:
        common.export(sae, acts, folder, "saelens")
        peer = SAE.load_from_disk(folder)
        assert torch.allclose(peer.encode(x), acts.scale * sae.encode(x), rtol=1e-5, atol=1e-4)
        assert torch.allclose(peer(x), sae(x)[0], rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Feature page
# ---------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of six tokens, two of them hostile; 4 and 5 are the halves of one character."""
    texts = ["</script><img src=x onerror=alert(1)>", " <b>&amp;", "\n", " plain", "\ufffd", "é"]

    def decode(self, ids, clean_up_tokenization_spaces):
        assert clean_up_tokenization_spaces is False
        return "".join(self.texts[i] for i in ids).replace("\ufffdé", "é")


class Fixed(torch.nn.Module):
    """An encoder whose codes are the activations: f = relu(x), F = D."""
    causal = False

    def __init__(self, W_dec):
        super().__init__()
        self.W_dec = torch.nn.Parameter(W_dec)

    def encode(self, x, mask=None):
        return x.relu()


def feature_page(path, x, mask, sae, tokens=None, **more):
    """features_page on held-out x (N, T, D) -> the data that the page embeds."""
    store = common.ArrayStore(x, mask)
    lm = None if tokens is None else types.SimpleNamespace(tokenizer=Words(), name="a/model")
    store.tokens = tokens

    def heldout(size=3):
        return ((x[i:i + size], mask[i:i + size]) for i in range(0, len(x), size))
    acts = types.SimpleNamespace(T=x.shape[1], D=x.shape[2], lm=lm, layer=3, heldout=heldout,
                                 heldout_store=store)
    report = common.features_page(sae, acts, path, **more)
    html = Path(path).read_text()
    assert report["shown"] <= report["live"] <= report["features"] == x.shape[2] and len(html) < 5e6
    return html, embedded(html)


def embedded(html):
    """The data inside a feature page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def fixture(N=8, T=72, D=12, seed=0):
    """Random codes (N, T, D) with stretches, feature 0 dead; masks with holes; tokens."""
    gen = common.generator(seed, "features")
    x = torch.randn(N, T, D, generator=gen)
    x = (x + x.roll(1, 1) + x.roll(2, 1)) * torch.rand(D, generator=gen).add(0.5)
    x[..., 0] = -1
    mask = torch.rand(N, T, generator=gen) > 0.1
    mask[1, 50:] = False
    return x, mask, torch.randint(0, 4, (N, 1 + T), generator=gen)


def test_features_numbers_equal_a_direct_computation():
    with folder() as path:
        x, mask, tokens = fixture()
        sae = Fixed(torch.randn(12, 12, generator=common.generator(0, "W")))
        probe = {"3": 0.5, "4": -2.0}
        _, data = feature_page(path / "features.html", x, mask, sae, tokens, probe=probe)
        f = x.relu() * mask[..., None]
        assert [row["i"] for row in data["rows"]] == list(range(1, 12)) and data["live"] == 11
        L0 = (f > 0).sum() / mask.sum()
        assert data["tokens"] == mask.sum() and abs(data["L0"] - L0) < 1e-3
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec[:, None], sae.W_dec[None], dim=-1)
        for row in data["rows"]:
            i = row["i"]
            stretches = on = stay = pairs = 0
            for n in range(8):
                for t in range(72):
                    now = bool(f[n, t, i] > 0)
                    on, stretches = on + now, stretches + (now and not (t and f[n, t - 1, i] > 0))
                    if t < 71 and now and mask[n, t + 1]:
                        pairs, stay = pairs + 1, stay + bool(f[n, t + 1, i] > 0)
            close = [(row["span"], on / stretches), (row["density"], on / mask.sum().item()),
                     (row["stay"], stay / pairs), (row["max"], f[..., i].max().item())]
            assert all(abs(a - b) < 1e-3 * b for a, b in close), (i, close)
            assert row["probe"] == {3: 0.5, 4: -2.0}.get(i)
            best = sorted((j for j in range(12) if j != i), key=lambda j: -cosine[i, j])[:5]
            assert row["near"] == best and abs(row["cosines"][0] - cosine[i, best[0]]) < 1e-3
            peaks = f[..., i].amax(1).sort(descending=True)
            assert len(row["contexts"]) == 6
            for n, (piece, peak, value, levels) in enumerate(row["contexts"]):
                window, start, texts = data["pieces"][piece]
                assert window == peaks.indices[n] and abs(value - peaks.values[n]) < 1e-3 * value
                assert abs(value - f[window, start + peak, i]) < 1e-3 * value
                assert len(texts) == len(levels) == (40 if window != 1 else len(levels))
                for t, level in enumerate(levels):
                    want = f[window, start + t, i].item() / row["max"] * 99
                    scored = mask[window, start + t]
                    assert abs(level - want) <= (want > 0) if scored else level == -1
                    text = Words.texts[tokens[window, 1 + start + t]]
                    assert data["vocabulary"][texts[t]] == text


def test_features_line_positions_and_unscored_tokens():
    with folder() as path:
        x, mask, tokens = fixture(T=130)
        _, data = feature_page(path / "features.html", x, mask, Fixed(torch.eye(12)), tokens)
        f, part = x.relu() * mask[..., None], torch.arange(130) * 64 // 130
        for row in data["rows"]:
            line = torch.stack([f[:, part == p, row["i"]].sum() / mask[:, part == p].sum()
                                for p in range(64)])
            assert len(row["line"]) == 64 and abs(row["height"] - line.max()) < 1e-3 * row["height"]
            assert (torch.tensor(row["line"]) - 99 * line / line.max()).abs().max() < 0.6
        for piece in data["pieces"]:
            assert piece[0] != 1 or piece[1] + len(piece[2]) <= 50, "padding is left out"


def test_features_escapes_and_joins_characters():
    with folder() as path:
        x, mask, tokens = fixture(N=2, T=8)
        mask[:] = True
        tokens[:] = torch.tensor([3, 0, 1, 2, 4, 5, 3, 0, 1])
        html, data = feature_page(path / "features.html", x, mask, Fixed(torch.eye(12)), tokens)
        texts = [data["vocabulary"][t] for t in data["pieces"][0][2]]
        assert texts == [*Words.texts[:3], "", "é", *[Words.texts[i] for i in (3, 0, 1)]]
        assert html.count("</script>") == 2 and "<img" not in html and "<b>" not in html
        assert "http:" not in html and "https:" not in html and "innerHTML" not in html


def test_features_cover_every_order():
    gen = common.generator(0, "cover")
    keys = [torch.rand(2000, generator=gen) for _ in range(3)]
    keys[2][500:] = torch.nan
    live = torch.rand(2000, generator=gen) > 0.2
    chosen = common.cover_orders(keys, live, 100)
    assert len(chosen) == 100 and chosen.unique().equal(chosen) and live[chosen].all()
    for key in keys:
        ranked = key.masked_fill(~live, torch.nan).nan_to_num(-1).argsort(descending=True)
        n = int((key.isfinite() & live).sum())
        assert torch.isin(ranked[:10], chosen).all() and torch.isin(ranked[n - 10:n], chosen).all()
    assert len(common.cover_orders(keys, live, 2000)) == live.sum()


class Browser:
    """Headless Chromium through chromedriver's plain WebDriver protocol."""

    def __init__(self, width=1200, height=900):
        names = ("chromium", "chromium-browser", "google-chrome")
        chrome = next(filter(None, map(shutil.which, names)), None)
        if not (chrome and shutil.which("chromedriver")):
            skip("no chromium with chromedriver on this machine")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}"]
        options = {"binary": chrome, "args": flags}
        if width < 500:                 # no window is narrower than 500: emulate the phone
            size = {"width": width, "height": height, "pixelRatio": 2}
            options["mobileEmulation"] = {"deviceMetrics": size}
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url.replace("session", "status"), timeout=60).read()
                break
            time.sleep(0.1)
        self.url += "/" + self("", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})["sessionId"]

    def __call__(self, command, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + ("/" + command if command else ""), data,
                                         {"Content-Type": "application/json"}, method=method)
        return json.loads(urllib.request.urlopen(request, timeout=120).read())["value"]

    def until(self, text, want, seconds=5.0):
        """js(text), asked again until it is `want` or time is up: a browser opens <details> after the key is down."""
        deadline = time.time() + seconds
        while (found := self.js(text)) != want and time.time() < deadline:
            time.sleep(0.02)
        return found

    def js(self, script):
        return self("execute/sync", {"script": "return " + script, "args": []})

    def element(self, css):
        found = self("element", {"using": "css selector", "value": css})
        return "element/" + next(iter(found.values()))

    def click(self, css):
        self(self.element(css) + "/click", {})

    def keys(self, css, text):
        self(self.element(css) + "/value", {"text": text})

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self("screenshot")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()
        self.profile.cleanup()


def test_features_page_in_a_browser():
    with folder() as path:
        x, mask, tokens = fixture(N=20, T=72, D=40)
        x[:, :, 39] = -1
        x[0, 5, 39] = 7.0
        x[..., 38], mask[0, 5] = 0, True
        tokens[:] = 3
        tokens[0, 6] = 0                # the hostile token stands under feature 39's peak
        _, data = feature_page(path / "features.html", x, mask, Fixed(torch.randn(40, 40)), tokens)
        listed = "[...document.querySelectorAll('.feature:not([hidden])')].map(e => +e.id.slice(1))"
        with Browser(390, 800) as browser:
            browser("url", {"url": f"file://{path}/features.html"})
            assert browser.js("document.documentElement.scrollWidth <= 390"), "wider than a phone"
            assert "not causal" in browser.js("document.querySelector('#note').textContent")
            rows = {row["i"]: row for row in data["rows"]}
            for name in ("span", "density", "max", "stay", "i"):
                if name != "span":                       # the page opens with this one
                    browser.click(f"#orders button[value={name}]")
                for sign in (-1, 1) if name != "i" else (1, -1):
                    order = browser.js(listed)
                    want = sorted(rows, key=lambda i: (sign * rows[i][name], i))
                    assert order == want, (name, sign)
                    browser.click(f"#orders button[value={name}]")
            browser.keys("#search", "ONERROR")
            found = browser.js(listed)
            assert 39 in found and len(found) < len(rows)
            browser.keys("#search", "\ue000" + "\ue003" * 7 + "#12")
            assert browser.js(listed) == [12]
            assert browser.js("document.querySelector('.body')") is None, "bodies are made lazily"
            browser.keys("#f12 summary", "\ue007")                        # the enter key opens
            assert browser.until("document.querySelectorAll('#f12 .body li').length", 6) == 6
            near = rows[12]["near"][0]
            browser.click("#f12 .body a")
            assert browser.until("location.hash", f"#f{near}") == f"#f{near}"
            assert browser.until(f"document.querySelector('#f{near}').open", True)
            assert len(browser.js(listed)) == len(rows), "a link to a hidden one ends the search"
            browser("url", {"url": f"file://{path}/features.html#f39"})
            text = browser.until("document.querySelector('#f39 .body .t.top')?.textContent", Words.texts[0])
            assert text == Words.texts[0] and browser.js("document.images.length") == 0
            browser.click("#f39 .body .t.top")
            assert "position 6: 7" in browser.js("document.querySelector('#f39 .pick').textContent")
            errors = browser("se/log", {"type": "browser"})
            assert not errors, errors


def test_features_of_a_dead_sae():
    with folder() as path:
        x, mask, tokens = fixture()
        _, data = feature_page(path / "features.html", -x.abs(), mask, Fixed(torch.eye(12)), tokens)
        assert data["rows"] == [] and data["live"] == 0 and data["L0"] == 0
        with Browser() as browser:
            browser("url", {"url": f"file://{path}/features.html"})
            assert "0 of 0 live features (12 in all)" in browser.js("document.body.innerText")
            assert not browser("se/log", {"type": "browser"})


def test_features_page_of_a_run():
    with folder():
        tiny(tsae, "a", 20)
        cfg = tsae.Config(**json.loads(Path("a/config.json").read_text())["config"])
        acts = next(iter(common.open_activations(cfg)))
        sae = tsae.TSAE(acts.D, cfg)
        sae.load_state_dict(common.load_tensors("a/sae_weights.safetensors")[0])
        common.features_page(sae, acts, Path("a/features.html"))
        data = embedded(Path("a/features.html").read_text())
        f = torch.cat([sae.encode(x, mask) * mask[..., None] for x, mask in acts.heldout()])
        results = json.loads(Path("a/eval.json").read_text())
        assert data["run"] == "a" and data["causal"] and data["EV"] == results["core"]["EV"]
        for row in data["rows"]:
            piece, peak, value, levels = row["contexts"][0]
            window, start, _ = data["pieces"][piece]
            assert abs(value - f[..., row["i"]].max()) < 1e-3 * value
            assert abs(f[window, start + peak, row["i"]] - value) < 1e-3 * value
            assert levels[peak] == 99


# ---------------------------------------------------------------------------------------------
# The real model
# ---------------------------------------------------------------------------------------------


def real_lm():
    """The offline CPU model, or a skip."""
    if not (common.HOME / "SmolLM2-135M-Instruct-Q4_1" / "complete.json").exists():
        skip("SmolLM2-135M is not on this machine yet; `python mtsae.py --layer 19` fetches it once")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        return common.load_lm("auto", torch.device("cpu"), "auto")


def test_real_model_has_a_sink_at_position_0():
    lm = real_lm()
    texts = [row["text"] for row in common.bundled("corpus", "heldout", ["prose"])][:4]
    tokens, lengths = common.make_windows(texts, lm, 128, 4)
    tokens = tokens[:4]
    states = common.hidden_states(lm, tokens.long(), [5, 19])
    for layer, h in states.items():
        norm = h.float().norm(dim=-1)
        assert norm[:, 0].min() > 5 * norm[:, 1:].median(), layer
        assert torch.allclose(h[:, 0], h[:1, 0].expand(4, -1), rtol=1e-2, atol=0.5)     # BOS sees only itself
    with torch.no_grad():
        logits = lm.model(input_ids=tokens.long()).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].long().flatten())
    assert loss < 4.5, loss


def test_real_model_trains_and_evaluates():
    real_lm()
    with folder():
        status, out, err = run(tsae, "--no-temporal", "--layer", 5, "--tokens", 4096, "--heldout_tokens", 1024,
                               "--steps", 60, "--lr", 3e-3, "--lr_warmup", 1, "--out", "a", curve=True)
        assert status == 0, err
        core = json.loads(Path("a/eval.json").read_text())["core"]
        assert core["EV"] > 0.5 and core["ce_loss_without_sae"] < core["ce_loss_with_sae"] < core["ce_loss_with_ablation"]
        assert "ce_loss_score" in out and Path("a/training.png").exists()


# ---------------------------------------------------------------------------------------------
# Speed: the fast paths give what the plain ones give
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(owner, name, value):
    """owner.name = value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


DENSE, GATHERED = {"cpu": 10 ** 9}, {"cpu": 1}
TOPK_CASES = ((tsae, dict(temporal=False)), (tsae, {}), (tsae, dict(layer_norm="off", warmup=0)), (temporal_lens, {}),
              (temporal_lens, dict(masks=False, pre_bias=True)), (mtsae, {}), (mtsae, dict(variant="unlearning")))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def test_speed_topk_encoder_equals_autograd():
    torch.manual_seed(0)
    h, W, bias = torch.randn(3, 7, 12), torch.randn(40, 12).t(), torch.randn(40)
    gate = torch.rand(7, 40)
    for score in (None, lambda pre: F.relu(pre) * gate):
        leaves = [[t.clone().requires_grad_() for t in (h, W, bias)] for _ in range(2)]
        values, index = common.encode_topk(*leaves[0], 5, score)
        pre = leaves[1][0] @ leaves[1][1] + leaves[1][2]
        right = (pre if score is None else score(pre)).topk(5, -1, sorted=False).indices
        assert torch.equal(index, right) and torch.allclose(values, pre.gather(-1, right), atol=1e-5)
        weight = torch.randn(3, 7, 5)
        (values * weight).sum().backward()
        (pre.gather(-1, right) * weight).sum().backward()
        for fast, plain in zip(*leaves):
            assert relative(fast.grad, plain.grad) < 1e-5 and fast.grad.stride() == fast.stride()


def topk_losses(module, values, way, dtype=None, device="cpu"):
    """Terms of the loss and gradients of one micro-batch with masked tokens, by the dense or the gathered way."""
    cfg = config(module, activation="topk", k=4, expansion=4, T=32, **values)
    model = {tsae: "TSAE", mtsae: "MTSAE", temporal_lens: "TemporalLens"}[module]
    sae = getattr(module, model)(16, cfg).to(device)
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2), std=0.1)
    x, mask = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(3)) * 2, torch.ones(3, 32, dtype=torch.bool)
    mask[0, 5:9], mask[2, 30:] = False, False
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()]) if module is mtsae else mask.sum()
    with replaced(common, "GATHER_FROM", way), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        terms, stats, *_ = module.losses(sae, x, mask, n, 500, cfg)
        sum(terms.values()).backward()
        code = sae.code(sae.temporal(x, mask) if module is mtsae else x)
    assert (code[1] is None) == (way is DENSE), "not the way that was asked for"
    return {**terms, **stats}, {name: p.grad for name, p in sae.named_parameters()}, sae, x, mask


def test_speed_gathered_topk_equals_dense():
    """Every script: losses, statistics and every gradient, in fp32 to 1e-5."""
    for module, values in TOPK_CASES:
        (plain, grads, sae, x, mask), (fast, quick, *_) = (topk_losses(module, values, way) for way in (DENSE, GATHERED))
        for name in plain:
            assert relative(fast[name].float(), plain[name].float()) < 1e-5, (module.__name__, values, name)
        for name in grads:
            assert relative(quick[name], grads[name]) < 1e-5, (module.__name__, values, name)
        both = []
        for way in (DENSE, GATHERED):
            with replaced(common, "GATHER_FROM", way), torch.no_grad():
                single = () if module is mtsae else (sae.encode(x[0]),)    # (N, D): positions unknown
                both += [(sae.encode(x, mask), *sae(x, mask), *single)]
        for a, b in zip(*both):
            assert a.shape == b.shape and relative(b, a) < 1e-5, (module.__name__, values)


def test_speed_gathered_topk_under_autocast():
    """bf16 products: the same features are chosen; the gathered decoder stays fp32 and is the nearer to the truth."""
    for module, values in TOPK_CASES:
        dense, gathered = (topk_losses(module, values, way, torch.bfloat16) for way in (DENSE, GATHERED))
        assert dense[0]["active"] == gathered[0]["active"], module.__name__
        for name in dense[0]:
            assert relative(gathered[0][name].float(), dense[0][name].float()) < 2e-2, (module.__name__, values, name)
        for name, grad in dense[1].items():
            assert relative(gathered[1][name], grad) < 0.1, (module.__name__, values, name)
            assert gathered[1][name].dtype == torch.float32


def test_speed_neighbour_cosine_of_lists():
    f, index = torch.rand(2, 9, 3, requires_grad=True), torch.rand(2, 9, 30).topk(3).indices
    with torch.no_grad():
        f[0, 4] = 0.0                                                     # a token without active features
    pair = torch.rand(2, 8) < 0.8
    fast = mtsae.neighbour_cosine(f, index, pair, 30)
    plain = mtsae.NeighbourCosine.apply(common.dense_code(f, index, 30), pair)
    assert abs(fast - plain) < 1e-5 and fast > 0.1
    a, b = (torch.autograd.grad(value, f)[0] for value in (fast, plain))
    assert torch.isfinite(a).all() and (a - b).abs().max() < 1e-5


def test_speed_gathered_topk_trains_resumes_and_splits():
    flags = ("--activation", "topk", "--k", 4, "--expansion", 2, "--dtype", "float32")    # F / k = 32: gathered
    cfg, cpu = config(tsae, activation="topk", k=4), torch.device("cpu")
    assert common.gather_pays(cfg, 28, cpu) and not common.gather_pays(cfg, 27, cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert common.gather_pays(cfg, 72, cpu) and not common.gather_pays(cfg, 71, cpu)
    with folder():
        for module in (tsae, temporal_lens, mtsae):
            more = ("--no-temporal",) if module is tsae else ("--batch_norm", "off") if module is mtsae else ()
            tiny(module, "split", 8, "--log_every", 1, "--micro_batch", 2, *flags, *more, "--overwrite", "--eval", "none")
            tiny(module, "whole", 8, "--log_every", 1, "--micro_batch", 0, *flags, *more, "--overwrite", "--eval", "none")
            with replaced(common, "GATHER_FROM", DENSE):
                tiny(module, "dense", 8, "--log_every", 1, *flags, *more, "--overwrite", "--eval", "none")
            rows = [[json.loads(line)["loss"] for line in Path(name, "log.jsonl").read_text().splitlines()]
                    for name in ("split", "whole", "dense")]
            for split, whole, dense in zip(*rows):
                assert abs(split - whole) < 1e-4 * abs(whole) and abs(dense - whole) < 1e-4 * abs(whole), module.__name__
    killed_and_resumed("tsae", "--no-temporal", *flags)


def test_speed_harvesting_ahead_changes_no_batch():
    """Live buffers filled a share at every step serve what buffers filled at once serve, from any step on."""
    with folder() as here:
        (plain, _), _ = open_tiny(here, cache="none", steps=12, lm_batch=4)           # 4 batches in a buffer
        (ahead, _), _ = open_tiny(here, cache="none", steps=12, lm_batch=4)
        (late, _), _ = open_tiny(here, cache="none", steps=12, lm_batch=4)
        ahead.ahead = late.ahead = True
        assert plain.per_fill == 4 and not plain.ahead
        for step in range(12):
            (x, mask), = plain.batch(step)
            (y, other), = ahead.batch(step)
            assert torch.equal(x, y) and torch.equal(mask, other), step
            if step < 8:                                                  # its share of the next buffer is there
                done, n = ahead._buffers[step // 4 + 1].done, len(ahead._buffers[step // 4].rows)
                assert (step % 4 + 1) / 4 * n <= done <= n and (step % 4 == 3 or done < n)
            assert len(plain._buffers) == 1 and len(ahead._buffers) == (2 if step < 8 else 1)
            if step >= 6:                                                 # resumed inside a buffer
                assert torch.equal(late.batch(step)[0][0], x)


def test_speed_processes_share_every_batch():
    """Cached and live, also where the batch does not divide: the processes' parts are the whole batch."""
    with folder() as here:
        for cache in ("cache", "none"):
            (acts, _), _ = open_tiny(here, cache=cache)
            whole = sorted(acts.batch(5)[0][0].sum((1, 2)).tolist())
            parts = []
            with replaced(common, "world", lambda: 3):
                for process in range(3):
                    with replaced(common, "rank", lambda: process):
                        acts._buffers = {}
                        parts += acts.batch(5)[0][0].sum((1, 2)).tolist()
            assert len(whole) == 4 and np.allclose(sorted(parts), whole, atol=1e-2), cache
        with replaced(common, "world", lambda: 5):
            try:
                common.Activations(acts.cfg, acts.lm, 1, acts.train_store, acts.train_store)
                raise AssertionError("a batch of 4 for 5 processes was accepted")
            except common.UserError as error:
                assert "5 processes" in str(error)


def test_speed_two_killed_processes_resume_exactly():
    """torchrun with two gloo processes, killed together after a checkpoint: --resume ends in the same bytes."""
    with folder() as here:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "tsae.py")]
        flags = [*map(str, TINY), "--steps", "60", "--dtype", "float32", "--log_every", "1", "--warmup", "40", "--eval", "none"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        process = subprocess.Popen([*start, *flags, "--out", "killed"], start_new_session=True, **quiet)
        deadline = time.time() + 240
        while not (here / "killed/checkpoint.safetensors").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in (*map(int, children), process.pid):                    # SIGKILL: nothing can be saved on the way out
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert len(children) >= 2 and not (here / "killed/eval.json").exists(), "the run ended before it could be killed"
        for args in (["--resume", "killed"], [*flags, "--out", "whole"]):
            done = subprocess.run(start + args, **quiet)
            assert done.returncode == 0, done.stderr.decode()[-1000:]
        for name in ("log.jsonl", "sae_weights.safetensors"):
            assert (here / "killed" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
        assert json.loads((here / "killed/config.json").read_text())["world"] == 2


def test_speed_compiled_losses_are_the_same():
    """--compile: terms and gradients of the standard SAE and of TopK as without it."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        skip("no C++ compiler on this machine")
    for values in (dict(temporal=False), dict(temporal=False, activation="topk", k=1)):
        cfg = config(tsae, compile=True, **values)
        sae, x, mask = tsae.TSAE(16, cfg), torch.randn(2, 32, 16), torch.ones(2, 32, dtype=torch.bool)
        mask[0, 3] = False
        fast, found = common.compiled(tsae.losses, cfg), []
        assert fast is not tsae.losses and common.compiled(tsae.losses, config(tsae)) is tsae.losses
        for function in (fast, tsae.losses):
            sae.zero_grad()
            terms, _ = function(sae, x, mask, mask.sum(), 0, cfg)
            sum(terms.values()).backward()
            found.append({**{k: v.detach() for k, v in terms.items()}, **{k: p.grad.clone() for k, p in sae.named_parameters()}})
        for name in found[1]:
            assert relative(found[0][name], found[1][name]) < 1e-5, (values, name)


def test_speed_compile_without_a_compiler_is_one_sentence():
    with folder() as here:
        env = {**os.environ, "CXX": str(here / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(here / "inductor"),
               "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(HERE / "tsae.py"), *map(str, TINY), "--no-temporal", "--compile", "--out", "run",
                               "--device", "cpu", "--steps", "5"], capture_output=True, text=True, env=env)
        assert done.returncode == 2 and "--compile" in done.stderr and "Traceback" not in done.stderr, done.stderr[-500:]


@contextlib.contextmanager
def c_library(lookup):
    """ctypes.CDLL replaced by `lookup`."""
    import ctypes
    real, ctypes.CDLL = ctypes.CDLL, lookup
    try:
        yield
    finally:
        ctypes.CDLL = real


def test_speed_freed_memory_is_kept_where_the_c_library_can():
    """Nothing trimmed, nothing mapped; a C library that lacks the call, or none by that name, stops nothing."""
    calls = []
    with c_library(lambda name: type("libc", (), {"mallopt": lambda self, *args: calls.append(args)})()):
        common.keep_freed_memory()
    assert calls == [(-1, 2 ** 31 - 1), (-4, 0)]
    def missing(name):
        raise OSError(name)
    for lookup in (missing, lambda name: object()):
        with c_library(lookup):
            common.keep_freed_memory()


def test_speed_gru_equals_torchs():
    """The written-out GRU: states and all gradients of a two-layer nn.GRU in double precision, and precisions restored."""
    torch.manual_seed(0)
    gru, x, weight = nn.GRU(6, 5, num_layers=2, batch_first=True), torch.randn(3, 9, 6), torch.randn(3, 9, 5)
    results = []
    for run, dtype in ((lambda x: gru(x)[0], torch.float64), (lambda x: common.run_gru(gru, x), torch.float32)):
        gru.to(dtype).zero_grad()
        inputs = x.to(dtype).requires_grad_()
        states = run(inputs)
        (states * weight).sum().backward()
        results.append([states.detach(), inputs.grad, *(p.grad.clone() for p in gru.parameters())])
    for want, found in zip(*results):
        assert found.shape == want.shape and (found - want).abs().max() < 2e-6
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2, 9), (9, 3), (9,))]
    assert torch.autograd.gradcheck(common.GRULayer.apply, leaves)
    before = torch.get_float32_matmul_precision()
    gru.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert common.run_gru(gru, x).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == before


def test_speed_fp32_products_keep_their_precision():
    """After fast_products a product has fp32's error; where the fast way rounds to bf16 it is not taken."""
    before, real = torch.get_float32_matmul_precision(), torch.randn
    try:
        common.fast_products(torch.device("cpu"))
        x = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ x.double()
        assert (x @ x - exact).norm() < 1e-6 * exact.norm()

        class Rounding:
            """A matrix whose products come out in bf16."""
            double = x.double
            __matmul__ = lambda self, other: (x @ x).bfloat16().float()
        torch.randn = lambda *shape, generator: Rounding()
        common.fast_products(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.randn = real
        torch.set_float32_matmul_precision(before)


def throughput():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import throughput as module
    return module


def test_speed_cost_table_by_hand():
    module = throughput()
    toy = dict(blocks=2, D=10, mlp=40, q=10, kv=5, parameters=1e3)
    block = 10 * 10 + 10 * 5 + 10 * 5 + 10 * 10 + 3 * 10 * 40
    assert module.flops_per_token(toy, 3) == (2 * 2 * block, 10 * 10 * 30)
    assert module.flops_per_token(toy, 3, k=2) == (2 * 2 * block, 2 * 10 * 30 + 8 * 10 * 2)
    gemma = module.MODELS["Gemma-2-2B, layer 19"]
    assert 3.0e9 < module.flops_per_token(gemma, 1)[0] < 3.2e9            # 2 x 1.56e9 parameters in blocks 0 to 19
    a = module.ASSUMED
    one, eight = (module.scaling(gemma, 500e6, gpus, 1) for gpus in (1, 8))
    lm, sae = module.flops_per_token(gemma, 1)
    assert abs(one["hours"] * 3600 - 500e6 * (lm / a["lm_use"] + sae / a["sae_use"]) / a["peak_flops"]) < 1e-6 * one["hours"] * 3600
    assert one["efficiency"] == 1 > eight["efficiency"] and abs(one["disk_TB"] - 500e6 * 2304 * 2 / 1e12) < 1e-9


def test_speed_cost_page_is_filled_and_says_not_run():
    module = throughput()
    page = (HERE / "benchmarks/README.md").read_text()
    empty = module.fill_readme(page, None)
    assert "not run" in empty and module.fill_readme(empty, None) == empty
    row = {"case": "standard, ReLU", "dtype": "float32", "F/D": 4, "seconds_per_token": 2e-4, "fastest": 1e-4, "slowest": 3e-4,
           "floor/step": 0.77, "lm_share": 0.6, "peak_bytes": None}
    table = {"device": "cpu", "layer": 19, "D": 8, "model": "m", "versions": {"cpu": "a, b", "commit": "c"}, "rows": [row],
             "lm_seconds_per_token": 3e-4, "lm_matmul_share": 0.5, "peak_rss_GB": 1.0, "loop_dtype": "float32",
             "loops": {"x": {"tokens": 10, "F/D": 8, "harvest_s": 1.0, "epoch_s": 1.0, "share": 0.5}}}
    filled = module.fill_readme(page, table)
    assert "| standard, ReLU | float32 | 4 | 200 | 0.77 | 0.60 | not measured |" in filled and "CUDA: not run" in filled
    assert "cuda: not run" in module.show(table)
    for name in re.findall(r"<!-- throughput (\w+) -->", page):
        body = re.search(rf"<!-- throughput {name} -->\n(.*?)<!-- end -->", filled, flags=re.S)[1]
        assert len(body) > 40 or name == "buffer" and body == "Measured: not run.\n", name
    row = module.buffer_memory(64, n=64)
    assert row["formula_bytes"] == 64 * 128 * 64 * 2
    assert row["measured_bytes"] is None or row["measured_bytes"] < 4 * row["formula_bytes"] + 2 ** 21
    filled = module.fill_readme(page, {**table, "buffer": {**row, "measured_bytes": 2_000_000}})
    assert "held 2.0 MB at its peak; the formula gives 1.0 MB, and 0.5 MB" in filled


def test_speed_random_gemma_and_large_batches_are_timed():
    """Everything measured on a toy of Gemma 2's architecture with random weights, four sequences in two passes."""
    module, real = throughput(), throughput().random_gemma
    toy = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
               head_dim=16, vocab_size=1000)
    module.random_gemma = lambda device, dtype: real(device, dtype, **toy)
    rate, module.matmul_rate = module.matmul_rate, lambda device, dtype: rate(device, dtype, n=256)
    args = types.SimpleNamespace(layer=1, repeats=1, expansions="1", dtypes="float32", cases="standard, ReLU,TSAE, ReLU",
                                 sequences=4, micro_batch=2, random_gemma=True, loop_tokens=99)
    passes, train = [], module.RandomActivations.batch
    module.RandomActivations.batch = lambda self, step: passes.append(len(train(self, step))) or train(self, step)
    try:
        table = module.measure(args)
    finally:
        module.random_gemma, module.matmul_rate, module.RandomActivations.batch = real, rate, train
    assert set(passes) == {2} and table["loops"] == {} and table["sequences"] == 4
    assert {row["case"] for row in table["rows"]} >= {"standard, ReLU", "TSAE, ReLU"}
    assert table["lm_matmul_share"] > 0 and "of the rate of a 4096^3 product" in module.show(table)


def test_speed_whole_loop_is_timed():
    """Harvest and one epoch of a tiny model by the wall clock, several cases; nothing is left behind."""
    cases = ["standard, ReLU", "TSAE, TopK 32", "MTSAE unlearning, TopK 32", "TemporalLens, ReLU", "hierarchical, ReLU"]
    with folder() as here:
        rows = throughput().whole_loop(tiny_lm(), 1, 4096, cases, str(some_text(here / "text.jsonl", n=9000)))
        assert list(rows) == cases and [row["F/D"] for row in rows.values()] == [1, 8, 8, 1, 1]
        for row in rows.values():
            assert row["tokens"] == 4096 and row["harvest_s"] > 0 and row["epoch_s"] > 0
            assert abs(row["share"] - row["harvest_s"] / (row["harvest_s"] + row["epoch_s"])) < 1e-9
        assert [path.name for path in here.iterdir()] == ["text.jsonl"]


def peers_module():
    """benchmarks/peers.py as a module."""
    if str(HERE / "benchmarks") not in sys.path:
        sys.path.insert(0, str(HERE / "benchmarks"))
    import peers
    return peers


def test_speed_peers_table_is_filled_and_says_not_run():
    module, page = peers_module(), (HERE / "benchmarks/README.md").read_text()
    empty = module.fill_readme(page, None)
    assert "<!-- peers -->\nnot run\n<!-- end -->" in empty and module.fill_readme(empty, None) == empty
    case = {"activation": "ReLU", "dtype": "float32"}
    row = {**case, "library": "SAELens", "F": 576, "seconds_per_token": 1e-4, "fastest": 5e-5, "slowest": 2e-4, "steps": 6,
           "ours/this": 2.5, "plain/this": 2.0, "floor/step": 0.31}
    table = {"device": "cpu", "D": 576, "repeats": 3, "versions": {"cpu": "a, b", "commit": "c", "torch": "2"},
             "packages": {"sae-lens": "6.0", "eai-sparsify": None}, "rows": [
                 row, {**row, "library": "alone", "ours/this": None, "plain/this": None, "floor/step": None},
                 {**case, "library": "sparsify", "F": None, "reason": "no ReLU SAE"}]}
    filled = module.fill_readme(page, table)
    assert "| ReLU | float32 | 576 | SAELens | 10.0 (5.0 to 20.0) | 2.00 | 2.50 | 0.31 |" in filled
    assert "| ReLU | float32 | 576 | alone | 10.0 (5.0 to 20.0) |  |  |  |" in filled
    assert "| ReLU | float32 |  | sparsify | no ReLU SAE | | | |" in filled
    assert "sae-lens 6.0, eai-sparsify not installed" in filled and "CUDA: not run" in filled
    rest = re.compile(r"<!-- peers -->.*?<!-- end -->", re.S)
    assert rest.sub("", filled) == rest.sub("", page) and module.fill_readme(filled, None) == empty


def test_speed_peers_ours_runs_and_a_missing_package_is_a_row():
    """The whole program with tiny sizes: our row in a process of its own, a library that is nowhere, its file."""
    module = peers_module()
    libraries = {"ours": module.LIBRARIES["ours"], "SAELens": ("no-such-package-of-saes", module.saelens, False)}
    with folder() as here, replaced(module, "LIBRARIES", libraries), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert module.main("--D 16 --expansions 4 --dtypes float32 --repeats 1 --out .".split()) == 0
        table = json.loads((here / "peers.json").read_text())
    assert "| SAELens | not installed | | | |" in out.getvalue() and table["packages"] == {"no-such-package-of-saes": None}
    relu, topk, missing = table["rows"]
    assert (relu["activation"], topk["activation"]) == ("ReLU", "TopK 32") and missing["reason"] == "not installed"
    for row in (relu, topk):
        assert row["F"] == 64 and row["steps"] == 2 and row["ours/this"] == 1 and row["floor/step"] > 0
        assert 0 < row["fastest"] <= row["seconds_per_token"] <= row["slowest"]


def test_speed_peers_each_installed_library_takes_its_steps():
    """Each library that is installed, in a process of its own: as many seconds as steps were asked for, or the reason."""
    module, ran = peers_module(), []
    args = types.SimpleNamespace(D=16, steps=2, expansions="4", dtypes="float32")
    for name, (package, _, _) in module.LIBRARIES.items():
        if package and module.version(package):
            for row in module.start(name, args)["rows"]:
                reason = module.refusal(name, row["activation"], torch.float32, common.pick_device())
                assert row.get("reason", "") == reason, (name, row)
                assert reason or (row["F"] == 64 and len(row["seconds"]) == 2 and min(row["seconds"]) > 0), (name, row)
            ran.append(name)
    if not ran:
        skip("none of the other libraries is installed")


# ---------------------------------------------------------------------------------------------
# Recorded runs: benchmarks/experiments.py
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_suite():
    """benchmarks/experiments.py with one suite of tiny synthetic runs; its results go to a temporary folder."""
    if str(HERE / "benchmarks") not in sys.path:
        sys.path.insert(0, str(HERE / "benchmarks"))
    import experiments
    flags = " ".join(map(str, TINY)) + " --steps 4"
    rows = {"plain": ("tsae", f"--no-temporal {flags}"), "  TSAE": ("tsae", flags)}
    with folder() as here, replaced(experiments, "HERE", here), replaced(experiments, "SUITES", {
            "tiny": experiments.Suite(rows, "reconstruction,temporal", "1,2", "0")}):
        yield experiments, rows


def test_experiments_share_runs_whatever_the_order_of_flags():
    with tiny_suite() as (experiments, _):
        a, b = (experiments.run_folder("tsae", flags, 1, 19) for flags in ("--k 4  --l1 0.1 --no-temporal",
                                                                          "--no-temporal --l1 0.1 --k 4"))
        assert a == b != experiments.run_folder("tsae", "--k 4 --l1 0.1", 1, 19)
        jobs = experiments.jobs_of("tiny")
        assert [seed for _, seed, _ in jobs] == ["1", "1", "2", "2"] and len(experiments.jobs_of("tiny", rows="^plain$")) == 2


def test_experiments_run_once_add_evaluations_and_keep_other_seeds():
    with tiny_suite() as (experiments, rows):
        script, flags = rows["plain"]
        for seed in ("1", "2"):
            experiments.one(script, flags, seed, "0", "reconstruction")
        out = experiments.run_folder(script, flags, "1", "0")
        weights = (out / "sae_weights.safetensors").read_bytes()
        assert experiments.lacks(out, "reconstruction,temporal") == ["temporal"]
        assert experiments.collect("tiny") == {}, "not finished as the suite wants it"
        for seed in ("1", "2"):
            experiments.one(script, flags, seed, "0", "reconstruction,temporal")
        assert experiments.lacks(out, "reconstruction,temporal") == []
        assert (out / "sae_weights.safetensors").read_bytes() == weights, "evaluated again, not trained again"
        row = experiments.collect("tiny")["plain | layer 0"]
        values = row["values"]["core.EV"]
        assert row["seeds"] == [1, 2] and row["steps"] == {"1": 4, "2": 4} and values["1"] != values["2"]
        assert math.isclose(row["mean"]["core.EV"], (values["1"] + values["2"]) / 2)
        shutil.rmtree(out)                                 # as on another machine: seed 1 is only in the results
        assert experiments.collect("tiny")["plain | layer 0"]["values"]["core.EV"] == values
        table = experiments.fill_readme("<!-- table tiny: EV -->\nold\n<!-- end -->")
        assert "| plain, layer 0 | 2 | 4 | " in table and "old" not in table


# ---------------------------------------------------------------------------------------------
# Claims: the ledger in results/claims.json and claims.md (benchmarks/claims.py)
# ---------------------------------------------------------------------------------------------


def ledger_module():
    """benchmarks/claims.py as a module."""
    if str(HERE / "benchmarks") not in sys.path:
        sys.path.insert(0, str(HERE / "benchmarks"))
    import claims
    return claims


def recorded_ledger():
    return json.loads((HERE / "results" / "claims.json").read_text())


def test_claims_each_has_quote_place_measure_and_its_runs():
    import importlib
    claims = ledger_module()
    for paper in claims.PAPERS:
        ids = [c.id for c in claims.CLAIMS if c.id[0] == paper]
        assert ids == [f"{paper}{i + 1}" for i in range(len(ids))] and len(ids) >= 10, ids
    for c in claims.CLAIMS:
        assert len(c.quote) >= 8 and c.reported and callable(c.measure), c.id
        assert re.match(r"(Abstract|Sec\. \d|Table \d)", c.place), (c.id, c.place)
        assert all(name in claims.ROWS or name in claims.MEASURED for name in c.needs), c.id
        used = {key.split(" | ")[0] for key in claims.asked([c])}
        assert used == set(c.needs), (c.id, "asks for", used, "and declares", c.needs)
        for key in claims.asked([c]):
            name, layer = key.split(" | layer ")
            assert name in claims.MEASURED or int(layer) in claims.ROWS[name].layers, (c.id, key)
    for row in claims.ROWS.values():                          # every command is one that its script takes
        module = importlib.import_module(row.script)
        common.check(common.parse_args(module.__doc__, module.Config, module.CHOICES, row.flags.split())[0])
    assert [row["id"] for row in recorded_ledger()["claims"]] == [c.id for c in claims.CLAIMS]


class Invented(dict):
    """Collected numbers that `draw` invents when they are asked for: the same for both seeds."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def get(self, key, default=None):
        if key == "values":
            return self
        if " | layer " in key:
            row = Invented(lambda metric, key=key: self.draw(key, metric))
            return {"values": row}
        return {"42": self.draw(key), "43": self.draw(key)}


def test_claims_verdicts_flip_with_the_numbers():
    """Every verdict that is not 'not testable here' can come out both ways: invented numbers reach both."""
    claims = ledger_module()
    values = [0.0, 0.004, 0.02, 0.15, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0, 1.5, 2.5, 4.0, 8.0, 16.0, 40.0, 64.0, 100.0, 2500.0]
    factors = [1.0, 0.99, 0.97, 0.95, 0.93, 0.9, 0.85, 0.77, 0.5, 1.05, 1.18, 1.5]
    for c in claims.CLAIMS:
        named = [float(x) for x in re.findall(r"-?\d+\.?\d*", c.reported)]
        pool, seen, gen = values + named + [x / 100 for x in named], set(), np.random.default_rng(0)
        for trial in range(30000):
            mode, drawn = trial % 5, {}

            def draw(run, metric, mode=mode, drawn=drawn, pool=pool, gen=gen):
                group = ((run, metric), metric, metric, None, None)[mode]    # shared by all runs, or by everything
                value = drawn.setdefault(group, pool[gen.integers(len(pool))])
                return value * drawn.setdefault((run, metric, "factor"), factors[gen.integers(len(factors))]) \
                    if mode in (2, 4) else value
            try:
                seen.add(c.measure(claims.Values(Invented(draw)))[0])
            except (claims.NotRun, ZeroDivisionError):
                continue
            if seen >= {True, False} or None in seen:
                break
        assert seen == {None} or seen == {True, False}, (c.id, seen)


def test_claims_by_hand():
    claims = ledger_module()
    table = {}

    def put(run, layer=19, **values):
        row = table.setdefault(f"{run} | layer {layer}", {"command": "", "values": {}})["values"]
        row.update({k.replace("__", "."): {str(42 + i): x for i, x in enumerate(v)} for k, v in values.items()})

    def verdict(name):
        one = next(c for c in claims.CLAIMS if c.id == name)
        return claims.judge(one, claims.Values(table))
    put("4 steps", log__steps=[4, 4, 4])
    assert verdict("D1")["verdict"] == "reproduced" and verdict("D1")["number"] == "4 to 4 steps in 3 runs"
    put("4 steps", log__steps=[4, 4, 5])
    assert verdict("D1")["verdict"] == "refuted"
    put("TSAE", log__steps=[2500, 2500], finished=[1, 1])
    assert verdict("C1")["verdict"] == "refuted" and "2 of 2 runs finished" in verdict("C1")["number"]
    put("TSAE", log__steps=[0, 0], finished=[0, 0])
    assert verdict("C1")["verdict"] == "reproduced" and "0 of 2 runs finished" in verdict("C1")["number"]
    put("MTSAE", log__loss_variance=[0.77, 1.54])             # paired by seed: -23 % and -23 %
    put("MTSAE 1,2,4", log__loss_variance=[1.0, 2.0])
    assert verdict("A3")["verdict"] == "reproduced" and verdict("A3")["number"] == "-23.0 ± 0.0 % (n 2)"
    for layer, span in ((5, 16), (12, 40), (19, 64)):
        put("lens", layer, span__median=[span], span__ignoring_position=[64])
    assert [verdict(f"E{i}")["verdict"] for i in (3, 4, 5, 6)] == ["reproduced"] * 4
    assert "says nothing about position" in verdict("E5")["why"] and "nothing" not in verdict("E3")["why"]
    put("lens", 12, span__median=[64])
    assert [verdict(f"E{i}")["verdict"] for i in (3, 4, 5, 6)] == ["reproduced", "refuted", "reproduced", "refuted"]
    assert claims.num([0.25, 0.35]) == "0.300 ± 0.071 (n 2)" and claims.num([-0.00001]) == "-0.00001"


def test_claims_without_runs_say_not_run():
    claims = ledger_module()
    for row in claims.ledger({})["claims"]:
        assert row["verdict"] in ("not run", "not testable here"), row
        assert row["verdict"] == "not testable here" or row["number"] == "not run"
        assert row["verdict"] == "not run" or row["why"].startswith("because ")
    data = claims.ledger({"TSAE | layer 19": {"command": "", "values": {"log.steps": {"42": 2500}}}})
    verdicts = {row["id"]: row["verdict"] for row in data["claims"]}
    assert verdicts["C1"] == "not run", "a number was given although `finished` is missing"
    assert "not run" in claims.markdown(data)


def test_claims_run_folders_are_read():
    claims = ledger_module()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        assert claims.gather(path) == {}
        rows = [{"step": 10 * i, "loss": 100.0 - i, "active": 5.0, "EV": i / 30} for i in range(31)]
        (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "status.json").write_text(json.dumps({"status": 130, "error": "stopped and saved after step 300"}))
        assert claims.gather(path) == {}, "an interrupted run counts as a failure of the method"
        (path / "status.json").write_text(json.dumps({"status": 2, "error": "the term 'l1' of the loss is nan at step 301"}))
        assert claims.gather(path)["finished"] == 0 and claims.gather(path)["log.steps"] == 301
        probing = {"sae_all": 0.9, "per_task": [{"task": "language", "sae_all": 0.8}]}
        common.write_json(path / "eval.json", {"core": {"EV": 0.5, "relative_reconstruction_bias": math.nan},
                                               "probing": probing})
        common.write_json(path / "config.json", {"script": "tsae"})
        found = claims.gather(path)
        assert found["finished"] == 1 and "heldout_loss" not in found and found["core.EV"] == 0.5 and found["probing.language.sae_all"] == 0.8
        assert "core.relative_reconstruction_bias" not in found                # 0/0 is no number
        assert found["log.loss_variance"] < 1e-18 and abs(found["log.EV_early"] - 6.5 / 30) < 1e-12   # rows 6 and 7
        common.write_json(path / "config.json", {"script": "temporal_lens", "D": 8, "scale": 2.0, "config": {"l1": 0.04}})
        common.write_json(path / "eval.json", {"core": {"MSE": 3.0, "L1": 5.0}})
        assert abs(claims.gather(path)["heldout_loss"] - (3.0 * 8 / 4 + 0.2)) < 1e-12
    noise = np.random.default_rng(0).normal(size=3000)
    rows = [{"step": i, "loss": 50 + 0.01 * i + x, "active": 1.0, "EV": 0.0} for i, x in enumerate(noise)]
    assert abs(claims.log_summary(rows)["log.loss_variance"] - 1) < 0.1, "the trend counts as variance"


def test_claims_json_and_md_follow_from_the_recorded_numbers():
    """Verdicts, numbers and page in the tree are what the recorded values give, byte for byte."""
    claims = ledger_module()
    data = recorded_ledger()
    again = json.loads(json.dumps(claims.ledger(data["runs"])))
    for old, new in zip(data["claims"], again["claims"]):
        assert old == new, (old, new)
    assert again == data
    assert claims.markdown(data) == claims.markdown(again) == (HERE / "results" / "claims.md").read_text()


# ---------------------------------------------------------------------------------------------
# Hygiene: the maps, ids, guarded copies and the README say what the code does
# ---------------------------------------------------------------------------------------------


def source(script):
    """(docstring, body) of a script."""
    text = (HERE / f"{script}.py").read_text()
    doc = ast.get_docstring(ast.parse(text), clean=False)
    return doc, text[text.index(doc) + len(doc):]


def paper_map(doc):
    """Rows of the docstring's 'Paper -> code' section: [(place, [names])]."""
    rows, inside = [], False
    for line in doc.splitlines():
        if line.startswith("Paper -> code"):
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.strip():
            cells = re.split(r"  +", line.strip())
            if len(cells) > 1:
                rows.append((cells[0], [name.strip() for name in cells[1].split(",")]))
    return rows


def test_hygiene_paper_maps():
    import importlib
    for script in SCRIPTS:
        doc, body = source(script)
        module, rows = importlib.import_module(script), paper_map(doc)
        assert len(rows) >= 6, f"{script}: no 'Paper -> code' map"
        for place, names in rows:
            for name in names:
                owner = module
                for part in name.split("."):
                    assert hasattr(owner, part) or part in getattr(owner, "__dataclass_fields__", {}), (
                        f"{script}: the map's {place} names {name}, which does not exist")
                    owner = getattr(owner, part, None)
            for equation in re.findall(r"Eq\. (\d+)", place):
                assert re.search(rf"Eqs?\. [\d, -]*\b{equation}\b", body), f"{script}: Eq. {equation} is not cited"


def test_hygiene_open_points_are_marked_in_the_body():
    for script in SCRIPTS:
        doc, body = source(script)
        declared = set(re.findall(r"(?:AMBIGUOUS|UNSPECIFIED|DEVIATION) ([AUD]\d+)", doc))
        assert declared, script
        for name in declared:
            assert re.search(rf"\b{name}\b", body), f"{script}: {name} is declared and never marked in the code"
        for name in re.findall(r"(?:AMBIGUOUS|UNSPECIFIED|DEVIATION) ([AUD]\d+)", body):
            assert name in declared, f"{script}: {name} is marked and not declared in the docstring"


def test_hygiene_choices_page_and_readme_follow_the_docstrings():
    """docs/choices.md is what docs/choices.py writes, and README's short list names declared ids and real flags."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("choices", HERE / "docs/choices.py")
    choices = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(choices)
    assert (HERE / "docs/choices.md").read_text() == choices.page(), "run python docs/choices.py"
    declared = {}
    for script in SCRIPTS:
        rows = choices.entries(script)
        assert [(kind, name) for kind, name, _, _ in rows] == re.findall(
            r"^    (AMBIGUOUS|UNSPECIFIED|DEVIATION) ([AUD]\d+)", source(script)[0], flags=re.M), script
        declared[script] = {name: text for _, name, text, _ in rows}
        fields = importlib.import_module(script).Config.__dataclass_fields__
        for flag in re.findall(r"--([a-z]\w*(?:-\w+)?)", source(script)[0]):
            bare = flag.removeprefix("no-")
            assert flag in fields or isinstance(fields[bare].default, bool), (script, flag)
        for flag in re.findall(r"--(\w+) (?:on|off)\b", source(script)[0]):      # a switch takes no value
            assert not isinstance(fields[flag].default, bool), (script, flag)
    section = (HERE / "README.md").read_text().split("## What the papers leave open")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (all four|`(\w+)\.py`) \| ([AUD]\d+) \| .* \| (.*) \|$", section, flags=re.M)
    assert len(rows) > 8
    for _, script, name, code in rows:
        for one in [script] if script else SCRIPTS:
            assert name in declared[one], (one, name)
            fields = importlib.import_module(one).Config.__dataclass_fields__
            for flag in re.findall(r"--(\w+)", code):
                assert flag in fields, (one, flag)


def definitions(script):
    """{qualified name: syntax tree without docstring} of a script's functions and classes."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child
                visit(child, prefix + child.name + ".")
    visit(ast.parse((HERE / f"{script}.py").read_text()), "")
    return found


def test_hygiene_guarded_copies_have_not_drifted():
    def shape(node):
        node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        return ast.dump(node)
    copies = 0
    for script in SCRIPTS:
        text = (HERE / f"{script}.py").read_text()
        marks = re.findall(r"def (\w+)\(.*# SAME AS (\w+)\.py:([\w.]+)", text)      # behind the def or above it
        marks += [(name, other, there) for other, there, name in
                  re.findall(r"# SAME AS (\w+)\.py:([\w.]+).*\n(?: *@.*\n)* *def (\w+)", text)]
        for name, other, there in marks:
            here = next(v for k, v in definitions(script).items() if k.split(".")[-1] == name)
            assert shape(here) == shape(definitions(other)[there]), f"{script}.py:{name} drifted from {other}.py:{there}"
            copies += 1
    assert copies >= 6


def test_hygiene_every_config_field_has_its_source():
    import importlib
    for script in SCRIPTS:
        module = importlib.import_module(script)
        comments = common.field_comments(module.Config)
        missing = set(module.Config.__dataclass_fields__) - set(comments)
        assert not missing, (script, missing)


def test_hygiene_configs_and_loops_have_one_shape():
    import dataclasses
    import importlib
    shared, loops = {}, {}
    for script in SCRIPTS:
        module = importlib.import_module(script)
        fields = [(f.name, f.type, f.default) for f in dataclasses.fields(module.Config)]
        names = [name for name, _, _ in fields]
        shared[script] = fields[names.index("seed"):]        # "machine and run": the same flags everywhere
        assert names[names.index("model"):names.index("k") + 1] == [
            "model", "layer", "data", "tokens", "heldout_tokens", "T", "expansion", "activation", "k"], script
        body = (HERE / f"{script}.py").read_text()
        body = body[body.index("for step in run.steps():"):body.index("run.log(step")]
        comments = "\n".join(line.split("#", 1)[1] for line in body.splitlines() if "#" in line)
        loops[script] = re.findall(r"(?<= )(\d)\. ([a-z]+)", comments)
        assert len(body.splitlines()) <= 90, script
    for script in SCRIPTS[1:]:
        assert shared[script] == shared[SCRIPTS[0]], f"{script}: machine and run fields differ"
        assert loops[script] == loops[SCRIPTS[0]] and len(loops[script]) == 7, f"{script}: steps of the loop"


def test_hygiene_lines_and_words():
    for path in sorted(HERE.glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            config_field = re.match(r"    \w+: (int|float|str|bool) = ", line)     # its comment is --help's text
            limit = 125 if config_field else {"test_all": 145, "common": 120}.get(path.stem, 100)
            assert len(line) <= limit, f"{path.name}:{number} has {len(line)} columns"
            assert not re.match(r"\s*except\s*:", line), f"{path.name}:{number}: bare except"


def test_hygiene_nothing_but_safetensors_and_json_is_read_back():
    for path in (*HERE.glob("*.py"), *HERE.glob("benchmarks/*.py")):
        if path.name == "test_all.py":
            continue
        text = path.read_text()
        for word in ("torch" + ".load(", "pickle" + ".load", "trust_remote_code=True", "allow_pickle=True"):
            assert word not in text, (path.name, word)


def test_hygiene_readme_commands_and_paths():
    import importlib
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"python (\w+)\.py([^\n`#|]*)", text)
    assert len(commands) >= 8
    for script, flags in commands:
        assert (HERE / f"{script}.py").exists(), script
        if script in SCRIPTS:
            module = importlib.import_module(script)
            words = flags.replace("[", " ").replace("]", " ").replace("\\", " ").split()
            for word in words:
                if word.startswith("--") and word not in ("--help",):
                    name = word[2:].split("=")[0].replace("-", "_")
                    fields = module.Config.__dataclass_fields__
                    assert name in fields or name.removeprefix("no_") in fields, (script, word)
    for path in re.findall(r"\]\(((?!http)[\w./-]+)\)", text):
        assert (HERE / path).exists(), f"README links to {path}, which does not exist"


# ---------------------------------------------------------------------------------------------
# Exercises and docs: docs/exercises.md; a check passes on a right solution only
# ---------------------------------------------------------------------------------------------


def plain_sae(seed=0, D=8, **values):
    """An untrained TSAE of paper C's script with random biases, its Config, tokens and their mask."""
    cfg = config(tsae, **{"T": 12, "k": 3, **values})
    sae = tsae.TSAE(D, cfg)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
        sae.scale.fill_(2.0)
    return sae, cfg, *some(4, 12, D)


def exercise_1():
    """What weighs against the error is divided as the error is, so lambda keeps its meaning."""
    for flags in (dict(temporal=False), dict(buffers=False, variance_weights="mean")):
        sums, means = ({}, {})
        for name, found in (("sum", sums), ("mean", means)):
            sae, cfg, x, mask = plain_sae(expansion=3, recon_reduction=name, **flags)
            found.update({k: v.item() for k, v in tsae.losses(sae, x, mask, mask.sum(), 1500, cfg)[0].items()})
        assert math.isclose(means["recon"] * 8, sums["recon"], rel_tol=1e-4), "the error is averaged over D no more"
        for name in set(sums) - {"recon"}:
            ratio = sums[name] / means[name]
            assert math.isclose(ratio, 8, rel_tol=1e-4), f"averaging makes {name} {ratio:.3g} times smaller, the error D = 8 times"


def exercise_2():
    """Rows of W_dec are free, and the loss does not change if a feature shrinks while its row grows."""
    sae, cfg, x, mask = plain_sae(temporal=False)
    gen = torch.Generator().manual_seed(1)
    size = torch.randn(8, generator=gen).exp()
    before = tsae.losses(sae, x, mask, mask.sum(), 0, cfg)[0]
    with torch.no_grad():
        sae.W_dec.mul_(size[:, None])
        sae.W_enc.div_(size)
        sae.b_enc.copy_(sae.b_enc / size)
    after = tsae.losses(sae, x, mask, mask.sum(), 0, cfg)[0]
    for name in before:
        assert torch.isclose(before[name], after[name], rtol=1e-4), f"{name}: {before[name]:.4f}, then {after[name]:.4f}"
    sum(after.values()).backward()
    # d loss / d log(size), feature by feature
    encoder = (sae.W_enc.grad * sae.W_enc).sum(0) + sae.b_enc.grad * sae.b_enc
    decoder = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert torch.allclose(encoder, decoder, rtol=1e-3, atol=1e-3 * decoder.abs().max().item()), "the norm needs its gradient"
    with folder():
        status, _, err = run(tsae, *TINY, "--no-temporal", "--steps", 5, "--lr", 3e-3, "--lr_warmup", 1, "--eval", "none",
                             "--out", "a")
        assert status == 0, err
        norm = common.load_tensors("a/sae_weights.safetensors")[0]["W_dec"].norm(dim=1)
        assert (norm - 1).abs().max() > 1e-3, "the rows are still put back to norm 1"


def exercise_3():
    """BatchTopK: k n entries of n scored tokens, shared out as they come; sinks take none."""
    sae, cfg, x, mask = plain_sae(temporal=False, activation="topk", expansion=2)
    x[0, 0], mask[0, 0] = 1000 * x[0, 0], False                      # an attention sink
    pre = F.relu(x / sae.scale @ sae.W_enc + sae.b_enc - sae.b_dec @ sae.W_enc)
    for f, dense in ((sae.encode(x, mask)[mask], pre[mask]), (sae.encode(x[mask]), pre[mask])):
        n = len(dense)
        assert (f > 0).sum() == 3 * n, f"{(f > 0).sum()} active entries for {n} scored tokens at k = 3"
        least = dense.flatten().topk(3 * n).values[-1]
        assert torch.allclose(f, torch.where(dense >= least, dense, 0.0), rtol=1e-4), "these are not the largest"
    dense = plain_sae(temporal=False, activation="topk", k=8)[0].encode(x[mask])
    assert torch.allclose(dense, plain_sae(temporal=False)[0].encode(x[mask]), rtol=1e-4), "k = F is the ReLU"


def exercise_4():
    """The temperature falls in a straight line from the first to the last step."""
    cfg = config(temporal_lens)
    for steps in (2, 11, 400):
        tau = [temporal_lens.temperature(step, steps, cfg) for step in range(steps)]
        assert abs(tau[0] - 5.0) < 1e-9 and abs(tau[-1] - 0.1) < 1e-9, f"{steps} steps: from {tau[0]} to {tau[-1]}"
        drops = [a - b for a, b in zip(tau, tau[1:])]
        assert max(drops) - min(drops) < 1e-9, f"{steps} steps: no straight line, drops from {min(drops)} to {max(drops)}"
    assert temporal_lens.temperature(0, 1, cfg) == 5.0, "a run of one step"
    assert temporal_lens.temperature(3, 9, config(temporal_lens, anneal=False)) == 0.1, "--no-anneal"


def exercise_5():
    """Masks are 0 or 1; their logits learn through the sigmoid's gradient."""
    sae, _ = lens(T=7)
    m = sae.position_mask(7)
    assert ((m == 0) | (m == 1)).all(), "the mask is not hard"
    assert torch.equal(m > 0.5, sae.alpha > 0), "on is where alpha > 0"
    assert m.requires_grad, "the logits get no gradient: nothing can learn which positions"
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    (m * weight).sum().backward()
    soft = torch.sigmoid(sae.alpha.detach() / sae.tau)
    assert torch.allclose(sae.alpha.grad, weight * soft * (1 - soft) / sae.tau, atol=1e-5), "not the sigmoid's gradient"
    x, _ = some(2, 7, 6)
    assert not sae.encode(x)[:, sae.alpha <= 0].any(), "a feature is active where its mask is off"
    assert (lens(T=7, masks=False)[0].position_mask(7) == 1).all(), "--no-masks"


def exercise_6():
    """One mask for 16 positions in a row."""
    sae, cfg = lens(T=40)
    assert tuple(sae.alpha.shape) == (3, 6), f"alpha has shape {tuple(sae.alpha.shape)}, 40 positions are 3 blocks"
    m, block = sae.position_mask(40), torch.arange(40) // 16
    assert torch.allclose(m, torch.sigmoid(sae.alpha[block] / sae.tau)), "position t belongs to block t // 16"
    assert torch.equal(sae.position_mask(9), m[:9]) and torch.equal(sae.position_mask(50)[40:], m[-1:].expand(10, -1))
    assert temporal_lens.initial_alpha(6, cfg).shape == sae.alpha.shape
    m[:16, 2].sum().backward()
    assert sae.alpha.grad[0, 2] > 0 and sae.alpha.grad.count_nonzero() == 1, "16 positions, one logit"


def exercise_7():
    """mixing's `leak`: how much a code depends on later tokens; 0 for a causal encoder."""
    x, mask = mts_data(B=16)

    def leak(padding="circular", taps=(0, 1, 2)):
        sae, _ = mts(padding=padding, batch_norm="off", rates="1,4")
        with torch.no_grad():                                       # other taps (before, at, after the token): 0
            sae.kernels.mul_(torch.tensor([float(i in taps) for i in range(3)])[:, None])
        found = mtsae.mixing(sae, types.SimpleNamespace(heldout=lambda size=16: iter([(x[:size], mask[:size])])))
        assert "leak" in found, "mixing returns no 'leak'"
        later = x.clone()
        later[:, 21:] = x.roll(1, 0)[:, 21:]
        a, b = sae.encode(x)[:, 20], sae.encode(later)[:, 20]
        assert math.isclose(found["leak"], ((a - b).norm() / a.norm()).item(), rel_tol=1e-3, abs_tol=1e-7), found
        return found["leak"]
    assert leak("causal") == 0, "a causal encoder cannot see later tokens"
    assert leak(taps=(0, 1)) == 0, "no tap after the token, no leak"
    assert leak() > 0.01 and leak(taps=(1, 2)) > 0.01


def exercise_8():
    """Coherence over all lags up to 16, as one product and not as a loop over lags."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))
    x, mask = mts_data(T=24)
    operations = []
    for coherence in (0.15, 0.0):
        sae, cfg = mts(T=24, batch_norm="off", coherence=coherence)
        n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])      # as train() counts
        with Count() as counter:
            terms, _ = mtsae.losses(sae, x, mask, n, 0, cfg)
        operations.append(counter.n)
        if coherence:
            f, total, pairs = sae.encode(x, mask).double(), 0.0, 0
            for lag in range(1, 17):
                both = mask[:, lag:] & mask[:, :-lag]
                total += (F.cosine_similarity(f[:, lag:], f[:, :-lag], dim=-1) * both).sum().item()
                pairs += both.sum().item()
            assert n[1] == pairs, f"{n[1]} pairs counted, {pairs} scored pairs are 1 to 16 tokens apart"
            assert math.isclose(terms["coherence"].item(), -0.15 * total / pairs, rel_tol=1e-4)
            with torch.no_grad():
                sae.b_enc.fill_(-1e3)                                    # no feature is active
            mtsae.losses(sae, x, mask, n, 0, cfg)[0]["coherence"].backward()
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in sae.parameters()), "empty codes"
    assert operations[0] - operations[1] < 40, f"{operations[0] - operations[1]} operations: a loop over the lags?"


def exercise_9():
    """AuxK: dead features, and nothing else, learn what the others left over."""
    sae, cfg = mts(T=40, activation="topk", k=2, expansion=3, dead_after=5)
    x, mask = mts_data()
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])
    sae.eval()                                                      # batch norm as it is
    assert not mtsae.losses(sae, x, mask, n, 0, cfg)[0].get("aux", 0), "nothing is dead, and still there is a term"
    sae.inactive[:7] = 6
    terms, _ = mtsae.losses(sae, x, mask, n, 0, cfg)
    assert "aux" in terms, "7 features are dead, and there is no term 'aux'"
    with torch.no_grad():
        h, rest = sae.temporal(x, mask), (x - sae(x, mask)[0]) / sae.scale
        guess = mtsae.topk(h @ sae.W_enc[:, :7] + sae.b_enc[:7], 4) @ sae.W_dec[:7]
        value = ((rest - guess).square().sum(-1) * mask).sum() / mask.sum() / 32
    assert torch.isclose(terms["aux"], value, rtol=1e-4), f"{terms['aux']:.4f} and not {value:.4f}"
    terms["aux"].backward()
    for name, p in sae.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        if name in ("W_enc", "b_enc", "W_dec"):
            dead = grad.movedim(-1 if name == "W_enc" else 0, 0)[:7]     # a view
            assert dead.any(), f"the dead features' {name} gets no gradient"
            dead.zero_()
        assert not grad.any(), f"{name} of living features gets a gradient"


def exercise_10():
    """Two features drift together: beside the others, and not their own past, they stand out."""
    sae = hs_sae(variant="self-aligning", expansion=4)
    gen, rows, over = torch.Generator().manual_seed(0), torch.arange(64), []
    for step in range(200):
        s = 0.3 + 0.02 * torch.randn(64, generator=gen)
        s[:2] = 0.3 + 0.65 * step / 200
        margin = hierarchical_sae.update_margin(sae, s, rows, sae.cfg)
        assert margin.shape == s.shape and not margin.requires_grad
        over.append(s > margin)
    over = torch.stack(over).float()                                # (200, 64)
    assert over[100:, :2].all(), f"the margin holds the two back in {1 - over[100:, :2].mean():.0%} of the last 100 steps"
    assert over[100:, 2:].mean() < 0.02, "the margin is below features that do nothing unusual"


def exercise_11():
    """Matryoshka: the lowest level alone, the lowest two and all three have to reconstruct."""
    for levels, reduction in ((3, "sum"), (3, "mean"), (1, "sum")):
        sae = hs_sae(variant="hierarchical", levels=levels, recon_reduction=reduction, expansion=2)
        x, mask = hs_data()
        terms, stats = hierarchical_sae.losses(sae, x, mask, mask.sum(), 0, sae.cfg)
        f, errors, end = sae.encode(x, mask).detach(), [], 0
        for size in sae.sizes:
            end += size
            kept = torch.cat([f[..., :end], torch.zeros_like(f[..., end:])], -1)
            errors.append(((sae.decode(kept) - x) / sae.scale)[mask].square().sum() / mask.sum())
        want = sum(errors) / levels / (16 if reduction == "mean" else 1)
        assert torch.isclose(terms["recon"], want, rtol=1e-4), f"{levels} levels, {reduction}: {terms['recon']:.4f}, not {want:.4f}"
        assert torch.isclose(stats["error"], errors[-1], rtol=1e-4), "the logged error is that of the whole code"


def exercise_12():
    """The GRU predicts the change: without its output, tomorrow is like today and the skill is 0."""
    sae = hs_sae(variant="temporal")
    x, mask = hs_data()
    state, _ = sae.gru(x if sae.W_track is None else x @ sae.W_track)
    assert torch.allclose(sae.predict(x), x + state @ sae.W_next, atol=1e-5), "not the image plus the GRU's change"
    with torch.no_grad():
        sae.W_next.zero_()
    windows = types.SimpleNamespace(heldout=lambda size=16: iter([(x, mask)]))
    skill = hierarchical_sae.prediction_skill(sae, windows)
    assert abs(skill) < 1e-5, f"without the GRU's output the skill is {skill:.3f}"
    x_hat, f = sae(x, mask)
    image = hierarchical_sae.features_image(sae, x_hat, mask)
    pair = mask[:, 1:] & mask[:, :-1]
    change = ((image[:, 1:] - image[:, :-1]).square().mean(-1) * pair).sum()
    found = hierarchical_sae.temporal_losses(sae, f, x_hat, mask, sae.cfg)["prediction"]
    assert torch.isclose(found, change, rtol=1e-4), "the loss does not use the same prediction"


def exercises():
    """Numbers of the exercises that have a check."""
    return sorted(int(name.split("_")[1]) for name in globals() if re.fullmatch(r"exercise_\d+", name))


def markers():
    """{number: script} from the comments in the scripts."""
    found = [(int(n), script) for script in SCRIPTS
             for n in re.findall(r"# EXERCISE (\d+)", (HERE / f"{script}.py").read_text())]
    assert len(found) == len(dict(found)), f"an exercise is marked twice: {found}"
    return dict(found)


def apply_patch(path, tree):
    """Apply one of docs/solutions to a copy of the scripts."""
    tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-s", "-i"] if shutil.which("patch") else skip(
        "neither git nor patch is on this machine")
    done = subprocess.run([*tool, str(path)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, f"{path.name} does not apply any more: {done.stderr}"


@contextlib.contextmanager
def changed(path):
    """A changed script in the place of its module, for this file's tests."""
    name, module = path.stem, types.ModuleType(path.stem)
    before, module.__file__ = sys.modules[name], str(path)
    sys.modules[name] = globals()[name] = module
    try:
        exec(compile(path.read_text(), path, "exec"), module.__dict__)
        yield
    finally:
        sys.modules[name] = globals()[name] = before


def test_exercises_pass_when_right_and_fail_when_unchanged_or_wrong():
    with folder() as here:
        for n, script in sorted(markers().items()):
            for kind in ("unchanged", "", "_wrong"):
                tree = here / f"{n}{kind or '_right'}"
                tree.mkdir()
                shutil.copy(HERE / f"{script}.py", tree)
                if kind != "unchanged":
                    apply_patch(HERE / "docs" / "solutions" / f"exercise_{n}{kind}.patch", tree)
                    assert (tree / f"{script}.py").read_text() != (HERE / f"{script}.py").read_text(), (n, kind)
                with changed(tree / f"{script}.py"):
                    try:
                        globals()[f"exercise_{n}"]()
                        said = None
                    except AssertionError as error:
                        said = str(error)
                if kind == "":
                    assert said is None, f"exercise {n}: the solution fails: {said}"
                else:
                    assert said is not None, f"exercise {n}: the check passes on the {kind.strip('_')} code"


def test_exercises_run_from_the_command_line():
    with folder() as here:
        for path in HERE.glob("*.py"):
            shutil.copy(path, here)
        for status in (1, 0):
            done = subprocess.run([sys.executable, "test_all.py", "exercise_4"], cwd=here, capture_output=True, text=True)
            assert done.returncode == status, done.stdout + done.stderr
            assert f"{1 - status} passed, {status} failed" in done.stdout
            apply_patch(HERE / "docs" / "solutions" / "exercise_4.patch", here) if status else None
    assert "exercise_1" not in names_of([]) and names_of(["exercise_1"]) == ["exercise_1"]


def test_exercises_are_marked_described_and_solved():
    text, teacher = ((HERE / "docs" / f"{name}.md").read_text() for name in ("exercises", "teachers"))
    marked = markers()
    assert sorted(marked) == exercises() == list(range(1, len(marked) + 1)) and len(marked) >= 12
    assert all(list(marked.values()).count(script) >= 3 for script in SCRIPTS), marked
    parts = re.split(r"^### Exercise (\d+)\b", text, flags=re.M)
    described = dict(zip(map(int, parts[1::2]), parts[2::2]))
    assert sorted(described) == sorted(marked)
    for n, script in marked.items():
        for word in (f"`{script}.", "**Change.**", "**Command.**", "**Predict first.**", "**What to see.**",
                     f"python test_all.py exercise_{n}\n"):
            assert word in described[n], f"exercise {n} lacks {word!r}"
        assert re.search(rf"^### Exercise {n}\b", teacher, flags=re.M), f"the teacher's page lacks exercise {n}"
        for kind in ("", "_wrong"):
            assert (HERE / "docs" / "solutions" / f"exercise_{n}{kind}.patch").exists()


def documents():
    return {path.name: path.read_text() for path in sorted((HERE / "docs").glob("*.md"))}


def test_docs_commands_parse():
    """Every command of a script in docs/*.md is taken by the script's own command line."""
    import importlib
    count = 0
    for name, text in documents().items():
        for script, flags in re.findall(r"python (\w+)\.py([^\n`#|]*)", text.replace("\\\n", " ")):
            assert (HERE / f"{script}.py").exists(), (name, script)
            if script in SCRIPTS:
                module = importlib.import_module(script)
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    try:
                        cfg, given = common.parse_args("", module.Config, module.CHOICES, flags.split())
                        common.check(cfg)
                    except SystemExit:
                        raise AssertionError(f"{name}: {script}.py{flags}: {err.getvalue()}") from None
                count += 1
            elif script == "test_all":
                assert all(names_of([word]) for word in flags.split()), (name, flags)
    assert count >= 12


def test_docs_links_exist():
    for name, text in documents().items():
        for path in re.findall(r"\]\(((?!http)[^)\s#]+)", text):
            assert (HERE / "docs" / path).exists(), f"{name} links to {path}, which does not exist"
        for path in re.findall(r"`((?:docs|results|benchmarks|data)/[\w./-]+\.\w+)`", text):
            assert (HERE / path).exists(), f"{name} names {path}, which does not exist"


def test_docs_names_exist():
    """`tsae.losses`, `mtsae.MTSAE.encode` and the like in docs/*.md are functions or classes of the code."""
    import importlib
    count = 0
    for name, text in documents().items():
        for script, attribute in re.findall(r"`(tsae|mtsae|temporal_lens|hierarchical_sae|common)\.([A-Za-z_.]+)\b", text):
            if attribute == "py":
                continue
            owner = importlib.import_module(script)
            for part in attribute.split("."):
                assert hasattr(owner, part) or part in getattr(owner, "__dataclass_fields__", {}), f"{name}: {script}.{attribute}"
                owner = getattr(owner, part, None)
            count += 1
    assert count >= 30
    walk = re.search(r"<!-- walk tsae -->(.*?)<!-- end -->", documents()["reading.md"], re.S)[1]
    told = set(re.findall(r"`tsae\.([\w.]+)", walk))
    for node in ast.parse((HERE / "tsae.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert any(word.split(".")[0] == node.name for word in told), f"the walk does not tell of {node.name}"


def test_docs_picture_shows_what_its_title_says():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import picture

    class Codes(nn.Module):
        def encode(self, x, mask=None):
            return x

        def forward(self, x, mask=None):
            return x, x
    f = torch.tensor([[1, 0, 3], [1, 2, 0], [0, 2, 2], [1, 2, 9.0]])            # stretches 2, 1; 3; 1, 2
    assert math.isclose(picture.stretches(f), 9 / 5, rel_tol=1e-6)
    x = torch.cat([torch.zeros(1, 4, 3), f[None]], 1)                           # (1, 8, 3)
    store = common.ArrayStore(x)
    acts = types.SimpleNamespace(heldout_store=store, device="cpu", T=8, heldout=lambda size=16: iter([store.get(torch.arange(1), "cpu")]))
    shown = picture.view(Codes(), acts, 0, 4, 8, 2)
    assert shown["features"] == [1, 2], "the two with most activation, 6 and 14, the earlier one first"
    assert torch.allclose(shown["share"] * torch.tensor([[2.0], [9]]), f[:, 1:].t()) and shown["L0"] == 9 / 4
    assert math.isclose(shown["stretch_all"], 9 / 5, rel_tol=1e-6)
    with folder() as here:
        picture.draw(here / "a.png", ["a", " b", " c", "."], [("above", shown), ("below", shown)])
        assert int.from_bytes((here / "a.png").read_bytes()[16:20], "big") == 1800


# ---------------------------------------------------------------------------------------------
# Runner
# ---------------------------------------------------------------------------------------------


def names_of(words):
    """Tests whose name holds one of the words; all test_* without words; an exercise by its whole name."""
    names = [n for n, v in list(globals().items()) if callable(v) and n.startswith(("test_", "exercise_"))]
    if words:
        return [n for n in names if any(n == w or (w in n and n.startswith("test_")) for w in words)]
    return [n for n in names if n.startswith("test_")]


def run_tests(names):
    """Run tests in this process -> [passed, failed, skipped]."""
    counts = [0, 0, 0]
    for name in names:
        start = time.time()
        try:
            globals()[name]()
            counts[0] += 1
            print(f"ok    {name}  ({time.time() - start:.1f} s)", flush=True)
        except Skip as reason:
            counts[2] += 1
            print(f"skip  {name}: {reason}", flush=True)
        except Exception:
            import traceback
            counts[1] += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    return counts


def main(words):
    """Run the tests, on two cores in two processes of one thread each. -> exit status."""
    torch.set_num_threads(1)
    if words[:1] == ["--part"]:
        print("counts", *run_tests(names_of([])[int(words[1])::2]), flush=True)
        return 0
    if words or (os.cpu_count() or 1) < 2:
        counts = run_tests(names_of(words))
    else:
        counts = [0, 0, 0]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        parts = [subprocess.Popen([sys.executable, __file__, "--part", str(i)], env=env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for i in range(2)]
        threads = [threading.Thread(target=follow, args=(part, counts)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts[1] += sum(part.wait() != 0 for part in parts)
    print("{} passed, {} failed, {} skipped".format(*counts))
    return 1 if counts[1] or not sum(counts) else 0


def follow(part, counts):
    """Pass on a part's output and add up its counts."""
    for line in part.stdout:
        if line.startswith("counts "):
            for i, n in enumerate(line.split()[1:]):
                counts[i] += int(n)
        else:
            print(line, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
