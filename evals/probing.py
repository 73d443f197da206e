"""Sparse probing: how well a few features tell kinds of text apart, beside the model's channels.

    python -m evals.probing RUN

Protocol of SAEBench 0.6.0 (sae_bench/evals/sparse_probing) on bundled text, data/probes.jsonl.xz:
language, topic, author, ... of a text, and whether a token stands inside a quotation. Each task is
asked as one-vs-rest questions, half of the rows positive. A text is the mean of its scored tokens;
the task about tokens takes up to 4 tokens inside and 4 outside the marked spans of each text. The
probe is sklearn's L2 logistic regression (C = 1, 1000 iterations, nothing standardised) on the k
columns with the largest |mean over positives - mean over negatives| in the training set.

    sae_top_K        test accuracy on K features of this SAE; sae_all on all of them
    residual_top_K   the same on K channels of the residual stream; residual_all on all of them
    pca_top_K        the same on K principal components of the training set's residual stream

Means over classes, then over tasks; per_task holds each task's own values and numbers of rows.
0.5 is chance. SAEBench's all-column probe picks its epoch on the test set; ours does not. For
SAEBench's own eight data sets see evals/saebench.py. The states of the texts are kept in --cache
for the next SAE of the layer; the probes take about 1 s a task.
"""
import contextlib
import functools
import hashlib
import math
import warnings
from pathlib import Path

import common  # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn.functional as F

from data import texts
from evals import run_eval

NEEDS_TEXT = True                       # --model synthetic is refused before training
KS = (1, 2, 5, 10, 20, 50)              # paper E's; SAEBench's default is 1, 2, 5
TEXTS = {"train": 420, "test": 180}     # texts of a task at most, evenly by label; not tuned
KEPT = 48                               # tokens kept of a text, for speed; SAEBench keeps 127


@torch.no_grad()
def evaluate(sae, acts, folder=None):
    """The accuracies above, as a dict."""
    samples = encode_texts(sae, acts, load_texts(), min(KEPT, acts.T))
    rows = [{"task": task, **{split: len(splits[split][2]) for split in TEXTS},
             **probe_task(splits["train"], splits["test"])} for task, splits in samples.items()]
    scores = [name for name in rows[0] if name not in ("task", *TEXTS)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in scores}
    return {**means, "tasks": len(rows), "per_task": rows}


def load_texts():
    """Rows of the bundled probe sets, at most TEXTS a task: dicts with "task", "split", "text" and
    "label" or, for a task about tokens, "spans" of characters [[start, end], ...]."""
    groups, chosen = {}, []
    for row in texts.bundled("probes"):
        labels = groups.setdefault((row["task"], row["split"]), {})
        labels.setdefault(row.get("label"), []).append(row)
    for (task, split), labels in groups.items():
        for label, group in labels.items():
            gen = common.generator(42, f"{task}/{split}/{label}")
            order = torch.randperm(len(group), generator=gen).tolist()
            chosen += [group[i] for i in order[:TEXTS[split] // len(labels)]]
    return chosen


def encode_texts(sae, acts, items, T):
    """{task: {split: (x (n, D), f (n, F), labels)}} of texts cut to T tokens (load_texts). A row
    is a text with a scored token, or one token of a task about tokens ("inside", "outside")."""
    lm = acts.lm
    enc = lm.tokenizer([item["text"] for item in items], add_special_tokens=False, verbose=False,
                       return_offsets_mapping=any("spans" in item for item in items))
    # cut by hand: a tokenizer may be set to cut on the left
    ids = [row[:T] or [lm.bos] for row in enc["input_ids"]]
    tokens = torch.tensor([[lm.bos] + row + row[-1:] * (T - len(row)) for row in ids])    # (N, 1+T)
    lengths = torch.tensor([len(row) for row in ids])
    states, found = text_states(acts, tokens, lengths), {}
    for rows in torch.arange(len(items)).split(acts.cfg.lm_batch):
        x = torch.stack([F.pad(states[i], (0, 0, 0, T - len(states[i]))) for i in rows])
        x, threshold = x.float().to(acts.device), acts.heldout_store.threshold           # (b, T, D)
        mask = common.scored_mask(x, tokens[rows], lengths[rows], lm.special, threshold)  # (b, T)
        f = sae.encode(x, mask).float()                                                  # (b, T, F)
        mean_x, mean_f = pool(x, x, mask).cpu(), pool(f, x, mask).cpu()
        for i, row in enumerate(rows.tolist()):
            item = items[row]
            kept = found.setdefault(item["task"], {}).setdefault(item["split"], [])
            if "spans" in item:
                picked = pick_tokens(item["spans"], enc["offset_mapping"][row][:T], mask[i], row)
                kept += [(x[i, t].cpu(), f[i, t].cpu(), label) for t, label in picked]
            elif mask[i].any():
                kept.append((mean_x[i], mean_f[i], item["label"]))
    return {task: {split: (torch.stack([x for x, _, _ in kept]),
                           torch.stack([f for _, f, _ in kept]), [label for *_, label in kept])
                   for split, kept in splits.items()} for task, splits in found.items()}


def text_states(acts, tokens, lengths):
    """States of block acts.layer: for each text (length, D) in bf16 on the CPU; kept in --cache.
    tokens (N, 1 + T), lengths (N,)."""
    lm, cfg = acts.lm, acts.cfg
    key = (tokens.tolist(), lengths.tolist(), lm.name, lm.revision, str(lm.dtype))
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = Path(cfg.cache) / f"probes-{Path(lm.name).name}-{digest}-L{acts.layer}.safetensors"
    if cfg.cache != "none":
        with contextlib.suppress(common.UserError):        # missing or damaged: made again
            return common.load_tensors(path)[0]["x"].split(lengths.tolist())
    states = [None] * len(tokens)
    with common.progress(lengths.sum().item(), "probe texts", "tok") as bar:
        # texts of one length side by side: little padding
        for rows in lengths.argsort(stable=True).split(cfg.lm_batch):
            batch = tokens[rows, :1 + lengths[rows].max()].to(lm.device)
            h = common.hidden_states(lm, batch, [acts.layer])[acts.layer]
            for row, x in zip(rows.tolist(), h[:, 1:].bfloat16().cpu()):
                states[row] = x[:lengths[row]]
            bar.update(lengths[rows].sum().item())
    if cfg.cache != "none":
        path.parent.mkdir(parents=True, exist_ok=True)
        common.save_tensors(path, {"x": torch.cat(states)})
    return states


def pool(values, x, mask):
    """Mean over scored positions with a non-zero state, as SAEBench pools: values (b, T, C),
    x (b, T, D), mask (b, T) -> (b, C); 0 where there is no such position."""
    mask = mask & (x != 0).any(-1)
    return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def pick_tokens(spans, offsets, mask, seed):
    """Up to 4 scored tokens inside and 4 outside the spans of characters: [(position, label)].
    offsets: each token's first and last character; a token is inside where its middle is."""
    middle = [(first + last) / 2 for first, last in offsets]
    inside = torch.tensor([any(a <= m < b for a, b in spans) for m in middle], dtype=torch.bool)
    picked = []
    for label, where in (("inside", inside), ("outside", ~inside)):
        where = (where & mask[:len(where)].cpu()).nonzero().flatten()
        order = torch.randperm(len(where), generator=common.generator(42, f"{seed}/{label}"))[:4]
        picked += [(t, label) for t in where[order].tolist()]
    return sorted(picked)


def probe_task(train, test, ks=KS):
    """Accuracies of one task, means over its classes; train, test: (x (n, D), f (n, F), labels)."""
    (x, f, labels), (x_test, f_test, labels_test) = train, test
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh.T           # (D, components)
    views = {"sae": (f, f_test), "residual": (x, x_test),
             "pca": ((x - mean) @ axes, (x_test - mean) @ axes)}
    classes, scores = sorted(set(labels) & set(labels_test)), {}
    for name in classes[:1] if len(classes) == 2 else classes:       # of two, one mirrors the other
        (rows, y), (rows_test, y_test) = (one_vs_rest(some, name) for some in (labels, labels_test))
        for view, (a, b) in views.items():
            a, b = a[rows].float().numpy(), b[rows_test].float().numpy()
            chosen = {f"top_{k}": top_columns(a, y, k) for k in ks}
            if view != "pca":
                chosen["all"] = slice(None)
            for suffix, columns in chosen.items():
                score = probe_accuracy(a[:, columns], y, b[:, columns], y_test)
                scores.setdefault(f"{view}_{suffix}", []).append(score)
    return {key: float(np.mean(values)) for key, values in scores.items()}


def one_vs_rest(labels, positive, seed=42):
    """Rows of one class and as many drawn evenly from the other classes -> rows, 0/1 (n,)."""
    gen, others = common.generator(seed, positive), sorted(set(labels) - {positive})

    def draw(rows, n):
        return [rows[i] for i in torch.randperm(len(rows), generator=gen)[:n].tolist()]
    members = {name: [i for i, label in enumerate(labels) if label == name] for name in set(labels)}
    share = math.ceil(len(members[positive]) / max(1, len(others)))
    negative = [i for other in others for i in draw(members[other], share)]
    n = min(len(members[positive]), len(negative))
    return draw(members[positive], n) + draw(negative, n), np.repeat([1, 0], n)


def top_columns(x, y, k):
    """The k columns of x (n, C) with the largest |mean over y = 1 - mean over y = 0| -> (k,)."""
    return np.abs(x[y == 1].mean(0) - x[y == 0].mean(0)).argsort(kind="stable")[::-1][:k]


def probe_accuracy(x, y, x_test, y_test):
    """Test accuracy of an L2 logistic regression, C = 1, 1000 iterations, columns as they are."""
    from sklearn.linear_model import LogisticRegression
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # "did not converge": SAEBench keeps such probes too
        return LogisticRegression(C=1.0, max_iter=1000).fit(x, y).score(x_test, y_test)


main = functools.partial(run_eval, "probing", evaluate, __doc__, needs_text=NEEDS_TEXT)

if __name__ == "__main__":
    raise SystemExit(main())
