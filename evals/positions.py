"""Where in the sequence an SAE is good, and where its features work (paper E, Sec. 5 and 6).

    python -m evals.positions RUN            into RUN: position.json, positions.png
    python -m evals.positions RUN RUN2       paired t-test between two runs' errors

For any SAE; on held-out windows, the "test sequences" of Sec. 5. Position masks and weights are
analysed where the SAE has them: alpha, position_mask, initial_alpha and fold; position_weights.

Paper -> code
    Sec. 5          measure                 position-wise error, sparsity and L1 per position
    Sec. 5          early_late, compare     paired t-tests over test sequences
    Sec. 5, 6.3     spans                   temporal span of a feature
    Sec. 5, 6.3     cluster                 hierarchical clusters, clustering consistency

What the paper leaves open (argued at the line that settles it)
    open E.sparsity   "feature sparsity of 0.73"        both readings are reported
    open E.span       "temporal span"                   smallest window with half of the activation
    open E.clusters   clustering, "consistency"         Ward, 8 clusters, two halves of the windows
"""
import functools

import common  # before torch: it sets how threads wait
import numpy as np
import torch

from evals import coded, figures, open_run, program, record

CLUSTERS = 8          # clusters of position profiles; not tuned
MAX_CLUSTERED = 500   # features clustered: those with most activation; not tuned


@torch.no_grad()
def evaluate(sae, acts, folder):
    """Numbers for eval.json; in the folder the figure and, by position and feature, position.json.

    no_sink, sink_as_coded, sink_fitted: early_late of each of sink_cases; features_off: fraction of
    features that are 0; span: median over features, beside that of one that ignores position;
    weight_difficulty_r: correlation of position weights and errors; of masks: see read_masks.
    """
    errors, halves, off = measure(sae, acts)
    error, energy, scored = errors
    profile = halves.mean(0)                                              # (T, F)
    live, T = profile.sum(0) > 0, len(profile)
    by = {"error": error.sum(0) / scored.sum(0).clip(1), "off": off, "L1": profile.sum(1),   # (T,)
          "span": spans(profile[:, live])}                                # by live feature
    # open E.sparsity: "average feature sparsity of 0.73" (Abstract) / here the fraction of features
    #   that are off and, with masks, the mean mask: both are meant by the words, and they differ
    numbers = {name: early_late(*case) for name, case in sink_cases(sae, acts, errors).items()}
    numbers.update(features_off=off.mean(), span_ignoring_position=T // 2,
                   span=np.median(by["span"]) if live.any() else np.nan)
    maps = {}                                      # (rows, T) each, and a tree
    if hasattr(sae, "position_weights") and not getattr(sae.cfg, "uniform_weights", False):
        by["weight"] = sae.position_weights().cpu().numpy()
        # Sec. 1: r = 0.82; close to 1 by construction, for w_t is an average of that very error
        numbers["weight_difficulty_r"] = np.corrcoef(by["weight"], by["error"])[0, 1]
        history = sae.weight_history[sae.weight_history.sum(1) > 0].cpu().numpy()
        maps |= {"weights": history} if len(history) else {}
    if hasattr(sae, "alpha"):
        m = sae.position_mask(T).cpu().numpy()                            # (T, F)
        by.update(mean_mask=m.mean(1), mask_span=spans(m))
        numbers.update(read_masks(sae, acts, m, error.sum(), energy.sum()),
                       mask_span=np.median(by["mask_span"]))
        maps["masks"] = m.T
    if live.sum() >= CLUSTERS:
        numbers["clusters"], maps["clusters"], maps["tree"] = clusters(halves)
    common.write_json(folder / "position.json", {k: np.round(v, 5) for k, v in by.items()})
    figures.positions(folder / "positions.png", by, numbers, maps)
    return numbers


@torch.no_grad()
def measure(sae, acts):
    """One pass over the held-out windows -> errors (3, N, T), profiles (2, T, F), off (T,).

    errors: squared error, squared distance from the mean, and 1 if scored, of every token; in units
    of scale^2, where a token has squared norm D; 0 where not scored. profiles: mean activation in
    even and in odd windows. off: fraction of features that are 0.
    """
    errors, mass, on, count = [], 0.0, 0.0, 0.0
    for x, x_hat, f, mask in coded(sae, acts):                            # 16: parity is kept
        error, energy = (((y - x) / sae.scale).pow(2).sum(-1) * mask for y in (x_hat, acts.mean))
        errors.append(torch.stack([error, energy, mask]).cpu())
        f = f * mask[..., None]
        on = on + (f > 0).sum((0, 2))
        mass = mass + torch.stack([f[0::2].sum(0), f[1::2].sum(0)]).double()
        count = count + torch.stack([mask[0::2].sum(0), mask[1::2].sum(0)])
    profiles = mass / count.clamp(min=1)[..., None]
    off = 1 - on.double() / (count.sum(0).clamp(min=1) * f.shape[-1])
    return torch.cat(errors, 1).double().numpy(), profiles.cpu().numpy(), off.cpu().numpy()


def early_late(error, energy, scored):
    """Positions 1-32 against later ones, early / late - 1; arrays (N, T) as measured. early_error:
    of the squared error a token; p: its paired t-test over sequences (Sec. 5); early_unexplained:
    of the error over the variance of the positions concerned."""
    from scipy.stats import ttest_rel
    border = min(32, error.shape[1] // 4)                                 # short windows: a quarter
    parts = slice(0, border), slice(border, None)
    both = np.all([scored[:, part].sum(1) > 0 for part in parts], 0)      # sequences with both
    early, late = (error[both, part].sum(1) / scored[both, part].sum(1) for part in parts)
    unexplained = [error[:, part].sum() / energy[:, part].sum() for part in parts]
    return {"early_error": float(early.mean() / late.mean() - 1),
            "p": float(ttest_rel(early, late).pvalue),
            "early_unexplained": float(unexplained[0] / unexplained[1] - 1)}


def sink_cases(sae, acts, errors):
    """measure's errors, and what they become if the attention sink counts as position 1:
    sink_as_coded: with this SAE's error on the sink, which it was not trained on; sink_fitted: with
    error 0, as an SAE trained on it reaches: the sink is the same vector in every window."""
    cases, sink = {"no_sink": errors}, acts.heldout_store.sink            # (D,), or None
    if sink is not None:
        x = sink.to(acts.device).float()[None, None]                      # (1, 1, D): position 1
        coded, far = (((y - x) / sae.scale).pow(2).sum().item() for y in (sae(x)[0], acts.mean))
        for name, error in (("sink_as_coded", coded), ("sink_fitted", 0.0)):
            front = np.broadcast_to(np.reshape([error, far, 1], (3, 1, 1)), (3, errors.shape[1], 1))
            cases[name] = np.concatenate([front, errors[..., :-1]], -1)   # (3, N, T)
    return cases


def read_masks(sae, acts, m, error, energy):
    """What position masks m (T, F) have become.

    decided: share below 0.1 or above 0.9; EV_lost_by_folding: share of the variance lost when they
    are made hard after training; r_with_first_draw: correlation of the logits with their initial
    values. At a low temperature, logits that nothing has moved still look like masks. prefer_first,
    prefer_early: mean distance of a mask at positions 1-3, or 4 to T/2, from its mean over later
    ones (what the draw alone makes of it: compare a run with --shuffle train).
    """
    tau = sae.tau.clone()
    sae.tau.fill_(1e-30)   # hard masks, on where alpha > 0: the limit tau -> 0 of Eq. 4
    folded = measure(sae, acts)[0][0].sum()
    sae.tau.copy_(tau)
    draw, alpha = sae.initial_alpha().cpu().flatten(), sae.alpha.detach().cpu().flatten()
    moved = np.abs(m - m[len(m) // 2:].mean(0)).mean(1, dtype=float)      # (T,)
    return {"mean_mask": m.mean(dtype=float), "decided": ((m < 0.1) | (m > 0.9)).mean(),
            "prefer_first": moved[:3].mean(), "prefer_early": moved[3:len(m) // 2].mean(),
            "EV_lost_by_folding": (folded - error) / energy,
            "r_with_first_draw": np.corrcoef(draw, alpha)[0, 1]}


def spans(profile):
    """Smallest contiguous window of positions with half of each column's mass: (T, F) -> (F,)."""
    # open E.span: "temporal span" (Sec. 5, 6.3), not defined / here the smallest window with half
    #   of a feature's mean activation over positions, which needs no threshold. One that ignores
    #   position has T / 2 = 64, the paper's own number for layer 19
    cumulative = np.insert(profile.astype(np.float64), 0, 0, axis=0).cumsum(0)   # (T + 1, F)
    half = cumulative[-1] / 2 * (1 - 1e-9)                                # despite rounding
    span = np.full(profile.shape[1], len(profile))
    for width in range(len(profile) - 1, 0, -1):
        span[(cumulative[width:] - cumulative[:-width]).max(0) >= half] = width
    return span


def clusters(halves):
    """Clusters of the most active features by profile: halves (2, T, F) -> numbers, profiles
    (n, T) in units of their maximum in the order of the tree, the tree (scipy's linkage)."""
    from scipy.cluster.hierarchy import leaves_list
    from sklearn.metrics import adjusted_rand_score
    profile = halves.mean(0)                                              # (T, F)
    mass = profile.sum(0)
    top = np.argsort(-mass, kind="stable")[:min(MAX_CLUSTERED, (mass > 0).sum())]
    tree, labels = cluster(profile[:, top])
    agreement = adjusted_rand_score(*(cluster(half[:, top])[1] for half in halves))
    ordered = profile[:, top][:, leaves_list(tree)].T
    return ({"consistency": agreement, "sizes": np.bincount(labels)[1:].tolist()},
            ordered / ordered.max(1, keepdims=True), tree)


def cluster(profile):
    """Hierarchical clustering of features (columns of profile (T, F)) -> tree, labels (F,)."""
    # open E.clusters: "hierarchical clustering", its "consistency" (Sec. 5, 6.3), no more / here
    #   Ward linkage of standardised profiles, whose squared distance is 2 T (1 - correlation): by
    #   where, not by how much, features are active; 8 clusters. Consistency: adjusted Rand index of
    #   even against odd windows, 0 by chance, high where both halves hold the same masks
    from scipy.cluster.hierarchy import fcluster, linkage
    standard = (profile - profile.mean(0)) / profile.std(0).clip(1e-12)
    tree = linkage(standard.T, "ward")
    return tree, fcluster(tree, CLUSTERS, "maxclust")


def compare(sae_a, sae_b, acts):
    """Paired t-test between two SAEs' squared errors on the same sequences (Sec. 5, 6.4), in raw
    units: each SAE has its own scale, which depends on the seed."""
    from scipy.stats import ttest_rel
    a, b = (errors[0].sum(1) * sae.scale.item() ** 2 / errors[2].sum(1).clip(1)   # (N,) each
            for sae, errors in ((sae, measure(sae, acts)[0]) for sae in (sae_a, sae_b)))
    test = ttest_rel(a, b)
    return {"a_against_b": float(a.mean() / b.mean() - 1), "t": float(test.statistic),
            "p": float(test.pvalue), "sequences": len(a)}


def work(sae, acts, folder, args):
    """The analysis of RUN, or the comparison with RUN2; UserError if it has another text."""
    if args.RUN2 is None:
        return record("positions", evaluate, sae, acts, folder)
    sae2, acts2, _ = open_run(args.RUN2, args.device, args.cache)
    x, y = (next(iter(one.heldout()))[0] for one in (acts, acts2))
    if x.shape != y.shape or not x.equal(y):
        raise common.UserError("the two runs have different held-out activations.")
    for name, value in compare(sae, sae2, acts).items():
        common.say(f"{name:<14} {value:.4g}")


main = functools.partial(program, "positions", __doc__, work,
                         RUN2=dict(nargs="?", help="another run, for the t-test"))

if __name__ == "__main__":
    raise SystemExit(main())
