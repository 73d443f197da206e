"""Every test. `python test_all.py` runs all, `python test_all.py tsae resume` those whose name holds a word,
`python test_all.py exercise_3` one exercise's check; the same file passes under pytest.

Order: maths by hand · language models and text · data and buffer · run folder and resume · command line and
bad input · tsae · mtsae · temporal_lens · hierarchical · evaluation · real model · hygiene · exercises.
Tests of the real model are skipped, with the reason printed, where its weights cannot be had.
"""
import ast
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
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


def run(module, *flags):
    """module.main(flags) with its output caught -> (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
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
    x, x_hat, f = torch.randn(6, 8, 5, generator=gen), torch.randn(6, 8, 5, generator=gen), torch.rand(6, 8, 7, generator=gen)
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
        def encode(self, x, mask=None):
            return x

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
        (acts, _), _ = open_tiny(here)
        x, mask = next(iter(acts.heldout_with_sink()))
        want = common.hidden_states(acts.lm, torch.tensor([[acts.lm.bos]]), [1])[1][0, 0]
        assert x.shape[1] == acts.T + 1 and mask[:, 0].all() and torch.allclose(x[0, 0], want, atol=1e-4)


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
        deadline = time.time() + 120
        while not (here / "killed/checkpoint.safetensors").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.kill()                                     # SIGKILL: nothing can be saved on the way out
        process.wait()
        process.stderr.close()
        assert not (here / "killed/eval.json").exists(), "the run ended before it could be killed"
        steps_done = len((here / "killed/log.jsonl").read_text().splitlines())
        for args in (["--resume", "killed"], ["--out", "whole"]):
            done = subprocess.run(command + args if "whole" in args else command[:2] + args, **quiet)
            assert done.returncode == 0, done.stderr.decode()[-500:]
        for name in ("log.jsonl", "sae_weights.safetensors"):
            assert (here / "killed" / name).read_bytes() == (here / "whole" / name).read_bytes(), name
        assert steps_done < len((here / "whole/log.jsonl").read_text().splitlines()) + 1


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
    """torchrun with gloo: the same losses as one process with the same global batch."""
    scripts = [s for s in SCRIPTS if (HERE / f"{s}.py").exists()]
    with folder():
        env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        for script in scripts:
            base = [str(HERE / f"{script}.py"), *map(str, TINY), "--steps", "50", "--log_every", "1", "--eval", "none"]
            for out, start in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run",
                                                                  "--standalone", "--nproc_per_node=2"])):
                done = subprocess.run(start + base + ["--out", f"{script}-{out}"], capture_output=True, env=env)
                assert done.returncode == 0, done.stderr.decode()[-2000:]
            one, two = ([json.loads(line) for line in Path(f"{script}-{n}/log.jsonl").read_text().splitlines()]
                        for n in ("one", "two"))
            assert len(one) == len(two) == 50
            for a, b in zip(one, two):
                assert abs(a["loss"] - b["loss"]) <= 1e-4 * abs(a["loss"]), (script, a["step"], a["loss"], b["loss"])


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
        status, _, err = run(tsae, "--no-temporal", "--model", "synthetic", "--out", "a", "--tokens", 32768)
        assert status == 0, err
        found = json.loads(Path("a/eval.json").read_text())["recovery"]
        assert found["mean_max_cosine"] > 0.8 > found["random_dictionary"] + 0.3, found


def test_tsae_reduction_collapse():
    with folder():
        good = tiny(tsae, "sum", 200, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--l1", 4)
        bad = tiny(tsae, "mean", 200, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--l1", 4, "--recon_reduction", "mean")
        assert good["core"]["L0"] > 3 and bad["core"]["L0"] < 0.1 * good["core"]["L0"]


# --- sections of the other scripts are below -------------------------------------------------


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
                               "--steps", 60, "--lr", 3e-3, "--lr_warmup", 1, "--out", "a")
        assert status == 0, err
        core = json.loads(Path("a/eval.json").read_text())["core"]
        assert core["EV"] > 0.5 and core["ce_loss_without_sae"] < core["ce_loss_with_sae"] < core["ce_loss_with_ablation"]
        assert "ce_loss_score" in out and Path("a/training.png").exists()


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
        for name, other, there in re.findall(r"def (\w+)\(.*# SAME AS (\w+)\.py:([\w.]+)",
                                             (HERE / f"{script}.py").read_text()):
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


def test_hygiene_lines_and_words():
    for path in sorted(HERE.glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            config_field = re.match(r"    \w+: (int|float|str|bool) = ", line)
            assert len(line) <= (110 if config_field else 100), f"{path.name}:{number} has {len(line)} columns"
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
# Runner
# ---------------------------------------------------------------------------------------------


def main(words):
    """Run the tests whose name holds one of the words (all test_* without words). -> exit status."""
    torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))
    names = [n for n, v in list(globals().items()) if callable(v) and n.startswith(("test_", "exercise_"))]
    if words:
        chosen = [n for n in names if any(n == w or (w in n and n.startswith("test_")) for w in words)]
    else:
        chosen = [n for n in names if n.startswith("test_")]
    passed = failed = skipped = 0
    for name in chosen:
        start = time.time()
        try:
            globals()[name]()
            passed += 1
            print(f"ok    {name}  ({time.time() - start:.1f} s)", flush=True)
        except Skip as reason:
            skipped += 1
            print(f"skip  {name}: {reason}", flush=True)
        except Exception:
            import traceback
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
