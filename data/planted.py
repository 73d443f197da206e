"""Planted data for --model synthetic: sequences whose features are known, so a score is possible.

    --plant states    features with mean durations of 1, 4, 16 and 64 tokens, little noise
    --plant noisy     slow features under noise so strong that one token does not tell: the best
                      that any code of single tokens can do is computed (ceiling)
    --plant flicker   slow features that drop out at every fourth token at random, beside fast ones
    --plant windows   each feature lives in a quarter of the positions only
    --plant tree      children are on only while their parent is; direction = parent + own part
    --plant domains   two kinds of sequences with features of their own, and shared ones

The negative control is --shuffle train: the same tokens, each sequence's order destroyed (tree:
children get the parents of another sequence); scores are of held-out sequences, left as they are.
common.py opens this file by name: make(cfg) before training, recovery(sae, acts) after it.
Activations have D = 64 channels; mean norm about sqrt(D).
"""
import math

import torch
import torch.nn.functional as F

import common

D, DURATIONS = 64, (1, 4, 16, 64)      # channels; mean number of tokens a feature of `states` stays
NOISE = {"noisy": 0.9}                 # deviation of the noise a channel; elsewhere 0.01
DROPOUT = 0.25                         # of flicker's slow features
CHILDREN = 3                           # of each parent of the tree


def make(cfg):
    """Training sequences and held-out ones behind them -> x (n, T, D), truth: dictionary (M, D) of
    unit rows, values (n_heldout, T, M) of the hidden features, and what a plant's score needs."""
    held = cfg.heldout_tokens // cfg.T
    n = held + cfg.tokens // cfg.T
    gen = common.generator(0, f"planted-{cfg.plant}-{n}-{cfg.T}")
    dictionary, values, observed, extra = PLANTS[cfg.plant](n, cfg.T, gen)
    if cfg.plant == "tree" and cfg.shuffle != "off":   # the order does not hold the tree
        train, child = observed[:-held].clone(), extra["level"] == 1
        train[..., child] = train.roll(1, 0)[..., child]
        observed = torch.cat([train, observed[-held:]])
    noise = NOISE.get(cfg.plant, 0.01) * torch.randn(n, cfg.T, D, generator=gen)
    x = math.sqrt(D) * (observed @ dictionary + noise)
    return x, {"dictionary": dictionary, "values": values[-held:], **extra}


def directions(M, gen, orthogonal=False):
    """Unit rows (M, D), random or orthonormal."""
    W = torch.randn(M, D, generator=gen)
    return torch.linalg.qr(W.t()).Q.t() if orthogonal else F.normalize(W)


def markov(n, T, tau, gen, active=3.0):
    """Two-state features of mean duration tau (M,) -> values (n, T, M), 0 where off. Stationary
    probability active / M; while on, a value drawn once a stretch from [1, 2]."""
    p, stop, M = active / len(tau), 1.0 / tau.float(), len(tau)
    on = torch.rand(n, M, generator=gen) < p
    value = 1 + torch.rand(n, M, generator=gen)
    values = torch.empty(n, T, M)
    for t in range(T):
        values[:, t] = torch.where(on, value, 0.0)
        u = torch.rand(n, M, generator=gen)
        begins, ends = u < stop * p, (u >= stop * p) & (u < stop)    # a stretch may follow another
        value = torch.where(begins, 1 + torch.rand(n, M, generator=gen), value)
        on = (on | begins) & ~ends
    return values


# Each plant -> dictionary (M, D), hidden values (n, T, M), observed values, further truths

def states(n, T, gen):
    tau = torch.tensor(DURATIONS).repeat(8)
    values = markov(n, T, tau, gen)
    return directions(32, gen), values, values, {"duration": tau}


def noisy(n, T, gen):
    values = markov(n, T, torch.full((16,), 32), gen, active=4.0)
    ceiling = one_token_ceiling(4.0 / 16, NOISE["noisy"])
    return directions(16, gen, True), values, values, {"ceiling": ceiling}


def one_token_ceiling(p, sigma, grid=20_000):
    """Correlation with v of the best function of y = v + sigma * noise, v as in markov: E[v | y].
    Rows are orthonormal and the noise isotropic, so y is all that one token tells of a feature. By
    quadrature over y: Var(E[v | y]) = E[E[v | y]^2] - E[v]^2."""
    y = torch.linspace(-6 * sigma, 2 + 6 * sigma, grid, dtype=torch.float64)
    v = torch.linspace(1, 2, 201, dtype=torch.float64)

    def density(z):
        return (-0.5 * (z / sigma) ** 2).exp() / (sigma * math.sqrt(2 * math.pi))
    on = density(y[:, None] - v)                                              # (grid, 201)
    p_y = (1 - p) * density(y) + p * on.mean(1)
    mean = p * (on * v).mean(1) / p_y
    step = (y[1] - y[0]).item()
    ev, ev2 = 1.5 * p, p * (v ** 2).mean().item()
    explained = (mean ** 2 * p_y).sum().item() * step - ev ** 2
    return math.sqrt(explained / (ev2 - ev ** 2))


def flicker(n, T, gen):
    tau = torch.tensor([32, 1]).repeat_interleave(16)
    values = markov(n, T, tau, gen, active=4.0)
    drop = (torch.rand(values.shape, generator=gen) < DROPOUT) & (tau == 32)
    truths = {"duration": tau, "ceiling": dropout_ceiling(4.0 / 32)}
    return directions(32, gen), values, values.masked_fill(drop, 0.0), truths


def dropout_ceiling(p):
    """The same for flicker's slow features: v is seen, or else it is E[v | not seen]."""
    ev, ev2, seen = 1.5 * p, p * 7 / 3, p * (1 - DROPOUT)
    unseen = DROPOUT * ev / (1 - seen)
    explained = seen * 7 / 3 + (1 - seen) * unseen ** 2 - ev ** 2
    return math.sqrt(explained / (ev2 - ev ** 2))


def windows(n, T, gen):
    M = 32
    start = torch.arange(M) * (T - T // 4) // (M - 1)                        # spread over T
    t = torch.arange(T)[:, None]
    alive = (t >= start) & (t < start + T // 4)                               # (T, M)
    on = (torch.rand(n, T, M, generator=gen) < 0.4) & alive
    values = on * (1 + torch.rand(n, T, M, generator=gen))
    return directions(M, gen), values, values, {"alive": alive}


def tree(n, T, gen):
    parents = 8
    own = directions(parents * (1 + CHILDREN), gen, True)
    child_of = torch.arange(parents).repeat_interleave(CHILDREN)
    dictionary = torch.cat([own[:parents], F.normalize(own[child_of] + own[parents:])])
    up = markov(n, T, torch.full((parents,), 8), gen, active=1.5)
    down = markov(n, T, torch.full((parents * CHILDREN,), 4), gen, active=parents * CHILDREN * 0.3)
    values = torch.cat([up, down * (up[..., child_of] > 0)], -1)
    level = torch.tensor([0] * parents + [1] * parents * CHILDREN)
    return dictionary, values, values, {"level": level}


def domains(n, T, gen):
    values = markov(n, T, torch.tensor(DURATIONS).repeat(8), gen, active=6.0)
    kind = torch.rand(n, generator=gen) < 0.5                             # True: forget it
    part = torch.tensor([0] * 8 + [1] * 8 + [2] * 16)                         # forget, keep, shared
    values[kind] *= part != 1
    values[~kind] *= part != 0
    return directions(32, gen), values, values, {"kind": kind, "part": part}


PLANTS = {plant.__name__: plant for plant in (states, noisy, flicker, windows, tree, domains)}


@torch.no_grad()
def recovery(sae, acts):
    """How much of the truth the SAE found: what every plant has, and its own part.

    mean_max_cosine: mean over true features of the largest cosine to a decoder row, beside random
    rows; correlation: mean over true features of the largest correlation of one SAE feature with
    the hidden value over held-out tokens. Both also by group where the plant has groups.
    """
    truth, W = acts.truth, F.normalize(sae.W_dec.detach().float(), dim=1)
    dictionary, gen = truth["dictionary"].to(W.device), common.generator(0, "random-dictionary")
    random = F.normalize(torch.randn(W.shape, generator=gen)).to(W.device)
    f = torch.cat([sae.encode(x, m).float() for x, m in acts.heldout()])      # (n, T, F)
    r = correlations(truth["values"].to(f.device), f)                         # (M, F)
    cosine, found = (dictionary @ W.t()).max(1).values, r.max(1).values       # (M,) each
    out = {"mean_max_cosine": cosine.mean().item(), "correlation": found.mean().item(),
           "random_dictionary": (dictionary @ random.t()).max(1).values.mean().item()}
    for name in ("duration", "level", "part"):
        for value in truth[name].unique().tolist() if name in truth else ():
            group = truth[name] == value
            out[f"cosine_{name}_{value}"] = cosine[group].mean().item()
            out[f"correlation_{name}_{value}"] = found[group].mean().item()
    if "ceiling" in truth:
        out["ceiling"] = truth["ceiling"]
    if "alive" in truth and hasattr(sae, "position_mask"):
        out.update(mask_scores(sae.position_mask(acts.T), truth["alive"].to(f.device), r))
    if "level" in truth and len(getattr(sae, "sizes", ())) > 1:
        out.update(level_scores(sae, acts, truth, r))
    if "kind" in truth:
        out.update(forgetting(sae, truth, f))
    return out


def correlations(values, f):
    """Pearson correlation over all tokens of each hidden value with each feature: (M, F)."""
    v, f = (a.flatten(0, 1).double() for a in (values, f))
    v, f = (a - a.mean(0) for a in (v, f))
    return v.t() @ f / (v.norm(dim=0)[:, None] * f.norm(dim=0)).clamp(min=1e-12)


def mask_scores(m, alive, r):
    """Masks against the planted windows: m (T, F), alive (T, M), r (M, F). iou: intersection over
    union of window and mask > 0.5, mean over true features, each with the SAE feature that follows
    it best; decided: share of the masks below 0.1 or above 0.9; mean mask inside and outside."""
    mine = m[:, r.argmax(1)]                                                  # (T, M)
    on = mine > 0.5
    iou = (on & alive).sum(0) / (on | alive).sum(0).clamp(min=1)
    return {"iou": iou.mean().item(), "decided": ((m < 0.1) | (m > 0.9)).float().mean().item(),
            "mask_inside": mine[alive].mean().item(), "mask_outside": mine[~alive].mean().item()}


def level_scores(sae, acts, truth, r):
    """Levels against the planted tree. parents_lower: mean level (0: lowest) of the features that
    follow children best, minus that of those that follow parents. router_shift: distance (total
    variation) of the router's mean gates at tokens with and without a child on. share_min: the
    least used level's share."""
    level_of = torch.arange(len(sae.sizes)).repeat_interleave(torch.tensor(sae.sizes)).to(r.device)
    at = level_of[r.argmax(1)].float()                                        # (M,)
    child, on = truth["level"].to(r.device) == 1, truth["values"].to(r.device) > 0
    gates = torch.cat([sae.code(x, m)[1] for x, m in acts.heldout()])         # (n, T, L)
    has = on[..., child].any(-1)                                              # (n, T)
    alone = on.any(-1) & ~has
    shift = 0.5 * (gates[has].mean(0) - gates[alone].mean(0)).abs().sum()
    share = gates.mean((0, 1))
    return {"parents_lower": (at[child].mean() - at[~child].mean()).item(),
            "router_shift": shift.item(), "share_min": share.min().item()}


def forgetting(sae, truth, f):
    """Forget one kind of sequences: of the features on at less than 1 % of the keep kind's tokens
    the 8 most often on in the forget kind (SAEBench's rule) are set to 0. forgotten: share of the
    forget features' energy gone; damage: squared change of all other hidden values over their
    energy, in the keep kind."""
    kind = truth["kind"][-len(f):].to(f.device)
    on = (f > 0).float()
    rate, side = on[kind].mean((0, 1)), on[~kind].mean((0, 1))
    chosen = rate.masked_fill(side >= 0.01, 0.0).topk(8)
    chosen = chosen.indices[chosen.values > 0]
    edited = f.clone()
    edited[..., chosen] = 0.0
    change = (sae.decode(edited) - sae.decode(f)).float() / math.sqrt(D)      # decode is linear
    change = change @ torch.linalg.pinv(truth["dictionary"].to(f.device))     # in hidden values
    v, part = truth["values"].to(f.device), truth["part"].to(f.device)
    gone, kept = v[kind][..., part == 0], v[~kind]
    left = gone + change[kind][..., part == 0]
    return {"forgotten": (1 - left.square().sum() / gone.square().sum()).item(),
            "damage": (change[~kind].square().sum() / kept.square().sum()).item(),
            "clamped": len(chosen)}
