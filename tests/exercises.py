"""Checks of the exercises in docs/exercises.md: `python test_all.py exercise_3`.

A check passes on a right answer, and fails on the unchanged script with a sentence that says what
is wrong. tests/test_docs.py holds each to the right and the wrong patch of docs/solutions.
"""
import itertools
import math

from tests.helpers import SCRIPTS, activations, folder, mixed, model, relative, tiny, weights

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks


def exercise_1():
    """What weighs against the error is divided as the error is, so lambda keeps its meaning."""
    x, mask = mixed(D=16)
    for flags in (dict(temporal=False), dict(buffers=False, variance_weights="mean")):
        found = {}
        for name in ("sum", "mean"):
            sae = model("tsae", recon_reduction=name, **flags)
            found[name] = SCRIPTS["tsae"].losses(sae, x, mask, mask.sum(), 1500, sae.cfg)[0]
        for name, value in found["sum"].items():
            ratio = (value / found["mean"][name]).item()
            assert math.isclose(ratio, 16, rel_tol=1e-4), (
                f"averaging makes {name} {ratio:.3g} times smaller, the error D = 16 times")


def exercise_2():
    """Rows of W_dec are free; the loss is the same if a feature shrinks while its row grows."""
    tsae, sae, size = SCRIPTS["tsae"], model("tsae", temporal=False), torch.randn(32).exp()
    x, mask = mixed(D=16)
    before = tsae.losses(sae, x, mask, mask.sum(), 0, sae.cfg)[0]
    for p, factor in ((sae.W_dec, size[:, None]), (sae.W_enc, 1 / size), (sae.b_enc, 1 / size)):
        p.data.mul_(factor)
    after = tsae.losses(sae, x, mask, mask.sum(), 0, sae.cfg)[0]
    for name, value in before.items():
        assert relative(value, after[name]) < 1e-4, f"{name}: {value:.4f}, then {after[name]:.4f}"
    sum(after.values()).backward()                         # d loss / d log(size), by feature
    encoder = (sae.W_enc.grad * sae.W_enc).sum(0) + sae.b_enc.grad * sae.b_enc
    decoder = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert relative(encoder, decoder) < 1e-3, "the norm needs its gradient"
    with folder():
        tiny(tsae, "a", 5, "--no-temporal", "--lr", 3e-3, "--lr_warmup", 1, "--eval", "none")
        norm = weights("a")["W_dec"].norm(dim=1)
    assert (norm - 1).abs().max() > 1e-3, "the rows are still put back to norm 1"


def exercise_3():
    """BatchTopK: k n entries of n scored tokens, shared out as they come; sinks take none."""
    sae, (x, mask) = model("tsae", temporal=False, activation="topk", k=3), mixed(D=16)
    x[~mask] *= 1000                                                 # attention sinks
    pre, n = F.relu((x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc)[mask], mask.sum()
    least = pre.flatten().topk(3 * n).values[-1]
    for f in (sae.encode(x, mask)[mask], sae.encode(x[mask])):
        on = (f > 0).sum()
        assert on == 3 * n, f"{on} are on for {n} scored tokens at k = 3"
        assert relative(f, torch.where(pre >= least, pre, 0.0)) < 1e-4, "these are not the largest"


def exercise_4():
    """The temperature falls in a straight line from the first to the last step."""
    lens, cfg = SCRIPTS["temporal_lens"], SCRIPTS["temporal_lens"].Config()
    for steps in (2, 11, 400):
        tau = torch.tensor([lens.temperature(step, steps, cfg) for step in range(steps)])
        off = (tau - torch.linspace(5.0, 0.1, steps)).abs().max()
        assert off < 1e-5, f"{steps} steps from {tau[0]:.3f} to {tau[-1]:.3f}: off by {off:.3f}"
    assert lens.temperature(0, 1, cfg) == 5.0, "a run of one step"


def exercise_5():
    """Masks are 0 or 1; their logits learn through the sigmoid's gradient."""
    sae = model("temporal_lens", T=7)
    m = sae.position_mask(7)
    assert ((m == 0) | (m == 1)).all(), "the mask is not hard"
    assert torch.equal(m > 0.5, sae.alpha > 0), "on is where alpha > 0"
    assert m.requires_grad, "the logits get no gradient: nothing can learn which positions"
    weight, soft = torch.randn(m.shape), torch.sigmoid(sae.alpha.detach() / sae.tau)
    (m * weight).sum().backward()
    slope = weight * soft * (1 - soft) / sae.tau
    assert relative(sae.alpha.grad, slope) < 1e-4, "not the sigmoid's gradient"


def exercise_6():
    """One mask for 16 positions in a row."""
    sae = model("temporal_lens", T=40)
    shape = tuple(sae.alpha.shape)
    assert shape == (3, 32), f"alpha has shape {shape}, 40 positions are 3 blocks"
    for T in (40, 9):
        soft = torch.sigmoid(sae.alpha[torch.arange(T) // 16] / sae.tau)
        assert relative(sae.position_mask(T), soft) < 1e-4, "position t belongs to block t // 16"


def exercise_7():
    """mixing's `leak`: how much a code depends on later tokens; 0 for a causal encoder."""
    x, mask = mixed(B=16, T=40, D=16)
    later = torch.cat([x[:, :21], x.roll(1, 0)[:, 21:]], 1)
    for padding in ("causal", "circular"):
        sae = model("mtsae", T=40, padding=padding, batch_norm="off", rates="1,4")
        sae.kernels.data.uniform_()
        found = SCRIPTS["mtsae"].mixing(sae, activations(x, mask)).get("leak")
        assert found is not None, "mixing returns no 'leak'"
        a, b = sae.encode(x)[:, 20], sae.encode(later)[:, 20]
        want = ((a - b).norm() / a.norm()).item()
        assert math.isclose(found, want, rel_tol=1e-3, abs_tol=1e-6), f"{found} and not {want}"
        assert found == 0 if padding == "causal" else found > 0.01, f"{padding}: {found}"


def exercise_8():
    """Coherence over all lags up to 16, as one product and not as a loop over lags."""
    mtsae, (x, mask), kept = SCRIPTS["mtsae"], mixed(T=24, D=16), []
    sae = model("mtsae", T=24, batch_norm="off")
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])      # as train() counts
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        terms = mtsae.losses(sae, x, mask, n, 0, sae.cfg)[0]
    f, total, pairs = sae.encode(x, mask).double(), 0.0, 0
    for lag in range(1, 17):
        both = mask[:, lag:] & mask[:, :-lag]
        total += (F.cosine_similarity(f[:, lag:], f[:, :-lag], dim=-1) * both).sum().item()
        pairs += both.sum().item()
    assert n[1] == pairs, f"{n[1]} pairs counted, {pairs} are 1 to 16 tokens apart"
    assert math.isclose(terms["coherence"].item(), -0.15 * total / pairs, rel_tol=1e-4)
    assert len(kept) < 55, f"{len(kept)} tensors are kept for the gradient: a loop over the lags?"
    sae.b_enc.data.fill_(-1e3)                                       # no feature is active
    mtsae.losses(sae, x, mask, n, 0, sae.cfg)[0]["coherence"].backward()
    assert sae.W_enc.grad.isfinite().all(), "empty codes"


def exercise_9():
    """AuxK: dead features, and nothing else, learn what the others left over."""
    mtsae, (x, mask) = SCRIPTS["mtsae"], mixed(T=40, D=16)
    sae = model("mtsae", T=40, activation="topk", k=2, expansion=3, dead_after=5)
    n = torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])
    sae.eval()                                                      # batch norm as it is
    alive = mtsae.losses(sae, x, mask, n, 0, sae.cfg)[0].get("aux", 0)
    assert not alive, "nothing is dead, and still there is a term"
    sae.inactive[:7] = 6
    terms = mtsae.losses(sae, x, mask, n, 0, sae.cfg)[0]
    assert "aux" in terms, "features are dead, and there is no term 'aux'"
    with torch.no_grad():
        pre = sae.temporal(x, mask) @ sae.W_enc[:, :7] + sae.b_enc[:7]
        rest, (values, index) = (x - sae(x, mask)[0]) / sae.scale, pre.topk(4, -1)
        guess = torch.zeros_like(pre).scatter(-1, index, values.relu()) @ sae.W_dec[:7]
        value = ((rest - guess).square().sum(-1) * mask).sum() / mask.sum() / 32
    assert relative(terms["aux"], value) < 1e-4, f"{terms['aux']:.4f} and not {value:.4f}"
    terms["aux"].backward()
    for name, p in sae.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if name in ("W_enc", "b_enc", "W_dec"):
            dead, grad = (grad.t() if name == "W_enc" else grad).tensor_split((7,))
            assert dead.any(), f"the dead features' {name} gets no gradient"
        assert not grad.any(), f"{name} of living features gets a gradient"


def exercise_10():
    """Two features drift together: beside the others, and not their own past, they stand out."""
    sae = model("hierarchical_sae", variant="self-aligning", expansion=4)
    gen, over = torch.Generator().manual_seed(0), []
    for step in range(200):
        s = 0.3 + 0.02 * torch.randn(64, generator=gen)
        s[:2] = 0.3 + 0.65 * step / 200
        over.append(s > SCRIPTS["hierarchical_sae"].update_margin(sae, s, sae.cfg))
    over = torch.stack(over).float()                                # (200, 64)
    held = 1 - over[100:, :2].mean()
    assert held == 0, f"the margin holds the two back in {held:.0%} of the last 100 steps"
    assert over[100:, 2:].mean() < 0.02, "the margin is below features that do nothing unusual"


def exercise_11():
    """Matryoshka: the lowest level alone, the lowest two and all three have to reconstruct."""
    x, mask = mixed(D=16)
    for levels in (3, 1):
        sae = model("hierarchical_sae", variant="hierarchical", levels=levels)
        terms, stats, _ = SCRIPTS["hierarchical_sae"].losses(
            sae, x, mask, mask.sum(), 0, sae.cfg)
        f, errors = sae.encode(x, mask).detach(), []
        for end in itertools.accumulate(sae.sizes):
            kept = f * (torch.arange(len(sae.W_dec)) < end)
            errors.append(((sae.decode(kept) - x)[mask] / sae.scale).square().sum() / mask.sum())
        want, found = sum(errors) / levels, terms["recon"]
        assert relative(found, want) < 1e-4, f"{levels} levels: {found:.4f}, not {want:.4f}"
        assert relative(stats["error"], errors[-1]) < 1e-4, "the logged error is the whole code's"


def exercise_12():
    """The GRU predicts the change: without its output, tomorrow is like today."""
    sae = model("hierarchical_sae", variant="temporal", gru_divisor=4)
    x, mask = mixed(D=16)
    before = sae.predict(x)
    sae.W_next.weight.data.zero_()
    assert relative(sae.predict(x), x) < 1e-4, "a GRU that says nothing does not say 'as now'"
    assert relative(before, x) > 1e-4, "the GRU's change is not added"
    f = sae.encode(x, mask)
    image, pair = f @ sae.W_dec * mask[..., None], mask[:, 1:] & mask[:, :-1]
    change = ((image[:, 1:] - image[:, :-1]).square().mean(-1) * pair).sum()
    terms = SCRIPTS["hierarchical_sae"].temporal_losses(sae, f, image, mask, sae.cfg)
    assert relative(terms["prediction"], change) < 1e-4, "the loss does not use the same prediction"
