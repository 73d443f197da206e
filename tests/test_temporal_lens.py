"""temporal_lens.py (paper E) against a reference written from its equations."""
import temporal_lens                # before torch: common.py sets how OpenMP threads wait
import torch

from tests.helpers import config, folder, log, mixed, tiny, weights
from tests.test_scripts import follows
from tests.test_tsae import keep_largest, shaken, standard


def encode(p, h, m, cfg):
    """Eq. 3: f_t = ReLU(W_e h_t + b_e) * m_t for h in units of the scale; TopK after it."""
    h = h - p["b_dec"] if cfg.pre_bias else h
    f = torch.relu(h @ p["W_enc"] + p["b_enc"]) * m
    return keep_largest(f, cfg.k) if cfg.activation == "topk" else f


def position_mask(p, length, cfg):
    """Eq. 4: m = sigma(alpha / tau); beyond T the last position's goes on."""
    if not cfg.masks:
        return torch.ones(length, 1)
    alpha = torch.stack([p["alpha"][min(t, len(p["alpha"]) - 1)] for t in range(length)])
    return 1 / (1 + torch.exp(-alpha / p["tau"]))


def reference(p, x, mask, cfg):
    """Eq. 8 averaged over scored tokens, w_t normalised to sum to T and without a gradient."""
    f = encode(p, x.double() / p["scale"], position_mask(p, 20, cfg), cfg)
    w = 1.0 if cfg.uniform_weights else p["error_ema"] / p["error_ema"].mean()
    return standard(p, x, f, mask, cfg, w)


CASES = ({}, dict(masks=False), dict(uniform_weights=True), dict(pre_bias=True, l1=1.0),
         dict(static_masks=True), dict(activation="topk"), dict(recon_reduction="mean"),
         dict(activation="topk", masks=False, pre_bias=True), dict(activation="topk", expansion=4))


def test_temporal_lens_losses_equal_the_equations():
    """And codes of windows that are shorter (first masks) or longer (the last one goes on), and of
    vectors without a position (the mean mask)."""
    whole, mask = mixed(T=26, seed=5)
    x, mask = whole[:, :20], mask[:, :20]
    for flags in CASES:
        sae = shaken("temporal_lens", **flags)
        cfg = sae.cfg
        follows(lambda sae, x: temporal_lens.losses(sae, x, mask, mask.sum(), 0, cfg),
                lambda p: reference(p, x, mask, cfg), sae, x, mask, flags)
        error = ((x - sae(x)[0]) / sae.scale).square().sum(-1) * mask  # for Eq. 6: sums and counts
        errors = temporal_lens.losses(sae, x, mask, mask.sum(), 0, cfg)[2]
        assert torch.allclose(errors, torch.stack([error, mask]).sum(1), rtol=1e-4), flags
        p = {name: value.double() for name, value in sae.state_dict().items()}
        masks = {length: position_mask(p, length, cfg) for length in (7, 20, 26)}
        for part, m in ((x[:, 8], masks[20].mean(0)), *((whole[:, :n], masks[n]) for n in masks)):
            want = encode(p, part.double() / p["scale"], m, cfg).float()
            assert torch.allclose(sae.encode(part), want, atol=1e-5), (flags, part.shape)


def test_temporal_lens_masks_at_the_start_and_folded():
    """alpha ~ N(0, 1/T): 1/T the variance, or on request the deviation; fold: on at alpha > 0."""
    for reading, std in (("variance", 64 ** -0.5), ("deviation", 1 / 64)):
        sae = temporal_lens.TemporalLens(400, config(temporal_lens, T=64, alpha_init=reading))
        assert abs(sae.alpha.std() / std - 1) < 0.02 and abs(sae.alpha.mean()) < 0.05 * std
    sae = shaken("temporal_lens")
    sae.alpha.data[0, :2] = torch.tensor([1e-4, -1e-4])
    sae.tau.fill_(1e-30)                                       # as evals/positions.py does
    assert torch.equal(sae.position_mask(20), (sae.alpha > 0).float())


def test_temporal_lens_position_weights_by_hand():
    """Eq. 6: 0.99 w + 0.01 error; a position without a scored token keeps its average."""
    errors = torch.tensor([[40.0, 30.0, 0.0, 8.0], [4.0, 2.0, 0.0, 1.0]])      # means 10, 15, -, 8
    moved = torch.tensor([0.99 + 0.10, 1.98 + 0.15, 3.0, 1.98 + 0.08])
    for where, want in (("use", moved), ("store", 4 * moved / moved.sum())):
        sae = shaken("temporal_lens", T=4, ema_norm=where)
        sae.error_ema.copy_(torch.tensor([1.0, 2.0, 3.0, 2.0]))
        temporal_lens.update_position_weights(sae, errors, sae.cfg)
        assert torch.allclose(sae.error_ema, want), where


def test_temporal_lens_micro_batches_rate_of_the_logits_and_weights():
    """In real runs: the same weights in micro-batches; w_t = 1 at first."""
    with folder():
        for out, *flags in (("lens",), ("split", "--micro_batch", 1), ("fast", "--alpha_lr", 0.03)):
            tiny(temporal_lens, out, 12, "--log_every", 1, "--eval", "none", *flags)
        rows, (lens, split, fast) = log("lens"), map(weights, ("lens", "split", "fast"))
    first = temporal_lens.TemporalLens(lens["alpha"].shape[1], config(temporal_lens)).alpha
    change, faster = ((state["alpha"] - first).abs().mean() for state in (lens, fast))
    assert faster > 5 * change > 0
    assert all(torch.allclose(value, split[name], atol=1e-4) for name, value in lens.items())
    assert abs(rows[0]["tau"] - 5.0) < 1e-6 > abs(rows[-1]["tau"] - 0.1)
    assert abs(rows[0]["recon"] / rows[0]["error"] - 1) < 1e-6
