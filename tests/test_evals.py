"""The evaluations: metrics by hand and against SAEBench's own numbers, figures, pages, exports."""
import importlib.util
import json
import math
import re
import shutil
import subprocess
import types
from pathlib import Path

from tests.helpers import (SCRIPTS, WORDS, Heldout, LinearSAE, close, data, data_folder, folder,
                           make_acts, model, modules, refused_with, relative, run, saebench, skip,
                           tiny, walk, words_lm, zero_sae)

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tsae
from data import texts
from evals import (core, export, features, figures, positions, probing, saebench as bench, steer,
                   temporal, unlearning)


class Same(nn.Module):
    """x_hat = part * x, f = relu(x): codes that a test chooses."""
    causal, part = False, 1.0

    def __init__(self, W_dec):
        super().__init__()
        self.W_dec = nn.Parameter(W_dec)

    def encode(self, x, mask=None):
        return x.relu()

    def forward(self, x, mask=None):
        return self.part * x, self.encode(x)


def test_core_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    x_hat = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    f = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.0, 0.5], [7.0, 7.0, 7.0]]])
    m = core.core_metrics([(x, x_hat, f, torch.tensor([[True, True, False]]))])
    # errors 1 and 1; mean (0.5, 1); squared distances to it 1.25 and 1.25
    want = {"EV": 1 - 2 / 2.5, "MSE": 2 / (2 * 2), "L0": 1.5, "L1": 1.75, "tokens": 2,
            "l2_ratio": (math.sqrt(2) / 1 + 1 / 2) / 2, "cosine": (1 / math.sqrt(2) + 1) / 2,
            "relative_reconstruction_bias": ((2 + 1) / 2) / ((1 + 2) / 2), "dead": 1 / 3}
    for name, value in want.items():
        close(m[name], value, name)
    batch = *torch.randn(2, 6, 8, 5), torch.rand(6, 8, 7), torch.rand(6, 8) > 0.2
    whole, parts = core.core_metrics([batch]), core.core_metrics(zip(*(t.split(2) for t in batch)))
    for name in whole:
        close(parts[name], whole[name], f"{name} depends on the batches")
    nothing = Heldout(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool))
    for metrics in (core.evaluate, temporal.evaluate, bench.evaluate):
        refused_with("no scored held-out token", metrics, zero_sae(2, 2), nothing)


def test_core_and_splice_values_equal_saebench():
    tensors, values = saebench()

    def batches(parts, masked=True, zero=False):
        for i in parts:
            x, x_hat, f, mask = (tensors[f"core.{i}.{k}"] for k in ("x", "x_hat", "f", "mask"))
            yield x, x_hat * (not zero), f * (not zero), mask.bool() | (not masked)
    W_enc, W_dec = tensors["core.sae.W_enc"], tensors["core.sae.W_dec"]
    for name, parts, masked, zero in (("core", (0, 1, 2), True, False),
                                      ("core_batch_0_only", (0,), True, False),
                                      ("core_no_mask", (0, 1, 2), False, False),
                                      ("core_zero_sae", (0, 1, 2), True, True)):
        got = bench.metrics(batches(parts, masked, zero), W_dec, W_enc)
        more = {} if zero else values[name]["misc"]        # of the weights
        for metric, value in {**values[name]["metrics"], **more}.items():
            if value == "nan":
                assert math.isnan(got[metric])
            else:
                close(got[metric], value, (name, metric))
    names = {"": "logits_orig", "_sae": "logits_spliced", "_zero": "logits_ablated"}
    for name, parts in (("recon", "012"), ("recon_specials_spliced", "0"),
                        ("recon_zero_sae", "0"), ("recon_underflow", "0")):
        sums = {}
        for i in parts:
            tokens = tensors[f"{name}.{i}.tokens"].long()
            logits = {k: tensors[f"{name}.{i}.{v}"] for k, v in names.items()}
            real = torch.ones_like(tokens).bool()          # 0, 1, 2: BOS, PAD, EOS
            for k, v in core.splice_sums(logits, tokens, tokens > 2, real).items():
                sums[k] = sums.get(k, 0) + v
        got = core.splice_scores(sums)
        for metric, value in values[name]["metrics"].items():
            if value == "nan":                             # SAEBench: log(softmax) underflows
                assert math.isfinite(got[metric])
            else:
                close(got[metric], value, (name, metric))


def test_saebench_gets_raw_features_of_windows():
    """What sae-bench is given: features in raw units, position 0 without any."""
    module = types.SimpleNamespace(CustomSAEConfig=lambda *args, **named: types.SimpleNamespace())
    parts = ("sae_bench", "sae_bench.custom_saes", "sae_bench.custom_saes.custom_sae_config")
    sae, acts, x = model("tsae", D=32), make_acts(words_lm(), T=5), torch.randn(2, 11, 32)
    sae.scale.fill_(3.0)
    with modules(**dict.fromkeys(parts, module)):
        peer = bench.ForSAEBench(sae, acts)
    f = peer.encode(x)
    assert not f[:, 0].any() and relative(f[:, 1:], 3 * sae.encode(x[:, 1:])) < 1e-5
    assert relative(peer.decode(f[:, 1:]), sae(x[:, 1:])[0]) < 1e-5
    with modules(sae_bench=None):
        refused_with("pip install sae-bench", bench.run_suite, "core", sae, acts, Path("a"))


def test_temporal_by_hand():
    f, sae = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]), Same(torch.eye(2))
    m = temporal.evaluate(sae, Heldout(f))
    # cosines 1, 0, 1; +-0.5 about the mean: products over lag 1 are .25, -.25, .25 a feature
    for found, want in ((m["neighbour_cosine"], 2 / 3), (m["total_variation"], 2 / 3),
                        (m["autocorrelation"]["1"], 1 / 3), (m["autocorrelation"]["2"], -1.0),
                        (m["span"], 2.0)):
        close(found, want)
    assert m["variance_share"] == {"1": 0.0, "2": 1.0, "mean": 0.0}     # (1, 0) and (0, 1)
    sae, x = Same(torch.eye(5)), torch.randn(6, 21, 5) + 3 * torch.randn(6, 1, 5)
    mask, sae.part = torch.rand(6, 21) < 0.7, 0.9
    m = temporal.evaluate(sae, Heldout(x, mask))
    assert m == temporal.evaluate(sae, Heldout(torch.where(mask[..., None], x, 99.0), mask))
    f, mean = x.relu(), x.relu()[mask].mean(0)
    for lag in (1, 4):
        a, b = (v[mask[:, lag:] & mask[:, :-lag]] for v in (f[:, :-lag], f[:, lag:]))
        want = ((a - mean) * (b - mean)).sum(1).mean() / (f[mask] - mean).square().sum(1).mean()
        close(m["autocorrelation"][str(lag)], want.item(), lag, 1e-4)
    parts = temporal.time_scales(x, mask)                  # blocks of 1, 2, 4, 8, 16 and the mean
    assert torch.isclose(parts.sum(), x[mask].double().square().sum()) and len(parts) == 6
    mixed = sum(m["EV_by_scale"][k] * m["variance_share"][k] for k in m["EV_by_scale"])
    close(mixed, core.evaluate(sae, Heldout(x, mask))["EV"], tolerance=1e-4)


def exported(**values):
    """A TSAE with every tensor random, on activations with scale 7."""
    acts = Heldout(7 * torch.randn(4, 32, 16))
    acts.scale, sae = 7.0, model("tsae", **values)
    sae.scale.fill_(7.0)
    return sae, acts


def read_export(path, fmt, x):
    """The code and reconstruction that a format defines: f = act((x - b) W + c), f V + b."""
    if fmt == "saelens":
        cfg, (w, _) = common.read_json(path / "cfg.json"), common.load_tensors(
            path / "sae_weights.safetensors")
        W, c, V, b = w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"]
        assert cfg["apply_b_dec_to_input"] and len(w) == 4
    else:
        w = torch.load(path / "ae.pt", weights_only=True)
        cfg = common.read_json(path / "config.json")["trainer"]
        W, V, c = w["encoder.weight"].t(), w["decoder.weight"].t(), w["encoder.bias"]
        b = w["b_dec" if "k" in cfg else "bias"]
    pre = (x - b) @ W + c
    f = tsae.topk(pre, cfg["k"]) if "k" in cfg else pre.relu()
    return f, f @ V + b


def test_export_gives_the_same_code_or_is_refused():
    with folder() as here:
        for i, values in enumerate((dict(temporal=False), dict(layer_norm="off"),
                                    dict(temporal=False, activation="topk", k=4))):
            sae, acts = exported(**values)
            x_hat, f = sae(acts.x)
            for fmt in export.FORMATS:
                export.export(sae, acts, here / f"{fmt}{i}", fmt)
                g, out = read_export(here / f"{fmt}{i}", fmt, acts.x)
                assert relative(g, acts.scale * f) < 1e-5 and relative(out, x_hat) < 1e-5, fmt
        smooth = exported(temporal=False)[0]
        smooth.encode = lambda x, mask=None, real=smooth.encode: real(x) + real(x.roll(1, 1))
        for other, word in ((exported()[0], "ln.bias"), (smooth, "another code")):
            refused_with(word, export.export, other, acts, here / "x", "saelens")
        assert not (here / "x").exists()
        if importlib.util.find_spec("sae_lens"):           # where it is installed, it agrees
            peer = importlib.import_module("sae_lens").SAE.load_from_disk(here / "saelens2")
            assert relative(peer.encode(acts.x), acts.scale * f) < 1e-5
            assert relative(peer(acts.x), x_hat) < 1e-5


class Hostile:
    """A tokenizer of six tokens, two of them hostile; 4 and 5 are the halves of one character."""
    texts = ["</script><img src=x onerror=alert(1)>", " <b>&amp;", "\n", " plain", "\ufffd", "é"]

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(self.texts[i] for i in ids).replace("\ufffdé", "é")


def page(path, x, mask, sae, tokens):
    """The feature page of held-out x (N, T, D) whose codes are relu(x) -> (html, its data)."""
    acts = Heldout(x, mask)
    acts.lm = types.SimpleNamespace(tokenizer=Hostile(), name="a/model")
    acts.heldout_store = types.SimpleNamespace(tokens=tokens)
    features.evaluate(sae, acts, path)
    html = (path / "features.html").read_text()
    return html, json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def stretches(N=8, T=72, D=12):
    """Random codes (N, T, D) with stretches, feature 0 dead; masks with holes; tokens."""
    gen = common.generator(0, "features")
    x = torch.randn(N, T, D, generator=gen)
    x = (x + x.roll(1, 1) + x.roll(2, 1)) * torch.rand(D, generator=gen).add(0.5)
    mask, x[..., 0] = torch.rand(N, T, generator=gen) > 0.1, -1
    mask[1, 50:] = False
    return x, mask, torch.randint(0, 4, (N, 1 + T), generator=gen)


def test_features_numbers_equal_a_direct_computation():
    (x, mask, tokens), sae = stretches(), Same(torch.randn(12, 12))
    with folder() as here:
        _, data = page(here, x, mask, sae, tokens)
    f, part = x.relu() * mask[..., None], torch.arange(72) * 64 // 72
    assert [row["i"] for row in data["rows"]] == list(range(1, 12)) and data["live"] == 11
    cosine = F.cosine_similarity(sae.W_dec[:, None], sae.W_dec[None], dim=-1)
    for row in data["rows"]:
        i = row["i"]
        on, peaks = f[..., i] > 0, f[..., i].amax(1).sort(descending=True)
        again = (on[:, 1:] & on[:, :-1]).sum()
        line = torch.stack([f[:, part == p, i].sum() / mask[:, part == p].sum() for p in range(64)])
        for name, want in dict(span=on.sum() / (on.sum() - again), density=on.sum() / mask.sum(),
                               stay=again / (on[:, :-1] & mask[:, 1:]).sum(), height=line.max(),
                               max=f[..., i].max()).items():
            close(row[name], want.item(), (i, name), 1e-3)
        assert (torch.tensor(row["line"]) - 99 * line / line.max()).abs().max() < 0.6
        others = [j for j in range(12) if j != i]
        assert row["near"] == sorted(others, key=lambda j: -cosine[i, j])[:5]
        assert len(row["contexts"]) == 6
        for n, (piece, peak, value, levels) in enumerate(row["contexts"]):
            window, start, texts = data["pieces"][piece]
            assert window == peaks.indices[n] and len(texts) >= len(levels) > peak
            close(value, f[window, start + peak, i].item(), (i, n), 1e-3)
            assert window != 1 or start + len(texts) <= 50, "padding is left out"
            for t, level in enumerate(levels):
                want = f[window, start + t, i].item() / row["max"] * 99
                assert abs(level - want) <= (want > 0) if mask[window, start + t] else level == -1
                text = Hostile.texts[tokens[window, 1 + start + t]]
                assert data["vocabulary"][texts[t]] == text


def test_features_escape_texts_and_cover_every_order():
    x, mask, tokens = stretches(N=2, T=8)
    tokens[:] = torch.tensor([3, 0, 1, 2, 4, 5, 3, 0, 1])
    with folder() as here:
        html, data = page(here, x, mask | True, Same(torch.eye(12)), tokens)
    texts = [data["vocabulary"][t] for t in data["pieces"][0][2]]
    assert texts == [*Hostile.texts[:3], "", "é", *[Hostile.texts[i] for i in (3, 0, 1)]]
    assert "<img" not in html and "<b>" not in html and "http:" not in html
    keys, live = [torch.rand(2000) for _ in range(3)], torch.rand(2000) > 0.2
    chosen = features.cover_orders(keys, live, 100)        # of many features: ends of each order
    assert len(chosen) == 100 and chosen.unique().equal(chosen) and live[chosen].all()
    for key in keys:
        ranked = key.masked_fill(~live, -1).argsort(descending=True)[:live.sum()]
        assert torch.isin(torch.cat([ranked[:10], ranked[-10:]]), chosen).all()


CLICKS = """<script>
const said = {}, $1 = css => document.querySelector(css);
const wait = () => new Promise(done => setTimeout(done, 100));
const listed = () => [...document.querySelectorAll(".feature:not([hidden])")].map(
  e => +e.id.slice(1));
const search = text => { $1("#search").value = text; $1("#search").oninput(); return listed(); };
onerror = message => { said.error = message; };
addEventListener("load", async () => {
  said.wide = document.documentElement.scrollWidth > innerWidth;
  for (const name of ["span", "density", "max", "stay"]) {
    if (name !== "span") $1(`#orders [value=${name}]`).click();      // the page opens with span
    said[name] = listed(); $1(`#orders [value=${name}]`).click(); said[name + " up"] = listed();
  }
  said.found = search("ONERROR"); said.number = search("#12");
  $1("#f12").open = true; await wait(); $1("#f12 .body a").click(); await wait();
  said.near = [location.hash, $1(location.hash).open, listed().length];
  location.hash = "#f39"; await wait();
  said.top = $1("#f39 .body .t.top").textContent; said.images = document.images.length;
  document.title = "said" + JSON.stringify(said) + "end"; });
</script>"""


def test_features_page_in_a_browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None) or skip("no chromium here")
    x, mask, tokens = stretches(N=20, T=72, D=40)
    x[:, :, 39], x[..., 38] = -1, 0
    x[0, 5, 39], mask[0, 5], tokens[:], tokens[0, 6] = 7.0, True, 3, 0   # hostile under 39's peak
    with folder() as path:
        html, data = page(path, x, mask, Same(torch.randn(40, 40)), tokens)
        (path / "features.html").write_text(html.replace("</body>", CLICKS + "</body>"))
        done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                               "--window-size=500,800", f"--user-data-dir={path}/profile",
                               "--virtual-time-budget=5000", f"file://{path}/features.html"],
                              capture_output=True, text=True, timeout=120)
    assert "<title>said" in done.stdout, done.stdout[:300] + done.stderr[-2000:]
    said = json.loads(re.search("<title>said(.*?)end</title>", done.stdout, re.S)[1].replace(
        "&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    rows = {row["i"]: row for row in data["rows"]}
    for name in ("span", "density", "max", "stay"):
        for label, sign in ((name, -1), (name + " up", 1)):
            assert said[label] == sorted(rows, key=lambda i: (sign * rows[i][name], i)), label
    assert 39 in said["found"] and len(said["found"]) < len(rows) and said["number"] == [12]
    assert said["near"] == [f"#f{rows[12]['near'][0]}", True, len(rows)]
    assert said["top"] == Hostile.texts[0] and not said["images"] + said["wide"]
    assert "error" not in said


def test_selection_clamp_and_score_equal_saebench():
    tensors, values = saebench()
    table, on = tensors["unlearn.f_table"], {}
    for name in ("forget", "retain"):                      # tokens 0, 1, 2: BOS, PAD, EOS
        tokens = tensors[f"unlearn.tokens_{name}"].long().flatten()[None]
        h, itself = F.pad(table[tokens], (0, 0, 1, 0)), types.SimpleNamespace(encode=lambda x, m: x)
        on[name], _ = unlearning.activity(itself, None, h, tokens > 2)
        assert relative(on[name].float(), tensors[f"unlearn.sparsity_{name}"].float()) < 1e-5
    for threshold, want in values["unlearn_features"].items():
        for n, k in (("10", 10), ("20", 20), ("all", 64)):
            found = unlearning.select_features(on["forget"], on["retain"], float(threshold), k)
            assert found == want[n], (threshold, n)
    sae = LinearSAE(*(tensors[f"clamp.{name}"] for name in ("W_enc", "W_dec", "b_enc", "b_dec")))
    h, mask = tensors["clamp.h"], torch.ones(3, 6, dtype=torch.bool)
    for n, multiplier in ((10, 25), (20, 200)):
        out = unlearning.clamp_edit(sae, values["unlearn_features"]["0.01"][str(n)], multiplier)(h)
        assert relative(out, tensors[f"clamp.out_n{n}_m{multiplier}"]) < 1e-5
    h, mask[1, 2] = h.clone(), False
    h[0, 3] *= 100                                         # a sink, and a masked token, stay
    same = (unlearning.clamp_edit(sae, list(range(64)), 25, mask, limit=50.0)(h) == h).all(-1)
    assert same[0, 3] and same[1, 3] and same[:, 0].all() and same.sum() == 5
    for case in values["unlearn_score"]:
        runs = [(w / 533, p / 308) for w, p in zip(case["wmdp"], case["pooled"])]
        close(unlearning.best_setting(runs)[0], case["score"], tolerance=1e-9)


def two_languages():
    """A model that knows both -> acts, states of each, an SAE whose feature 0 is on in one only."""
    lm = words_lm(layers=2)
    tokens, _ = texts.make_windows([walk("ab"[i % 2], 16, i) for i in range(48)], lm, 16, 48)
    opt = torch.optim.Adam(lm.model.requires_grad_(True).parameters(), lr=1e-2)
    for step in range(60):
        rows = tokens[step % 3::3].long()
        logits = lm.model(input_ids=rows).logits[:, :-1]
        opt.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        opt.step()
    lm.model.requires_grad_(False)
    acts, rows = make_acts(lm, layer=0), [
        {"split": split, "domain": domain, "text": walk(c, 64, i + 100 * (split == "train"))}
        for c, domain in (("a", "code"), ("b", "prose")) for split in ("train", "heldout")
        for i in range(12)]
    with data_folder(corpus=rows):
        both = [unlearning.domain_states(acts, "corpus", name) for name in ("code", "prose")]
    a, b = (states["select"][1][:, 1:].reshape(-1, 32) for states in both)
    W, bias = torch.zeros(40, 32), torch.full((40,), -1e6)
    W[0] = F.normalize(a.mean(0) - b.mean(0), dim=0)
    bias[0] = -(b @ W[0]).max() - 0.01
    return acts, *both, LinearSAE(W.t().clone(), W, bias)


def test_unlearning_forgets_one_language_and_steering_changes_what_is_said():
    acts, forget, retain, sae = two_languages()
    out = unlearning.unlearn_pair(sae, acts, forget, retain)
    zero = unlearning.unlearn_pair(zero_sae(32, 40), acts, forget, retain)
    assert out["accuracy_forget"] > 0.9 and out["accuracy_retain"] > 0.9
    assert out["score"] > 0.5 and out["retain_kept"] >= 0.99 and out["random"] < 0.1, out
    assert out["methods"][0]["setting"]["features"] == [0] and out["crossed_drop"] > 0.5
    # the papers' 0.0: an all-zero SAE has no feature that is on, so nothing is selected
    assert zero["score"] == 0 and set(zero["eligible_features"].values()) == {0}
    same, said = (steer.steer(sae, acts, what, walk("b", 4, 0), n=6) for what in ("3:off", "0:=30"))
    assert same["plain"] == same["steered"] and set(same["plain"].split()) <= set(WORDS[12:])
    assert said["plain"] == same["plain"] != said["steered"]
    want = [(123, 1, 8), (77, 0, 0), (5, 0, 3), (6, 1, -2.5)]
    assert steer.parse_steer("123:+8,77:off, 5:=3,6:-2.5", 200) == want
    for bad in ("x:+1", "5", "5:8", "300:off", "", "5:+", "5:+-3", "5:=.."):
        refused_with("FEATURE", steer.parse_steer, bad, 200)


def test_pooling_and_probe_equal_saebench():
    tensors, values = saebench()
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    sae = LinearSAE(*(tensors[f"pool.sae.{name}"] for name in names))
    for name in ("a", "b"):
        x = tensors[f"pool.{name}.x"]
        mask = (x != 0).any(-1)                            # BOS and padding are zero there
        for v, want in ((x, "mean_x"), (sae.encode(x), "mean_f")):
            assert relative(probing.pool(v, x, mask), tensors[f"pool.{name}.{want}"]) < 1e-5
    nothing = probing.pool(torch.zeros(1, 3, 16), torch.zeros(1, 3, 16), torch.ones(1, 3).bool())
    assert (nothing == 0).all(), "no position: 0, not NaN"
    x, x_test = (torch.cat([tensors[f"probe.{part}.{side}"] for side in ("pos", "neg")]).numpy()
                 for part in ("train", "test"))
    y, y_test = np.repeat([1, 0], 100), np.repeat([1, 0], 50)
    for k, want in values["probe"].items():
        columns = np.sort(probing.top_columns(x, y, int(k)))
        found = probing.probe_accuracy(x[:, columns], y, x_test[:, columns], y_test)
        assert columns.tolist() == want["features"], k
        close(found, want["accuracy"])
    labels = list("w" * 12 + "x" * 12 + "y" * 12 + "z" * 12)
    rows, y = probing.one_vs_rest(labels, "x")             # balanced, the others evenly
    assert len(set(rows)) == 24 and all((labels[i] == "x") == t for i, t in zip(rows, y))
    assert all(sum(labels[i] == c for i in rows) == (12 if c == "x" else 4) for c in "wxyz")
    assert len(probing.one_vs_rest(list("xxxxxxxxy"), "x")[0]) == 2, "positives are cut as well"


def probe_rows(n=40):
    """A task of two labels that the words give away, one of three, and one about tokens."""
    for i in range(n):
        text, quote = walk("b", 3, i) + " ", walk("a", 4, i)
        for task, text, more in (
                ("letter", walk("ab"[i % 2], 3 + i % 7, i), {"label": "ab"[i % 2]}),
                ("start", f"a{i % 3} " * 4 + walk("b", 1, i), {"label": str(i % 3)}),
                ("inside", text + quote, {"spans": [[len(text), len(text + quote)]]})):
            yield {"task": task, "text": text, "split": "train" if i % 5 else "test", **more}


def test_probing_finds_the_words_and_a_zero_sae_scores_a_half():
    W = F.normalize(torch.randn(64, 32, generator=common.generator(0, "w")), dim=1)
    sae, lm, text = LinearSAE(W.t().clone(), W), words_lm(), "b0 b1 a0 a1 b2 b3"
    with data_folder(probes=probe_rows()) as here:
        acts = make_acts(lm, cache=str(here / "c"))
        good, zero = probing.evaluate(sae, acts), probing.evaluate(zero_sae(32, 64), acts)
        (cache,) = here.glob("c/probes-*")
        for raw in (cache.read_bytes(), b"damaged"):       # read again; made again
            cache.write_bytes(raw)
            assert probing.evaluate(sae, acts) == good
    assert {row["task"] for row in good["per_task"]} == {"letter", "start", "inside"}
    assert good["sae_all"] > 0.9 and good["residual_all"] > 0.9 and good["pca_top_5"] > 0.8, good
    for k in probing.KS:
        residual = f"residual_top_{k}"
        assert zero[f"sae_top_{k}"] == 0.5 and zero[residual] == good[residual]
    items = [{"task": "q", "split": "train", "text": text, "spans": [[6, 11]]}]
    ids = torch.tensor([[lm.bos, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    states = common.hidden_states(lm, ids, [1])[1][0, 1:]
    for T, side, inside in ((8, "right", 2), (3, "left", 1)):
        lm.tokenizer.padding_side = lm.tokenizer.truncation_side = side
        x, _, labels = probing.encode_texts(zero_sae(32, 8), make_acts(lm), items, T)["q"]["train"]
        assert labels.count("inside") == inside and len(labels) == min(T, 6)
        assert relative(x, states[:T]) < 0.01, "not the first tokens, in order"       # bf16


def test_positions_by_hand():
    from sklearn.metrics import adjusted_rand_score

    def naive_span(column):
        return next(w for w in range(1, 24) for s in range(24 - w)
                    if column[s:s + w].sum() >= column.sum() / 2 * (1 - 1e-9))
    rng = np.random.default_rng(0)
    profile = rng.random((23, 40)) ** 4
    assert positions.spans(profile).tolist() == [naive_span(column) for column in profile.T]
    assert positions.spans(np.ones((128, 1))) == [64]      # a feature that ignores position
    sae, (x, mask) = model("temporal_lens", D=6, T=12), data(B=37, D=6)
    errors, profiles, off = positions.measure(sae, Heldout(x, mask))
    x_hat, f = (v.detach() for v in sae(x, mask))
    error = ((x - x_hat) / sae.scale).square().sum(-1) * mask
    assert np.allclose(errors[0], error, atol=1e-4) and (errors[2] == mask.numpy()).all()
    for t in range(12):
        halves = [f[i::2, t][mask[i::2, t]].mean(0) for i in (0, 1)]
        assert np.allclose(profiles[:, t], torch.stack(halves), atol=1e-5)
        assert abs(off[t] - (f[:, t][mask[:, t]] == 0).float().mean()) < 1e-6
    error, scored = 1 + 0.1 * rng.random((50, 128)), np.ones((50, 128))
    error[:, :32] *= 0.85
    error[:, 40] = scored[:, 40] = 0                       # not scored: not in the late mean
    out = positions.early_late(error, 2 * scored, scored)
    assert abs(out["early_error"] + 0.15) < 0.01 and out["p"] < 1e-10
    group, profile = np.repeat(np.arange(8), 10), 0.1 * rng.random((128, 80))
    for k, g in enumerate(group):
        profile[16 * g:16 * (g + 1), k] += 1 + rng.random()
    assert adjusted_rand_score(group, positions.cluster(profile)[1]) == 1.0
    # a sink that is fitted exactly: of 3 early positions 1 is free, so their error falls by 1/3
    acts, errors = Heldout(x, mask), 1 + 1e-6 * rng.random((3, 37, 12))
    acts.heldout_store = types.SimpleNamespace(sink=torch.full((6,), 300.0))
    fitted = positions.sink_cases(sae, acts, errors)["sink_fitted"]
    assert np.array_equal(fitted[..., 1:], errors[..., :-1]), "every token one position later"
    assert abs(positions.early_late(*fitted)["early_error"] + 1 / 3) < 1e-4


def test_evaluations_of_a_run_from_the_command_line():
    with folder() as here:
        tiny(SCRIPTS["temporal_lens"], "a", 12)
        before = common.read_json(here / "a/eval.json")
        for name in ("core", "temporal", "positions", "features", "zero", "saebench"):
            assert run(importlib.import_module(f"evals.{name}"), "a")[0] == 0, name
        results, by = (common.read_json(here / f"a/{name}.json") for name in ("eval", "position"))
        assert results["core"] == before["core"] and results["temporal"] == before["temporal"]
        assert len(by["error"]) == len(by["weight"]) == 32 and abs(sum(by["weight"]) - 32) < 1e-3
        assert abs(results["positions"]["features_off"] - results["core"]["inactive"]) < 1e-3
        assert results["zero"]["L0"] == results["zero"]["l2_ratio"] == 0 > results["zero"]["EV"]
        assert results["features"]["live"] > 0 and (here / "a/features.html").exists()
        figures.training(here / "a")
        for name in ("training", "positions", "clusters"):
            assert (here / f"a/{name}.png").stat().st_size > 5000
        for name, *words in (("probing",), ("unlearning",), ("steer", "0:off", "text")):
            status, _, err = run(importlib.import_module(f"evals.{name}"), "a", *words)
            assert status in (2, 3) and "synthetic" in err, name      # said, no crash
        assert run(temporal, "nowhere")[0] == run(temporal)[0] == 2
