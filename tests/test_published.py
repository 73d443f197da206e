"""benchmarks/published.py: losses and codes against loops, causality, runs that learn."""
import itertools

from benchmarks import published    # before torch: common.py sets how OpenMP threads wait
import torch
import torch.nn.functional as F

from tests.helpers import folder, tiny
from tests.test_tsae import keep_largest


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
    z, mask, terms = torch.rand(3, 5, 4) - 0.3, torch.rand(3, 5) < 0.7, []
    pairs = [(b, t) for b, t in itertools.product(range(3), range(1, 5))
             if mask[b, t] and mask[b, t - 1]]
    for b, t in pairs:                                         # its own first
        against = [z[b, t - 1], *(z[c, s - 1] for c, s in pairs if c != b)]
        cosine = F.cosine_similarity(z[b, t], torch.stack(against))
        terms.append(cosine.logsumexp(0) - cosine[0])
    assert len(pairs) > 3
    assert abs(published.contrast(z, mask) - sum(terms) / len(pairs)) < 1e-5


def test_published_codes_equal_loops():
    sae, x, mask, cfg = sae_and_batch("pooled")
    f, pre = sae.encode(x, mask), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    for b, t in itertools.product(range(3), range(7)):
        last = [pre[b, s] for s in range(max(0, t - cfg.window + 1), t + 1) if mask[b, s]]
        mean = sum(last) / max(1, len(last)) + torch.zeros(12)
        assert torch.allclose(f[b, t], keep_largest(mean, 3), atol=1e-6)

    sae, x, mask, cfg = sae_and_batch("tfa")
    h, (f, predicted) = x - sae.b_dec, sae.codes(x, mask)
    for b, t in itertools.product(range(3), range(7)):
        past, mixed = h[b, :t][mask[b, :t]], torch.zeros(6)    # (n, D)
        if len(past):
            scores = past @ sae.W_k @ (h[b, t] @ sae.W_q)
            mixed = (scores / 6 ** 0.5).softmax(0) @ past @ sae.W_v
        guess = F.relu(mixed @ sae.W_enc + sae.b_pred)
        novel = keep_largest((h[b, t] - guess @ sae.W_dec) @ sae.W_enc + sae.b_enc, 3)
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
    for method in ("tsae", "matryoshka", "tfa", "pooled", "random"):
        sae, x, mask, _ = sae_and_batch(method)
        sae.eval()
        later = x.clone()
        later[:, 4:] = torch.randn(3, 3, 6)
        assert torch.equal(sae.encode(x, mask)[:, :4], sae.encode(later, mask)[:, :4]), method
        with folder():
            found = tiny(published, "run", 60, "--method", method, "--k", 4, "--eval", "core")
        core, least = found["core"], 0.1 if method == "random" else 0.3
        assert core["EV"] > least and 2 < core["L0"] < 8, (method, core)
