"""data/planted.py: every plant has the statistics it claims, and the scores are what they say."""
import types

import common                   # before torch: it sets how idle threads wait
import torch

import tsae
from data import planted
from data.planted import PLANTS, directions, one_token_ceiling


def plant(name, n=400, T=64):
    """dictionary, hidden values, observed values, further truths of a plant"""
    return PLANTS[name](n, T, common.generator(1, name))


def activations(*flags):
    argv = ["--model", "synthetic", "--tokens", "4096", "--heldout_tokens", "1024", "--T", "32",
            "--cache", "none", "--batch_size", "4", *flags]
    return next(iter(common.open_activations(
        common.configure(tsae.Config, tsae.LAPTOP, tsae.defaults, argv))))


def test_planted_features_last_as_long_as_claimed():
    """A stretch of mean duration tau ends at a token with probability (1 - p) / tau."""
    for name in ("states", "flicker"):
        dictionary, values, _, truth = plant(name)
        p = (3 if name == "states" else 4) / len(dictionary)
        on = values > 0
        assert torch.allclose(on.float().mean(), torch.tensor(p), atol=0.1 * p), name
        for tau in truth["duration"].unique().tolist():
            now, then = (on[:, a:b, truth["duration"] == tau] for a, b in ((0, -1), (1, None)))
            stay, expected = (now & then).sum() / now.sum(), 1 - (1 - p) / tau
            assert abs(stay - expected) < 0.03, (name, tau, stay, expected)
        assert ((values == 0) | (values >= 1) & (values <= 2)).all(), name
        assert torch.allclose(dictionary.norm(dim=1), torch.ones(len(dictionary))), name


def test_planted_dropout_hides_a_quarter_of_the_slow_features():
    _, values, observed, truth = plant("flicker")
    gone, slow = (values > 0) & (observed == 0), truth["duration"] == 32
    share = gone[..., slow].sum() / (values[..., slow] > 0).sum()
    assert abs(share - planted.DROPOUT) < 0.02
    assert not gone[..., ~slow].any() and (observed[observed > 0] == values[observed > 0]).all()


def test_planted_windows_cover_a_quarter_of_the_positions():
    _, values, _, truth = plant("windows")
    assert (truth["alive"].sum(0) == 16).all() and truth["alive"].any(1).all()
    rate = (values > 0).float().mean(0)                              # (T, M)
    assert not rate[~truth["alive"]].any() and abs(rate[truth["alive"]].mean() - 0.4) < 0.02


def test_planted_children_are_on_only_with_their_parent():
    dictionary, values, _, truth = plant("tree")
    up, down = values[..., truth["level"] == 0] > 0, values[..., truth["level"] == 1] > 0
    parent = up.repeat_interleave(planted.CHILDREN, -1)
    assert down.any() and not (down & ~parent).any()
    cosine = dictionary[truth["level"] == 1] @ dictionary[truth["level"] == 0].t()
    own = torch.eye(8).repeat_interleave(planted.CHILDREN, 0) * 0.5 ** 0.5
    assert torch.allclose(cosine, own, atol=1e-5)                    # own parent 0.71, others 0


def test_planted_domains_keep_their_features_apart():
    _, values, _, truth = plant("domains")
    assert 0.4 < truth["kind"].float().mean() < 0.6
    for kind, absent, present in ((True, 1, 0), (False, 0, 1)):
        rows = values[truth["kind"] == kind]
        assert not rows[..., truth["part"] == absent].any()
        assert rows[..., truth["part"] == present].any() and rows[..., truth["part"] == 2].any()


def test_one_token_ceiling_is_that_of_a_simulation():
    """E[v | y] estimated as the mean of v in narrow bins of y."""
    gen = common.generator(0, "ceiling")
    for p, sigma in ((0.25, 0.9), (0.1, 0.3), (0.5, 2.0)):
        on, amount, noise = (f(2_000_000, generator=gen) for f in (torch.rand, torch.rand,
                                                                   torch.randn))
        v = (on < p) * (1 + amount)
        y = v + sigma * noise
        bins = ((y - y.min()) / (y.max() - y.min()) * 999).long()
        mean = torch.zeros(1000).index_add_(0, bins, v) / bins.bincount(minlength=1000).clamp(min=1)
        found = torch.corrcoef(torch.stack([v, mean[bins]]))[0, 1].item()
        assert abs(found - one_token_ceiling(p, sigma)) < 0.003, (p, sigma, found)


def test_shuffle_destroys_the_order_and_keeps_each_sequences_tokens():
    straight, mixed = (activations("--plant", "noisy", "--shuffle", s) for s in ("off", "train"))
    (x, _), (y, _) = straight.batch(0), mixed.batch(0)
    assert torch.equal(x.sort(1).values, y.sort(1).values) and not torch.equal(x, y)
    whole = [torch.cat([a.batch(i)[0] for i in range(8)]) for a in (straight, mixed)]
    near = [torch.cosine_similarity(w[:, 1:], w[:, :-1], dim=-1).mean() for w in whole]
    assert near[0] > near[1] + 0.01                                  # neighbours alike no more
    held = [torch.cat([x for x, _ in a.heldout()]) for a in (straight, mixed)]
    assert torch.equal(*held)                                        # scored in true order


def test_a_perfect_sae_recovers_everything():
    acts = activations("--plant", "states")
    dictionary, values = acts.truth["dictionary"], acts.truth["values"]
    codes = iter(values.split(16))
    sae = types.SimpleNamespace(W_dec=dictionary, encode=lambda x, m: next(codes))
    scores = planted.recovery(sae, acts)
    ones = [v for k, v in scores.items() if k != "random_dictionary"]
    assert torch.allclose(torch.tensor(ones), torch.ones(len(ones)), atol=1e-5), scores


def test_scores_by_hand():
    alive = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]).bool()    # (T, M)
    m = torch.tensor([[0.95, 0.0], [0.4, 0.0], [0.0, 0.6], [0.0, 1.0]])
    found = planted.mask_scores(m, alive, torch.eye(2))
    expected = {"iou": 0.75, "decided": 0.75, "mask_inside": 0.7375, "mask_outside": 0.0}
    assert all(abs(found[k] - v) < 1e-6 for k, v in expected.items()), found
    assert torch.allclose(directions(4, common.generator(0, "d"), True) @ directions(
        4, common.generator(0, "d"), True).t(), torch.eye(4), atol=1e-5)
    v = torch.tensor([[[1.0], [2.0], [0.0]]])                        # (n, T, M)
    f = torch.tensor([[[0.0, 2.0], [0.0, 4.0], [1.0, 0.0]]])
    r = planted.correlations(v, f)[0]
    assert abs(r[1] - 1) < 1e-6 and abs(r[0] + 0.8660254) < 1e-6
