"""The evaluations: metrics against their definitions and SAEBench's numbers, pages, exports."""
import collections
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import types
import unittest

from tests.helpers import (HERE, SCRIPTS, WORDS, LinearSAE, activations, close, data_folder, folder,
                           make_acts, mixed, model, refused_with, relative, run, tiny, walk,
                           words_lm, zero_sae)
from tests.test_tsae import keep_largest

import common
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import evals
from evals import (core, export, features, figures, positions, probing, saebench as bench, steer,
                   temporal, unlearning, zero)

FIXTURES = HERE / "data/fixtures/saebench.json"        # what SAEBench 0.6.0's own code computed
TENSORS, VALUES = load_file(FIXTURES.with_suffix(".safetensors")), common.read_json(FIXTURES)


def fixture_sae(name):
    weights = ("W_enc", "W_dec", "b_enc", "b_dec")
    return LinearSAE(*(TENSORS[f"{name}.{part}"] for part in weights))


def test_core_metrics_equal_their_definitions_whatever_the_batches():
    x, noise, mask = 2 * torch.randn(6, 8, 5), torch.randn(6, 8, 5), torch.rand(6, 8) > 0.2
    f = torch.randn(6, 8, 40) * (torch.rand(6, 8, 40) > 0.9)
    f[..., 0] = 0
    m = core.core_metrics(zip(*(t.split(4) for t in (x, x + noise, f, mask))))
    x, x_hat, f = x[mask], (x + noise)[mask], f[mask]
    on, ratio = f != 0, x_hat.norm(dim=1) / x.norm(dim=1)
    want = {"EV": 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum(),
            "MSE": F.mse_loss(x, x_hat), "L0": on.sum() / len(x), "L1": f.abs().sum() / len(x),
            "cosine": F.cosine_similarity(x, x_hat).mean(), "l2_ratio": ratio.mean(),
            "relative_reconstruction_bias": x_hat.square().sum() / (x * x_hat).sum(),
            "inactive": (~on).float().mean(), "dead": (~on.any(0)).float().mean(),
            "dense": (on.float().mean(0) > 0.1).float().mean(), "features": 40, "tokens": len(x)}
    assert m.keys() == want.keys()
    for name, value in want.items():
        close(m[name], float(value), name)
    acts = activations(torch.ones(1, 4, 2))
    acts.heldout_store.mask = torch.zeros(1, 4).bool()
    refused_with("no scored held-out token", core.evaluate, zero_sae(2, 2), acts)


def test_core_and_splice_values_equal_saebench():
    def same(name, got, want):
        for metric, value in want.items():
            if value == "nan":             # of splices: only SAEBench's log(softmax) underflows
                assert math.isnan(got[metric]) == name.startswith("core"), (name, metric)
            else:
                close(got[metric], value, (name, metric))
    weights = TENSORS["core.sae.W_dec"], TENSORS["core.sae.W_enc"]
    for name, scale, misc in (("core", 1, VALUES["core"]["misc"]), ("core_zero_sae", 0, {})):
        parts = ([TENSORS[f"core.{i}.{k}"] for k in ("x", "x_hat", "f", "mask")] for i in range(3))
        batches = [(x, scale * x_hat, scale * f, mask.bool()) for x, x_hat, f, mask in parts]
        same(name, bench.metrics(batches, *weights), {**VALUES[name]["metrics"], **misc})
    for name, parts in (("recon", "012"), ("recon_specials_spliced", "0"),
                        ("recon_zero_sae", "0"), ("recon_underflow", "0")):
        sums = collections.Counter()
        for i in parts:
            tokens = TENSORS[f"{name}.{i}.tokens"].long()  # 0, 1, 2: BOS, PAD, EOS
            logits = {k: TENSORS[f"{name}.{i}.logits_{v}"] for k, v in (
                ("", "orig"), ("_sae", "spliced"), ("_zero", "ablated"))}
            sums.update(core.splice_sums(logits, tokens, tokens > 2, tokens >= 0))
        same(name, core.splice_scores(sums), VALUES[name]["metrics"])


def test_temporal_metrics_equal_their_definitions():
    x, mask = torch.randn(6, 21, 5) + 3 * torch.randn(6, 1, 5), torch.rand(6, 21) < 0.7
    sae = LinearSAE(torch.eye(5), 0.9 * torch.eye(5))      # f = relu(x)
    m = temporal.evaluate(sae, activations(x, mask))
    assert m == temporal.evaluate(sae, activations(torch.where(mask[..., None], x, 99.0), mask))
    f, mean = x.relu(), x.relu()[mask].mean(0)
    runs = [len([*group]) for row in (f * mask[..., None]).transpose(1, 2).flatten(0, 1).tolist()
            for on, group in itertools.groupby(row, bool) if on]
    want = {"span": sum(runs) / len(runs)}
    for lag in (4, 1):
        a, b = (v[mask[:, lag:] & mask[:, :-lag]] for v in (f[:, :-lag], f[:, lag:]))
        covariance = ((a - mean) * (b - mean)).sum(1).mean()
        want[f"autocorrelation.{lag}"] = covariance / (f[mask] - mean).square().sum(1).mean()
    want["neighbour_cosine"] = F.cosine_similarity(a, b).mean()
    want["total_variation"] = (a - b).abs().sum(1).mean() / f[mask].sum(1).mean()
    for name, value in want.items():
        close(evals.flatten(m)[name], float(value), name, 1e-4)


def test_export_gives_the_same_code_or_is_refused():
    x = 7 * torch.randn(4, 32, 16)
    acts = activations(x)
    acts.scale = 7.0
    with folder() as here:
        for k, values in ((None, {}), (4, dict(activation="topk", k=4))):
            sae = model("tsae", temporal=False, **values)
            sae.scale.fill_(7.0), sae.W_enc.data.mul_(2)       # not W_dec's transpose
            export.export(sae, acts, here)
            cfg = common.read_json(here / "cfg.json")
            assert cfg.get("k") == k and cfg["apply_b_dec_to_input"]
            w = common.load_tensors(here / "sae_weights.safetensors")[0]
            f = keep_largest((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], k or 32)
            assert relative(f, 7 * sae.encode(x)) < 1e-5
            assert relative(f @ w["W_dec"] + w["b_dec"], sae(x)[0]) < 1e-5
        sae.encode = lambda x, mask=None, real=sae.encode: real(x) + real(x.roll(1, 1))
        for other in (sae, model("tsae"), model("mtsae"), model("mtsae", variant="unlearning")):
            refused_with("another code", export.export, other, acts, here / "x")
        assert not (here / "x").exists()


HOSTILE = ("</script><img src=x onerror=alert(1)>", " <b>&amp;", " plain")    # three tokens


def test_features_page_holds_the_right_numbers_and_shows_them():
    """Of random codes with stretches, feature 0 dead; in a browser: features in order of span, one
    opened by its number, texts as texts."""
    torch.manual_seed(0)
    x, mask, tokens = torch.randn(8, 72, 12), torch.rand(8, 72) > 0.1, torch.full((8, 73), 2)
    x = (x + x.roll(1, 1) + x.roll(2, 1)) * (0.5 + torch.rand(12))
    x[..., 0], x[0, 5, 11], mask[0, 5], tokens[0, 6], tokens[2:, 4::8] = -1, 9.0, True, 0, 1
    acts, W_dec, f = activations(x, mask), torch.randn(12, 12), x.relu() * mask[..., None]
    decode = types.SimpleNamespace(decode=lambda ids, **_: "".join(HOSTILE[i] for i in ids))
    acts.lm = types.SimpleNamespace(tokenizer=decode, name="a/model")
    acts.heldout_store.tokens = tokens
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with folder() as here:
        features.evaluate(LinearSAE(torch.eye(12), W_dec), acts, here)
        page = (here / "features.html").read_text()
        assert "<img" not in page and "<b>" not in page and "http:" not in page
        shown = browser and subprocess.run([
            browser, "--headless", "--no-sandbox", "--dump-dom", "--disable-gpu",
            f"--user-data-dir={here}/profile", "--virtual-time-budget=5000",
            f"file://{here}/features.html#f11"], capture_output=True, text=True, timeout=120).stdout
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [row["i"] for row in data["rows"]] == list(range(1, 12)) and data["live"] == 11
    cosine = F.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1)
    for row in data["rows"]:
        i, v = row["i"], f[..., row["i"]]
        on, peaks = v > 0, v.amax(1).sort(descending=True)
        again = (on[:, 1:] & on[:, :-1]).sum()
        for name, want in dict(span=on.sum() / (on.sum() - again), density=on.sum() / mask.sum(),
                               stay=again / (on[:, :-1] & mask[:, 1:]).sum(), max=v.max()).items():
            close(row[name], want.item(), (i, name), 1e-3)
        assert row["near"] == [j for j in cosine[i].argsort(descending=True).tolist() if j != i][:5]
        assert len(row["contexts"]) == (peaks.values > 0).sum().clamp(max=6)
        for n, (piece, peak, value, levels) in enumerate(row["contexts"]):
            window, start, texts = data["pieces"][piece]
            assert window == peaks.indices[n]
            close(value, v[window, start + peak].item(), (i, n), 1e-3)
            for t, level in enumerate(levels):
                want = v[window, start + t].item() / row["max"] * 99
                assert abs(level - want) <= (want > 0) if mask[window, start + t] else level == -1
                assert data["vocabulary"][texts[t]] == HOSTILE[tokens[window, 1 + start + t]]
    if not browser:
        raise unittest.SkipTest("no chromium here")
    order = [row["i"] for row in sorted(data["rows"], key=lambda row: (-row["span"], row["i"]))]
    assert [int(i) for i in re.findall(r'class="feature" id="f(\d+)"', shown)] == order, shown
    assert "<img" not in shown and html.escape(HOSTILE[0], False) in shown
    assert re.search(r'id="f11"[^>]* open', shown)


def test_selection_clamp_and_score_equal_saebench():
    on, itself = {}, types.SimpleNamespace(encode=lambda x, mask: x)
    for name in ("forget", "retain"):                      # tokens 0, 1, 2: BOS, PAD, EOS
        tokens = TENSORS[f"unlearn.tokens_{name}"].long().flatten()[None]
        h = F.pad(TENSORS["unlearn.f_table"][tokens], (0, 0, 1, 0))
        on[name], _ = unlearning.activity(itself, None, h, tokens > 2)
        assert relative(on[name].float(), TENSORS[f"unlearn.sparsity_{name}"].float()) < 1e-5
    for threshold, want in VALUES["unlearn_features"].items():
        for n, k in (("10", 10), ("20", 20), ("all", 64)):
            found = unlearning.select_features(on["forget"], on["retain"], float(threshold), k)
            assert found == want[n], (threshold, n)
    sae, h, mask = fixture_sae("clamp"), TENSORS["clamp.h"], torch.ones(3, 6).bool()
    for n, multiplier in ((10, 25), (20, 200)):
        out = unlearning.clamp_edit(sae, VALUES["unlearn_features"]["0.01"][str(n)], multiplier)(h)
        assert relative(out, TENSORS[f"clamp.out_n{n}_m{multiplier}"]) < 1e-5
    h[0, 3], mask[1, 2] = 100 * h[0, 3], False             # a sink, and a masked token, stay
    same = (unlearning.clamp_edit(sae, list(range(64)), 25, mask, limit=50.0)(h) == h).all(-1)
    assert same[0, 3] and same[1, 3] and same[:, 0].all() and same.sum() == 5
    for case in VALUES["unlearn_score"]:
        runs = [(w / 533, p / 308) for w, p in zip(case["wmdp"], case["pooled"])]
        close(unlearning.best_setting(runs)[0], case["score"], tolerance=1e-9)


def test_unlearning_forgets_one_language_and_steering_changes_what_is_said():
    """In both languages the next word follows from the last; feature 0 is on in one of them."""
    lm, eye, W = words_lm(layers=2), torch.eye(27, 32), torch.zeros(40, 32)
    with torch.no_grad():
        for p in lm.model.model.layers.parameters():       # blocks add nothing
            p.zero_()
        lm.model.model.embed_tokens.weight.copy_(eye)
        lm.model.lm_head.weight.zero_()[3:] = eye[3:].view(2, 12, 32).roll(1, 1).flatten(0, 1)
    W[0, 3:15] = 1                                         # the words of "a"
    sae, acts = LinearSAE(W.t().clone(), W), make_acts(lm, layer=0)
    rows = [{"split": split, "domain": letter, "text": walk(letter, 64, i)} for letter in "ab"
            for split, first in (("train", 100), ("heldout", 0)) for i in range(first, first + 12)]
    with data_folder(corpus=rows):
        forget, retain = (unlearning.domain_states(acts, "corpus", letter) for letter in "ab")
    out = unlearning.unlearn_pair(sae, acts, forget, retain)
    zero = unlearning.unlearn_pair(zero_sae(32, 40), acts, forget, retain)
    assert out["accuracy_forget"] > 0.9 and out["accuracy_retain"] > 0.9
    assert out["score"] > 0.5 and out["retain_kept"] >= 0.99 and out["random"] < 0.1, out
    assert out["methods"][0]["setting"]["features"] == [0] and out["crossed_drop"] > 0.5
    # the papers' 0.0: an all-zero SAE has no feature that is on, so nothing is selected
    assert zero["score"] == 0 and set(zero["eligible_features"].values()) == {0}
    same, said = (steer.steer(sae, acts, what, walk("b", 4, 0), n=6) for what in ("3:=0", "0:=30"))
    assert same["plain"] == same["steered"] and set(same["plain"].split()) <= set(WORDS[12:])
    assert said["plain"] == same["plain"] != said["steered"]
    assert steer.parse_steer("23:+8,7:=0, 6:-2.5", 40) == [(23, 1, 8), (7, 0, 0), (6, 1, -2.5)]
    refused_with("FEATURE", steer.parse_steer, "40:off", 40)


def test_pooling_and_probes_equal_saebench():
    sae = fixture_sae("pool.sae")
    for name in ("a", "b"):
        x = TENSORS[f"pool.{name}.x"]                      # BOS and padding are zero there
        for v, want in ((x, "mean_x"), (sae.encode(x), "mean_f")):
            pooled = probing.pool(v, x, torch.ones(x.shape[:2]).bool())
            assert relative(pooled, TENSORS[f"pool.{name}.{want}"]) < 1e-5
    x, x_test = (torch.cat([TENSORS[f"probe.{part}.{side}"] for side in ("pos", "neg")]).numpy()
                 for part in ("train", "test"))
    y, y_test = np.repeat([1, 0], 100), np.repeat([1, 0], 50)
    for k, want in VALUES["probe"].items():
        columns = np.sort(probing.top_columns(x, y, int(k)))
        found = probing.probe_accuracy(x[:, columns], y, x_test[:, columns], y_test)
        assert columns.tolist() == want["features"], k
        close(found, want["accuracy"])


def test_probing_finds_the_words_and_a_zero_sae_scores_a_half():
    """Words that give two labels away, or one of three; and tokens inside of a quotation."""
    rows, W = [], F.normalize(torch.randn(64, 32, generator=common.generator(0, "w")), dim=1)
    for i in range(40):
        text, quote, split = walk("b", 3, i) + " ", walk("a", 4, i), "train" if i % 5 else "test"
        rows += [dict(task="letter", split=split, text=walk("ab"[i % 2], 3 + i % 7, i),
                      label=str(i % 2)),
                 dict(task="start", split=split, text=f"a{i % 3} " * 4 + "b1", label=str(i % 3)),
                 dict(task="inside", split=split, text=text + quote,
                      spans=[[len(text), len(text + quote)]])]
    acts, saes = make_acts(words_lm()), (LinearSAE(W.t(), W), zero_sae(32, 64))
    with data_folder(probes=rows):
        good, zero = (probing.evaluate(sae, acts) for sae in saes)
    assert {row["task"] for row in good["per_task"]} == {"letter", "start", "inside"}
    assert good["sae_all"] > 0.9 and good["residual_all"] > 0.9 and good["pca_top_5"] > 0.8, good
    assert all(zero[f"sae_top_{k}"] == 0.5 for k in probing.KS)


def test_positions_by_hand():
    rng = np.random.default_rng(0)
    profile = rng.random((23, 40)) ** 4
    for column, found in zip(profile.T, positions.spans(profile)):
        assert found == next(w for w in range(1, 24) for s in range(24 - w)
                             if column[s:s + w].sum() >= column.sum() / 2 * (1 - 1e-9))
    sae, (x, mask) = model("temporal_lens", D=6, T=12), mixed(B=37, T=12)
    acts = activations(x, mask)
    (error, energy, scored), profiles, off = positions.measure(sae, acts)
    x_hat, f = (v.detach() for v in sae(x, mask))
    for got, y in ((error, x_hat), (energy, acts.mean)):
        assert np.allclose(got, ((x - y) / sae.scale).square().sum(-1) * mask, atol=1e-4)
    for i, profile in enumerate(profiles):                 # of even and of odd windows
        total = torch.where(mask[i::2, :, None], f[i::2], 0.0).sum(0)
        assert np.allclose(profile, total / mask[i::2].sum(0)[:, None], atol=1e-5)
    assert (scored == mask.numpy()).all() and abs(off.mean() - (f[mask] == 0).float().mean()) < 0.01
    error, scored = 1 + 0.1 * rng.random((50, 128)), np.ones((50, 128))
    error[:, :32] *= 0.85
    error[:, 40] = scored[:, 40] = 0                       # not scored: not in the late mean
    out = positions.early_late(error, 2 * scored, scored)
    assert abs(out["early_error"] + 0.15) < 0.01 and out["p"] < 1e-10


def test_evaluations_of_a_run_from_the_command_line():
    with folder() as here:
        before = tiny(SCRIPTS["temporal_lens"], "a", 12)
        for module in (core, temporal, positions, features, zero, bench):
            assert run(module, "a")[0] == 0, module
        results = common.read_json(here / "a/eval.json")
        assert results["core"] == before["core"] and results["temporal"] == before["temporal"]
        assert results["zero"]["L0"] == results["zero"]["l2_ratio"] == 0 > results["zero"]["EV"]
        figures.training(here / "a")
        for name in ("features.html", "training.png", "positions.png"):
            assert (here / "a" / name).stat().st_size > 5000, name
        for module, *words in ((probing,), (unlearning,), (steer, "0:=0", "text")):
            status, _, err = run(module, "a", *words)
            assert status in (2, 3) and "synthetic" in err, module    # said, no crash
