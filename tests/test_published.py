"""benchmarks/published.py: losses and codes against loops, causality, runs that learn."""
import itertools
import math

import common
import torch
import torch.nn.functional as F

from benchmarks import published
from tests.helpers import folder

METHODS = ("tsae", "matryoshka", "tfa", "pooled", "random")


def sae_and_batch(method, B=3, T=7, D=6, **fields):
    torch.manual_seed(0)
    cfg = published.Config(method=method, expansion=2, k=3, T=T, **fields)
    sae = published.PublishedSAE(D, cfg)
    for p in sae.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    mask = torch.rand(B, T) < 0.8
    mask[:, 2:4] = True
    return sae, torch.randn(B, T, D), mask, cfg


def test_published_contrast_equals_its_definition():
    """Each pair against the tokens before the pairs of other sequences."""
    torch.manual_seed(0)
    z, mask = torch.rand(3, 5, 4) - 0.3, torch.rand(3, 5) < 0.7
    pairs = [(b, t) for b, t in itertools.product(range(3), range(1, 5))
             if mask[b, t] and mask[b, t - 1]]
    total = 0.0
    for b, t in pairs:
        cosine = lambda c, s: F.cosine_similarity(z[b, t], z[c, s - 1], dim=0).item()
        others = [math.exp(cosine(c, s)) for c, s in pairs if c != b]
        own = math.exp(cosine(b, t))
        total -= math.log(own / (own + sum(others)))
    assert len(pairs) > 3
    assert abs(published.contrast(z, mask).item() - total / len(pairs)) < 1e-5


def test_published_codes_equal_loops():
    sae, x, mask, cfg = sae_and_batch("pooled")
    f, pre = sae.encode(x, mask), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    for b, t in itertools.product(range(3), range(7)):
        last = [pre[b, s] for s in range(max(0, t - cfg.window + 1), t + 1) if mask[b, s]]
        mean = sum(last) / max(1, len(last)) + torch.zeros(12)
        values, index = mean.topk(3)
        assert torch.allclose(f[b, t], torch.zeros(12).scatter(0, index, values), atol=1e-6)

    sae, x, mask, cfg = sae_and_batch("tfa")
    h, (f, predicted) = x - sae.b_dec, sae.codes(x, mask)
    for b, t in itertools.product(range(3), range(7)):
        past = [s for s in range(t) if mask[b, s]]
        mixed = torch.zeros(6)
        if past:
            scores = torch.stack([(h[b, t] @ sae.W_q) @ (h[b, s] @ sae.W_k) for s in past])
            weights = (scores / 6 ** 0.5).softmax(0)
            mixed = sum(w * (h[b, s] @ sae.W_v) for w, s in zip(weights, past))
        guess = F.relu(mixed @ sae.W_enc + sae.b_pred)
        values, index = ((h[b, t] - guess @ sae.W_dec) @ sae.W_enc + sae.b_enc).topk(3)
        novel = torch.zeros(12).scatter(0, index, values.relu())
        assert torch.allclose(predicted[b, t], guess, atol=1e-5)
        assert torch.allclose(f[b, t], novel, atol=1e-5)
    assert torch.allclose(sae(x, mask)[0], (f + predicted) @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_published_batch_topk_keeps_k_a_token_then_a_threshold():
    sae, x, mask, cfg = sae_and_batch("tsae")
    f, pre = sae.encode(x, mask), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    kept = pre[mask].flatten().sort(descending=True).values[:3 * mask.sum()]
    assert (f[mask] > 0).sum() == 3 * mask.sum() and sae.threshold == kept[-1]
    assert torch.equal(f[mask], torch.where(pre[mask] >= kept[-1], pre[mask], 0.0))
    sae.eval()
    assert torch.equal(sae.encode(x), pre * (pre > sae.threshold))
    terms, _ = published.losses(sae, x, mask, mask.sum(), 0, cfg)
    high = sae.encode(x)[..., :sae.n_high] @ sae.W_dec[:sae.n_high] + sae.b_dec
    assert torch.allclose(terms["high"], (high - x)[mask].square().sum(-1).mean())
    assert torch.allclose(terms["contrast"],
                          0.6 * published.contrast(sae.encode(x)[..., :sae.n_high], mask))


def test_published_methods_never_see_a_later_token_and_learn():
    for method in METHODS:
        sae, x, mask, _ = sae_and_batch(method)
        sae.eval()
        later = x.clone()
        later[:, 4:] = torch.randn(3, 3, 6)
        assert torch.equal(sae.encode(x, mask)[:, :4], sae.encode(later, mask)[:, :4]), method
        with folder() as here:
            flags = ["--model=synthetic", f"--method={method}", "--k=4", "--steps=60",
                     "--tokens=8192", "--heldout_tokens=1024", "--eval=core", "--log_every=1",
                     "--out=run"]
            assert published.main(flags) == 0, method
            log = common.read_json(here / "run" / "eval.json")["core"]
            least = 0.1 if method == "random" else 0.3
            assert log["EV"] > least and 2 < log["L0"] < 8, (method, log)
