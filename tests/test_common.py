"""Language models, text, buffer and cache, the run folder, resume, processes, the command line."""
import contextlib
import fcntl
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import typing
import unittest
from pathlib import Path

from tests.helpers import (HERE, OFFLINE, SCRIPTS, TINY, LinearSAE, config, folder, log, refused,
                           refused_with, relative, replaced, run, same_files, saved_lm, tiny,
                           tiny_lm)

import common
import torch
import torch.nn.functional as F

import evals
import tsae
from data import models, texts
from evals import core, temporal


def test_hidden_states_and_intervene_of_four_architectures():
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    for kind in ("Llama", "Gemma2", "GPTNeoX", "GPT2"):
        lm, calls = tiny_lm(kind), []
        with torch.no_grad():
            plain = lm.model(input_ids=tokens, output_hidden_states=True)
            handle = lm.blocks[3].register_forward_hook(lambda *_: calls.append(1))
            got = common.hidden_states(lm, tokens, [0, 2])
            handle.remove()
            assert not calls, f"{kind}: a block behind the deepest ran"
            for layer in (0, 2):                           # hidden_states[0] is the embedding
                assert torch.allclose(got[layer], plain.hidden_states[layer + 1], atol=1e-5), kind
            last = common.hidden_states(lm, tokens, [3])[3]     # ours is not normed
            assert not torch.allclose(last, plain.hidden_states[4], atol=1e-3), kind
            for edit, same in ((lambda h: h, True), (lambda h: h * 0, False)):
                with common.intervene(lm, 1, edit):
                    assert torch.equal(lm.model(input_ids=tokens).logits, plain.logits) == same
            assert torch.equal(lm.model(input_ids=tokens).logits, plain.logits), "hook left behind"


def test_windows_documents_and_scored_tokens():
    lm = tiny_lm()
    words = [" ".join([f"w{i}"] * n) for i, n in ((1, 70), (2, 10), (3, 20))]
    tokens, lengths = texts.make_windows(words, lm, 32, 100)
    assert lengths.tolist() == [32, 32, 20]                # the tail of 6 and the text of 10 go
    assert (tokens[:, 0] == lm.bos).all() and tokens.shape == (3, 33)
    assert all(len(row[1:].unique()) == 1 for row in tokens), "the tail repeats its last token"
    tokens, x = torch.tensor([[0, 5, 1, 7, 8, 8]]), torch.ones(1, 5, 4)
    x[0, 3] = 100                                          # BOS, word, EOS, word, sink, padding
    mask = common.scored_mask(x, tokens, torch.tensor([4]), lm.special, threshold=20.0)
    assert mask.tolist() == [[True, False, True, False, False]]
    with folder() as here:
        (here / "a.txt").write_text("".join(f"line {i} of the file\n" for i in range(6000)))
        odd = {"text": "one\u2028two\u0085three"}          # legal inside a json string
        (here / "c.jsonl").write_text("\ufeff" + json.dumps(odd, ensure_ascii=False) + "\n")
        train, held = (list(texts.documents(str(here), split)) for split in ("train", "heldout"))
    assert train and held and not set(train) & set(held)
    assert "".join(train + held).count("line") == 6000 and odd["text"] in train + held


def test_the_real_model_has_a_sink_and_is_explained():
    if not list(models.HOME.glob("*/complete.json")):
        raise unittest.SkipTest("no SmolLM2-135M here; `python mtsae.py --layer 19` fetches it")
    flags = ("--no-temporal --layer 5 --tokens 4096 --heldout_tokens 1024 --lr 3e-3 --steps 60 "
             "--lr_warmup 1 --data bundled --out a")
    with folder(), replaced(os, "environ", OFFLINE):
        assert run(tsae, *flags.split())[0] == 0
        m, (_, acts, _) = common.read_json("a/eval.json")["core"], evals.open_run("a")
    assert m["EV"] > 0.5 and m["ce_loss_without_sae"] < 4.5
    assert m["ce_loss_without_sae"] < m["ce_loss_with_sae"] < m["ce_loss_with_ablation"]
    assert acts.heldout_store.sink.norm() > acts.heldout_store.threshold / 2   # 5 medians


def open_tiny(here, *flags):
    """Activations of the tiny Llama on random text -> (list of them, what was printed)."""
    argv = [*saved_lm(here), "--layer", "1,2", "--cache", here / "cache", "--buffer", 16,
            "--lm_batch", 8, "--device", "cpu", *flags]
    cfg, _ = common.parse_args(tsae.Config, [str(flag) for flag in argv], "")
    with contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()):
        return list(common.open_activations(cfg)), out.getvalue()


def test_cached_and_live_batches_agree_and_do_not_depend_on_the_past():
    with folder() as here:
        cached, live = open_tiny(here)[0], open_tiny(here, "--cache", "none")[0]
    for a, b in zip(cached, live, strict=True):
        assert abs(a.scale - b.scale) < 1e-3 and torch.allclose(a.mean, b.mean, atol=1e-3)
        for step in (0, 3, 4, 70, 3):                      # in a buffer, across buffers and epochs
            (x, mask), (y, other) = a.batch(step), b.batch(step)
            assert torch.equal(mask, other) and torch.allclose(x, y, atol=2e-2), step
    acts, n = cached[0], cached[0].train_store.N
    train, held = ({tuple(row.tolist()) for row in store.tokens}
                   for store in (acts.train_store, acts.heldout_store))
    assert held and not train & held
    order = acts.order(torch.arange(3 * n))                # every window once an epoch
    assert torch.equal(order.view(3, n).sort(1).values, torch.arange(n).expand(3, n))
    assert not torch.equal(order[:n], order[n:2 * n])
    x = torch.cat([acts.batch(step)[0] for step in range(n // 4)]).float()
    assert torch.equal(x, acts.train_store.get(order[:n // 4 * 4], "cpu")[0].float())
    x, mask = acts.fill(0)
    assert abs((x[mask].float() / acts.scale).norm(dim=1).mean() - math.sqrt(32)) < 1e-2
    x, y = (next(next(common.open_activations(config(tsae, shuffle=how))).heldout())[0]
            for how in ("off", "train"))
    assert torch.equal(x, y), "held-out tokens are never shuffled"


def test_cache_is_used_checked_and_repaired():
    def flip(raw):
        return raw[:-9] + bytes([raw[-9] ^ 64]) + raw[-8:]
    with folder() as here:
        (first, _), said = open_tiny(here)
        assert "cache:" not in said
        for name, change, word in (
                ("L1.bf16", bytes, "from"), ("L1.bf16", flip, "again"),
                ("L1.bf16", lambda raw: raw[:-9], "again"), ("L1.safetensors", flip, "again"),
                ("windows.safetensors", flip, "again")):
            path = next(here.glob(f"cache/train-*/{name}"))
            path.write_bytes(change(path.read_bytes()))
            (acts, _), said = open_tiny(here)
            assert said.count("cache:") >= 2 and word in said, (name, said)
            assert torch.equal(acts.batch(0)[0], first.batch(0)[0]), name


def test_a_reconstruction_is_spliced_in_at_scored_positions_only():
    h, mask = torch.randn(2, 6, 4), torch.rand(2, 5) > 0.4
    out, keep = core.reconstruct_edit(lambda x, m: (x * 0, x), mask)(h), ~F.pad(mask, (1, 0))
    assert torch.equal(out[keep], h[keep]) and (out[~keep] == 0).all()
    eye = torch.eye(32)                                    # relu(x) - relu(-x) = x
    with folder() as here, torch.no_grad():
        perfect = LinearSAE(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]))
        m = core.evaluate(perfect, open_tiny(here)[0][0])
    assert m["EV"] > 0.999 and abs(m["ce_loss_score"] - 1) < 1e-3 > abs(m["kl_div_with_sae"])


def test_topk_fast_equals_plain_in_values_and_gradients():
    """Also for a code that has lost its list of active features, and roughly in bf16."""
    torch.manual_seed(0)
    h, W, b, W_dec = tensors = [
        t.requires_grad_() for t in (torch.randn(3, 7, 12), torch.randn(40, 12).t(),
                                     torch.randn(40) - 4, torch.randn(40, 12))]
    slopes, found = (torch.randn(3, 7, 40), torch.randn(3, 7, 12), torch.randn(3, 7, 12)), {}
    for fast in (False, True):                             # TopK by rows
        with replaced(common, "gather_pays", lambda *_: fast):
            f = common.encode_topk(h, W, b, 5)
            out = f, common.decode_topk(f, W_dec, 5), common.decode_topk(f.clone(), W_dec, 5)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                half = common.encode_topk(h, W, b, 5)
                rough = half.float(), common.decode_topk(half, W_dec, 5).float()
        found[fast] = [*out, *torch.autograd.grad(out, tensors, slopes)]
        assert all(relative(ours, want) < 0.05 for ours, want in zip(rough, found[False])), fast
    assert all(relative(ours, want) < 1e-5 for ours, want in zip(found[True], found[False]))
    assert 0.2 < ((f > 0).sum(-1) == 5).float().mean() < 0.8, "fewer than k may be positive"
    assert common.gather_pays(h, 40, 5) and not common.gather_pays(h, 40, 6)


def stopping(action, at=25, layer=0):
    """common.Run.log that calls action() behind a step of one layer."""
    def stop(self, step, *args, real=common.Run.log, **more):
        real(self, step, *args, **more)
        if (step, self.acts.layer) == (at, layer):
            action()
    return replaced(common.Run, "log", stop)


def torchrun(jobs, kill_at=None):
    """Command lines in two processes, which kill -9 hits behind a step."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", "-m", "tests.test_common",
                           json.dumps([kill_at, jobs], default=str)], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert bool(done.returncode) == bool(kill_at), done.stderr[-3000:]


def test_two_processes_equal_one_and_resume_exactly():
    """torchrun with gloo: the losses of one process with the same global batch; killed, resumed."""
    cases = [("tsae",), ("temporal_lens",), ("mtsae",), ("mtsae", "--variant", "unlearning"),
             ("hierarchical_sae",), ("mtsae", "--batch_size", 5)]
    flags = ("--log_every", 1, "--eval", "none")
    with folder():
        jobs = [(script, *TINY, "--steps", 40, *flags, *more, "--out", f"two{i}")
                for i, (script, *more) in enumerate(cases)]
        torchrun([(*jobs[0], "--out", "killed")], kill_at=25)
        torchrun([*jobs, ("tsae", "--resume", "killed")])
        same_files("killed", "two0")
        for i, (script, *more) in enumerate(cases):
            tiny(SCRIPTS[script], f"one{i}", 40, *flags, *more)
            one, two = ([row["loss"] for row in log(f"{name}{i}")] for name in ("one", "two"))
            assert len(one) == len(two) == 40
            assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, two)), cases[i]


def test_stopped_runs_resume_exactly():
    """By Ctrl-C or SIGTERM, which save, by a crash behind the last save, in the second layer or in
    the evaluation: the same command goes on, byte for byte the uninterrupted run."""
    interrupt, terminate, crash = (stopping(action) for action in (
        lambda: os.kill(os.getpid(), signal.SIGINT), lambda: os.kill(os.getpid(), signal.SIGTERM),
        lambda: sys.exit(9)))
    with folder() as here:
        for i, (script, stop, wanted, *more) in enumerate((
                ("tsae", interrupt, 130, "--save_every", 1000),
                ("tsae", terminate, 143, "--save_every", 1000),
                ("tsae", replaced(core, "evaluate", side_effect=KeyboardInterrupt), 130),
                ("tsae", crash, 9, "--warmup", 40), ("temporal_lens", crash, 9),
                ("hierarchical_sae", crash, 9),
                ("mtsae", crash, 9, "--resample_every", 12, "--dead_after", 6, "--l1", 2),
                ("tsae", stopping(lambda: sys.exit(9), 25, layer=2), 9, *saved_lm(here),
                 "--layer", "0,2"))):
            flags = (*TINY, "--steps", 40, "--log_every", 1, *more, "--resume", "auto", "--out")
            with stop:
                status, _, err = run(SCRIPTS[script], *flags, f"a{i}")
            assert status == wanted and (wanted == 9 or f"--resume a{i}" in err), err
            for out in (f"a{i}", f"whole{i}"):
                status, _, err = run(SCRIPTS[script], *flags, out)
                assert status == 0, err
            for path in Path(f"a{i}").rglob("timing.jsonl"):
                same_files(path.parent, Path(f"whole{i}", *path.parent.parts[1:]))
                steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
                assert steps == list(range(40)), "not once each"
        assert not [*here.rglob("checkpoint*"), *here.rglob(".*.tmp")]


def test_no_run_is_lost_or_goes_on_as_another():
    with folder() as here:
        with replaced(common.Run, "evaluate", lambda *_: {}):            # an unfinished run
            assert run(tsae, *TINY, "--steps", 12, "--out", "a")[0] == 0
        refused("--resume", "a", "--lr", 1, words=["keeps its settings"])
        checkpoint, rows = here / "a/checkpoint.safetensors", here / "a/log.jsonl"
        raw, (tensors, meta) = rows.read_bytes(), common.load_tensors(checkpoint)
        for key in ("text", "scale", "seed", "last step"):
            stands = {**meta["stands_on"], key: None}
            common.save_tensors(checkpoint, tensors, {**meta, "stands_on": stands})
            refused("--resume", "a", words=[key])
        common.save_tensors(checkpoint, tensors, meta)
        rows.write_bytes(raw[:-1])
        refused("--resume", "a", words=["shorter"])
        rows.write_bytes(raw)
        with open(here / "a/.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            refused("--resume", "a", words=["another process"])
        assert run(tsae, "--resume", "a")[0] == 0                        # now it is finished
        for flags, words in (((), ["--overwrite"]), (("--resume", "a"), ["finished"]),
                             (("--overwrite", "--l1", 1e300), ["l1", "inf"]),
                             (("--overwrite", "--lr", 1e300), ["W_dec", "first step"])):
            refused(*TINY, "--steps", 12, "--out", "a", *flags, words=words)
        tiny(tsae, "a", 14, "--overwrite")
        assert log("a")[-1]["step"] == 13


def test_full_disk_and_non_finite_numbers_are_one_sentence():
    def poisoned(sae, x, mask, n, step, cfg, real=tsae.losses):
        terms, *others = real(sae, x, mask, n, step, cfg)
        return {**terms, "l1": terms["l1"] * (math.nan if step >= 15 else 1)}, *others
    with folder():
        full = replaced(common, "write_atomic", side_effect=OSError(28, "No space left", "path"))
        for out, fault, words in (("full", full, ("disk is full", "--resume")),
                                  ("a", replaced(tsae, "losses", poisoned), ("l1", "nan", "10"))):
            with fault:
                status, _, err = run(tsae, *TINY, "--steps", 30, "--out", out, "--log_every", 5)
            assert status == 2 and all(word in err for word in words), err
        tensors, meta = common.load_tensors("a/checkpoint.safetensors")
    assert meta["step"] == 10 and all(v.isfinite().all() for v in tensors.values())
    acts = next(common.open_activations(config(tsae)))
    x, mask = acts.train_store.x, acts.train_store.mask
    for factor, scored, word in ((math.nan, 1, "not finite"), (0, 1, "zero"), (1, 0, "no token")):
        store = common.Store(x * factor, mask & bool(scored))
        refused_with(word, common.Activations, acts.cfg, None, 0, store, store)


# --- Wrong flags and damaged files: one sentence, no traceback, nothing changed ---------------


REFUSED = [  # script, flags, what the sentence names
    ("tsae", "--laye 19", "unrecognized"), ("tsae", "--data pile", "synthetic"),
    ("tsae", "--activation topk --k 65", "64 features"), ("tsae", "--buffer 2", "--buffer"),
    ("tsae", "--tokens 9", "--tokens"), ("tsae", "--expansion 1000000", "GB"),
    ("tsae", "--eval probing", "language model"), ("hierarchical_sae", "--levels 65", "--levels"),
    ("hierarchical_sae", "--levels 9 --activation topk --k 8", "--levels")]
TEXTS = [  # file, contents, what the sentence names
    ("empty.txt", b"", "no text"), ("short.txt", b"w1 w2 w3", "short.txt"),
    ("binary.txt", bytes(range(256)) * 20, "UTF-8"), ("nul.txt", b"w1\0 " * 50, "UTF-8"),
    ("bad.jsonl", b'{"text": "w1"}\n{"txt": 1}\n', "line 2"), ("list.jsonl", b"[1]\n", "line 1"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1")]
ROUNDS = int(os.environ.get("FUZZ", 1))   # FUZZ=10 python test_all.py damaged: more random damages
LONG = "x" * 5000
STRINGS = {  # bad values of the fields that are free text; FILE and FOREIGN are made
    "model": ("", "no-such/model", "/dev/null", LONG, "FILE", "FOREIGN", "a b", ".."),
    "layer": ("", "x", "-1", "1,1", "1,", "1.5", "9" * 30, "1;2", "19"),
    "data": ("", "missing.txt", "/dev/null", LONG, "FOREIGN/empty", "pile "),
    "device": ("", "tpu", "cuda:99", "CPU", "cpu:1", "cuda:-1", "cuda:x"),
    "cache": ("", "FILE", "FILE/x", "/dev/null/x", "/proc/nothing/x", LONG),
    "out": ("", "FILE", "FOREIGN", "FILE/x", "/dev/null", "/proc/nothing/x", LONG),
    "resume": ("nowhere", "FILE", "FOREIGN", LONG, "/dev/null", "FILE/x", "..."),
    "eval": ("x", "core,x", "..", "steer", "__init__", "CORE", "core temporal"),
    "rates": ("", "x", "0", "-1", "1,1", "1.5", "1,,4")}
GARBAGE = (b"", b"null", b"[]", b'"x"', b"\xff" * 64, b"[" * 10 ** 5)
WRONG = (None, [], {}, "x", -1, 1e300, True, 0, [[None]])


def bad_values(name, hint):
    """At least six values that a field of this type must refuse."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        found = ["x", "", "nan", "1,5", "1e999", "-inf", "0x10", args[1] - 1, args[2] * 2 + 1]
        return found + ["1.5", "1e3"] * (args[0] is int)
    if origin is typing.Literal:
        return ["x", "", f"{args[0]} ", f"{args[0]}!", args[0].title(), args[0][:-1], "None"]
    return ["x", "", "1", "nan", "None", "true"] if hint is bool else STRINGS[name]


def test_bad_flags_and_texts_are_refused():
    """Flags that do not go together, texts that are none, and every field with bad values."""
    with folder() as here, replaced(os, "environ", OFFLINE):
        for script, flags, word in REFUSED:
            refused(*TINY, *flags.split(), words=[word], module=SCRIPTS[script])
        real = (*saved_lm(here), "--layer", 1, "--steps", 4, "--eval", "none", "--overwrite")
        refused(*real, "--layer", 4, words=["blocks 0 to 3"])
        for name, raw, word in TEXTS:
            (here / name).write_bytes(raw)
            refused(*real, "--data", here / name, words=[word, name])
        (here / "FILE").write_text("mine")
        (here / "FOREIGN/empty").mkdir(parents=True)
        (here / "FOREIGN/config.json").write_text('{"model_type": "x"}')
        run(tsae, *real, "--out", "fills_the_cache")
        for script, module in SCRIPTS.items():
            text = run(module, "--help")[1]
            for name, hint in common.field_types(module.Config).items():
                assert f"--{name}" in text, (script, name)
                base = real if hint is str and name != "resume" else ()
                for value in bad_values(name, hint):
                    refused(*base, f"--{name}={value}", module=module)


def wrong_json(path, *names):
    """Write the json object with a wrong or no value at one of the names; yield each time."""
    whole = common.read_json(path)
    for name in names:
        inner = whole["config"] if name in whole["config"] else whole
        good = inner.pop(name)
        yield common.write_json(path, whole)
        for value in WRONG:
            if type(value) is not type(good) and not (value == 0 and type(good) is float):
                inner[name] = value
                yield common.write_json(path, whole)
        inner[name] = good


def wrong_tensors(path):
    """One bit turned round; then well-formed, but a tensor or a note does not belong there."""
    raw, (tensors, meta), rng = path.read_bytes(), common.load_tensors(path), random.Random(0)
    for _ in range(12 * ROUNDS):
        place = rng.randrange(len(raw) if rng.random() < 0.5 else 2000)
        flipped = bytes([raw[place] ^ 1 << rng.randrange(8)])
        yield path.write_bytes(raw[:place] + flipped + raw[place + 1:])
    for name, t in tensors.items():
        yield common.save_tensors(path, {k: v for k, v in tensors.items() if k != name}, meta)
        if t.dim():
            yield common.save_tensors(path, {**tensors, name: t.new_zeros(3)}, meta)
    for key in set(meta or ()) - {"world"}:
        for value in WRONG:
            if type(value) not in (type(meta[key]), bool, int):
                yield common.save_tensors(path, tensors, {**meta, key: value})


def test_damaged_runs_are_refused():
    """Files that are cut, of another type, or well-formed with something wrong inside."""
    fields, half, done = tuple(tsae.Config.__dataclass_fields__), ("--resume", "half"), ("done",)
    rng = random.Random(0)
    with folder() as here:
        tiny(tsae, "done", 12)
        with replaced(common.Run, "evaluate", lambda *_: {}):
            run(tsae, *TINY, "--steps", 12, "--out", "half")
        for path, module, flags, wrong, *names in (
                (here / "done/config.json", temporal, done, wrong_json, "script", "class", "config",
                 *fields), (here / "half/config.json", tsae, half, wrong_json, *fields),
                (here / "done/eval.json", temporal, done, wrong_json),
                (here / "done/sae_weights.safetensors", temporal, done, wrong_tensors),
                (here / "half/checkpoint.safetensors", tsae, half, wrong_tensors)):
            raw = path.read_bytes()
            cuts = (rng.randrange(1, len(raw) - 2) for _ in range(6 * ROUNDS))
            for text in (*GARBAGE, raw[1:], raw[:-2], *(raw[:cut] for cut in cuts)):
                path.write_bytes(text)
                refused(*flags, module=module)
            path.write_bytes(raw)
            for _ in wrong(path, *names):
                refused(*flags, module=module)
            path.write_bytes(raw)
        assert run(tsae, *half)[0] == run(temporal, *done)[0] == 0, "the originals are good"


if __name__ == "__main__":                                 # started by torchrun
    kill, commands = json.loads(sys.argv[1])
    with stopping(lambda: os.kill(os.getpid(), signal.SIGKILL), kill):
        for script, *flags in commands:
            assert SCRIPTS[script].main([str(flag) for flag in flags]) == 0, flags
