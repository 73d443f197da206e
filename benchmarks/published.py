"""Other people's temporal SAEs and three controls, on the stage of the five papers' methods.

    python benchmarks/published.py --method tsae --layer 19        T-SAE (arXiv 2511.05541)
    python benchmarks/published.py --method tfa --layer 19         TFA (arXiv 2511.01836)
    python benchmarks/published.py --method matryoshka --layer 19  T-SAE without contrast
    python benchmarks/published.py --method pooled --layer 19      averages over the last tokens
    python benchmarks/published.py --method random --layer 19      a decoder that is never trained

Written from the papers; none of their authors' code was used or compared. The optimiser, schedule,
start, scale and evaluations are those of tsae.py. What differs from the papers is said here:

T-SAE   Matryoshka groups of features, the first 20 % "high-level"; BatchTopK; to the reconstruction
        by the high group and by all is added 0.1 times a contrastive loss (InfoNCE) between a
        token's high-level code and the previous token's, against those of other samples. Here other
        samples are the step's other sequences; the cosine has temperature 1; 0.1 is meant for
        activations of norm 1, which is 0.1 D in this project's units. No auxiliary loss for dead
        features. At evaluation a feature is on above the running mean of the smallest value that
        BatchTopK kept.
TFA     A token's code is the sum of a predicted part, from attention to earlier tokens, and a novel
        part, the TopK code of what the prediction leaves. Here one head of width D, and a ReLU on
        the prediction. The code f that is counted, probed and compared is the novel part; the
        predicted part has no sparsity, and how many of its features are on is `predicted.L0`.
pooled  A standard SAE that codes the mean of the pre-activations of a token and the 3 before it.

Does not include the token-mean baseline (subtract the current token's mean activation before, add
it after): an SAE of this project is given activations, not tokens.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                       # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Count, Fraction, NonNegative, Positive, Steps

import tsae

# --- Config ----------------------------------------------------------------------------------


@dataclass
class Config(common.RunConfig):     # model, text, device, run folder: common.py
    method: Literal["tsae", "matryoshka", "tfa", "pooled", "random"] = "tsae"   # see above
    expansion: Count = 1            # F / D
    activation: Literal["topk"] = "topk"   # all of these have a fixed L0
    k: Count = 32                   # active features per token (T-SAE: on average)
    high: Fraction = 0.2            # T-SAE: share of the features in the high group
    contrast: NonNegative = 0.1     # T-SAE: weight of the contrastive loss, for norm 1
    window: Count = 4               # pooled: tokens averaged (temp_xc compares 2 to 16)
    recon_reduction: Literal["sum"] = "sum"   # error over D
    steps: Steps = 4000             # optimiser steps; 0 = one pass over the tokens
    batch_size: Count = 16          # sequences per step
    lr: Positive = 3e-4             # AdamW
    lr_warmup: Steps = 1000         # steps of linear learning-rate warm-up
    weight_decay: NonNegative = 0.0  # AdamW's
    clip: NonNegative = 0.0         # gradient-norm clipping, 0 = off
    project_gradient: bool = True   # remove the gradient along each decoder row


LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=2500, batch_size=4, lm_batch=16)  # sizes


def variant(cfg):
    """Name of the run's variant, used for the run folder."""
    return f"{cfg.method}-topk{cfg.k}"

# --- Model -----------------------------------------------------------------------------------


class PublishedSAE(nn.Module):
    """The SAE of cfg.method; no token sees a later one."""
    causal, decode = True, tsae.TSAE.decode

    def __init__(self, D, cfg):
        super().__init__()
        n_features, draw = D * cfg.expansion, common.generator(cfg.seed, "weights")
        self.cfg, self.n_high = cfg, max(1, round(cfg.high * n_features))
        W = F.normalize(torch.randn(n_features, D, generator=draw))
        self.W_dec = nn.Parameter(W, requires_grad=cfg.method != "random")   # (F, D), unit norm
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        if cfg.method in ("tsae", "matryoshka"):
            self.register_buffer("threshold", torch.zeros(()))            # of BatchTopK
        if cfg.method == "tfa":
            linear = [torch.randn(D, D, generator=draw) / D ** 0.5 for _ in range(3)]
            self.W_q, self.W_k, self.W_v = map(nn.Parameter, linear)      # (D, D)
            self.b_pred = nn.Parameter(torch.zeros(n_features))

    def encode(self, x, mask=None):
        """Raw activations (B, T, D), mask (B, T) -> features (B, T, F)."""
        return self.codes(x, mask)[0]

    def codes(self, x, mask=None):
        """-> the code f (B, T, F), and what of the code TFA predicted, else None. fp32."""
        h, predicted = x.float() / self.scale - self.b_dec, None
        if self.cfg.method == "tfa":
            predicted = F.relu(self.context(h, mask) @ self.W_enc + self.b_pred).float()
            h = h - (predicted @ self.W_dec).float()
        if self.cfg.method not in ("pooled", "tsae", "matryoshka"):
            return common.encode_topk(h, self.W_enc, self.b_enc, self.cfg.k), predicted
        pre = F.relu(h @ self.W_enc + self.b_enc).float()                 # (B, T, F)
        if self.cfg.method == "pooled":
            values, index = self.pool(pre, mask).topk(self.cfg.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, index, values), None
        return self.batch_topk(pre, mask), None

    def context(self, h, mask):
        """Attention of each token to the scored ones before it, one head: (B, T, D)."""
        t = torch.arange(h.shape[1], device=h.device)
        before = t < t[:, None]                                           # (T, T): query, key
        allowed = before if mask is None else before & mask[:, None]      # (T, T) or (B, T, T)
        allowed = allowed | (t == t[:, None]) & ~allowed.any(-1, keepdim=True)   # first: itself ...
        out = F.scaled_dot_product_attention(h @ self.W_q, h @ self.W_k, (h @ self.W_v),
                                             attn_mask=allowed)
        return out * (allowed & before).any(-1, keepdim=True)             # ... and that is dropped

    def pool(self, pre, mask):
        """Mean over a token and the window - 1 before it, scored ones only: (B, T, F)."""
        m = torch.ones_like(pre[..., :1]) if mask is None else mask[..., None].float()
        both = torch.cat([pre * m, m], -1)                                # (B, T, F + 1)
        total = F.pad(both, (0, 0, self.cfg.window, 0)).cumsum(1)
        both = total[:, self.cfg.window:] - total[:, :-self.cfg.window]
        return both[..., :-1] / both[..., -1:].clamp(min=1)

    def batch_topk(self, pre, mask):
        """In training the k n largest values of the step's n scored tokens; later a threshold."""
        if not self.training:
            return pre * (pre > self.threshold)
        m = torch.ones_like(pre[..., :1]) if mask is None else mask[..., None].float()
        scored, n = pre * m, int(m.sum().item())
        least = scored.detach().flatten().topk(max(1, self.cfg.k * n)).values[-1]
        with torch.no_grad():   # 0 at first; a mean over about 100 steps
            new = least if self.threshold == 0 else torch.lerp(self.threshold, least, 0.01)
            self.threshold.copy_(new)
        return pre * (pre >= least.clamp(min=1e-30))

    def forward(self, x, mask=None):
        """Raw activations (B, T, D) -> reconstruction (B, T, D) and features (B, T, F)."""
        f, predicted = self.codes(x, mask)
        return self.decode(f if predicted is None else f + predicted), f

# --- Losses ----------------------------------------------------------------------------------


def losses(sae, x, mask, n, step, cfg):
    """Terms, already weighted (their sum is the loss), statistics. fp32.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reconstruction sums over D and averages over scored tokens; contrast averages over pairs.
    """
    x_hat, f = sae(x, mask)
    error = squared_error(sae, x_hat, x, mask) / n                        # ()
    stats = {"error": error.detach(), "active": ((f > 0).sum(-1) * mask).sum() / n}
    terms = {"recon": error}
    if cfg.method in ("tsae", "matryoshka"):   # Matryoshka: the high group alone must do, too
        high = f[..., :sae.n_high]                                        # (B, T, high)
        part = (high @ sae.W_dec[:sae.n_high] + sae.b_dec) * sae.scale
        terms["high"] = squared_error(sae, part, x, mask) / n
        if cfg.method == "tsae" and cfg.contrast:
            weight = cfg.contrast * x.shape[-1]   # 0.1 where activations have norm 1
            terms["contrast"] = weight * contrast(high, mask) / common.world()
    return terms, stats


def squared_error(sae, x_hat, x, mask):
    """Sum over scored tokens of ||x_hat - x||^2 in units of scale^2: ()."""
    return (((x_hat.float() - x.float()) / sae.scale).pow(2).sum(-1) * mask).sum()


def contrast(z, mask):
    """InfoNCE: mean over scored pairs of - log softmax of cos(z_t, z_{t-1}) against the cosines
    with the tokens that precede the pairs of other sequences. z (B, T, F), mask (B, T) -> ()."""
    pair, own = mask[:, 1:] & mask[:, :-1], torch.arange(len(z), device=z.device)
    z = F.normalize(z.float(), dim=-1)
    now, before = z[:, 1:][pair], z[:, :-1][pair]                         # (P, F)
    sequence = own[:, None].expand_as(pair)[pair]                         # (P,)
    with torch.autocast(z.device.type, enabled=False):
        cosine = now @ before.t()                                         # (P, P)
    other = sequence[:, None] != sequence
    both = cosine.masked_fill(~(other | torch.eye(len(now), dtype=torch.bool, device=z.device)),
                              -torch.inf)
    return (both.logsumexp(1) - cosine.diagonal()).sum() / max(1, len(now))

# --- Training --------------------------------------------------------------------------------


def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). -> evaluation."""
    sae = PublishedSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        sae.scale.fill_(acts.scale)
        sae.b_dec.copy_(acts.mean / acts.scale)
    trained = [p for p in sae.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    run = common.Run(__file__, variant(cfg), cfg, acts, sae, opt)
    for step in run.steps():
        # 1. batch   2. forward and losses   3. backward
        x, mask = acts.batch(step)                                        # (b, T, D), (b, T)
        n = common.total(mask.sum()).clamp(min=1)
        with acts.autocast():
            terms, stats = losses(sae, x, mask, n, step, cfg)
        opt.zero_grad()
        sum(terms.values()).backward()
        common.sum_gradients(sae)
        # 4. constrain the gradient
        if cfg.project_gradient and sae.W_dec.requires_grad:
            tsae.remove_parallel_gradient(sae)
        if cfg.clip:
            nn.utils.clip_grad_norm_(trained, cfg.clip)
        # 5. step   6. renormalise
        opt.param_groups[0]["lr"] = cfg.lr * tsae.lr_factor(step, cfg)
        opt.step()
        if sae.W_dec.requires_grad:
            tsae.normalize_decoder(sae)
        run.log(step, {**terms, **stats}, lr=opt.param_groups[0]["lr"])
    return run.evaluate({}, findings)


@torch.no_grad()
def findings(sae, acts):
    """TFA: features of the predicted part that are on; T-SAE: smoothness of its two groups."""
    if sae.cfg.method == "tfa":
        on = [((sae.codes(x, m)[1] > 0).sum(-1) * m).sum() / m.sum() for x, m in acts.heldout()]
        return {"predicted": {"L0": torch.stack(on).mean().item()}}
    if sae.cfg.method not in ("tsae", "matryoshka"):
        return {}
    found = {"high": [], "low": []}
    for x, mask in acts.heldout():
        f, pair = sae.encode(x, mask), mask[:, 1:] & mask[:, :-1]
        for name, z in (("high", f[..., :sae.n_high]), ("low", f[..., sae.n_high:])):
            found[name].append(F.cosine_similarity(z[:, 1:], z[:, :-1], dim=-1)[pair])
    return {"groups": {f"neighbour_cosine_{name}": torch.cat(values).mean().item()
                       for name, values in found.items()}}


def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, train, LAPTOP, None, argv)


if __name__ == "__main__":
    raise SystemExit(main())
