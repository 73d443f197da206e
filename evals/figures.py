"""Drawings: a run's training curves at its end, and for evals/positions.py what depends on the
position (paper E, Fig. 1, Sec. 6.3).
"""
import json
import math
from itertools import takewhile

import common  # before torch: it sets how threads wait
import numpy as np
from matplotlib.figure import Figure

HERE = "position (1 = first token after the sink)"


def training(folder):
    """training.png from log.jsonl: terms of the loss, EV and active features over the steps."""
    try:
        rows = [{**json.loads(line)} for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise common.UserError(f"{folder}/log.jsonl holds no readable log "
                               f"({common.one_line(error)}).") from None
    if len(rows) < 2:
        return
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in rows[-1]}
    figure = Figure(figsize=(11, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for name in takewhile(lambda key: key != "error", list(columns)[1:]):    # loss and its terms
        if columns[name].any():
            lowers = np.nanmin(columns[name]) < 0                         # dashed: lowers the loss
            left.semilogy(columns["step"], np.abs(columns[name]), "--" if lowers else "-",
                          linewidth=1, label=name)
    left.set(xlabel="step", title="Terms of the loss, weighted, in size (dashed: lowers the loss)")
    left.legend(fontsize=8)
    right.plot(columns["step"], np.maximum(-0.1, columns["EV"]), color="tab:blue")
    right.set(xlabel="step", ylabel="explained variance (training batch)", ylim=(-0.1, 1.02))
    twin = right.twinx()
    twin.plot(columns["step"], columns["active"], color="tab:orange", linewidth=1)
    twin.set_ylabel("active features a token (L0)", color="tab:orange")
    figure.savefig(folder / "training.png", dpi=90)


def positions(path, by, numbers, maps):
    """positions.png: up to six panels of what depends on the position; those of weights and masks
    where an SAE has them. by, numbers, maps: as evals/positions.py makes them."""
    T, rows = len(by["error"]), 2 if maps else 1
    figure = Figure(figsize=(15, 4 * rows), layout="tight")
    error, off, span, *others = figure.subplots(rows, 3).flat
    at = range(1, T + 1)
    error.plot(at, by["error"], color="tab:red")
    error.axvspan(1, min(32, T // 4), color="tab:blue", alpha=0.12)
    title = f"Early positions (shaded): error {numbers['no_sink']['early_error']:+.1%}"
    error.set(ylim=0, ylabel="squared error a token (its squared norm: D)")
    if "weight" in by:                     # Fig. 1: reconstruction difficulty correlation
        twin = error.twinx()
        twin.plot(at, by["weight"], color="tab:purple", linewidth=1)
        twin.set(ylim=0, ylabel="final weight $w_t$ (purple; mean 1)")
        title += f"\nweight and error: r = {numbers['weight_difficulty_r']:.2f}"
    error.set(xlabel=HERE, title=title)
    off.plot(at, by["off"], label="features off", color="tab:green")
    if "mean_mask" in by:
        off.plot(at, by["mean_mask"], label="mean mask", color="tab:purple")
    off.axhline(0.73, color="grey", linestyle="--", label="paper E's 0.73")
    off.set(xlabel=HERE, ylabel="fraction", ylim=(0, 1.02), title="Sparsity")
    spans = {name: by[key] for name, key in (("activations", "span"), ("mask alone", "mask_span"))
             if key in by}
    span.hist(spans.values(), np.linspace(0.5, T + 0.5, 33), label=[*spans])
    span.axvline(T / 2, color="grey", linestyle="--", label="feature that ignores position")
    span.set(xlabel="span (positions with half of the activation)", ylabel="features",
             title=f"Spans of features: median {numbers['span']:.0f} of {T}")
    off.legend()
    span.legend()
    if "weights" in maps:                  # Fig. 1: evolution of the weights
        heat_map(others.pop(0), maps["weights"], "weight $w_t$ (mean 1; top 2 % cut), from the\n"
                 "start of training to its end", "viridis", vmax=np.quantile(maps["weights"], 0.98))
    if "masks" in maps:
        mean = maps["masks"] @ np.arange(T) / maps["masks"].sum(1).clip(1e-12)
        heat_map(others.pop(0), maps["masks"][mean.argsort()], "mask $m_{t,k}$, features by mean "
                 f"position\nr with the first draw {numbers['r_with_first_draw']:.2f}", "gray_r")
    if "clusters" in maps:                 # Sec. 6.3: the tree, its leaves at the map's rows
        from scipy.cluster.hierarchy import dendrogram
        spot = others.pop(0)
        spot.set_axis_off()
        parts = spot.get_subplotspec().subgridspec(1, 2, width_ratios=(1, 3), wspace=0.02)
        tree, axis = map(figure.add_subplot, parts)
        dendrogram(maps["tree"], orientation="left", no_labels=True, ax=tree)
        tree.set_axis_off()
        heat_map(axis, maps["clusters"], "mean activation (share of the maximum), features by "
                 f"tree\ntwo halves agree {numbers['clusters']['consistency']:.2f}", "magma")
    for axis in others:
        axis.remove()
    figure.savefig(path, dpi=70)


def heat_map(axis, rows, title, cmap, **limits):
    """rows (n, T) over the positions."""
    image = axis.imshow(rows, aspect="auto", origin="lower", interpolation="nearest", cmap=cmap,
                        extent=(0.5, rows.shape[1] + 0.5, 0, len(rows)), **limits)
    axis.figure.colorbar(image, ax=axis)
    axis.set(xlabel=HERE, title=title)
