"""hierarchical_sae.py (paper B) against a reference made of torch's own layers."""
import hierarchical_sae             # before torch: common.py sets how OpenMP threads wait
import math

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.helpers import mixed, refused_with
from tests.test_mtsae import cosine
from tests.test_scripts import follows
from tests.test_tsae import keep_largest, shaken, standard


def hs(shift=0.6, **values):
    sae = shaken("hierarchical_sae", 16, **{"T": 10, "k": 6, "gru_divisor": 4,
                                            "checkpointing": False, **values})
    sae.b_enc.data.add_(shift)
    if sae.parts["temporal"]:
        sae.W_out.weight.data.mul_(30)                         # it starts small: all tokens alike
    return sae


def context(p, h, mask, cfg):
    """Eq. 1, as it is composed: what the encoder reads of one window h (T, D)."""
    (T, D), scored = h.shape, mask[:, None]
    h = h * scored

    def convolve(v, name):                                     # kernel 3, padding 1
        v = F.pad(v.t(), (2, 0) if cfg.causal else (1, 1))
        weight = p[f"{name}.weight"].view(D, 3, D).transpose(1, 2)
        return F.conv1d(v, weight, p[f"{name}.bias"]).t()

    def attend(v):                                             # keys: scored tokens and oneself
        hide = ~(mask | torch.eye(T).bool()) | (cfg.causal * torch.ones(T, T)).triu(1).bool()
        weights = {"in_proj_weight": p["W_qkv.weight"], "out_proj.weight": p["W_out.weight"]}
        layer = nn.MultiheadAttention(D, 8, bias=False).double()
        return functional_call(layer, weights, (v, v, v), dict(attn_mask=hide))[0]
    near = h
    if cfg.conv:                                               # Eq. 10
        near = convolve(torch.relu(convolve(h, "conv1")) * scored, "conv2")
    if cfg.compose == "literal":                               # f_temp(f_local(h))
        return attend(near)
    if cfg.compose == "parallel":                              # Sec. 5.3: complementary
        return h + attend(h) + (near if cfg.conv else 0)
    return h + attend(near)


def route(p, h, levels, cfg):
    """The router's choice for each token (sums to 1), and the gate that multiplies each level."""
    if levels == 1:
        return torch.ones(2, *h.shape[:-1], 1)
    share = torch.softmax(F.linear(h, p["router.weight"], p["router.bias"]), -1)
    if cfg.routing == "soft":
        return share, levels * share
    choice = F.one_hot(share.argmax(-1), levels) + share - share.detach()    # straight-through
    if cfg.routing == "top1":
        return choice, choice
    return choice, torch.stack([choice[..., level:].sum(-1) for level in range(levels)], -1)


def encode(p, h, mask, sizes, cfg, temporal):
    """Codes and choices of levels of windows h (B, T, D), centred, in units of the scale."""
    choice, gate = route(p, h, len(sizes), cfg)
    rest = torch.stack([context(p, *window, cfg) for window in zip(h, mask)]) if temporal else h
    codes, first = [], 0
    for level, size in enumerate(sizes):                       # level l codes what is left over
        here = slice(first, first + size)
        pre = rest @ p["W_enc"][:, here] + p["b_enc"][here]
        if cfg.activation == "topk":
            k = (cfg.k + len(sizes) - 1 - level) // len(sizes)     # larger ones first
            z = keep_largest(pre, min(cfg.k, size) if cfg.routing == "top1" else k)
        else:
            z = torch.relu(pre)
        codes.append(z * gate[..., level, None])
        rest, first = rest - codes[-1] @ p["W_dec"][here], first + size
    return torch.cat(codes, -1), choice


def temporal_terms(p, f, image, mask, cfg):
    """Sec. 3.2, 5.1 for one window: 1 - c_psi, contrast with the others, surprise; summed."""
    gru = {name[4:]: value for name, value in p.items() if name.startswith("gru.")}
    layer = nn.GRU(image.shape[1], image.shape[1] // cfg.gru_divisor, 2).double()
    predicted = functional_call(layer, gru, image)[0] @ p["W_next.weight"].t()
    z = f * torch.exp(p["log_psi"]) if cfg.consistency == "learned" else f
    c, total = cosine(z[:, None], z), torch.zeros(3)
    for t in range(len(f) - 1):
        if mask[t] and mask[t + 1]:
            others = [u for u in range(len(f)) if u != t and mask[u]]
            contrast = F.cross_entropy(c[t, others] / cfg.tau, torch.tensor(others.index(t + 1)))
            surprise = F.mse_loss(predicted[t], image[t + 1].detach())
            total = total + torch.stack([1 - c[t, t + 1], contrast, surprise])
    return total


def adversarial(p, f, cfg, parts):
    """Eq. 3 to 7, 16: lambda_adv L_adv. f: codes of all scored tokens (n, F)."""
    columns = f.t() if cfg.similarity == "code" else p["W_dec"]
    s = cosine(columns[:, None], columns).fill_diagonal_(-2).max(1).values
    total, spurious, now = 0.0, 0.0, s.detach()
    if parts["margin"]:
        alpha, mean, std = cfg.margin_decay if cfg.adapt else 1.0, p["margin_mean"], p["margin_std"]
        mean = torch.where(mean == 0, now, alpha * mean + (1 - alpha) * now)                # Eq. 3
        std = torch.sqrt(alpha * std ** 2 + (1 - alpha) * (now - mean) ** 2)                # Eq. 4
        total = total + ((s - (mean + 2 * std)).clamp(min=0) ** 2).sum()                    # Eq. 5
    if parts["orthogonality"]:
        A = p["attribution"] / p["attribution"].max()
        A = torch.where(A > numpy.quantile(A, cfg.percentile), A, 0.0)
        total = total + parts["orthogonality"] * (A * s.clamp(min=0) ** 2).sum()
        spurious = A[A > 0].mean().item()
        if cfg.spurious == "similarity":
            spurious = (A * now.clamp(min=0)).sum().item() / A.sum().item()
    return cfg.adv_scale * max(spurious - 0.5, 0.1) * total                                 # Eq. 7


def reference(p, x, mask, sizes, cfg):
    """Eq. 8, 16: the weighted terms."""
    parts, n = hierarchical_sae.VARIANTS[cfg.variant], mask.sum()
    f, choice = encode(p, x.double() / p["scale"] - p["b_dec"], mask, sizes, cfg, parts["temporal"])
    terms = standard(p, x, f, mask, cfg)
    if "l1" in terms and cfg.l1_reduction == "mean":
        terms["l1"] = terms["l1"] / f.shape[-1]
    if parts["temporal"] and cfg.lambda_temp:
        image = f @ p["W_dec"] * mask[..., None]
        total = sum(temporal_terms(p, *window, cfg) for window in zip(f, image, mask))
        names = ("consistency", "contrastive", "prediction")
        terms |= zip(names, cfg.lambda_temp * total / n)
    if len(sizes) > 1:
        share = choice[mask].mean(0)
        entropy = -(share * torch.log(share.clamp(min=1e-12))).sum()
        terms["routing"] = cfg.routing_weight * (math.log(len(sizes)) - entropy)
    if parts["margin"] or parts["orthogonality"]:
        terms["adversarial"] = adversarial(p, f[mask], cfg, parts)
    return terms


def terms_of(sae, x, mask):
    """All terms of a step, as train() puts them together; statistics; the code."""
    terms, stats, (f, _, _) = hierarchical_sae.losses(sae, x, mask, mask.sum(), 0, sae.cfg)
    if sae.parts["margin"] or sae.parts["orthogonality"]:
        terms["adversarial"] = hierarchical_sae.adversarial_loss(sae, f, mask, sae.cfg)[0]
    return terms, stats, f


CASES = tuple(dict(variant=name) for name in hierarchical_sae.VARIANTS) + (
    dict(compose="literal"), dict(compose="parallel"), dict(causal=True),
    dict(compose="parallel", conv=False, causal=True), dict(consistency="cosine", tau=0.2),
    dict(lambda_temp=0.0), dict(gru_divisor=1, checkpointing=True), dict(activation="topk"),
    *(dict(variant="hierarchical", **flags) for flags in (
        dict(levels=1), dict(levels=5), dict(routing="top1"), dict(routing="soft"),
        dict(activation="topk"), dict(activation="topk", routing="top1"),
        dict(recon_reduction="mean", l1_reduction="mean", routing_weight=3.0))),
    *(dict(variant="self-aligning", **flags) for flags in (
        dict(similarity="decoder"), dict(adapt=False), dict(margin_decay=0.5))),
    *(dict(variant="adversarial", **flags) for flags in (
        dict(activation="topk", expansion=4), dict(l1=1.0, percentile=0.3, adv_scale=7.0),
        dict(spurious="similarity", similarity="decoder", percentile=0.0))))


def test_hierarchical_losses_equal_the_equations():
    """Shifted down some tokens have no feature: their c_psi is 0 and passes no gradient
    (through the straight-through gate it would, 1e8)."""
    for seed, shift, cases in ((1, 0.6, CASES), (2, -0.3, ({}, dict(routing="top1")))):
        x, mask = mixed(T=10, D=16, seed=seed)
        for flags in cases:
            sae = hs(shift=shift, **flags)
            follows(lambda sae, x: terms_of(sae, x, mask),
                    lambda p: reference(p, x, mask, sae.sizes, sae.cfg), sae, x, mask, flags)
            assert shift > 0 or not sae.encode(x, mask)[mask].any(-1).all(), flags
    refused_with("heads", shaken, "hierarchical_sae", 12)
    sae, terms = hs(), []                                      # fp32 under autocast, too
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            terms.append(hierarchical_sae.temporal_losses(sae, x.relu(), x, mask, sae.cfg))
    assert terms[0] == terms[1]


def test_hierarchical_margin_by_hand():
    """Eq. 3 to 5 over steps (0.0: feature silent)."""
    sae = hs(variant="self-aligning")
    sae.margin_mean.zero_(), sae.margin_std.zero_()
    mean, std = 0.2, 0.0
    for s in (0.2, 0.4, 0.0, 0.4, 0.1):
        if s:
            mean = 0.95 * mean + 0.05 * s
            std = math.sqrt(0.95 * std ** 2 + 0.05 * (s - mean) ** 2)
        margin = hierarchical_sae.update_margin(sae, torch.full((16,), s), sae.cfg)
        assert torch.allclose(margin, torch.tensor(mean + 2 * std)), s


def test_hierarchical_attribution_is_the_gradient_at_the_code():
    """Eq. 6 for a linear decoder: dL/dz = 2/n (x_hat - x) W_dec^T + lambda_1/n, scored tokens."""
    x, mask = mixed(T=10, D=16)
    for which in ("active", "all"):
        sae = hs(variant="adversarial", attribution=which, similarity="decoder")
        terms, _, f = terms_of(sae, x, mask)
        sum(terms.values()).backward()
        hierarchical_sae.update_attribution(sae, f, sae.cfg)
        grad = 2 * ((sae.decode(f) - x) / 1.7) @ sae.W_dec.t() + 0.04
        grad = grad / mask.sum() * (f > 0 if which == "active" else 1)
        assert torch.allclose(sae.attribution, grad[mask].norm(dim=0), rtol=1e-4), which
        assert not sae.attribution.requires_grad


def test_hierarchical_monitor_by_hand():
    """Sec. 5.2: plain means until their weight falls to 1 - 0.99, then the newest counts 1 %;
    Sec. 6.1 from them."""
    (x, mask), sae, want = mixed(T=10, D=16), hs(variant="hierarchical"), 0.0
    for step, newest in ((0, 1.0), (1, 0.5), (1000, 0.01)):
        f, p, choice = (v.detach() for v in sae.code((1 + step) * x, mask))
        hierarchical_sae.update_monitor(sae, f, p, choice, mask, mask.sum(), step, sae.cfg)
        f = f[mask]
        mean = torch.stack([f.mean(0), f.square().mean(0), (f > 0).float().mean(0)])
        want = (1 - newest) * want + newest * mean
        assert torch.allclose(sae.feature_ema, want, rtol=1e-4, atol=1e-6), step
    assert abs(sae.route_ema[0].sum() - 1) < 1e-5, "shares of the levels"
    levels, (mean, square, _) = hierarchical_sae.level_metrics(sae), sae.feature_ema
    variance = [part.mean() for part in (square - mean ** 2).split(sae.sizes)]
    assert abs(levels["variance_drop"] - (1 - variance[2] / variance[0])) < 1e-6
