"""Drawings: a run's training curves at its end, and for evals/positions.py what depends on the
position (paper E, Fig. 1, Sec. 6.3).
"""
import json
import math
from itertools import takewhile

import common  # before torch: it sets how threads wait

import numpy as np

HERE = "position (1 = first token after the sink)"


def pyplot():
    """matplotlib.pyplot without a window."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, path, dpi):
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)


def training(folder):
    """training.png from log.jsonl: terms of the loss, EV and active features over the steps."""
    try:
        rows = [{**json.loads(line)} for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise common.UserError(f"{folder}/log.jsonl holds no readable log "
                               f"({common.one_line(error)}).") from None
    if len(rows) < 2:
        return

    def column(name):
        return np.array([row.get(name, math.nan) for row in rows])
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4))
    for name in takewhile(lambda key: key != "error", list(rows[-1])[1:]):   # loss and its terms
        values = column(name)
        if values.any() and len(left.lines) < 8:
            negative = np.nanmin(values) < 0                              # lowers the loss: dashed
            left.semilogy(column("step"), np.abs(values), "--" if negative else "-", linewidth=1,
                          label=f"{name} (size; lowers the loss)" if negative else name)
    left.set(xlabel="step", ylabel="loss terms, weighted (log scale)", title="Loss")
    left.legend(fontsize=8)
    right.plot(column("step"), np.maximum(-0.1, column("EV")), color="tab:blue")
    right.set(xlabel="step", ylabel="explained variance (training batch)", ylim=(-0.1, 1.02),
              title="Quality")
    twin = right.twinx()
    twin.plot(column("step"), column("active"), color="tab:orange", linewidth=1)
    twin.set_ylabel("active features a token (L0)", color="tab:orange")
    save(figure, folder / "training.png", 90)


def heat_map(axis, values, top, label, cmap, **limits):
    """values (rows, T) over the positions; the vertical axis goes from 0 to top."""
    image = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest",
                        cmap=pyplot().get_cmap(*cmap), **limits,
                        extent=(0.5, values.shape[1] + 0.5, 0, top))
    axis.figure.colorbar(image, ax=axis, label=label)


def draw_positions(path, by, numbers, m=None, history=()):
    """positions.png: up to six views of what depends on the position.

    by, numbers: as evals/positions.py makes them; views of weights and masks only where they are
    there. m (T, F): the masks; history (rows, T): the position weights over training.
    """
    T, views = len(by["error"]), [draw_error, draw_sparsity, draw_spans]
    if "weight" in by:
        views[1:1] = [draw_history, draw_difficulty] if len(history) else [draw_difficulty]
    if m is not None:
        views[-1:-1] = [draw_masks]
    rows = 1 if len(views) == 3 else 2
    figure, axes = pyplot().subplots(rows, -(-len(views) // rows), figsize=(15, 4 * rows),
                                     squeeze=False)
    for axis, draw in zip(axes.flat, views):
        draw(axis, T, by, numbers, m, history)
    for axis in axes.flat[len(views):]:
        axis.remove()
    save(figure, path, 70)


def draw_error(axis, T, by, numbers, *_):
    axis.plot(range(1, T + 1), by["error"], color="tab:red")
    axis.axvspan(1, min(32, T // 4), color="tab:blue", alpha=0.12, label="early positions")
    axis.set(xlabel=HERE, ylabel="squared error a token (its squared norm: D)",
             title=f"Early positions: error {numbers['no_sink']['early_error']:+.1%}")
    axis.set_ylim(0)
    axis.legend(loc="lower right")


def draw_history(axis, T, by, numbers, m, history):
    # Fig. 1: evolution of position-specific weights
    heat_map(axis, history, 100, "weight $w_t$ (mean 1; top 2 % cut)", ("viridis", 10),
             vmax=np.quantile(history, 0.98))
    axis.set(xlabel=HERE, ylabel="training done (%)", title="Weight of each position in the loss")


def draw_difficulty(axis, T, by, numbers, *_):
    # Fig. 1: reconstruction difficulty correlation
    dots = axis.scatter(by["error"], by["weight"], c=range(1, T + 1), cmap="plasma", s=18)
    axis.figure.colorbar(dots, ax=axis, label="position")
    axis.set(xlabel="held-out squared error a token", ylabel="final weight $w_t$ (mean 1)",
             title=f"Weight, difficulty: r = {numbers['weight_difficulty_r']:.2f}")


def draw_sparsity(axis, T, by, *_):
    axis.plot(range(1, T + 1), by["off"], label="features off", color="tab:green")
    if "mean_mask" in by:
        axis.plot(range(1, T + 1), by["mean_mask"], label="mean mask", color="tab:purple")
    axis.axhline(0.73, color="grey", linestyle="--", label="paper E's 0.73")
    axis.set(xlabel=HERE, ylabel="fraction", ylim=(0, 1.02),
             title="Sparsity in both readings" if "mean_mask" in by else "Sparsity")
    axis.legend()


def draw_masks(axis, T, by, numbers, m, history):
    t = np.arange(1, T + 1)
    order = np.argsort((m * t[:, None]).sum(0) / m.sum(0).clip(1e-12), kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(120, len(order))).astype(int)]
    heat_map(axis, m[:, order].T, len(order), "mask $m_{t,k}$", ("gray_r", 5), vmin=0, vmax=1)
    axis.set(xlabel=HERE, ylabel="feature (by mean position)",
             title=f"Masks; r with their first draw {numbers['r_with_first_draw']:.2f}")


def draw_spans(axis, T, by, numbers, *_):
    n = 2 if "mask_span" in by else 1
    axis.hist([by[name] for name in ("span", "mask_span")[:n]], np.linspace(0.5, T + 0.5, 33),
              color=("tab:blue", "plum")[:n], label=("activations", "mask alone")[:n])
    axis.axvline(T / 2, color="grey", linestyle="--", label="feature that ignores position")
    axis.margins(y=0.4)
    axis.set(xlabel="span (positions with half of the activation)", ylabel="features",
             title=f"Spans of features: median {numbers['span']:.0f} of {T}")
    axis.legend(loc="upper left")


def draw_clusters(path, profile, tree, labels, agreement):
    """clusters.png: dendrogram of the features beside their profiles (T, F), in the same order."""
    from scipy.cluster.hierarchy import dendrogram
    n = labels.max()
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 7), width_ratios=(1, 2.2))
    cut = tree[1 - n, 2] if n > 1 else 0                                  # lowest merge of clusters
    drawn = dendrogram(tree, orientation="left", no_labels=True, ax=left, color_threshold=cut)
    left.set(xlabel="Ward distance of profiles", ylabel="feature", title=f"{n} clusters")
    share = (profile / profile.max(0).clip(1e-12))[:, drawn["leaves"]]
    heat_map(right, share.T, len(share.T), "mean activation (share of the feature's maximum)",
             ("magma", 5))
    right.set(xlabel=HERE, ylabel="feature (as on the left)",
              title=f"Where features are active; clusters from two halves agree {agreement:.2f}")
    save(figure, path, 70)
