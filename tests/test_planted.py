"""data/planted.py: every plant has the statistics it claims, and the scores are what they say."""
import types

from tests.helpers import config

import common
import torch

import tsae
from data import planted


PLANT = {name: make(400, 64, common.generator(1, name)) for name, make in planted.PLANTS.items()}


def activations(**values):
    return next(iter(common.open_activations(config(tsae, **values))))


def test_planted_features_last_as_long_as_claimed():
    """A stretch of mean duration tau ends at a token with probability (1 - p) / tau."""
    for name, active in (("states", 3), ("flicker", 4)):
        dictionary, values, _, truth = PLANT[name]
        p, on = active / len(dictionary), values > 0
        assert abs(on.float().mean() - p) < 0.1 * p, name
        for tau in truth["duration"].unique().tolist():
            now, then = (on[:, a:b, truth["duration"] == tau] for a, b in ((0, -1), (1, None)))
            stay, expected = (now & then).sum() / now.sum(), 1 - (1 - p) / tau
            assert abs(stay - expected) < 0.03, (name, tau, stay, expected)
        assert ((values == 0) | (values >= 1) & (values <= 2)).all(), name


def test_ceilings_are_what_one_token_tells():
    """Correlation of v with E[v | y], the mean of v in narrow bins of what is seen of it."""
    for name, seen, noise in (("noisy", 1, 0.9), ("flicker", 1 - planted.DROPOUT, 0.0)):
        _, values, observed, truth = PLANT[name]
        slow = truth.get("duration", torch.full((16,), 32)) == 32      # others are never hidden
        assert torch.equal(values[..., ~slow], observed[..., ~slow])
        v, y = (a[..., slow].flatten() for a in (values, observed))
        assert abs((y > 0).sum() / (v > 0).sum() - seen) < 0.02
        y = y + noise * torch.randn(len(y), generator=common.generator(0, name))
        bins = ((y - y.min()) / (y.max() - y.min()) * 999).long()
        mean = torch.zeros(1000).index_add_(0, bins, v) / bins.bincount(minlength=1000).clamp(min=1)
        found = torch.corrcoef(torch.stack([v, mean[bins]]))[0, 1]
        assert abs(found - truth["ceiling"]) < 0.005, (name, found)


def test_planted_features_are_on_only_where_they_may():
    """Windows: a quarter of the positions. Domains: in their own kind. (Tree: below.)"""
    _, values, _, truth = PLANT["windows"]
    alive, rate = truth["alive"], (values > 0).float().mean(0)       # (T, M)
    assert (alive.sum(0) == 16).all() and alive.any(1).all()
    assert not rate[~alive].any() and abs(rate[alive].mean() - 0.4) < 0.02
    dictionary, _, _, truth = PLANT["tree"]
    child = truth["level"] == 1
    own = torch.eye(8).repeat_interleave(planted.CHILDREN, 0) * 0.5 ** 0.5
    assert torch.allclose(dictionary[child] @ dictionary[~child].t(), own, atol=1e-5)
    _, values, _, truth = PLANT["domains"]
    for kind, absent in ((True, 1), (False, 0)):
        rows, part = values[truth["kind"] == kind], truth["part"]
        assert 0.4 < len(rows) / len(values) < 0.6 and not rows[..., part == absent].any()
        assert rows[..., part == 1 - absent].any() and rows[..., part == 2].any()


def test_shuffle_destroys_the_order_and_keeps_each_sequences_tokens():
    straight, mixed = (activations(plant="noisy", shuffle=s) for s in ("off", "train"))
    x, y = (torch.cat([a.batch(i)[0] for i in range(8)]) for a in (straight, mixed))
    assert torch.equal(x.sort(1).values, y.sort(1).values)
    near = [torch.cosine_similarity(a[:, 1:], a[:, :-1], dim=-1).mean() for a in (x, y)]
    assert near[0] > near[1] + 0.01                                  # neighbours alike no more
    found = []               # tree: children are on as often as before, but not with their parent
    for shuffle in ("off", "train"):
        acts = activations(plant="tree", shuffle=shuffle)
        on = acts.train_store.x / 8 @ acts.truth["dictionary"].pinverse() > 0.5   # (n, T, M)
        child, parent = on[..., 8:], on[..., :8].repeat_interleave(planted.CHILDREN, -1)
        found.append((child.sum(), (child & parent).sum() / child.sum()))
    assert found[0][0] == found[1][0] and found[0][1] == 1 and found[1][1] < 0.4


def test_scores_of_a_perfect_sae_and_by_hand():
    acts = activations(plant="states")
    codes = iter(acts.truth["values"].split(16))
    sae = types.SimpleNamespace(W_dec=acts.truth["dictionary"], encode=lambda x, m: next(codes))
    for name, value in planted.recovery(sae, acts).items():
        assert abs(value - 1) < 1e-5 or name == "random_dictionary" and value < 0.7, name
    alive = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).bool()    # (T, M)
    m = torch.tensor([[0.95, 0.0], [0.4, 0.0], [0.0, 0.6], [0.0, 1.0]])
    found = planted.mask_scores(m, alive, torch.eye(2))
    for name, value in dict(iou=0.75, decided=0.75, mask_inside=0.7375, mask_outside=0).items():
        assert abs(found[name] - value) < 1e-6, name
    v = torch.tensor([[[1.0], [2.0], [0.0]]])                        # (n, T, M)
    f = torch.tensor([[[0.0, 2.0], [0.0, 4.0], [1.0, 0.0]]])
    assert (planted.correlations(v, f) - torch.tensor([[-0.75 ** 0.5, 1.0]])).abs().max() < 1e-6
