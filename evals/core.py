"""Core metrics on held-out text: reconstruction, sparsity, and the language model with the SAE.

    python -m evals.core RUN          (every script runs it at its end: --eval core)

Definitions: core_metrics and splice_metrics below. A non-causal SAE's CE and KL are partly leakage.
"""
import functools
import math

import torch
import torch.nn.functional as F

import evals
from common import intervene


@torch.no_grad()
def evaluate(sae, acts, folder=None):
    """Core metrics on the held-out windows; with a language model also cross-entropy and KL."""
    spliced = splice_metrics(sae, acts) if acts.lm else {}
    return {**core_metrics(evals.coded(sae, acts)), **spliced}


def core_metrics(batches):
    """Reconstruction and sparsity over batches of (x, x_hat (B, T, D), f (B, T, F), mask (B, T)).

    EV = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over the whole sample; MSE: mean over tokens
    and dimensions (raw units squared); relative_reconstruction_bias: sum ||x_hat||^2 / sum x.x_hat;
    dead, dense: share of the features active on no token, on more than 10 %; inactive: mean share
    that is off; the others are means over tokens. evals/saebench.py has SAEBench's variants.
    """
    names = ("error", "square", "dot", "out", "L0", "L1", "cosine", "l2_ratio")
    n, mean, active = 0, 0.0, 0.0
    sums = dict.fromkeys(names, 0.0)
    for x, x_hat, f, mask in batches:
        x, x_hat, f = x[mask].double(), x_hat[mask].double(), f[mask]
        error, square, out = ((v * v).sum(-1) for v in (x - x_hat, x, x_hat))
        dot = (x * x_hat).sum(-1)
        cosine = dot / (square * out).clamp(min=1e-300).sqrt()
        L0, L1, ratio = (f != 0).sum(-1), f.abs().sum(-1), (out / square).sqrt()
        values = error, square, dot, out, L0, L1, cosine, ratio
        for name, value in zip(names, values):
            sums[name] += value.double().sum().item()
        n, mean, active = n + len(x), mean + x.sum(0), active + (f != 0).double().sum(0)
    return {"EV": 1 - sums["error"] / (sums["square"] - (mean.pow(2).sum() / n).item()),
            "MSE": sums["error"] / (n * len(mean)),
            **{name: sums[name] / n for name in ("L0", "L1", "cosine", "l2_ratio")},
            "relative_reconstruction_bias": sums["out"] / sums["dot"] if sums["dot"] else math.nan,
            "inactive": 1 - sums["L0"] / n / len(active),
            "dead": (active == 0).double().mean().item(),
            "dense": (active / n > 0.1).double().mean().item(),
            "features": len(active), "tokens": n}


def splice_metrics(sae, acts, n_windows=16, batch=4):
    """SAEBench's CE and KL scores: the reconstruction in the LM, against the LM and zero ablation.

    The reconstruction replaces scored positions only; the ablation sets every position to 0, BOS
    included. CE of the next token counts where the *source* token is scored and the target real;
    KL(original || other) at every scored position. A non-causal SAE's scores are partly leakage.
    """
    lm, store, sums = acts.lm, acts.heldout_store, {}
    for rows in torch.arange(min(n_windows, store.N)).split(batch):
        tokens, mask = store.tokens[rows].long().to(lm.device), store.get(rows, lm.device)[1]
        lengths = store.lengths[rows, None].to(lm.device)
        real = torch.arange(tokens.shape[1], device=lm.device) <= lengths
        logits = {"": lm.model(input_ids=tokens, use_cache=False).logits}
        for name, edit in (("_sae", reconstruct_edit(sae, mask)), ("_zero", torch.zeros_like)):
            with intervene(lm, acts.layer, edit):
                logits[name] = lm.model(input_ids=tokens, use_cache=False).logits
        for name, value in splice_sums(logits, tokens, F.pad(mask, (1, 0)), real).items():
            sums[name] = sums.get(name, 0) + value
    return splice_scores(sums)


def reconstruct_edit(sae, mask):
    """An edit for `intervene`: x_hat at scored positions, the original elsewhere."""
    def edit(h):
        x = h[:, 1:].float()
        new = torch.where(mask[..., None], sae(x, mask)[0].float(), x).to(h.dtype)
        return torch.cat([h[:, :1], new], 1)
    return edit


def splice_sums(logits, tokens, mask, real):
    """Sums of CE and KL; logits {"", "_sae", "_zero"}: (B, L, V); tokens, mask, real (B, L)."""
    source = mask[:, :-1] & real[:, 1:]
    target = tokens[:, 1:][source][:, None]
    logs = {name: v.float().log_softmax(-1) for name, v in logits.items()}
    sums = {"ce_tokens": source.sum().item(), "kl_tokens": mask.sum().item()}
    for name, log in logs.items():
        sums[f"ce{name}"] = -log[:, :-1][source].gather(-1, target).double().sum().item()
        kl = logs[""][mask].exp() * (logs[""][mask] - log[mask])
        sums[f"kl{name}"] = kl.double().sum().item()
    return sums


def splice_scores(sums):
    """CE and KL scores from splice_sums added up over batches."""
    ce, sae, zero = (sums[k] / max(1, sums["ce_tokens"]) for k in ("ce", "ce_sae", "ce_zero"))
    kl_sae, kl_zero = (sums[k] / max(1, sums["kl_tokens"]) for k in ("kl_sae", "kl_zero"))
    return {"ce_loss_without_sae": ce, "ce_loss_with_sae": sae, "ce_loss_with_ablation": zero,
            "ce_loss_score": (zero - sae) / (zero - ce) if zero != ce else math.nan,
            "kl_div_with_sae": kl_sae, "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl_sae) / kl_zero if kl_zero else math.nan,
            "ce_tokens": sums["ce_tokens"]}


main = functools.partial(evals.run_eval, "core", evaluate, __doc__)

if __name__ == "__main__":
    raise SystemExit(main())
