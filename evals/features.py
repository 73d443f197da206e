"""features.html: a page to browse features by the held-out text they answer to.

    python -m evals.features RUN      then open RUN/features.html in any browser; no network needed

Over scored tokens: a feature is on where f > 0; density is the share of tokens on; span the mean
number of tokens in a stretch on (cut at masked tokens and window ends, as in evals/temporal.py);
p(stay) = P(on at t+1 | on at t); the line is the mean of f over positions 1..T, zeros included. f
is in the code's units (x of mean norm sqrt(D)). A context is TOKENS tokens around the peak of f in
a window; windows: those with the largest peaks.

The page itself is features.html beside this file; @DATA@ in it becomes the data, as json.
"""
import json
import math
from functools import partial
from pathlib import Path

import common  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F

from evals import run_eval

FEATURES, CONTEXTS, TOKENS = 300, 6, 40     # on the page; contexts each; tokens each
BINS = 64                                   # most points of the line over positions


@torch.no_grad()
def evaluate(sae, acts, folder, limit=FEATURES):
    """Write folder/features.html -> numbers of features. Two passes over the held-out windows."""
    stats = statistics(sae, acts)
    orders = {name: stats[name] for name in ("span", "density", "max", "stay")}   # (F,) each
    live = orders["max"] > 0
    chosen = cover_orders(orders.values(), live, limit)                   # (C,)
    pieces, contexts = find_contexts(sae, acts, chosen, stats)
    W = F.normalize(sae.W_dec.detach().float(), dim=1)
    cosine = (W[chosen] @ W.t()).scatter_(1, chosen[:, None], -2.0)       # (C, F), itself last
    near = cosine.topk(min(5, len(W) - 1), dim=1)
    line = stats["line"][:, chosen].t()                                   # (C, P)
    height = line.amax(1, keepdim=True)
    columns = {"i": chosen, **{name: values[chosen] for name, values in orders.items()},
               "height": height[:, 0], "line": (99 * line / height).round().int(),
               "near": near.indices, "cosines": near.values}
    rows = zip(*(rounded(column.tolist()) for column in columns.values()), contexts)
    texts = dict.fromkeys(text for piece in pieces for text in piece[2])
    index = {text: n for n, text in enumerate(texts)}
    counts = {"live": int(live.sum()), "features": len(W)}
    data = {"run": folder.resolve().name, "layer": acts.layer, "T": acts.T, "causal": sae.causal,
            "model": Path(acts.lm.name).name if acts.lm else "synthetic data",
            "tokens": stats["tokens"], "L0": rounded(stats["L0"]), "EV": rounded(stats["EV"]),
            **counts, "vocabulary": list(texts),
            "pieces": [[window, start, [index[t] for t in ts]] for window, start, ts in pieces],
            "rows": [dict(zip([*columns, "contexts"], row)) for row in rows]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    text = text.replace("<", "\\u003c")                                   # no text ends the script
    common.write_atomic(folder / "features.html", page.replace("@DATA@", text))
    return {"shown": len(chosen), **counts}


def rounded(v):
    """Four digits for the page, in nested lists too; NaN, which json lacks, becomes None."""
    if isinstance(v, list):
        return [rounded(x) for x in v]
    return v if isinstance(v, int) else float(f"{v:.4g}") if math.isfinite(v) else None


def statistics(sae, acts):
    """First pass: "span", "density", "max", "stay" (F,); "line" (P, F), means of f in P <= BINS
    runs of positions; "peaks", "windows", "places" (CONTEXTS, F), the windows' largest; "EV",
    "L0", "tokens"."""
    device, size, P = sae.W_dec.device, len(sae.W_dec), min(acts.T, BINS)
    active, again, pairs = torch.zeros(3, size, dtype=torch.float64, device=device)
    mass, count = active.new_zeros(P, size), active.new_zeros(P)
    peaks, n = torch.zeros(CONTEXTS, size, device=device), 0
    windows, places = torch.zeros(2, CONTEXTS, size, dtype=torch.long, device=device)
    error = energy = x_sum = 0.0
    part = torch.arange(acts.T, device=device) * P // acts.T              # (T,) position -> its run
    for x, mask in acts.heldout():
        x_hat, f = sae(x, mask)
        f = torch.where(mask[..., None], f.float().relu(), 0.0)           # (b, T, F)
        scored = x[mask].double()
        error = error + (x_hat[mask] - scored).square().sum()
        energy, x_sum = energy + scored.square().sum(), x_sum + scored.sum(0)
        on = f > 0
        active += on.sum((0, 1))
        again += (on[:, 1:] & on[:, :-1]).sum((0, 1))                     # on at t and t+1
        pairs += (on[:, :-1] & mask[:, 1:, None]).sum((0, 1))             # on at t, t+1 scored
        mass.index_add_(0, part, f.double().sum(0))
        count.index_add_(0, part, mask.double().sum(0))
        peak, place = f.max(1)                                            # (b, F)
        window = torch.arange(n, n + len(x), device=device)[:, None].expand_as(place)
        peaks, keep = torch.cat([peaks, peak]).topk(CONTEXTS, dim=0)
        windows = torch.cat([windows, window]).gather(0, keep)
        places = torch.cat([places, place]).gather(0, keep)
        n += len(x)
    tokens, stretches = count.sum(), active - again                       # by their first tokens
    return {"span": active / stretches, "density": active / tokens, "max": peaks[0].double(),
            "stay": again / pairs, "line": mass / count.clamp(min=1)[:, None], "peaks": peaks,
            "windows": windows, "places": places, "tokens": int(tokens),
            "EV": (1 - error / (energy - x_sum.square().sum() / tokens)).item(),
            "L0": (active.sum() / tokens).item()}


def cover_orders(orders, live, limit):
    """Live features (C,), ascending; of more than `limit`: the top, the bottom and evenly spaced
    ranks of each order (F,), then evenly spaced others. NaN has no rank."""
    index = live.nonzero().flatten()
    if len(index) <= limit:
        return index
    chosen, n = torch.zeros_like(live), limit // (3 * len(orders))

    def spaced(ranked, n):
        return ranked[torch.linspace(0, len(ranked) - 1, n, device=ranked.device).long()]
    for values in orders:
        ranked = index[~values[index].isnan()]
        ranked = ranked[values[ranked].argsort(descending=True, stable=True)]
        if len(ranked):
            chosen[torch.cat([ranked[:n], ranked.flip(0)[:n], spaced(ranked, n)])] = True
    chosen[spaced((live & ~chosen).nonzero().flatten(), limit - int(chosen.sum()))] = True
    return chosen.nonzero().flatten()


def find_contexts(sae, acts, chosen, stats):
    """Second pass: text and activations at the peaks of the chosen (C,) -> pieces [(window, first
    position - 1, texts of the tokens)], each once, and for each feature its contexts [(piece,
    offset of the peak, peak, levels)]; level: 0..99 of its maximum (1 or more where on), -1 where
    not scored. Starts are multiples of 8: near peaks share a piece."""
    peaks, windows, places = (stats[name][:, chosen] for name in ("peaks", "windows", "places"))
    size = min(TOKENS, acts.T)
    starts = ((places - 24) // 8 * 8).clamp(0, acts.T - size)             # (CONTEXTS, C)
    reach = starts[..., None] + torch.arange(size, device=starts.device)  # (CONTEXTS, C, size)
    values, n = torch.zeros(reach.shape, device=starts.device), 0
    for x, mask in acts.heldout():
        here = (windows >= n) & (windows < n + len(x)) & (peaks > 0)
        slot, column = here.nonzero(as_tuple=True)
        if len(slot):
            f = torch.where(mask[..., None], sae.encode(x, mask).float()[..., chosen].relu(), -1.0)
            rows = windows[slot, column, None] - n
            values[slot, column] = f[rows, reach[slot, column], column[:, None]]
        n += len(x)
    levels = (99 * values / peaks[0][:, None]).round().clamp(min=1)
    levels = torch.where(values > 0, levels, values.sign()).int()
    pieces, index, contexts = [], {}, []
    columns = (t.transpose(0, 1).tolist() for t in (peaks, windows, places, starts, levels))
    for feature in zip(*columns):
        contexts.append([])
        for peak, window, place, start, level in zip(*feature):
            if peak > 0:
                length = max(t for t, v in enumerate(level) if v >= 0) + 1     # drops padding
                piece = index.setdefault((window, start), len(pieces))
                if piece == len(pieces):
                    pieces.append((window, start, token_texts(acts, window, start, length)))
                contexts[-1].append([piece, place - start, rounded(peak), level[:length]])
    return pieces, contexts


def token_texts(acts, window, start, length):
    """Texts of `length` held-out tokens (synthetic data: positions, from 1). A character that
    several tokens share stands at the last of them."""
    if acts.lm is None:
        return [f" {t}" for t in range(start + 1, start + length + 1)]
    ids = acts.heldout_store.tokens[window, 1 + start:1 + start + length].tolist()
    decode = partial(acts.lm.tokenizer.decode, clean_up_tokenization_spaces=False)
    texts = [decode(ids[:i]).rstrip("\ufffd") for i in range(length + 1)]
    return [text[len(before):] for before, text in zip(texts, texts[1:])]


main = partial(run_eval, "features", evaluate, __doc__)

if __name__ == "__main__":
    raise SystemExit(main())
