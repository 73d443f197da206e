"""TSAE: the time-aware sparse autoencoder, the standard SAE, and the TopK SAE (paper C).

Paper   "Time-Aware Sparse Autoencoders: Learning Temporally Consistent Features in Language
        Models", anonymous, under double-blind review (letter C in this project).
Run     python tsae.py --layer 19                the paper's TSAE
        python tsae.py --layer 19 --no-temporal  the standard SAE, everybody's control
        python tsae.py --layer 19 --activation topk --k 32 [--no-temporal]

The idea. A standard SAE codes every token on its own. Text changes slowly (topic, language,
quotation, syntax), so a feature that means something should rarely flicker from token to token.
TSAE adds a penalty on the squared change of the code between tokens 1-3, 4-15 and 16-127 apart.
The encoder still sees one token at a time: it can prefer features that stay, not average a noisy
one over its neighbours. The paper reports that no variant finished a single step and calls temporal
objectives incompatible with SAEs. They are not: this script runs the paper's whole schedule.

Notation (paper -> code)
    x_t in R^d      residual stream at token t            x          (B, T, D)
    h_t in R^k      feature activations (the code)        f          (B, T, F)
    x_hat_t         reconstruction                        x_hat      (B, T, D)
    B sequences, T tokens, D model width, F features; "scored" tokens are those with mask = True.

Paper -> code
    Sec. 3.1        TSAE.encode, TSAE.decode        the autoencoder
    Eq. 1, 2        losses                          reconstruction + sparsity + temporal
    Sec. 3.1, 4.1   lag_weights, temporal_loss      three scales of lags, in closed form
    Eq. 3           variance_weights                feature-wise weights from window variances
    Eq. 4           recon_boost                     reconstruction boost 2 -> 1
    Sec. 4.2        temporal_ramp, add_gradient_noise, train   progressive training
    Sec. 4.3        TSAE.blend, TSAE.update_buffer, TSAE.encode   buffers, LayerNorm
    Sec. 5.3        transitions                     activation variance and transition patterns

What the paper leaves open; each is argued at the line that settles it: grep -n "open C.norm" *.py
    open C.lags         where the three ranges of lags end     the sums of Sec. 3.1
    open C.reduction    sums over lags without an average      --lag_reduction sum | mean
    open C.share        Eq. 3 weakens the loss by a factor F   --variance_weights printed|mean|off
    open C.variance     the variance of which code             before the buffers are mixed in
    open C.gradient     do Eq. 3's weights carry a gradient    --weight_gradient
    open C.norm         LayerNorm "on feature activations"     --layer_norm pre | post | off
    open C.buffers      what the temporal buffers hold         --no-buffers
    open C.ramp         when the temporal loss begins          --ramp_from 0 | 1000
    open C.noise        size of the gradient noise             --grad_noise
    open C.gating       "adaptive feature gating"              never defined: left out
    open C.clip         is the control clipped, too            --clip
    open C.batch        "batch size of 2048"                   --batch_size 16 | 2048 sequences
    open C.steps        layer, steps, learning-rate schedule   --layer --steps --lr_warmup
    open S.decay        AdamW's weight decay                   --weight_decay
    open S.start        first values of the weights            tied; b_dec the mean
    open S.projection   gradient along decoder rows            --no-project_gradient
    open S.scale        unit of the activations                mean norm sqrt(D)
    open S.lambda       ... and so of lambda                   --l1 VALUE
    open S.sinks        attention sinks                        masked

Does not include: cross-attention, Matryoshka groups, or the contrastive loss of the published
T-SAE (arXiv 2511.05541), which is a different method.
"""
from dataclasses import dataclass
from typing import Literal

import common                       # before torch: it sets how OpenMP's threads wait
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Count, Fraction, NonNegative, Positive, Steps

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------
# open C.batch: "batch size of 2048" / here tokens, as usual for SAEs / --batch_size is in sequences
# open C.steps: not given / here layer 19 (papers A, B, E); 4000 steps, half with the full objective


@dataclass
class Config(common.RunConfig):     # model, text, device, run folder: common.py
    temporal: bool = True           # the paper's TSAE; --no-temporal is the standard SAE   ABLATION
    expansion: Count = 1            # F / D (Sec. 5.1: same as the hidden size)
    activation: Literal["relu", "topk"] = "relu"   # relu (with L1) or topk (then no L1)   ABLATION
    k: Count = 32                   # active features per token with topk (ours)
    # losses
    l1: NonNegative = 0.04          # lambda_1, sparsity (Sec. 4.3; S.lambda)
    recon_reduction: Literal["sum", "mean"] = "sum"   # error over D (mean collapses)   ABLATION
    lambda_short: NonNegative = 0.01     # lags 1-3 (Sec. 5.2)
    lambda_medium: NonNegative = 0.005   # lags 4-15 (Sec. 5.2)
    lambda_long: NonNegative = 0.001     # lags 16-127 (Sec. 5.2)
    temporal_scale: NonNegative = 1.0    # multiplies the three weights (ours)   ABLATION
    lag_reduction: Literal["sum", "mean"] = "sum"   # over a scale's lags (C.reduction)
    variance_weights: Literal["printed", "mean", "off"] = "printed"   # Eq. 3 (C.share)   ABLATION
    weight_gradient: bool = False   # Eq. 3's weights carry a gradient (C.gradient)
    min_variance: NonNegative = 0.01     # features with less variance are excluded (Sec. 4.1)
    layer_norm: Literal["pre", "post", "off"] = "pre"   # before or after ReLU (C.norm)   ABLATION
    # schedule
    steps: Steps = 4000             # optimiser steps; 0 = one pass over the tokens (C.steps)
    batch_size: Count = 16          # sequences per step (C.batch: 2048 tokens)
    lr: Positive = 3e-4             # AdamW (Sec. 4.3)
    lr_warmup: Steps = 1000         # steps of linear learning-rate warm-up (C.steps)
    weight_decay: NonNegative = 0.0      # AdamW's (S.decay)
    clip: NonNegative = 2.0         # gradient-norm clipping, 0 = off (Sec. 4.2; C.clip)   ABLATION
    project_gradient: bool = True   # remove the gradient along each decoder row (S.projection)
    warmup: Steps = 2000            # steps of the progressive schedule (Sec. 4.2)
    ramp_from: Steps = 0            # step at which the temporal loss begins (C.ramp)
    boost: NonNegative = 2.0        # reconstruction weight before warmup / 2 (Eq. 4)   ABLATION
    grad_noise: NonNegative = 0.01  # noise over gradient RMS in the warm-up (C.noise)   ABLATION
    buffers: bool = True            # temporal buffers in the warm-up (Sec. 4.3)   ABLATION
    buffer_std: NonNegative = 0.1   # initial deviation of the buffers (Sec. 4.3)
    buffer_mix: Fraction = 0.25     # mixing ratio of the buffers (Sec. 4.3)


LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=2500, batch_size=4, lm_batch=16)  # sizes
PAPER = {"core.EV": "-0.78 (baseline)", "core.MSE": "47.25 (baseline)", "core.L0": "0 (baseline)",
         "core.l2_ratio": "0", "core.ce_loss_with_sae": "18.0 (2.94 without)", "steps": "0 (TSAE)"}


def defaults(cfg):
    """Values of fields that the user did not give and that depend on others."""
    # open C.clip: Sec. 4.2 clips to stabilise temporal training / here not the control: by clipping
    #   alone it would gain 0.009 EV over the other scripts / --clip
    return {} if cfg.temporal else {"clip": 0.0}

# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------
class TSAE(nn.Module):
    """Standard SAE with the temporal extras of paper C. Position-wise: t never sees u."""
    causal = True

    def __init__(self, D, cfg):
        super().__init__()
        n_features = D * cfg.expansion
        assert cfg.activation != "topk" or cfg.k <= n_features, f"k={cfg.k} exceeds F={n_features}"
        self.cfg, self.norm = cfg, cfg.layer_norm if cfg.temporal else "off"
        self.k = cfg.k if cfg.activation == "topk" and self.norm != "post" else None   # most on
        W = F.normalize(torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights")))
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        if self.norm != "off":
            self.ln = nn.LayerNorm(n_features)                            # Sec. 4.3
        if cfg.temporal and cfg.buffers:
            # open C.buffers: what they hold / here a position's mean code, mixed in / --no-buffers
            state = torch.randn(cfg.T, n_features, generator=common.generator(cfg.seed, "buffers"))
            self.register_buffer("temporal_buffer", cfg.buffer_std * state)   # (T, F)

    def encode(self, x, mask=None):
        """Raw activations (..., D) -> features (..., F). mask is accepted and not needed."""
        # Sec. 3.1: h_t = f_theta(x_t); here ReLU((x_t - b_dec) W_enc + b_enc), b_dec multiplied out
        x, bias = x / self.scale, self.b_enc - self.b_dec @ self.W_enc
        if self.k and self.norm == "off":
            return common.encode_topk(x, self.W_enc, bias, self.k)        # topk(x W_enc + bias, k)
        pre = x @ self.W_enc + bias                                       # (..., F)
        # open C.norm: "on feature activations" / here before the ReLU, behind it none is 0 / costs
        #   0.08 EV, and at equal L0 planted slow features gain only without it / --layer_norm
        if self.norm == "pre":
            pre = self.ln(pre)
        f = topk(pre, self.cfg.k) if self.cfg.activation == "topk" else F.relu(pre)
        return self.ln(f) if self.norm == "post" else f

    def decode(self, f, k=None):
        """Features (..., F) -> raw (..., D); linear. k: at most so many are on, which is faster."""
        product = f @ self.W_dec if k is None else common.decode_topk(f, self.W_dec, k)
        return (product + self.b_dec) * self.scale                        # Sec. 3.1: g_phi(h_t)

    def forward(self, x, mask=None):
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f = self.encode(x, mask)
        return self.decode(f, self.k), f

    def blend(self, f, step):
        """Codes (B, T, F) as the temporal loss compares them: in the warm-up mixed with a state."""
        warm = self.cfg.buffers and step < self.cfg.warmup
        return torch.lerp(f, self.temporal_buffer, self.cfg.buffer_mix) if warm else f   # Sec. 4.3

    @torch.no_grad()
    def update_buffer(self, f, mask, step):
        """Move the state of each position to its mean code (Sec. 4.3); not where none is scored."""
        if self.cfg.buffers and step < self.cfg.warmup:
            summed = common.total((f * mask[..., None]).sum(0))           # (T, F)
            n = common.total(mask.sum(0))[:, None]                        # (T, 1)
            self.temporal_buffer.lerp_(summed / n.clamp(min=1), self.cfg.buffer_mix * (n > 0))


def topk(pre, k):   # EXERCISE 3
    """Keep the k largest entries of the last axis, set to zero where negative; the rest is 0."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, F.relu(values))


@torch.no_grad()
def normalize_decoder(sae):
    """Rows of W_dec back to norm 1."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@torch.no_grad()
def remove_parallel_gradient(sae):
    """Take from each decoder row's gradient its component along the row (it would be undone)."""
    W, grad = sae.W_dec, sae.W_dec.grad
    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)

# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------
def losses(sae, x, mask, n, step, cfg):
    """Terms of Eq. 2, already weighted (their sum is the loss), statistics, and the code. fp32.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reconstruction sums over D, sparsity over F, temporal over lags and F; all average over n.
    """
    x_hat, f = (t.float() for t in sae(x, mask))                          # (B, T, D), (B, T, F)
    error = ((x_hat - x.float()) / sae.scale).pow(2).sum(-1) * mask       # (B, T)
    # Eq. 1, 2 (Sec. 3.1, 4): L = w(t) L_recon + λ_1 L_sparsity + Σ_s λ_s L_s
    recon = error.sum() / n
    stats = {"error": recon.detach(), "active": (f.count_nonzero(-1) * mask).sum() / n}   # logged
    if cfg.recon_reduction == "mean":   # ABLATION: collapses   # EXERCISE 1
        recon = recon / x.shape[-1]
    terms = {"recon": recon}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (f.abs().sum(-1) * mask).sum() / n
    if cfg.temporal:
        # open C.gating: "adaptive feature gating" (Sec. 4) would stand here, were it defined
        # open C.gradient: "weights" / here constants, not a thing to minimise / --weight_gradient
        weight = variance_weights(f if cfg.weight_gradient else f.detach(), mask, cfg)   # (B, 1, F)
        ramp = temporal_ramp(step, cfg) * cfg.temporal_scale
        terms["recon"] = recon_boost(step, cfg) * recon
        terms["temporal"] = ramp * temporal_loss(sae.blend(f, step), mask, cfg, weight) / n
    return terms, stats, f.detach()


def lag_weights(T, cfg, device=None):
    """Weight of the pair (t, u) by its lag |t - u|: symmetric Toeplitz (T, T), 0 diagonal."""
    # Sec. 3.1, 4.1: L_short, L_medium, L_long = Σ_i ||h_{t+i} - h_t||^2, i = 1..3, 4..15, 16..127
    # open C.lags: the text says 1-4, 5-16, 17-128 / here as summed: 127 is the largest lag there is
    # λ_base: cfg.lambda_short, _medium, _long
    # open C.reduction: no average stated / here none / --lag_reduction mean, 13 times weaker
    lag, weight = torch.arange(T, device=device), torch.zeros(T, device=device)
    scales = (1, 3, cfg.lambda_short), (4, 15, cfg.lambda_medium), (16, 127, cfg.lambda_long)
    for first, last, value in scales:
        per_lag = value / (last - first + 1) if cfg.lag_reduction == "mean" else value
        weight[(lag >= first) & (lag <= last)] = per_lag
    return weight[(lag[:, None] - lag[None, :]).abs()]                    # (T, T)


@torch.autocast("cuda", enabled=False)   # fp32: differences of sums
@torch.autocast("cpu", enabled=False)
def temporal_loss(f, mask, cfg, weight=1.0):
    """Σ_s λ_s Σ_i Σ_t Σ_j weight_j (f_{t+i,j} - f_{t,j})^2 over scored pairs and sequences: ().

    f (B, T, F), mask (B, T), weight (B, 1, F). With A the lag weights of scored pairs it equals
        Σ_{t<u} A_tu (f_t - f_u)^2 = <f, L f>,   L = diag(A 1) - A   (a graph Laplacian):
    one (T, T) product for all 127 lags, instead of 127 shifted copies of f.
    """
    A = lag_weights(f.shape[1], cfg, f.device) * (mask[:, :, None] & mask[:, None])   # (B, T, T)
    L = torch.diag_embed(A.sum(-1)) - A
    f = f - window_mean(f, mask)   # changes nothing (L 1 = 0), but saves fp32 from cancelling
    return (weight * f * (L @ f)).sum()


def window_mean(f, mask):
    """Mean over the scored tokens of each window: (B, T, F), (B, T) -> (B, 1, F)."""
    return (f * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)


def variance_weights(f, mask, cfg):
    """Feature weights of Eq. 3 in each window: code (B, T, F), mask (B, T) -> (B, 1, F)."""
    if cfg.variance_weights == "off":
        return torch.ones_like(f[:, :1])
    # Eq. 3 (Sec. 4.1): λ_i = σ_i²/Σ_j σ_j² λ_base, the fraction; λ_base: see lag_weights
    # open C.variance: of which code / here as encoded / mixed with the buffers it has 0.56 of this
    #   variance, and of features at 0.0135 the threshold would exclude 89 instead of 5 %
    variance = window_mean((f - window_mean(f, mask)).square(), mask)
    variance = torch.where(variance < cfg.min_variance, 0.0, variance)
    weight = variance / variance.sum(-1, keepdim=True).clamp(min=1e-8)
    # open C.share: printed so that the λ_i sum to λ_base / "mean": that is their mean, F times more
    return weight * weight.shape[-1] if cfg.variance_weights == "mean" else weight

# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------
def lr_factor(step, cfg):
    """Learning-rate multiplier: linear warm-up (as in papers A and D), then 1."""
    return min(1.0, (step + 1) / max(1, cfg.lr_warmup))


def recon_boost(step, cfg):
    """Eq. 4: w(t) = 2 for t < 1000; 1 + (1 - (t - 1000) / 1000) until 2000; then 1."""
    return 1 + (cfg.boost - 1) * min(1, max(0, (cfg.warmup - step) / max(1, cfg.warmup / 2)))


def temporal_ramp(step, cfg):
    """Sec. 4.2: temporal objectives introduced gradually over 2000 steps."""
    # open C.ramp: "over 2000 steps", or "then", behind the boost / here from step 0 / --ramp_from
    return min(1.0, max(0.0, (step - cfg.ramp_from) / max(1, cfg.warmup - cfg.ramp_from)))


@torch.no_grad()
def add_gradient_noise(sae, step, cfg):
    """Sec. 4.2: Gaussian noise on gradients during warm-up; a pure function of seed and step."""
    # open C.noise: size not given / 1 % of a gradient's RMS, falling to 0; not tuned / --grad_noise
    level = cfg.grad_noise * max(0.0, 1.0 - step / max(1, cfg.warmup))
    gen = common.generator(cfg.seed, f"noise{step}", sae.W_dec.device)
    for p in sae.parameters() if level > 0 else ():
        rms = p.grad.pow(2).mean().sqrt()
        p.grad.add_(torch.randn(p.shape, generator=gen, device=p.device) * rms, alpha=level)

# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). -> evaluation."""
    sae = TSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        # open S.scale: not given / here one scalar makes the mean norm sqrt(D), whatever the model
        # open S.lambda: had theirs norm 1, 0.04 would be 0.04 sqrt(D) here (D = 576: 0.96) / --l1
        # open S.sinks: not given / here masked: at 100 times the norm they are nearly all variance
        # open S.start: not given / as usual W_enc = W_dec^T, b_enc = 0, b_dec = the mean activation
        sae.scale.fill_(acts.scale)
        sae.b_dec.copy_(acts.mean / acts.scale)
    # open S.decay: not given / here 0, as usual for SAEs / --weight_decay 0.01 is PyTorch's default
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    name = ("tsae" if cfg.temporal else "standard") + f"-topk{cfg.k}" * (cfg.activation == "topk")
    run = common.Run(__file__, name, cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch
        x, mask = acts.batch(step)                                        # (b, T, D), (b, T)
        n = common.total(mask.sum()).clamp(min=1)                         # scored, all processes
        # 2. forward and losses   3. backward
        with acts.autocast():
            terms, stats, f = compute(sae, x, mask, n, step, cfg)
        opt.zero_grad()
        sum(terms.values()).backward()
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient
        # open S.projection: not given / here the part along a row goes / --no-project_gradient
        if cfg.project_gradient:
            remove_parallel_gradient(sae)
        if cfg.temporal:
            add_gradient_noise(sae, step, cfg)
        if cfg.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        # 5. step   6. renormalise
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg)
        opt.step()
        normalize_decoder(sae)   # EXERCISE 2
        # 7. bookkeeping
        if cfg.temporal:
            sae.update_buffer(f, mask, step)
        # ---------------------------------------------------------------------------------------
        run.log(step, {**terms, **stats}, lr=opt.param_groups[0]["lr"])
    return run.evaluate(PAPER, transitions)


@torch.no_grad()
def transitions(sae, acts):
    """Sec. 5.3: how likely a feature stays on, or turns on, at the next token, and its variance."""
    counts, variance = 0, []
    for x, mask in acts.heldout():
        f, pair = sae.encode(x, mask).float(), (mask[:, 1:] & mask[:, :-1])[..., None]
        now, then = f[:, :-1] != 0, f[:, 1:] != 0                         # (B, T - 1, F)
        cases = torch.stack([now & then, now, ~now & then, ~now]) & pair
        counts = counts + cases.sum((1, 2))                               # (4, F)
        variance.append(window_mean((f - window_mean(f, mask)).square(), mask).mean(-1))   # (B, 1)
    stay, on, start, off = counts[:, counts[1] > 0]
    found = dict(p_stay=stay / on, p_on=start / off.clamp(min=1), variance=torch.cat(variance))
    return {"transitions": {name: value.mean().item() for name, value in found.items()}}

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, train, LAPTOP, defaults, argv)


if __name__ == "__main__":
    raise SystemExit(main())
