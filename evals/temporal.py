"""How smoothly the features of a run move from token to token, on held-out windows.

    python -m evals.temporal RUN

Definitions are ours, except where a source is named; f (B, T, F) is the code, and only scored
tokens count.

    neighbour_cosine   mean cosine of the codes of adjacent tokens (what paper A maximises, Eq. 6)
    total_variation    mean over adjacent pairs of sum_f |f_{t+1} - f_t|, over the mean of
                       sum_f |f_t|: 0 is a constant code, 2 never has a feature on twice in a row
    span               mean length in tokens of a stretch during which a feature stays on
    autocorrelation    by lag: autocovariance over variance, both summed over features
    variance_share     share of the variance of x that changes between neighbouring blocks of 1, 2,
                       4 ... tokens (a Haar decomposition), and of the windows' means
    EV_by_scale        explained variance in each of these parts; their mean weighted by
                       variance_share is EV
"""
import functools
from collections import defaultdict

import torch
import torch.nn.functional as F

from evals import coded, run_eval

LAGS = (1, 2, 4, 8, 16, 32, 64)


@torch.no_grad()
def evaluate(sae, acts, folder=None):
    """The metrics above, as a dict; NaN at a lag at which no two scored tokens lie apart."""
    lags = [lag for lag in LAGS if lag < acts.T]
    sums = defaultdict(int)
    for x, x_hat, f, mask in coded(sae, acts):                            # (B, T, D) ... (B, T)
        f = f * mask[..., None]                                           # (B, T, F)
        sums["tokens"] += mask.sum()
        sums["x"] += (x.double() * mask[..., None]).sum((0, 1))
        sums["scales"] += time_scales(x, mask)
        sums["error scales"] += time_scales(x - x_hat, mask)
        sums["f"] += f.double().sum((0, 1))
        sums["|f|"] += f.double().abs().sum()
        sums["f^2"] += f.double().pow(2).sum()
        on, both = f > 0, mask[:, 1:] & mask[:, :-1]
        sums["on"] += on.sum()
        sums["stretches"] += on[:, 0].sum() + (on[:, 1:] & ~on[:, :-1]).sum()
        now, then = f[:, :-1][both], f[:, 1:][both]                       # (pairs, F)
        sums["cosine"] += F.cosine_similarity(now, then, dim=-1).double().sum()
        sums["variation"] += (then - now).abs().double().sum()
        for lag in lags:
            both = (mask[:, lag:] & mask[:, :-lag])[..., None]
            a, b = f[:, :-lag] * both, f[:, lag:] * both
            sums["a b", lag] += (a * b).double().sum()
            sums["a + b", lag] += a.double().sum((0, 1)) + b.double().sum((0, 1))
            sums["pairs", lag] += both.sum()
    sums = {name: value.double() for name, value in sums.items()}
    n, pairs = sums["tokens"], sums["pairs", 1].clamp(min=1)
    mean = sums["f"] / n                                                  # (F,)
    variance = sums["f^2"] / n - mean.pow(2).sum()
    auto = {}
    for lag in lags:      # E[a b] - mean.E[a + b] + mean.mean: about the mean of all scored tokens
        ab, a_plus_b = (sums[name, lag] / sums["pairs", lag] for name in ("a b", "a + b"))
        covariance = ab - (mean * a_plus_b).sum() + mean.pow(2).sum()
        auto[str(lag)] = (covariance / variance).item() if variance > 0 else 0.0
    scales, errors = sums["scales"], sums["error scales"]                 # (1 + levels,) each
    scales[-1] -= sums["x"].pow(2).sum() / n                              # about the mean, as EV
    names = [str(2 ** level) for level in range(len(scales) - 1)] + ["mean"]
    size = (sums["|f|"] / n).clamp(min=1e-12)
    return {"neighbour_cosine": (sums["cosine"] / pairs).item(),
            "total_variation": (sums["variation"] / pairs / size).item(),
            "span": (sums["on"] / sums["stretches"].clamp(min=1)).item(),
            "autocorrelation": auto,
            "EV_by_scale": dict(zip(names, (1 - errors / scales).tolist())),
            "variance_share": dict(zip(names, (scales / scales.sum()).tolist()))}


def time_scales(x, mask):
    """Energy of x (B, T, D) over its scored tokens by time scale: (1 + ceil(log2 T),) fp64.

    With m_b the mean over the scored tokens of each block of b tokens, entry i is the energy of
    m_{2^i} - m_{2^(i+1)} (m_1 = x), the last one that of the window's mean. The parts are
    orthogonal, masked tokens or not, so they add up to sum ||x||^2.
    """
    levels = (x.shape[1] - 1).bit_length()
    pad = 2 ** levels - x.shape[1]
    total = F.pad(x.double() * mask[..., None], (0, 0, 0, pad))           # (B, 2^levels, D)
    count = F.pad(mask.double(), (0, pad))                                # (B, 2^levels)
    energy = []                                                           # of m_1, m_2, m_4 ...
    for _ in range(levels + 1):
        energy.append((total.square().sum(-1) / count.clamp(min=1)).sum())
        if len(energy) <= levels:
            total, count = (v.unflatten(1, (-1, 2)).sum(2) for v in (total, count))
    energy = torch.stack(energy)
    return torch.cat([energy[:-1] - energy[1:], energy[-1:]])


main = functools.partial(run_eval, "temporal", evaluate, __doc__)

if __name__ == "__main__":
    raise SystemExit(main())
