"""TSAE: the time-aware sparse autoencoder, the standard SAE, and the TopK SAE (paper C).

Paper   "Time-Aware Sparse Autoencoders: Learning Temporally Consistent Features in Language
        Models", anonymous, under double-blind review (letter C in this project).
Run     python tsae.py --layer 19                        the paper's TSAE
        python tsae.py --layer 19 --no-temporal          the standard SAE: every script's control
        python tsae.py --layer 19 --activation topk --k 32 [--no-temporal]

The idea. A standard SAE codes every token on its own. Text changes slowly (topic, language,
quotation, syntax), so a feature that means something should rarely flicker from token to token.
TSAE keeps the standard encoder and decoder and adds a penalty on the squared change of the code
between tokens 1-3 apart, 4-15 apart and 16-127 apart. The paper reports that no variant finished
a single step and calls temporal objectives incompatible with SAEs. They are not: this script runs
the paper's whole schedule, and README.md has the numbers.

Notation (paper -> code)
    x_t in R^d      residual stream at token t            x          (B, T, D)
    h_t in R^k      feature activations (the code)        f          (B, T, F)
    x_hat_t         reconstruction                        x_hat      (B, T, D)
    B sequences, T tokens, D model width, F features; "scored" tokens are those with mask = True.

Paper -> code
    Sec. 3.1        TSAE.code, TSAE.decode          the autoencoder
    Eq. 1           losses                          reconstruction + sparsity + temporal
    Eq. 2           losses                          with the boost w(t) and one weight a scale
    Sec. 3.1, 4.1   lag_weights, temporal_loss      three scales of lags, in closed form
    Eq. 3           variance_weights                feature-wise weights from window variances
    Eq. 4           recon_boost                     reconstruction boost 2 -> 1
    Sec. 4.2        temporal_ramp                   temporal loss brought in over 2000 steps
    Sec. 4.2        add_gradient_noise              noise during warm-up
    Sec. 4.3        TSAE.blend                      temporal buffers
    Sec. 4.3        TSAE.code                       LayerNorm on feature activations
    Sec. 5.3        transitions                     activation variance and transition patterns

What the paper leaves open, and how it is settled here
    AMBIGUOUS A1    Sec. 3.1 names lag ranges 1-4, 5-16, 17-128 and sums over 1-3, 4-15, 16-127.
                    The sums are used: 127 is the largest lag inside 128 tokens.
    AMBIGUOUS A2    The sums over lags have no stated average. Code: summed over lags and features
                    as printed, averaged over scored tokens. --lag_reduction mean divides each
                    scale by its number of lags (about 1/13 of the total weight).
    AMBIGUOUS A3    Eq. 3 as printed makes the weights of all features sum to lambda_base, so the
                    temporal loss shrinks by a factor F. --variance_weights printed | mean | off:
                    "mean" lets them average to lambda_base, "off" gives every feature lambda_base.
    AMBIGUOUS A4    LayerNorm "on feature activations": after the ReLU it destroys sparsity, so it
                    stands before the nonlinearity. --layer_norm pre | post | off.
    AMBIGUOUS A5    "batch size of 2048": tokens, the SAE convention (16 sequences of 128).
                    --batch_size counts sequences; 2048 is the other reading.
    UNSPECIFIED U1  What the temporal buffers hold. Code: one slow state for each position and
                    feature, drawn with deviation 0.1, blended into the compared codes at 0.25 and
                    updated at 0.25 during warm-up. --no-buffers removes them.
    UNSPECIFIED U2  Size of the gradient noise. Code: 1 % of each gradient's root mean square,
                    falling linearly to 0 at the end of the warm-up. Not tuned.
    UNSPECIFIED U3  "adaptive feature gating" (Sec. 4) is announced and never defined: left out.
    UNSPECIFIED U4  Learning-rate schedule. Code: 1000 steps of linear warm-up, then constant.
    UNSPECIFIED U5  Layer and number of steps. Code: layer 19 (papers A, B, E) and 4000 steps, so
                    that half of the run has the full objective.
    DEVIATION D1    Activations are divided by one scalar so that their mean norm is sqrt(D), and
                    attention-sink tokens are masked (the paper says neither). Without the first,
                    lambda has no meaning; without the second, explained variance has none.

Does not include: cross-attention, Matryoshka groups, or the contrastive loss of the published
T-SAE (arXiv 2511.05541), which is a different method.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    temporal: bool = True           # the paper's TSAE; --no-temporal is the standard SAE   ABLATION
    model: str = "auto"             # language model: auto, synthetic, or any causal LM of transformers (paper: gemma-2-2b)
    layer: str = "19"               # block whose output is read; 5,12,19 trains one SAE each (paper: not given)
    data: str = "auto"              # text: auto, pile, shakespeare, bundled, or a path (Sec. 5.1: the Pile)
    tokens: int = 10_000_000        # tokens of text harvested (not given)
    heldout_tokens: int = 131_072   # held-out tokens for the evaluation (not given)
    T: int = 128                    # tokens per sequence (Sec. 5.1)
    expansion: int = 1              # F / D (Sec. 5.1: same as the hidden size)
    activation: str = "relu"        # relu (with L1) or topk (then no L1)   ABLATION
    k: int = 32                     # active features per token with topk (ours)
    # losses
    l1: float = 0.04                # lambda_1, sparsity (Sec. 4.3)
    recon_reduction: str = "sum"    # squared error summed or averaged over D (not given; mean collapses)   ABLATION
    lambda_short: float = 0.01      # lags 1-3 (Sec. 5.2)
    lambda_medium: float = 0.005    # lags 4-15 (Sec. 5.2)
    lambda_long: float = 0.001      # lags 16-127 (Sec. 5.2)
    temporal_scale: float = 1.0     # multiplies the three weights (ours)   ABLATION
    lag_reduction: str = "sum"      # sum or mean over the lags of a scale (A2)
    variance_weights: str = "printed"  # Eq. 3: printed, mean or off (A3)   ABLATION
    min_variance: float = 0.01      # features with less variance are excluded (Sec. 4.1)
    layer_norm: str = "pre"         # LayerNorm on feature activations: pre, post, off (A4)   ABLATION
    # schedule
    steps: int = 4000               # optimiser steps; 0 = one pass over the tokens (UNSPECIFIED U5)
    batch_size: int = 16            # sequences per step (A5: 2048 tokens)
    micro_batch: int = 0            # sequences per forward pass; 0 = the whole batch (ours)
    lr: float = 3e-4                # AdamW (Sec. 4.3)
    lr_warmup: int = 1000           # steps of linear learning-rate warm-up (U4)
    warmup: int = 2000              # steps of the progressive schedule (Sec. 4.2)
    boost: float = 2.0              # reconstruction weight before warmup / 2 (Eq. 4)   ABLATION
    clip: float = 2.0               # gradient-norm clipping; 0 = off (Sec. 4.2)   ABLATION
    grad_noise: float = 0.01        # gradient noise over gradient RMS during warm-up; 0 = off (U2)   ABLATION
    buffers: bool = True            # temporal buffers during warm-up (Sec. 4.3, U1)   ABLATION
    buffer_std: float = 0.1         # their initial deviation (Sec. 4.3)
    buffer_mix: float = 0.25        # their mixing ratio (Sec. 4.3)
    # machine and run
    seed: int = 42                  # weights and order of the data (paper A's seed; not given in C)
    device: str = "auto"            # auto, cpu or cuda
    dtype: str = "auto"             # auto, float32 or bfloat16: matrix products only
    compile: bool = False           # torch.compile of the losses: needs a C++ compiler (CPU) or Triton (GPU)
    preset: str = "auto"            # paper, laptop, or auto: laptop on a CPU
    lm_batch: int = 32              # sequences per language-model pass (papers A and D)
    buffer: int = 2048              # sequences harvested and shuffled at a time (papers A and D)
    cache: str = "cache"            # folder for harvested activations; none = keep nothing
    out: str = "auto"               # run folder; auto = runs/<script>-<variant>-<model>-L<layer>-s<seed>
    resume: str = ""                # run folder to continue exactly where it stopped
    overwrite: bool = False         # replace a finished run
    run: str = ""                   # with --eval: a finished run to evaluate again
    eval: str = "core,temporal"     # also: reconstruction, zero, probing, unlearning, features, none
    export: str = ""                # write the SAE for saelens or dictionary_learning
    steer: str = ""                 # edit features in generation, such as 123:+8,77:off (with --prompt)
    prompt: str = ""                # text that --steer continues, with and without the edit
    log_every: int = 10             # steps between lines of log.jsonl
    save_every: int = 500           # steps between checkpoints


# sizes and step counts only
LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=2500, batch_size=4, lm_batch=16)
CHOICES = dict(activation=("relu", "topk"), recon_reduction=("sum", "mean"),
               lag_reduction=("sum", "mean"), variance_weights=("printed", "mean", "off"),
               layer_norm=("pre", "post", "off"))
PAPER = {  # metric -> what the paper reports
    "core.EV": "-0.78 (baseline, Sec. 6.1)", "core.MSE": "47.25 (baseline)",
    "core.L0": "0.0 (baseline)", "core.l2_ratio": "0.0 (baseline)",
    "core.ce_loss_with_sae": "18.0 (Gemma-2-2B)",
    "core.ce_loss_without_sae": "2.94 (Gemma-2-2B)", "steps": "0 (every temporal variant)"}


def variant(cfg):
    """Name of the run's variant, used for the run folder."""
    name = "tsae" if cfg.temporal else "standard"
    return name + ("" if cfg.activation == "relu" else f"-topk{cfg.k}")


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
        self.cfg = cfg
        W = torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights"))
        W = W / W.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        if cfg.temporal and cfg.layer_norm != "off":
            self.ln = nn.LayerNorm(n_features)                            # Sec. 4.3
        if cfg.temporal and cfg.buffers:                                  # UNSPECIFIED U1
            state = torch.randn(cfg.T, n_features, generator=common.generator(cfg.seed, "buffers"))
            self.register_buffer("temporal_buffer", cfg.buffer_std * state)   # (T, F)
        self.pending = 0.0   # sums of codes since the last update

    def encode(self, x, mask=None):
        """Raw activations (..., D) -> features (..., F). mask is accepted and not needed."""
        return common.dense_code(*self.code(x), len(self.b_enc))

    def code(self, x):
        """Raw activations (..., D) -> features (..., F) and None; with TopK, where that is faster,
        only the k active features and which they are: (..., k), (..., k). See common.encode_topk.
        """
        # Sec. 3.1: h_t = f_theta(x_t); the standard encoder: (x - b_dec) W_enc + b_enc, multiplied
        # out so that b_dec's gradient does not cost a sixth matrix product
        x, bias = x / self.scale, self.b_enc - self.b_dec @ self.W_enc
        norm = self.cfg.layer_norm if self.cfg.temporal else "off"
        gather = norm != "post" and common.gather_pays(self.cfg, len(self.b_enc), x.device)
        if gather and norm == "off":
            values, index = common.encode_topk(x, self.W_enc, bias, self.cfg.k)
            return F.relu(values), index
        pre = x @ self.W_enc + bias                                       # (..., F)
        if norm == "pre":                                                 # AMBIGUOUS A4
            pre = self.ln(pre)
        if gather:
            values, index = pre.topk(self.cfg.k, dim=-1, sorted=False)    # (..., k) each
            return F.relu(values), index
        f = topk(pre, self.cfg.k) if self.cfg.activation == "topk" else F.relu(pre)
        return (self.ln(f) if norm == "post" else f), None

    def decode(self, f, index=None):
        """Features (..., F), or a list of the active ones (see code) -> raw (..., D); linear."""
        # Sec. 3.1: x_hat_t = g_phi(h_t)
        x_hat = f @ self.W_dec if index is None else common.decode_topk(f, index, self.W_dec)
        return (x_hat + self.b_dec) * self.scale

    def forward(self, x, mask=None):
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f, index = self.code(x)
        return self.decode(f, index), common.dense_code(f, index, len(self.b_enc))

    def blend(self, f, mask, step):
        """Codes as the temporal loss compares them: during warm-up mixed with a slow state.

        f (B, T, F), mask (B, T) -> (B, T, F). What update_buffers needs is kept in self.pending.
        """
        # Sec. 4.3: buffers start at deviation 0.1 and mix at 0.25 during warm-up     UNSPECIFIED U1
        if not self.cfg.buffers or step >= self.cfg.warmup:
            return f
        weight = mask[..., None].float()
        summed, count = (f.detach() * weight).sum(0), weight.sum(0).expand_as(f[0])
        self.pending = self.pending + torch.stack([summed, count])       # (2, T, F)
        return torch.lerp(f, self.temporal_buffer, self.cfg.buffer_mix)

    @torch.no_grad()
    def update_buffers(self):
        """Move the state of each position towards this step's mean code by the mixing ratio."""
        if torch.is_tensor(self.pending):
            summed, count = common.total(self.pending)   # (T, F) each, all processes
            self.temporal_buffer.lerp_(summed / count.clamp(min=1), self.cfg.buffer_mix)
            self.pending = 0.0


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
    """Terms of Eq. 2, already weighted; their sum is the loss. fp32 throughout.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reductions: reconstruction sums over D, sparsity sums over F, temporal sums over lags and F;
    all three are averaged over scored tokens.
    """
    f, index = sae.code(x)   # f (B, T, F); (B, T, k) where index is given
    # (B, T, D), mean norm of x: sqrt(D)
    error = (sae.decode(f, index).float() - x.float()) / sae.scale * mask[..., None]
    f = f.float()
    # "adaptive feature gating" (Sec. 4) would stand here, were it defined            UNSPECIFIED U3
    # Eq. 1, 2: L = w(t) L_recon + lambda_1 L_sparsity + sum_s lambda_s L_s
    recon = error.pow(2).sum() / n
    # logged, not part of the loss; signs are added up 7 times as fast as truth values
    active = F.relu(f.detach()).sign().sum(-1)                            # (B, T)
    stats = {"error": recon, "active": (active * mask).sum() / n}
    if cfg.recon_reduction == "mean":   # ABLATION: collapses   # EXERCISE 1
        recon = recon / x.shape[-1]
    terms = {"recon": recon}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (f.sum(-1) * mask).sum() / n   # f >= 0: the L1 norm is the sum
    if cfg.temporal:
        terms["recon"] = recon_boost(step, cfg) * recon
        f = common.dense_code(f, index, len(sae.b_enc))                   # (B, T, F)
        blended = sae.blend(f, mask, step)
        ramp = temporal_ramp(step, cfg) * cfg.temporal_scale
        terms["temporal"] = ramp * temporal_loss(blended, mask, cfg) / n
    return terms, stats


def lag_weights(T, cfg, device=None):
    """Weight of the pair (t, u) by its lag |t - u|: symmetric Toeplitz (T, T), 0 diagonal."""
    # Sec. 3.1, 4.1: L_short = Σ_{i=1..3}, L_medium = Σ_{i=4..15}, L_long = Σ_{i=16..127}
    # of ||h_{t+i} - h_t||^2                                                         AMBIGUOUS A1
    lag = torch.arange(T, device=device)
    weight = torch.zeros(T, device=device)
    scales = (1, 3, cfg.lambda_short), (4, 15, cfg.lambda_medium), (16, 127, cfg.lambda_long)
    for first, last, value in scales:
        # AMBIGUOUS A2
        per_lag = value / (last - first + 1) if cfg.lag_reduction == "mean" else value
        weight[(lag >= first) & (lag <= last)] = per_lag
    return weight[(lag[:, None] - lag[None, :]).abs()]                    # (T, T)


def temporal_loss(f, mask, cfg):
    """sum_s lambda_s sum_i sum_t ||f_{t+i} - f_t||^2 over scored pairs, feature-weighted (Eq. 3).

    Summed over sequences, pairs and features: () ; the caller divides by the number of tokens.
    Closed form. With A the lag weights, m the mask and A_m = m_t A_tu m_u,
        sum_{t<u} A_m,tu (f_t - f_u)^2 = <f, L f>,   L = diag(A_m 1) - A_m   (a graph Laplacian),
    one (T, T) product for all 127 lags, instead of 127 shifted copies of f.
    """
    m = mask.to(f.dtype)                                                  # (B, T)
    A = lag_weights(f.shape[1], cfg, f.device).to(f.dtype)
    A = A * m[:, :, None] * m[:, None, :]                                 # (B, T, T), A_m
    with torch.autocast(f.device.type, enabled=False):   # fp32 (TF32 on a GPU): differences of sums
        L = torch.diag_embed(A.sum(-1)) - A
        return LagQuadratic.apply(f, L, m[:, None], cfg)


class LagQuadratic(torch.autograd.Function):
    """sum_bi weight_bi <f_bi, L_b f_bi>: f (B, T, F), L (B, T, T), m (B, 1, T) -> ().

    The weights are constants to the gradient 2 weight L f, which is kept from the forward pass.
    """

    @staticmethod
    def forward(ctx, f, L, m, cfg):
        # L 1 = 0, so the window's mean may be taken off first: without it fp32 cancels to nothing
        count = m.sum(-1, keepdim=True).clamp(min=1)                      # (B, 1, 1)
        centred = f - m @ f / count                                       # (B, T, F)
        weight = variance_weights(m @ centred.square() / count, cfg)      # (B, 1, F)
        Lf = (L @ centred).mul_(weight)
        ctx.save_for_backward(Lf)
        return torch.dot(Lf.flatten(), centred.flatten())

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0], None, None, None


def variance_weights(variance, cfg):
    """Feature weights of Eq. 3 from the variances within each window: (B, 1, F) -> (B, 1, F)."""
    if cfg.variance_weights == "off":
        return torch.ones_like(variance)
    # Eq. 3: lambda_i = sigma_i^2 / sum_j sigma_j^2 * lambda_base; variance below 0.01 excluded
    variance = torch.where(variance < cfg.min_variance, 0.0, variance)
    weight = variance / variance.sum(-1, keepdim=True).clamp(min=1e-8)
    return weight * weight.shape[-1] if cfg.variance_weights == "mean" else weight   # AMBIGUOUS A3


# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------


def lr_factor(step, cfg):
    """Learning-rate multiplier: linear warm-up, then 1."""
    return min(1.0, (step + 1) / max(1, cfg.lr_warmup))


def recon_boost(step, cfg):
    """Eq. 4: w(t) = 2 for t < 1000; 1 + (1 - (t - 1000) / 1000) until 2000; then 1."""
    half = cfg.warmup / 2
    return 1.0 + (cfg.boost - 1.0) * min(1.0, max(0.0, 1.0 - (step - half) / max(1.0, half)))


def temporal_ramp(step, cfg):
    """Sec. 4.2: temporal objectives introduced gradually over 2000 steps."""
    return min(1.0, step / max(1, cfg.warmup))


def noise_level(step, cfg):
    """Gradient noise over gradient RMS: falls linearly to 0 at the end of the warm-up (U2)."""
    return cfg.grad_noise * max(0.0, 1.0 - step / max(1, cfg.warmup))


@torch.no_grad()
def add_gradient_noise(sae, step, cfg):
    """Sec. 4.2: Gaussian noise on gradients during warm-up; a pure function of seed and step."""
    level = noise_level(step, cfg)
    if level > 0:
        gen = common.generator(cfg.seed, f"noise{step}", sae.W_dec.device)
        for p in sae.parameters():
            rms = p.grad.pow(2).mean().sqrt()
            p.grad.add_(torch.randn(p.shape, generator=gen, device=p.device) * rms, alpha=level)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). Returns the evaluation.

    Writes the run folder (common.Run): config, log, checkpoints, weights, evaluation, figures.
    """
    sae = TSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        sae.scale.fill_(acts.scale)                                       # DEVIATION D1
        sae.b_dec.copy_(acts.mean / acts.scale)
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0,
                            fused=True)                                   # one pass over memory
    run = common.Run(__file__, variant(cfg), cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch: micro-batches that together hold cfg.batch_size sequences
        batch = acts.batch(step)   # [(x (B, T, D), mask (B, T))]
        n = common.total(sum(mask.sum() for _, mask in batch))   # scored tokens, all processes
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg)
        opt.zero_grad()
        # 2. forward and losses   3. backward
        sums = {}
        for x, mask in batch:
            with acts.autocast():
                terms, stats = compute(sae, x, mask, n, step, cfg)
            sum(terms.values()).backward()
            common.accumulate(sums, terms, **stats)
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient
        remove_parallel_gradient(sae)
        if cfg.temporal:
            add_gradient_noise(sae, step, cfg)
        if cfg.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        if step == 0:
            common.assert_gradients(sae, sums)
        # 5. step   6. renormalise
        opt.step()
        normalize_decoder(sae)   # EXERCISE 2
        # 7. bookkeeping
        sae.update_buffers()
        # ---------------------------------------------------------------------------------------
        run.log(step, sums, lr=opt.param_groups[0]["lr"])
        run.save_if_due(step)

    return run.evaluate(cfg.eval, PAPER, extra=lambda sae, acts: transitions(sae, acts, run.dir))


@torch.no_grad()
def transitions(sae, acts, folder=None):
    """Sec. 5.3: transition patterns between neighbouring scored tokens, and activation variance.

    Means over live features: p_stay = P(on at t+1 | on at t), p_on = P(on at t+1 | off at t).
    variance: mean over features and windows of a feature's variance within the window (x of mean
    norm sqrt(D)). With a folder also transitions.png: the most and the least persistent features.
    """
    on = stay = start = off = 0
    variance = windows = 0.0
    for x, mask in acts.heldout():
        f = sae.encode(x, mask).float() * mask[..., None]
        pair = (mask[:, 1:] & mask[:, :-1])[..., None]
        now, then = (f[:, :-1] > 0) & pair, (f[:, 1:] > 0) & pair
        on, stay = on + now.sum((0, 1)), stay + (now & then).sum((0, 1))
        off, start = off + (~now & pair).sum((0, 1)), start + (~now & then).sum((0, 1))
        count = mask.sum(1)[:, None].clamp(min=1)
        mean = f.sum(1) / count
        variance += (f.pow(2).sum(1) / count - mean.pow(2)).mean(-1).sum().item()
        windows += len(x)
    live = on > 0
    p_stay, p_on = stay / on.clamp(min=1), start / off.clamp(min=1)       # (F,)
    if folder is not None and (on >= 20).any():
        draw_transitions(folder / "transitions.png", sae, acts, p_stay.masked_fill(on < 20, -1.0))
    return {"transitions": {"p_stay": p_stay[live].mean().item(), "p_on": p_on[live].mean().item(),
                            "variance": variance / windows}}


def draw_transitions(path, sae, acts, p_stay, n=24):
    """Raster of the n most and n least persistent features over three held-out windows.

    p_stay (F,); features with fewer than 20 pairs are marked by -1 and left out.
    """
    plt = common.pyplot()
    order = p_stay.argsort(descending=True)[:(p_stay >= 0).sum()]
    x, mask = next(iter(acts.heldout()))
    f = (sae.encode(x, mask) * mask[..., None])[:3].flatten(0, 1)         # (3 T, F)
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), sharex=True)
    for axis, chosen, name in ((axes[0], order[:n], "most"), (axes[1], order[-n:], "least")):
        share = f[:, chosen] / f[:, chosen].amax(0).clamp(min=1e-8)       # (3 T, n)
        image = axis.imshow(share.t().cpu(), aspect="auto", interpolation="nearest", cmap="magma")
        stays = p_stay[chosen]
        title = f"The {len(chosen)} {name} persistent features: P(stays on) "
        axis.set(ylabel="feature", title=title + f"{stays.min():.2f} to {stays.max():.2f}")
        figure.colorbar(image, ax=axis, label="share of its maximum here")
        for border in range(acts.T, len(share), acts.T):
            axis.axvline(border - 0.5, color="white", linewidth=1)
    axes[1].set_xlabel("token (three held-out windows, white lines between them)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, LAPTOP, CHOICES, TSAE, train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
