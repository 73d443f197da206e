"""MTSAE: multi-scale temporal sparse autoencoders (papers A and D).

Paper   A: "MTSAE: Multi-Scale Temporal Feature Extraction for Interpretable Language Model
        Modification"; D: "Temporal Feature Disentanglement: Multi-Scale Sparse Autoencoders for
        Selective Model Unlearning"; both anonymous, under double-blind review.
Run     python mtsae.py --layer 19                  paper A, Run 3: 61 s of training on 2 cores
        python mtsae.py --layer 19 --rates 1,2,4    paper A, Run 2; for Run 1 see A.run1
        python mtsae.py --variant unlearning --eval core,unlearning    paper D
        python mtsae.py --variant unlearning --tokens 10000 --steps 0 --batch_size 16    as reported

The idea. A standard SAE encodes every token on its own. An MTSAE first lets each channel of the
residual stream look along the sequence: depth-wise convolutions of kernel 3, dilated by different
rates r, read the tokens r before and r after. Paper A adds the token itself to each (a residual),
normalises, averages and encodes that, and asks neighbouring codes to point the same way. Paper D
encodes all branches side by side and asks them to differ. Both reconstruct the token itself: the
rest can only help to choose features. The branches are parallel, not stacked: paper A reaches its
largest rate, 16 tokens either way, not the 128 that it claims.

Notation (paper -> code)
    A^l, h^l        residual stream at layer l            x          (B, T, D)
    h_i, z_k        one branch of K                       h, z       K times (B, T, D)
    h, [z_1; ...]   what the encoder reads                h          (B, T, D) or (B, T, K D)
    f, e            features (the code)                   f          (B, T, F)
    g(f), h_hat     reconstruction                        x_hat      (B, T, D)
    B sequences, T tokens, D width, F features, K branches; "scored" tokens: mask = True. Eq. A.1 to
    A.6 and Sec. A.4.1 to A.4.4 are paper A's (no appendix), D.1 to D.4 paper D's.

Paper -> code
    Eq. A.1         MTSAE.encode                      sequences of activations -> of codes
    Eq. A.3, D.2    MTSAE.temporal, MaskedBatchNorm   residual or none, norm, average or all
    Eq. A.3, D.2    MTSAE.branches, MTSAE.pad         dilated convolutions; padding of Sec. A.4.4
    Eq. A.4, D.3    MTSAE.code                        ReLU encoder
    Eq. A.5         MTSAE.decode, normalize_decoder   linear decoder with unit-norm rows
    Eq. A.2, A.6    losses, neighbours                reconstruction + sparsity - coherence
    Eq. D.1, D.4    losses                            norm + sparsity + separation of the branches
    Sec. A.4.3      resample, lr_factor               neuron resampling; warm-up
    D, Sec. 4, 5    lr_factor, monitor                schedule; statistics every 10 steps

What the papers leave open; each is argued at the line that settles it: grep -n "open A.bn" *.py
    open A.bn           batch norm of what               --batch_norm branch | average | off
    open A.init         the kernels' size and start      3; --conv_init identity | pytorch
    open A.padding      reading later tokens             --padding circular | causal
    open A.fill         unscored tokens, as read         the mean, or the last scored one again
    open A.axes         norms and cosines without axes   --recon_reduction sum | mean
    open A.run1         loss weights of Run 1            --recon_weight 1
    open A.resample     what neurons restart as          Bricken et al. (2023)
    open A.steps        how long A trains                --steps; 6.4 passes over the tokens
    open D.features     number of features               --expansion
    open D.tokens       10,000 tokens: 4 steps           --tokens 10000 --steps 0
    open D.batch        "batch size 2048"                --batch_size 16 | 2048 sequences
    open D.dtype        "float32 precision"              --dtype; activations kept in bfloat16
    open D.schedule     "cosine learning rate warmup"    --schedule cosine | cosine-warmup
    open D.table        what Table 1 is of               the convolutions, raw
    open D.buffers      "logging of buffer states"       mean norm, scored share
    open S.decay        AdamW's weight decay             --weight_decay; in D of every parameter
    open S.start        first values of the weights      tied; b_dec the mean
    open S.projection   gradient along decoder rows      --no-project_gradient
    open S.scale        unit of the activations          mean norm sqrt(D)
    open S.lambda       ... and so of lambda             --l1 VALUE
    open S.sinks        attention sinks                  masked

Does not include: stacked branches, which would reach further; D's "adaptive dilation rates".
"""
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import common                       # before torch: it sets how OpenMP's threads wait
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Count, NonNegative, Positive, Steps

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------
# open A.steps: not given / here 4000, which 125 sequences make 6.4 passes over 10,000,000 tokens
# open A.run1: "adjusted" after Run 1 / here reconstruction 2, as in Eq. A.2 / --recon_weight 1
# open D.tokens: 10,000, which are 4 steps, its "early termination" / here 10,000,000 / --tokens
# open D.batch: tokens or sequences / here tokens: only they make 4 steps of 10,000 / --batch_size
# open D.features: not given / here F = D, as in A / --expansion
# open D.dtype: "float32" / here all arithmetic, on activations that the buffer keeps in bfloat16


@dataclass
class Config(common.RunConfig):     # model, text, device, run folder: common.py
    variant: Literal["extraction", "unlearning"] = "extraction"   # paper A or paper D
    expansion: Count = 1            # F / D (Eq. A.1: k = d; D.features)
    activation: Literal["relu", "topk"] = "relu"   # relu (with L1) or topk (then no L1)   ABLATION
    k: Count = 32                   # active features per token with topk (ours)
    # temporal stage
    rates: str = "1,4,16"           # dilation rates, a branch each (Eq. A.3; D: 1,2,4,8)   ABLATION
    padding: Literal["circular", "causal"] = "circular"   # Sec. A.4.4; causal: ours   ABLATION
    conv_init: Literal["identity", "pytorch"] = "identity"   # kernels' start (A.init)   ABLATION
    conv_range: NonNegative = 0.1   # identity: uniform in +- this about it (not tuned)
    batch_norm: Literal["branch", "average", "off"] = "branch"   # paper A (A.bn)   ABLATION
    center: bool = True             # subtract the mean activation first (S.scale; D: no)   ABLATION
    # losses
    recon: Literal["squared", "norm"] = "squared"     # Eq. A.6; Eq. D.4: its root, norm   ABLATION
    recon_reduction: Literal["sum", "mean"] = "sum"   # over D (A.axes; mean collapses)   ABLATION
    recon_weight: NonNegative = 2.0 # reconstruction (Eq. A.2; Eq. D.4: 1; A.run1)   ABLATION
    l1: NonNegative = 0.04          # sparsity (Eq. A.2, D.4; S.lambda)
    coherence: NonNegative = 0.15   # paper A: cosine of neighbouring codes (Eq. A.2)   ABLATION
    separation: NonNegative = 0.1   # paper D: lambda_2, cosine of the branches (Eq. D.4)   ABLATION
    # schedule
    steps: Steps = 4000             # optimiser steps; 0 = one pass over the tokens (A.steps)
    batch_size: Count = 125         # sequences per step (Sec. A.4.4; D: 2048 tokens, D.batch)
    lr: Positive = 3e-4             # AdamW (Sec. A.4.3; D, Sec. 5)
    lr_warmup: Steps = 1000         # steps of learning-rate warm-up (Sec. A.4.3)
    schedule: Literal["constant", "cosine", "cosine-warmup"] = "constant"   # D: cosine (D.schedule)
    weight_decay: NonNegative = 0.0 # AdamW's (A: not given, S.decay; D, Sec. 5: 0.01)
    clip: NonNegative = 0.0         # gradient-norm clipping; 0 = off, as in both papers
    project_gradient: bool = True   # remove the gradient along each decoder row (S.projection)
    resample_every: Steps = 1000    # steps between resamplings, 0 = off (Sec. A.4.3; D: 0) ABLATION
    dead_after: Steps = 500         # inactive for more steps than this = dead (Sec. A.4.3)


VARIANTS = {"extraction": {}, "unlearning": dict(model="EleutherAI/pythia-70m", layer="3",
            rates="1,2,4,8", center=False, recon="norm", recon_weight=1.0, batch_size=16,
            weight_decay=0.01, schedule="cosine", resample_every=0, dtype="float32")}
LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=3000, batch_size=4, lm_batch=16,
              model="auto", layer="19")               # D: model, layer, too
PAPER = {"extraction": {   # metric -> what the paper reports
    "core.inactive": "0.50 (Sec. 6.1)", "mixing.reach": "128 (abstract)",
    "resampling.features": "0.15 (Sec. 6.3)"}, "unlearning": {"core.L0": "0.0", "core.L1": "0.0",
    "core.EV": "-0.785 (Sec. 6.2)", "core.MSE": "47.25 (as 'L2 loss')", "steps": "4 (Sec. 6.1)",
    "core.relative_reconstruction_bias": "-1.0", "core.kl_div_score": "-0.5279",
    "core.ce_loss_score": "-0.5855", "branches.mean_1": "0.0012 (Table 1)",
    "branches.std_1": "0.0891 (Table 1)", "branches.mean_2": "0.0009", "branches.std_2": "0.0867",
    "branches.mean_4": "0.0007", "branches.std_4": "0.0842", "branches.mean_8": "0.0005",
    "branches.std_8": "0.0819"}}


def defaults(cfg):
    """What the variant sets where the user set nothing; Config's defaults are paper A's."""
    return VARIANTS[cfg.variant]

# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------
class MTSAE(nn.Module):
    """Sparse autoencoder behind dilated depth-wise convolutions; it encodes sequences."""

    def __init__(self, D, cfg):
        super().__init__()
        n_features, self.k = D * cfg.expansion, cfg.k if cfg.activation == "topk" else None
        self.cfg, self.causal = cfg, cfg.padding == "causal"
        self.rates = [int(r) if r.strip().isdecimal() else 0 for r in cfg.rates.split(",")]
        if min(self.rates) < 1 or len(set(self.rates)) < len(self.rates):
            raise common.UserError(f"--rates are different numbers from 1 on; not {cfg.rates!r}.")
        self.taps = (-2, -1, 0) if self.causal else (-1, 0, 1)            # times the rate
        K, unlearning = len(self.rates), cfg.variant == "unlearning"
        # open S.start: not given / here as usual W_enc = W_dec^T (in D a K-th), b_dec the mean
        W = torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights"))
        W, copies = W / W.norm(dim=1, keepdim=True), K if unlearning else 1
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.repeat(1, copies).t() / copies)       # (D, F) or (K D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        # open A.init: not given / here 3 taps, as in D; no bias (nn.Conv1d's would put Table 1 over
        #   0.33); +- conv_range about the identity (A's residual; D: a tap of 1), so a token starts
        #   as itself / --conv_init pytorch: nn.Conv1d's +- 1/sqrt(3) about 0, neighbours as noise
        near = cfg.conv_init == "identity"
        kernels = torch.rand(K, 3, D, generator=common.generator(cfg.seed, "kernels")) * 2 - 1
        kernels = kernels * (cfg.conv_range if near else 1 / math.sqrt(3))
        kernels[:, self.taps.index(0)] += float(near and unlearning)
        self.kernels = nn.Parameter(kernels)                              # (K, 3, D)
        if unlearning:
            self.ln = nn.ModuleList(nn.LayerNorm(D) for _ in self.rates)
        elif cfg.batch_norm == "branch":
            self.bn = nn.ModuleList(MaskedBatchNorm(D) for _ in self.rates)
        elif cfg.batch_norm == "average":
            self.bn = MaskedBatchNorm(D)
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        self.register_buffer("mean", torch.zeros(D))                      # in units of scale
        for name in "inactive", "resampled":   # per feature: steps since it was active, restarts
            self.register_buffer(name, torch.zeros(n_features, dtype=torch.int64))

    def encode(self, x, mask=None):
        """Raw activations (B, T, D), mask (B, T) -> features (B, T, F); no mask: all count."""
        # Eq. A.1 (Sec. 3.1): f_θ: R^{T×d} → R^{T×k}, k = d
        return self.code(self.temporal(x, mask))

    def code(self, h):
        """What the encoder reads (..., D or K D) -> features (..., F)."""
        # Eq. A.4 (Sec. 4.2): f = ReLU(W_enc h + b_enc)
        # Eq. D.3 (Sec. 4):   e = ReLU(W_enc [z_1; ...; z_K] + b_enc)
        if self.k:
            return common.encode_topk(h, self.W_enc, self.b_enc, self.k)  # topk(h W_enc + b_enc)
        return F.relu(h @ self.W_enc + self.b_enc)

    def decode(self, f, k=None):   # SAME AS tsae.py:TSAE.decode
        """Features (..., F) -> raw (..., D); linear. k: at most k are on, which is faster."""
        # Eq. A.5 (Sec. 4.2): g(f) = W_dec f + b_dec, ‖W_dec,i‖_2 = 1; the same in D (Sec. 4)
        product = f @ self.W_dec if k is None else common.decode_topk(f, self.W_dec, k)
        return (product + self.b_dec) * self.scale

    def forward(self, x, mask=None):   # SAME AS tsae.py:TSAE.forward
        """Raw activations (B, T, D) -> reconstruction (B, T, D) and features (B, T, F)."""
        f = self.encode(x, mask)
        return self.decode(f, self.k), f

    def temporal(self, x, mask=None):
        """Raw activations (B, T, D) -> what the encoder reads (B, T, D or K D). fp32."""
        conv, token = self.branches(x, mask)                              # K (B, T, D), (B, T, D)
        if self.cfg.variant == "unlearning":
            # Eq. D.2 (Sec. 4): z_k = LayerNorm(C_{r_k}(h))
            return torch.cat([norm(c) for norm, c in zip(self.ln, conv)], -1)   # [z_1; ...; z_K]
        # Eq. A.3 (Sec. 4.1): h_i = Conv_i(A, r_i) + A, r_i in {1, 4, 16}; A: token, from pad
        h = [c + token for c in conv]
        # open A.bn: "residual connection (+A) and subsequent batch normalization", h "the averaged
        #   output from the temporal processing stage" / here in that order / --batch_norm average
        if self.cfg.batch_norm == "branch":
            h = [norm(h_i, mask) for norm, h_i in zip(self.bn, h)]
        h = sum(h[1:], h[0]) / len(h)                                     # (B, T, D)
        return self.bn(h, mask) if self.cfg.batch_norm == "average" else h

    def branches(self, x, mask=None):
        """C_r (A.3: Conv_i) for each rate, and the tokens: K times (B, T, D), (B, T, D). fp32."""
        padded, before = self.pad(x, mask)

        def at(shift):   # x_{t + shift}, for every t
            return padded[:, before + shift:][:, :x.shape[1]]             # (B, T, D)
        # C_r(x)_t = u x_{t-r} + v x_t + w x_{t+r}, channel by channel; causal: t - 2r, t - r, t
        i, j, k = self.taps
        return [u * at(i * r) + v * at(j * r) + w * at(k * r)
                for (u, v, w), r in zip(self.kernels, self.rates)], at(0)

    def pad(self, x, mask=None):
        """Raw (B, T, D) -> scaled, filled, padded sequences, and where token 0 stands in them."""
        if x.dim() != 3:
            raise ValueError(f"an MTSAE encodes sequences (B, T, D), not {tuple(x.shape)}")
        x = x.float() / self.scale - self.mean                            # fp32: filters and norms
        T, R = x.shape[1], max(self.rates)
        if mask is not None:
            # open A.fill: not given / here 0, the mean; past the last scored one that (Sec. A.4.4)
            t = torch.arange(T, device=x.device)
            source = torch.minimum(t, (mask * t).amax(1, keepdim=True))   # (B, T), up to the last
            x = x[torch.arange(len(x), device=x.device)[:, None], source]
            x = torch.where(mask.gather(1, source)[..., None], x, 0.0)
        # open A.padding: circular in both papers / here too; it reads later tokens (in the LM: a
        #   leak) and joins the last to the first / --padding causal
        if self.causal:
            x, before = F.pad(x, (0, 0, 2 * R, 0)), 2 * R                 # 0 is the mean
        else:   # Sec. A.4.4: circular in T = 128 tokens; shorter: the last one repeats up to there
            index = torch.arange(-R, T + R, device=x.device) % max(T, self.cfg.T)
            x, before = x[:, index.clamp(max=T - 1)], R
        return (x if self.cfg.center else x + self.mean), before


class MaskedBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the scored tokens of all processes; (B, T, D), (B, T) -> (B, T, D)."""

    def forward(self, h, mask=None):
        if self.training:
            m = torch.ones_like(h[..., :1]) if mask is None else mask[..., None].float()
            n = common.total(m.sum())                                     # of all processes
            m = m / n.clamp(min=1)                                        # weights of a mean
            mean = common.total_with_gradient((h * m).sum((0, 1)))
            h = h - mean   # before the variance: E[h^2] - mean^2 would cancel
            var = common.total_with_gradient((h.square() * m).sum((0, 1)))
            with torch.no_grad():   # a plain mean of 10 batches, then moving by 0.1
                rate = (n > 0) / self.num_batches_tracked.add_(n > 0).clamp(1, 10)
                self.running_mean.lerp_(mean, rate), self.running_var.lerp_(var, rate)
        else:
            h, var = h - self.running_mean, self.running_var
        # Sec. A.4.1, "batch normalization": γ (h - mean) / sqrt(var + 1e-5) + β
        return torch.addcmul(self.bias, h, self.weight * (var + self.eps).rsqrt())


@torch.no_grad()
def normalize_decoder(sae):   # SAME AS tsae.py:normalize_decoder
    """Rows of W_dec back to norm 1."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@torch.no_grad()
def remove_parallel_gradient(sae):   # SAME AS tsae.py:remove_parallel_gradient
    """Take from each decoder row's gradient its component along the row (it would be undone)."""
    W, grad = sae.W_dec, sae.W_dec.grad
    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)

# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------
def losses(sae, x, mask, n, step, cfg):   # DIFFERS FROM tsae.py:losses - terms; n counts pairs, too
    """Terms of Eq. A.6 or D.4, already weighted (their sum is the loss), statistics, code. fp32.

    x (B, T, D) raw, mask (B, T), n (2,) numbers of scored tokens and of scored pairs of neighbours
    in the whole (global) batch. Reductions: reconstruction sums over D (norm: the root of that sum,
    token by token), sparsity sums over F, separation averages over pairs of branches; these
    three are averaged over scored tokens. Coherence: cosine over F, averaged over scored pairs.
    """
    # open A.axes: not given / here as above; averaged over D it collapses / --recon_reduction mean
    tokens, pairs = n.clamp(min=1)
    h = sae.temporal(x, mask)                                             # (B, T, D or K D)
    f = sae.code(h).float()                                               # (B, T, F)
    x_hat = sae.decode(f, sae.k)                                          # (B, T, D)
    error = ((x_hat.float() - x.float()) / sae.scale).pow(2).sum(-1) * mask   # (B, T)
    stats = {"error": error.sum() / tokens, "active": ((f > 0).sum(-1) * mask).sum() / tokens}
    error = error / (x.shape[-1] if cfg.recon_reduction == "mean" else 1)   # ABLATION: collapses
    # Eq. A.2, A.6: L = 2.0 ‖A - g(f)‖_2² + 0.04 ‖f‖_1 - 0.15 cos(f_t, f_{t+1})
    # Eq. D.1, D.4: L = ‖h^l - h_hat‖_2 + λ_1 ‖e‖_1 + λ_2/(K(K-1)) Σ_{i≠j} max(0, cos(z_i, z_j))
    recon = error if cfg.recon == "squared" else error.clamp(min=1e-12).sqrt() * mask
    terms = {"recon": cfg.recon_weight * recon.sum() / tokens}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (f.sum(-1) * mask).sum() / tokens          # f >= 0
    if cfg.variant == "extraction" and cfg.coherence:
        # Eq. A.6: - 0.15 cos(f_t, f_{t+1}); Eq. A.2 adds 0.15 L_temporal, which is -cos: the same
        dot, norm = (f[:, 1:] * f[:, :-1]).sum(-1), f.norm(dim=-1)        # (B, T - 1), (B, T)
        cosine = dot / (norm[:, 1:] * norm[:, :-1]).clamp(min=1e-8)       # 0 where nothing is on
        terms["coherence"] = -cfg.coherence * (cosine * neighbours(mask)).sum() / pairs
    if cfg.variant == "unlearning" and cfg.separation:                    # Eq. D.4: λ_2 Σ ...
        z = [F.normalize(z_k, dim=-1) for z_k in h.split(x.shape[-1], -1)]   # K times (B, T, D)
        cosine = sum(F.relu((a * b).sum(-1)) for a, b in itertools.combinations(z, 2))   # (B, T)
        mean = cosine / max(1, math.comb(len(z), 2))                      # i < j for i ≠ j
        terms["separation"] = cfg.separation * (mean * mask).sum() / tokens
    return terms, stats, f.detach()   # EXERCISE 9


def neighbours(mask):   # EXERCISE 8
    """Pairs (t, t+1) of scored tokens: (B, T) -> (B, T - 1)."""
    return mask[:, 1:] & mask[:, :-1]

# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------
def lr_factor(step, cfg, total):   # DIFFERS FROM tsae.py:lr_factor - D's cosine needs the last step
    """Learning-rate multiplier: warm-up, then 1 (Sec. A.4.3) or a cosine to 0 at `total` (D)."""
    # open D.schedule: "cosine learning rate warmup" / here linear, then a cosine to 0 / --schedule
    warm = min(1.0, (step + 1) / max(1, cfg.lr_warmup))
    done = max(0.0, (step - cfg.lr_warmup) / max(1, total - cfg.lr_warmup))
    return {"constant": warm, "cosine": warm * 0.5 * (1 + math.cos(math.pi * done)),
            "cosine-warmup": 0.5 * (1 - math.cos(math.pi * warm))}[cfg.schedule]


@torch.no_grad()
def resample(sae, opt, x, mask, step, cfg):
    """Sec. A.4.3: neurons silent for more than 500 steps restart from inputs of high error. x
    (b, T, D), mask (b, T) are one process's share; the draw is over the whole batch."""
    def everywhere(share):   # (b, T, ...) -> (batch_size T, ...); process i % world has sequence i
        whole = share.new_zeros(cfg.batch_size, *share.shape[1:])
        whole[common.rank()::common.world()] = share
        return common.total(whole).flatten(0, 1)
    sae.eval()                                                            # running statistics
    h, target = sae.temporal(x, mask), x.float() / sae.scale
    error = (sae.decode(sae.code(h)).float() / sae.scale - target).pow(2).sum(-1) * mask
    sae.train()
    error, token, read = map(everywhere, (error, target - sae.b_dec, h))
    dead = sae.inactive > cfg.dead_after                                  # (F,)
    n_dead, n_tokens = dead.sum().item(), (error > 0).sum().item()
    if n_dead and n_tokens:
        # open A.resample: not given / here as Bricken et al. (2023): tokens drawn by squared error,
        #   W_dec rows point there, W_enc columns to what was read, 0.2 times the live ones' norm
        gen = common.generator(cfg.seed, f"resample{step}", error.device)
        pick = torch.multinomial(error, n_dead, replacement=n_dead > n_tokens, generator=gen)
        length = 1.0 if dead.all() else sae.W_enc[:, ~dead].norm(dim=0).mean()
        sae.W_dec[dead] = F.normalize(token[pick], dim=1)
        sae.W_enc[:, dead] = 0.2 * length * F.normalize(read[pick], dim=1).t()
        sae.b_enc[dead] = 0.0
        for moment in ("exp_avg", "exp_avg_sq"):                          # "optimizer state"
            opt.state[sae.W_dec][moment][dead] = 0.0
            opt.state[sae.W_enc][moment][:, dead] = 0.0
            opt.state[sae.b_enc][moment][dead] = 0.0
        sae.inactive[dead], sae.resampled[dead] = 0, sae.resampled[dead] + 1

# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). -> evaluation."""
    sae = MTSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        # open S.scale: not given / here mean norm sqrt(D), else lambda means nothing across models;
        #   in A less the mean, which its batch norm takes off anyway / --no-center
        # open S.lambda: on activations of norm 1, A's weights would be here --l1 0.04 sqrt(D) and
        #   --coherence 0.15 D (D = 576: 0.96, 86); in D, --separation 0.1 sqrt(D) / --l1 VALUE
        # open S.sinks: not given / here masked (norm > 10 times the median) / else EV is 0.999
        sae.scale.fill_(acts.scale)
        sae.b_dec.copy_(acts.mean / acts.scale)
        sae.mean.copy_(sae.b_dec)
    # open S.decay: A none, D 0.01 / here of every parameter, AdamW's way / --weight_decay
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    name = cfg.variant + f"-topk{cfg.k}" * (cfg.activation == "topk")
    run = common.Run(__file__, name, cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself
    for step in run.steps():
        # 1. batch
        x, mask = acts.batch(step)                                        # (b, T, D), (b, T)
        n = common.total(torch.stack([mask.sum(), neighbours(mask).sum()]))   # of all processes
        # 2. forward and losses   3. backward
        with acts.autocast():
            terms, stats, f = compute(sae, x, mask, n, step, cfg)
        opt.zero_grad()
        sum(terms.values()).backward()
        common.sum_gradients(sae)                                         # across processes
        watched = monitor(sae, x, mask, f, n) if run.log_due(step) else {}
        # 4. constrain the gradient
        # open S.projection: not given / here the part along a row goes / --no-project_gradient
        if cfg.project_gradient:
            remove_parallel_gradient(sae)
        if cfg.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        # 5. step   6. renormalise
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg, run.total)
        opt.step()
        normalize_decoder(sae)                                            # Sec. A.4.3, and D
        # 7. bookkeeping: how long each neuron has been silent; the dead restart
        fired = common.total(mask.flatten().float() @ f.flatten(0, 1)) > 0   # (F,), f >= 0
        sae.inactive.add_(1).mul_(~fired)
        if cfg.resample_every and step and step % cfg.resample_every == 0:   # Sec. A.4.3
            resample(sae, opt, x, mask, step, cfg)
        # ---------------------------------------------------------------------------------------
        run.log(step, {**terms, **stats}, lr=opt.param_groups[0]["lr"], **watched)
    return run.evaluate(PAPER[cfg.variant], findings)


@torch.no_grad()
def monitor(sae, x, mask, f, n):
    """D, Sec. 5, on log steps (every 10): gradient norm (not projected), convolutions, shares of
    features on at some token, on at most tokens, ever resampled, buffer; over all processes."""
    # open D.buffers: not said which / here of what it served: mean raw norm, share of scored tokens
    tokens = n[0].clamp(min=1)
    rate = common.total(((f > 0) * mask[..., None]).sum((0, 1))) / tokens   # (F,)
    return {"grad_norm": nn.utils.get_total_norm([p.grad for p in sae.parameters()]),
            **{f"conv_{k}": v for k, v in table_1(sae, x, mask, common.total).items()},
            "alive": (rate > 0).float().mean(), "dense": (rate > 0.5).float().mean(),
            "resampled": (sae.resampled > 0).float().mean(),
            "buffer_norm": common.total((x.float().norm(dim=-1) * mask).sum()) / tokens,
            "buffer_scored": n[0] / (sae.cfg.batch_size * x.shape[1])}


def table_1(sae, x, mask, total):
    """Paper D's Table 1: mean and deviation of each convolution; total(t) sums over processes."""
    # open D.table: not those of z_k, which LayerNorm sets to 1 / here of the raw convolutions
    table = {}
    for r, conv in zip(sae.rates, sae.branches(x, mask)[0]):
        y = (conv[mask] * sae.scale).double()                             # (n, D)
        sums = total(torch.stack([torch.ones_like(y).sum(), y.sum(), y.square().sum()]))
        mean, square = sums[1:] / sums[0].clamp(min=1)
        table |= {f"mean_{r}": mean, f"std_{r}": (square - mean ** 2).clamp(min=0).sqrt()}
    return table


@torch.no_grad()
def findings(sae, acts):
    """What the convolutions learnt, on held-out windows; how many neurons were resampled."""
    table, times = table_1(sae, *next(acts.heldout(64)), torch.clone), sae.resampled.double()
    return {"mixing": mixing(sae, acts), "branches": {k: v.item() for k, v in table.items()},
            "resampling": {"features": times.sign().mean().item(), "events": times.sum().item()}}


def mixing(sae, acts):   # EXERCISE 7
    """reach: largest distance at which changing a token changes a code, in a sequence so long that
    nothing wraps round. neighbours: share of the (mean) kernel's energy on other tokens."""
    x, _ = next(acts.heldout(1))
    x = x.repeat(1, 1 + 4 * max(sae.rates) // x.shape[1], 1)
    middle, changed = x.shape[1] // 2, x.clone()
    changed[:, middle] = -changed[:, middle]
    moved = (sae.encode(x) != sae.encode(changed)).any(-1)[0].nonzero()[:, 0]
    reach = (moved - middle).abs().max().item() if len(moved) else 0
    centre = torch.tensor(sae.taps, device=x.device) == 0                 # (3,)
    own, others = sae.kernels[:, centre], sae.kernels[:, ~centre]         # (K, 1, D), (K, 2, D)
    if sae.cfg.variant == "extraction":
        own, others = 1 + own.mean(0), others / len(sae.rates)
    share = 1 / (1 + own.square().sum() / others.square().sum())
    return {"reach": reach, "neighbours": share.item()}

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, train, LAPTOP, defaults, argv)


if __name__ == "__main__":
    raise SystemExit(main())
