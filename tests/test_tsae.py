"""tsae.py (paper C) against references that go token by token and lag by lag."""
import tsae                         # before torch: common.py sets how OpenMP threads wait
import torch
from tests.helpers import Heldout, config
from tests.test_scripts import agree, eq_4, keep_largest, layer_norm, logged, mixed, shake

# --- Sec. 3.1, Eq. 1 to 4 and Sec. 4.3 of paper C --------------------------------------------


def encode_token(p, x, cfg):
    """Sec. 3.1: h_t = f(x_t), x already in units of the scale; LayerNorm of Sec. 4.3."""
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    norm = cfg.layer_norm if cfg.temporal else "off"
    if norm == "pre":
        h = layer_norm(h, p["ln.weight"], p["ln.bias"])
    h = keep_largest(h, cfg.k) if cfg.activation == "topk" else torch.relu(h)
    return layer_norm(h, p["ln.weight"], p["ln.bias"]) if norm == "post" else h


def feature_weights(h, cfg):
    """Eq. 3 for one window: from the variance of each feature over its scored tokens."""
    mean = sum(h) / len(h)
    variance = sum((v - mean) ** 2 for v in h) / len(h)
    variance = variance if cfg.weight_gradient else variance.detach()
    if cfg.variance_weights == "off":
        return torch.ones_like(variance)
    variance = torch.where(variance < cfg.min_variance, 0.0, variance)
    if variance.sum() == 0:
        return variance
    share = variance / variance.sum()
    return share * len(share) if cfg.variance_weights == "mean" else share


def lag_losses(compared, codes, mask, cfg):
    """sum_s lambda_s L_s of one window: every lag of every scale, every pair of scored tokens."""
    T = len(mask)
    scored = [t for t in range(T) if mask[t]]
    if not scored:
        return 0.0
    weight = feature_weights([codes[t] for t in scored], cfg)
    total = 0.0
    for first, last, value in ((1, 3, cfg.lambda_short), (4, 15, cfg.lambda_medium),
                               (16, 127, cfg.lambda_long)):
        each = value / (last - first + 1) if cfg.lag_reduction == "mean" else value
        for i in range(first, last + 1):
            for t in range(T - i):
                if mask[t] and mask[t + i]:
                    total = total + each * (weight * (compared[t + i] - compared[t]) ** 2).sum()
    return total


def reference(x, mask, step, cfg):
    """Eq. 1, 2: the weighted terms, each averaged over scored tokens."""
    def terms(p):
        n, out = mask.sum().item(), {"recon": 0.0}
        for b in range(len(x)):
            h = [encode_token(p, v, cfg) for v in x[b].double() / p["scale"]]
            for t in range(len(h)):
                if mask[b, t]:
                    error = x[b, t].double() / p["scale"] - (h[t] @ p["W_dec"] + p["b_dec"])
                    mean = len(error) if cfg.recon_reduction == "mean" else 1
                    w = eq_4(step) if cfg.temporal else 1.0
                    out["recon"] = out["recon"] + w * (error ** 2).sum() / mean / n
                    if cfg.activation == "relu":
                        out["l1"] = out.get("l1", 0.0) + cfg.l1 * h[t].abs().sum() / n
            if cfg.temporal:
                compared = h
                if cfg.buffers and step < 2000:                # Sec. 4.3: mixed in at 0.25
                    compared = [0.75 * v + 0.25 * p["temporal_buffer"][t] for t, v in enumerate(h)]
                ramp = min(1.0, max(0.0, (step - cfg.ramp_from) / (2000 - cfg.ramp_from)))
                lags = lag_losses(compared, h, mask[b], cfg)
                out["temporal"] = out.get("temporal", 0.0) + ramp * cfg.temporal_scale * lags / n
        return out
    return terms


CASES = (                           # every flag, at steps where the schedules differ
    (0, {}), (700, {}), (1500, {}), (5000, {}), (5000, dict(temporal=False)),
    (700, dict(activation="topk")), (5000, dict(activation="topk", temporal=False)),
    (700, dict(activation="topk", expansion=4, layer_norm="off")),    # F / k = 8: the fast path
    (700, dict(activation="topk", layer_norm="post")), (700, dict(layer_norm="post")),
    (700, dict(layer_norm="off")), (700, dict(buffers=False)), (5000, dict(lag_reduction="mean")),
    (5000, dict(variance_weights="mean")), (5000, dict(variance_weights="off")),
    (5000, dict(min_variance=0.5)), (5000, dict(min_variance=1e9)),
    (5000, dict(weight_gradient=True)), (700, dict(weight_gradient=True, min_variance=0.5)),
    (700, dict(ramp_from=500)), (400, dict(ramp_from=500)),
    (5000, dict(temporal_scale=50.0, expansion=3)), (700, dict(lambda_short=0.0, lambda_long=0.3)),
    (5000, dict(recon_reduction="mean", l1=0.3)))


def test_tsae_losses_equal_the_equations():
    x, mask = mixed()
    for step, flags in CASES:
        cfg = config(tsae, T=20, warmup=2000, **{"k": 3, **flags})
        sae = shake(tsae.TSAE(6, cfg))

        def compute(sae):
            return tsae.losses(sae, x.to(sae.W_dec), mask, mask.sum(), step, cfg)
        agree(sae, lambda sae: compute(sae)[0], reference(x, mask, step, cfg), (step, flags))
        logged(*compute(sae)[1:], sae, x, mask, flags)


def test_tsae_lags_end_at_127_and_do_not_cancel():
    """131 tokens: pairs 127 apart count, 128 apart do not. And fp32 at 10,000 deviations from 0."""
    cfg = config(tsae, variance_weights="off", lambda_long=0.1)
    gen = torch.Generator().manual_seed(0)
    for T, offset, noise, tolerance in ((131, 0.0, 1.0, 1e-5), (24, 100.0, 0.01, 1e-3)):
        f = (offset + noise * torch.rand(1, T, 3, generator=gen)).requires_grad_()
        g, mask = f.detach().double().requires_grad_(), torch.ones(1, T, dtype=torch.bool)
        ours, theirs = tsae.temporal_loss(f, mask, cfg), lag_losses(g[0], g[0], mask[0], cfg)
        ours.backward(), theirs.backward()
        assert abs(ours - theirs) < tolerance * theirs, T
        assert (f.grad - g.grad).norm() < tolerance * g.grad.norm(), T
    weight = tsae.lag_weights(131, cfg)[0]
    for lag, value in ((0, 0), (1, 0.01), (3, 0.01), (4, 0.005), (15, 0.005), (16, 0.1), (127, 0.1),
                       (128, 0)):
        assert abs(weight[lag] - value) < 1e-8, lag


def test_tsae_buffers_and_noise_stop_after_the_warm_up():
    """Sec. 4.2, 4.3; a position without a scored token keeps its state."""
    cfg = config(tsae, T=20, warmup=10)
    sae, gen = tsae.TSAE(8, cfg), torch.Generator().manual_seed(0)
    f, before = torch.rand(2, 20, 8, generator=gen), sae.temporal_buffer.clone()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 4], mask[:, 5] = False, False
    assert abs(before.std() - 0.1) < 0.02 and torch.equal(sae.blend(f, 10), f)
    assert torch.allclose(sae.blend(f, 9), 0.75 * f + 0.25 * before)
    sae.update_buffer(f, mask, 10)
    assert torch.equal(sae.temporal_buffer, before)
    sae.update_buffer(f, mask, 9)
    for t in range(20):
        mean = f[0, 4] if t == 4 else f[:, t].mean(0)
        want = before[5] if t == 5 else 0.75 * before[t] + 0.25 * mean
        assert torch.allclose(sae.temporal_buffer[t], want, atol=1e-6), t
    for step, low, high in ((0, 0.02, 0.04), (5, 0.01, 0.02), (10, 0.0, 0.0), (99, 0.0, 0.0)):
        drawn = []
        for _ in range(2):                                     # the same noise for the same step
            for p in sae.parameters():
                p.grad = torch.full_like(p, 3.0)               # of root mean square 3: noise 0.03
            tsae.add_gradient_noise(sae, step, cfg)
            drawn.append(sae.W_enc.grad.clone())
        assert low <= (drawn[0] - 3).std() <= high and torch.equal(*drawn), step


def test_tsae_transitions_by_hand():
    """Sec. 5.3."""
    x, mask = mixed(T=12)
    sae = shake(tsae.TSAE(6, config(tsae, T=12, temporal=False)))
    f = sae.encode(x).detach().double()
    stays, starts, variances = [], [], []
    for i in range(6):
        now = [(f[b, t, i] > 0, f[b, t + 1, i] > 0) for b in range(3) for t in range(11)
               if mask[b, t] and mask[b, t + 1]]
        after_on, after_off = [z for a, z in now if a], [z for a, z in now if not a]
        if after_on:
            stays.append(sum(after_on) / len(after_on))
            starts.append(sum(after_off) / max(1, len(after_off)))
        windows = [f[b, mask[b], i] for b in range(3)]
        variances += [v.var(unbiased=False) if len(v) else 0 for v in windows]
    found = tsae.transitions(sae, Heldout(x, mask))["transitions"]
    for name, values in (("p_stay", stays), ("p_on", starts), ("variance", variances)):
        assert abs(found[name] - sum(values) / len(values)) < 1e-5, name
