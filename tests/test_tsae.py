"""tsae.py (paper C) against a reference that goes window by window and lag by lag."""
import tsae                         # before torch: common.py sets how OpenMP threads wait
import torch
import torch.nn.functional as F

from tests.helpers import LinearSAE, activations, config, mixed, model
from tests.test_scripts import eq_4, follows


def shaken(script, D=6, **values):
    """An untrained SAE in which nothing that counts is a constant: biases, gains, statistics."""
    sae = model(script, D, **{"T": 20, "k": 3, "expansion": 1, **values})
    gen = torch.Generator().manual_seed(0)
    sae.scale.fill_(1.7)
    for name, value in sae.named_buffers():
        if value.dim() and value.is_floating_point():
            value.copy_(0.3 * torch.rand(value.shape, generator=gen))
            value[::5] *= not name.startswith("margin")        # 0: a feature not seen yet
    return sae


def keep_largest(v, k):
    """The k largest entries of the last axis where they are positive, else 0."""
    return torch.relu(v) * (v >= v.sort(descending=True).values[..., k - 1, None])


def encode(p, x, cfg):
    """Sec. 3.1: h_t = f(x_t), x already in units of the scale; LayerNorm of Sec. 4.3."""
    norm = cfg.layer_norm if cfg.temporal else "off"
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if norm == "pre":
        h = F.layer_norm(h, h.shape[-1:], p["ln.weight"], p["ln.bias"])
    h = keep_largest(h, cfg.k) if cfg.activation == "topk" else torch.relu(h)
    return F.layer_norm(h, h.shape[-1:], p["ln.weight"], p["ln.bias"]) if norm == "post" else h


def feature_weights(h, cfg):
    """Eq. 3 for the scored tokens of one window (n, F): from the variance of each feature."""
    if cfg.variance_weights == "off":
        return 1.0
    variance = h.var(0, unbiased=False)
    variance = torch.where(variance < cfg.min_variance, 0.0, variance)
    total = variance.mean() if cfg.variance_weights == "mean" else variance.sum()
    weight = variance / total if total > 0 else variance
    return weight if cfg.weight_gradient else weight.detach()


def lag_losses(compared, h, mask, cfg):
    """sum_s lambda_s L_s of one window (T, F): every lag of every scale, all scored pairs."""
    if not mask.any():
        return 0.0
    weight, total = feature_weights(h[mask], cfg), 0.0
    for first, last, value in ((1, 3, cfg.lambda_short), (4, 15, cfg.lambda_medium),
                               (16, 127, cfg.lambda_long)):
        each = value / (last - first + 1) if cfg.lag_reduction == "mean" else value
        for i in range(first, min(last + 1, len(h))):
            gap = (compared[i:] - compared[:-i])[mask[i:] & mask[:-i]]
            total = total + each * (weight * gap ** 2).sum()
    return total


def standard(p, x, f, mask, cfg, weight=1.0):
    """Squared error and L1 of codes f, tokens times their weights, averaged over scored ones."""
    error = (x.double() / p["scale"] - f @ p["W_dec"] - p["b_dec"]) ** 2
    error = error.mean(-1) if cfg.recon_reduction == "mean" else error.sum(-1)
    error = torch.sqrt(error) if getattr(cfg, "recon", "squared") == "norm" else error    # Eq. D.1
    terms = {"recon": (weight * error)[mask].sum() / mask.sum()}
    if cfg.activation == "relu":
        size = torch.where(f < 0, -f, f).sum(-1)               # slope 1 at 0: closed gates learn
        terms["l1"] = cfg.l1 * (weight * size)[mask].sum() / mask.sum()
    return terms


def reference(p, x, mask, step, cfg):
    """Eq. 1, 2: the weighted terms, each averaged over scored tokens."""
    h = compared = encode(p, x.double() / p["scale"], cfg)
    terms = standard(p, x, h, mask, cfg)
    if cfg.temporal:
        if cfg.buffers and step < 2000:                        # Sec. 4.3: mixed in at 0.25
            compared = 0.75 * h + 0.25 * p["temporal_buffer"]
        ramp = min(1.0, max(0.0, (step - cfg.ramp_from) / (2000 - cfg.ramp_from)))
        lags = sum(lag_losses(*window, cfg) for window in zip(compared, h, mask))
        terms["recon"] = eq_4(step) * terms["recon"]
        terms["temporal"] = ramp * cfg.temporal_scale * lags / mask.sum()
    return terms


CASES = (                           # every flag, at steps where the schedules differ
    (0, {}), (1500, {}), (5000, dict(temporal=False)), (5000, dict(recon_reduction="mean", l1=0.3)),
    (700, dict(activation="topk")), (700, dict(layer_norm="post")),
    (700, dict(activation="topk", expansion=4, layer_norm="off")),    # F / k = 8: the fast path
    (700, dict(activation="topk", layer_norm="post")), (700, dict(buffers=False, ramp_from=500)),
    (5000, dict(lag_reduction="mean", min_variance=0.5)), (5000, dict(variance_weights="mean")),
    (5000, dict(variance_weights="off")), (5000, dict(min_variance=1e9)),
    (700, dict(weight_gradient=True, min_variance=0.5)),
    (5000, dict(temporal_scale=50.0, expansion=3, lambda_short=0.0, lambda_long=0.3)))


def test_tsae_losses_equal_the_equations():
    """Of 131 tokens: pairs 127 apart count, 128 apart do not."""
    x, mask = mixed(T=131, seed=5)
    for step, flags in CASES:
        sae = shaken("tsae", T=131, warmup=2000, **flags)
        follows(lambda sae, x: tsae.losses(sae, x, mask, mask.sum(), step, sae.cfg),
                lambda p: reference(p, x, mask, step, sae.cfg), sae, x, mask, (step, flags))


def test_tsae_lags_do_not_cancel():
    """In fp32 at 10,000 deviations from 0, whatever the products' precision."""
    cfg, mask = config(tsae, variance_weights="off"), torch.ones(1, 24, dtype=torch.bool)
    f = 100 + 0.01 * torch.rand(1, 24, 3, generator=torch.Generator().manual_seed(0))
    g = f.requires_grad_().detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = tsae.temporal_loss(f, mask, cfg), lag_losses(g[0], g[0], mask[0], cfg)
    ours.backward(), theirs.backward()
    for a, b in ((ours, theirs), (f.grad, g.grad)):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_tsae_buffers_and_noise_stop_after_the_warm_up():
    """Sec. 4.2, 4.3; a position without a scored token keeps its state."""
    sae = model("tsae", 8, T=20, warmup=10)
    f, before = torch.rand(2, 20, 16), sae.temporal_buffer.clone()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 4], mask[:, 5] = False, False
    assert abs(before.std() - 0.1) < 0.02
    want = 0.75 * before + 0.25 * f.mean(0)
    want[4], want[5] = 0.75 * before[4] + 0.25 * f[0, 4], before[5]
    for step, state in ((10, before), (9, want)):
        sae.update_buffer(f, mask, step)
        assert torch.allclose(sae.temporal_buffer, state, atol=1e-6)
    for step, low, high in ((0, 0.02, 0.04), (5, 0.01, 0.02), (10, 0.0, 0.0)):
        for p in sae.parameters():
            p.grad = torch.full_like(p, 3.0)                   # of root mean square 3: noise 0.03
        tsae.add_gradient_noise(sae, step, sae.cfg)
        assert low <= (sae.W_enc.grad - 3).std() <= high, step


def test_tsae_transitions_by_hand():
    """Sec. 5.3: features are the columns; of the last one no scored token has any."""
    f = torch.tensor([[[4.0, 2.0, 0.0], [4, 0, 0], [0, 0, 0], [0, 2, 0], [9, 9, 9], [4, 0, 0]]])
    mask = torch.tensor([[True, True, True, True, False, True]])       # pairs 0-1, 1-2 and 2-3
    sae = LinearSAE(torch.eye(3), torch.eye(3))
    found = tsae.transitions(sae, activations(f, mask))["transitions"]
    for name, value in dict(p_stay=0.25, p_on=0.25, variance=(16 + 4) * 0.6 * 0.4 / 3).items():
        assert abs(found[name] - value) < 1e-5, found
