"""Checks of the exercises in docs/exercises.md: `python test_all.py exercise_3`.

A check passes on a right answer, and fails on the unchanged script with a sentence that says what
is wrong. tests/test_docs.py holds each to the right and the wrong patch of docs/solutions.
"""
import itertools
import math

from tests import helpers
from tests.helpers import Heldout, data, folder, tiny, weights

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks


def start(script, **values):
    """The script as it is now; an untrained SAE with random biases and scale 2; its Config."""
    sae = helpers.model(script, **values)
    sae.scale.fill_(2.0)
    return helpers.SCRIPTS[script], sae, sae.cfg


def close(a, b, tolerance=1e-4):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def exercise_1():
    """What weighs against the error is divided as the error is, so lambda keeps its meaning."""
    x, mask = data()
    for flags in (dict(temporal=False), dict(buffers=False, variance_weights="mean")):
        found = {}
        for name in ("sum", "mean"):
            tsae, sae, cfg = start("tsae", recon_reduction=name, **flags)
            found[name] = tsae.losses(sae, x, mask, mask.sum(), 1500, cfg)[0]
        for name, value in found["sum"].items():
            ratio = (value / found["mean"][name]).item()
            assert math.isclose(ratio, 16, rel_tol=1e-4), (
                f"averaging makes {name} {ratio:.3g} times smaller, the error D = 16 times")


def exercise_2():
    """Rows of W_dec are free; the loss is the same if a feature shrinks while its row grows."""
    tsae, sae, cfg = start("tsae", temporal=False)
    (x, mask), size = data(), torch.randn(32).exp()
    before = tsae.losses(sae, x, mask, mask.sum(), 0, cfg)[0]
    for p, factor in ((sae.W_dec, size[:, None]), (sae.W_enc, 1 / size), (sae.b_enc, 1 / size)):
        p.data.mul_(factor)
    after = tsae.losses(sae, x, mask, mask.sum(), 0, cfg)[0]
    for name, value in before.items():
        assert close(value, after[name]), f"{name}: {value:.4f}, then {after[name]:.4f}"
    sum(after.values()).backward()                         # d loss / d log(size), by feature
    encoder = (sae.W_enc.grad * sae.W_enc).sum(0) + sae.b_enc.grad * sae.b_enc
    decoder = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert close(encoder, decoder, 1e-3), "the norm needs its gradient"
    with folder():
        tiny(tsae, "a", 5, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--eval", "none")
        norm = weights("a")["W_dec"].norm(dim=1)
    assert (norm - 1).abs().max() > 1e-3, "the rows are still put back to norm 1"


def exercise_3():
    """BatchTopK: k n entries of n scored tokens, shared out as they come; sinks take none."""
    _, sae, _ = start("tsae", temporal=False, activation="topk", k=3)
    x, mask = data(masked=((0, 0),))
    x[0, 0] *= 1000                                                  # an attention sink
    pre, n = F.relu((x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc)[mask], mask.sum()
    least = pre.flatten().topk(3 * n).values[-1]
    for f in (sae.encode(x, mask)[mask], sae.encode(x[mask])):
        on = (f > 0).sum()
        assert on == 3 * n, f"{on} are on for {n} scored tokens at k = 3"
        assert close(f, torch.where(pre >= least, pre, 0.0)), "these are not the largest"


def exercise_4():
    """The temperature falls in a straight line from the first to the last step."""
    lens, _, cfg = start("temporal_lens")
    for steps in (2, 11, 400):
        tau = torch.tensor([lens.temperature(step, steps, cfg) for step in range(steps)])
        off = (tau - torch.linspace(5.0, 0.1, steps)).abs().max()
        assert off < 1e-5, f"{steps} steps from {tau[0]:.3f} to {tau[-1]:.3f}: off by {off:.3f}"
    assert lens.temperature(0, 1, cfg) == 5.0, "a run of one step"


def exercise_5():
    """Masks are 0 or 1; their logits learn through the sigmoid's gradient."""
    _, sae, _ = start("temporal_lens", T=7)
    m = sae.position_mask(7)
    assert ((m == 0) | (m == 1)).all(), "the mask is not hard"
    assert torch.equal(m > 0.5, sae.alpha > 0), "on is where alpha > 0"
    assert m.requires_grad, "the logits get no gradient: nothing can learn which positions"
    weight, soft = torch.randn(m.shape), torch.sigmoid(sae.alpha.detach() / sae.tau)
    (m * weight).sum().backward()
    assert close(sae.alpha.grad, weight * soft * (1 - soft) / sae.tau), "not the sigmoid's gradient"


def exercise_6():
    """One mask for 16 positions in a row."""
    _, sae, _ = start("temporal_lens", T=40)
    shape = tuple(sae.alpha.shape)
    assert shape == (3, 32), f"alpha has shape {shape}, 40 positions are 3 blocks"
    for T in (40, 9):
        soft = torch.sigmoid(sae.alpha[torch.arange(T) // 16] / sae.tau)
        assert close(sae.position_mask(T), soft), "position t belongs to block t // 16"


def exercise_7():
    """mixing's `leak`: how much a code depends on later tokens; 0 for a causal encoder."""
    x, mask = data(B=16, T=40)
    later = torch.cat([x[:, :21], x.roll(1, 0)[:, 21:]], 1)
    for padding in ("causal", "circular"):
        mtsae, sae, _ = start("mtsae", T=40, padding=padding, batch_norm="off", rates="1,4")
        sae.kernels.data.uniform_()
        found = mtsae.mixing(sae, Heldout(x, mask)).get("leak")
        assert found is not None, "mixing returns no 'leak'"
        a, b = sae.encode(x)[:, 20], sae.encode(later)[:, 20]
        want = ((a - b).norm() / a.norm()).item()
        assert math.isclose(found, want, rel_tol=1e-3, abs_tol=1e-6), f"{found} and not {want}"
        assert found == 0 if padding == "causal" else found > 0.01, f"{padding}: {found}"


def exercise_8():
    """Coherence over all lags up to 16, as one product and not as a loop over lags."""
    (x, mask), kept = data(T=24), {0.0: [], 0.15: []}          # by weight: for the gradient
    for weight, tensors in kept.items():
        mtsae, sae, cfg = start("mtsae", T=24, batch_norm="off", coherence=weight)
        n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])      # as train() counts
        with saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            terms = mtsae.losses(sae, x, mask, n, 0, cfg)[0]
    f, total, pairs = sae.encode(x, mask).double(), 0.0, 0
    for lag in range(1, 17):
        both = mask[:, lag:] & mask[:, :-lag]
        total += (F.cosine_similarity(f[:, lag:], f[:, :-lag], dim=-1) * both).sum().item()
        pairs += both.sum().item()
    assert n[1] == pairs, f"{n[1]} pairs counted, {pairs} are 1 to 16 tokens apart"
    assert math.isclose(terms["coherence"].item(), -0.15 * total / pairs, rel_tol=1e-4)
    more = len(kept[0.15]) - len(kept[0.0])
    assert more < 30, f"{more} tensors are kept for the gradient: a loop over the lags?"
    sae.b_enc.data.fill_(-1e3)                                       # no feature is active
    mtsae.losses(sae, x, mask, n, 0, cfg)[0]["coherence"].backward()
    assert sae.W_enc.grad.isfinite().all(), "empty codes"


def exercise_9():
    """AuxK: dead features, and nothing else, learn what the others left over."""
    (x, mask), (mtsae, sae, cfg) = data(T=40), start(
        "mtsae", T=40, activation="topk", k=2, expansion=3, dead_after=5)
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])
    sae.eval()                                                      # batch norm as it is
    alive = mtsae.losses(sae, x, mask, n, 0, cfg)[0].get("aux", 0)
    assert not alive, "nothing is dead, and still there is a term"
    sae.inactive[:7] = 6
    terms = mtsae.losses(sae, x, mask, n, 0, cfg)[0]
    assert "aux" in terms, "features are dead, and there is no term 'aux'"
    with torch.no_grad():
        pre = sae.temporal(x, mask) @ sae.W_enc[:, :7] + sae.b_enc[:7]
        rest, (values, index) = (x - sae(x, mask)[0]) / sae.scale, pre.topk(4, -1)
        guess = torch.zeros_like(pre).scatter(-1, index, values.relu()) @ sae.W_dec[:7]
        value = ((rest - guess).square().sum(-1) * mask).sum() / mask.sum() / 32
    assert close(terms["aux"], value), f"{terms['aux']:.4f} and not {value:.4f}"
    terms["aux"].backward()
    for name, p in sae.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if name in ("W_enc", "b_enc", "W_dec"):
            dead, grad = (grad.t() if name == "W_enc" else grad).tensor_split((7,))
            assert dead.any(), f"the dead features' {name} gets no gradient"
        assert not grad.any(), f"{name} of living features gets a gradient"


def exercise_10():
    """Two features drift together: beside the others, and not their own past, they stand out."""
    hierarchical, sae, cfg = start("hierarchical_sae", variant="self-aligning", expansion=4)
    gen, over = torch.Generator().manual_seed(0), []
    for step in range(200):
        s = 0.3 + 0.02 * torch.randn(64, generator=gen)
        s[:2] = 0.3 + 0.65 * step / 200
        over.append(s > hierarchical.update_margin(sae, s, cfg))
    over = torch.stack(over).float()                                # (200, 64)
    held = 1 - over[100:, :2].mean()
    assert held == 0, f"the margin holds the two back in {held:.0%} of the last 100 steps"
    assert over[100:, 2:].mean() < 0.02, "the margin is below features that do nothing unusual"


def exercise_11():
    """Matryoshka: the lowest level alone, the lowest two and all three have to reconstruct."""
    x, mask = data()
    for levels in (3, 1):
        hierarchical, sae, cfg = start("hierarchical_sae", variant="hierarchical", levels=levels)
        terms, stats, _ = hierarchical.losses(sae, x, mask, mask.sum(), 0, cfg)
        f, errors = sae.encode(x, mask).detach(), []
        for end in itertools.accumulate(sae.sizes):
            kept = f * (torch.arange(len(sae.W_dec)) < end)
            errors.append(((sae.decode(kept) - x)[mask] / sae.scale).square().sum() / mask.sum())
        want, found = sum(errors) / levels, terms["recon"]
        assert close(found, want), f"{levels} levels: {found:.4f}, not {want:.4f}"
        assert close(stats["error"], errors[-1]), "the logged error is that of the whole code"


def exercise_12():
    """The GRU predicts the change: without its output, tomorrow is like today."""
    hierarchical, sae, cfg = start("hierarchical_sae", variant="temporal", gru_divisor=4)
    x, mask = data()
    before = sae.predict(x)
    sae.W_next.weight.data.zero_()
    assert close(sae.predict(x), x), "a GRU that says nothing does not say 'as now'"
    assert not close(before, x), "the GRU's change is not added"
    f = sae.encode(x, mask)
    image, pair = f @ sae.W_dec * mask[..., None], mask[:, 1:] & mask[:, :-1]
    change = ((image[:, 1:] - image[:, :-1]).square().mean(-1) * pair).sum()
    found = hierarchical.temporal_losses(sae, f, image, mask, cfg)["prediction"]
    assert close(found, change), "the loss does not use the same prediction"
