"""Unlearning: can a run's features take one kind of text from the language model and keep another?

    python -m evals.unlearning RUN

Protocol of SAEBench 0.6.0 (sae_bench/evals/unlearning), with next-token accuracy on bundled text
instead of WMDP's questions, which small models cannot answer (those: evals/saebench.py).

  1. Select, on training text, n features (select_features).
  2. Edit: a chosen feature that is on becomes -multiplier times its mean active value (0: removed).
     What the SAE does not explain stays. SAEBench's multipliers, 25 to 200, are in raw units.
  3. Score, on held-out text: the largest relative drop of the forget accuracy among the settings
     (threshold, n, multiplier) that keep 99 % of the retain accuracy.

    score                        SAEBench's rule: a maximum over the scored text, so biased upwards
    crossed_drop, crossed_kept   without it: the setting is chosen on every second window, measured
                                 on the others, and the other way round; what is lost, what is kept
    random, random_crossed       score and crossed_drop over features drawn at random
    most_active                  score over the features most often on in the forget text
    eligible_features            by threshold; an SAE that has none scores 0
"""
import functools
import math
import time
from statistics import fmean

import common  # before torch: it sets how threads wait
import torch
import torch.nn.functional as F

from data import texts
from evals import run_eval

PAIRS = {"code, keeping prose": (("corpus", "code"), ("corpus", "prose")),
         "French, keeping German": (("corpus", "fr"), ("corpus", "de")),
         "Shakespeare, keeping prose": (("shakespeare", None), ("corpus", "prose"))}
THRESHOLDS = (0.001, 0.01, 0.1)     # SAEBench's, and 0.1 for codes too dense for them
NUMBERS = (10, 20)                  # n: SAEBench's
MULTIPLIERS = (0, 3, 10)            # not tuned
WINDOWS = 24                        # of T tokens, for each domain and split; not tuned
NEEDS_TEXT = True                   # --model synthetic is refused before training
KEEP = 0.99                         # SAEBench: the share of the retain accuracy that must stay
HOPELESS = 0.98                     # below it no larger multiplier is tried; not tuned


def evaluate(sae, acts, folder=None):
    """The scores above for each pair of PAIRS, and their means, as a dict. UserError where
    the bundled text has too few windows of T tokens."""
    states, pairs = functools.cache(functools.partial(domain_states, acts)), {}
    for name, (forget, retain) in PAIRS.items():
        pairs[name] = unlearn_pair(sae, acts, states(*forget), states(*retain))
        common.say(f"unlearning: {name}: {pairs[name]['score']:.3f} of the accuracy gone")
    means = ("score", "random", "most_active", "crossed_drop", "crossed_kept", "eligible")
    return {**{key: fmean(pair[key] for pair in pairs.values()) for key in means}, **pairs}


@torch.no_grad()
def domain_states(acts, corpus, domain):
    """The language model's states on one kind of bundled text: {"select": of its training part,
    "score": of its held-out part}, each tokens (N, 1+T), h (N, 1+T, D), mask (N, T)."""
    lm, sink, out = acts.lm, acts.heldout_store.threshold, {}
    domains = [domain] if domain else None
    for part, split in (("select", "train"), ("score", "heldout")):
        found = [row["text"] for row in texts.bundled(corpus, split, domains)]
        tokens, lengths = texts.make_windows(found, lm, acts.T, 10**9)
        gen = common.generator(0, f"{corpus}{domains}{split}")
        order = torch.randperm(len(tokens), generator=gen)       # then whole windows first
        rows = order[lengths[order].argsort(descending=True, stable=True)][:WINDOWS]
        if len(rows) < 2:
            raise common.UserError(f"--T {acts.T}: too few windows of {domain or corpus} text.")
        tokens = tokens[rows].long().to(lm.device)
        h = common.hidden_states(lm, tokens, [acts.layer])[acts.layer]
        out[part] = tokens, h, common.scored_mask(h[:, 1:], tokens, lengths[rows], lm.special, sink)
    return out


@torch.no_grad()
def unlearn_pair(sae, acts, forget, retain):
    """Select and score on one pair of domains, each from domain_states -> dict."""
    start = time.perf_counter()
    plain = [next_token(acts, domain["score"]) for domain in (forget, retain)]
    on_forget, typical = activity(sae, *forget["select"])
    on_retain, _ = activity(sae, *retain["select"])
    gen = common.generator(acts.cfg.seed, "random-features")
    shuffled = torch.randperm(len(typical), generator=gen).tolist()
    plans = {"sae": [(t, n, select_features(on_forget, on_retain, t, n))
                     for t in THRESHOLDS for n in NUMBERS],
             "random": [(None, n, shuffled[:n]) for n in NUMBERS],
             "most_active": [(1.0, n, select_features(on_forget, 0 * on_retain, 1.0, n))
                             for n in NUMBERS]}
    if not any(features for _, _, features in plans["sae"]):
        plans = dict.fromkeys(plans, [])                   # nothing to select, none to compare with
    rows = []
    for method, plan in plans.items():
        tried = sweep(sae, acts, plan, typical, forget["score"], retain["score"], plain)
        every, even, odd = (                               # shares of both accuracies, by setting
            [tuple(accuracy(table[windows]) / max(accuracy(before[windows]), 1e-9)
                   for table, before in zip(tables, plain)) for _, *tables in tried]
            for windows in (slice(None), slice(0, None, 2), slice(1, None, 2)))
        score, best = best_setting(every)
        halves = (best_setting(even)[1], odd), (best_setting(odd)[1], even)
        crossed = [(1.0, 1.0) if i is None else there[i] for i, there in halves]
        rows.append({"method": method, "settings_tried": len(tried), "score": score,
                     "retain_kept": 1.0 if best is None else every[best][1],
                     "setting": None if best is None else tried[best][0],
                     "crossed_drop": 1 - fmean(known for known, _ in crossed),
                     "crossed_kept": fmean(kept for _, kept in crossed)})
    own, random, most_active = rows
    eligible = {str(t): ((on_forget > 0) & (on_retain < t)).sum().item() for t in THRESHOLDS}
    return {**{key: own[key] for key in ("score", "retain_kept", "crossed_drop", "crossed_kept")},
            "random": random["score"], "random_crossed": random["crossed_drop"],
            "most_active": most_active["score"], "methods": rows,
            "eligible": eligible["0.01"], "eligible_features": eligible,
            "accuracy_forget": accuracy(plain[0]), "accuracy_retain": accuracy(plain[1]),
            "seconds": time.perf_counter() - start}


def activity(sae, tokens, h, mask):
    """Share of scored tokens on which each feature is on, and its mean value there: (F,) each."""
    on = value = 0
    for x, m in zip(h[:, 1:].float().split(8), mask.split(8)):
        f = sae.encode(x, m).float().clamp(min=0) * m[..., None]          # (8, T, F)
        on, value = on + (f > 0).sum((0, 1)), value + f.sum((0, 1))
    return on / mask.sum(), value / on.clamp(min=1)


def select_features(forget, retain, threshold, n):
    """Of the features on at less than `threshold` of the retain tokens, the n on most often at
    forget tokens; never one on at none. (F,), (F,) -> list of int. Both are rounded to 6 decimals
    first, as in SAEBench's text files: 2 of 2001 tokens is not below 0.001."""
    forget, retain = (share.double().round(decimals=6) for share in (forget, retain))
    forget = forget * (retain < threshold)
    return forget.argsort(descending=True, stable=True)[:min(n, forget.count_nonzero())].tolist()


def sweep(sae, acts, plan, typical, forget, retain, plain):
    """Every setting of plan [(threshold, n, features)] and MULTIPLIERS that is worth trying ->
    [(setting, next_token's table of the forget text, that of the retain text)]."""
    tried, done = [], [[]]
    for threshold, n, features in plan:
        if features in done:                               # none, or the same set again
            continue
        done.append(features)
        for multiplier in MULTIPLIERS:
            edit = functools.partial(clamp_edit, sae, features, multiplier * typical[features])
            kept = next_token(acts, retain, edit, plain[1])
            if accuracy(kept) < HOPELESS * accuracy(plain[1]):
                break
            setting = dict(threshold=threshold, n=n, multiplier=multiplier, features=features)
            tried.append((setting, next_token(acts, forget, edit, plain[0]), kept))
    return tried


def best_setting(runs, keep=KEEP):
    """SAEBench's rule: 1 - the least forget share among runs (forget share, retain share) that keep
    the retain one, and the index of that run; (0.0, None) where none helps."""
    fit = [(1 - left, i) for i, (left, kept) in enumerate(runs) if kept >= keep and left < 1]
    return max(fit, default=(0.0, None))


def clamp_edit(sae, features, value, mask=None, limit=math.inf):
    """SAEBench's edit: a chosen feature that is on becomes -value: a number or (n,)."""
    def change(f):
        f, part = f.clone(), f[..., features]
        f[..., features] = torch.where(part > 0, -value, part)
        return f
    return feature_edit(sae, change, mask, limit)


def feature_edit(sae, change, mask=None, limit=math.inf):
    """An edit for common.intervene: h (B, 1+T, D) -> h + dec(change(f)) - dec(f), not at position
    0 nor where mask (B, T) is False or the norm of h exceeds limit."""
    def edit(h):
        x = h[:, 1:].float()
        use = (x.norm(dim=-1) <= limit) & (True if mask is None else mask)
        f = sae.encode(x, use)
        shift = torch.where(use[..., None], change(f) - f, 0.0)
        shift = sae.decode(shift) - sae.decode(torch.zeros_like(shift))   # decode is linear
        return torch.cat([h[:, :1], (x + shift).to(h.dtype)], 1)
    return edit


def next_token(acts, states, edit=None, before=None, batch=8):
    """A table (N, 2) fp64 by window: right next tokens and all; a scored one predicts a scored one.
    states: see domain_states; edit: mask -> edit of h; before: the table without it."""
    lm, (tokens, h, mask) = acts.lm, states
    table = torch.zeros(len(h), 2, dtype=torch.float64) if before is None else before.clone()
    for rows in torch.arange(len(h), device=h.device).split(batch):
        new = h[rows]
        if edit is not None:
            new = edit(mask[rows])(new)
            changed = (new != h[rows]).flatten(1).any(1)
            rows, new = rows[changed], new[changed]
        if len(rows) == 0:                                 # nothing changed: the table stands
            continue
        with common.intervene(lm, acts.layer, lambda _: new):     # goes on from there
            logits = lm.model(input_ids=tokens[rows], use_cache=False).logits[:, :-1]
        source = F.pad(mask[rows], (1, 0))[:, :-1] & mask[rows]           # (b, T)
        right = (logits.argmax(-1) == tokens[rows, 1:]) & source
        table[rows.cpu()] = torch.stack([right.sum(1), source.sum(1)], 1).double().cpu()
    return table


def accuracy(table):
    """Share of right next tokens, from next_token's table (n, 2)."""
    return (table[:, 0].sum() / table[:, 1].sum().clamp(min=1)).item()


main = functools.partial(run_eval, "unlearning", evaluate, __doc__, needs_text=NEEDS_TEXT)

if __name__ == "__main__":
    raise SystemExit(main())
