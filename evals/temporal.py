"""How smoothly the features of a run move from token to token, on held-out windows.

    python -m evals.temporal RUN

Definitions are ours, except where a source is named; f (B, T, F) is the code, and only scored
tokens count.

    neighbour_cosine   mean cosine of the codes of adjacent tokens (what paper A maximises, Eq. 6)
    total_variation    mean over adjacent pairs of sum_f |f_{t+1} - f_t|, over the mean of
                       sum_f |f_t|: 0 is a constant code, 2 never has a feature on twice in a row
    span               mean length in tokens of a stretch during which a feature stays on
    autocorrelation    by lag: autocovariance over variance, both summed over features
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
    for _, _, f, mask in coded(sae, acts):                                # (B, T, F), (B, T)
        f = f * mask[..., None]
        sums["tokens"] += mask.sum()
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
    size = (sums["|f|"] / n).clamp(min=1e-12)
    return {"neighbour_cosine": (sums["cosine"] / pairs).item(),
            "total_variation": (sums["variation"] / pairs / size).item(),
            "span": (sums["on"] / sums["stretches"].clamp(min=1)).item(),
            "autocorrelation": auto}


main = functools.partial(run_eval, "temporal", evaluate, __doc__)

if __name__ == "__main__":
    raise SystemExit(main())
