"""TemporalLens: a sparse autoencoder with one learnt on/off mask per position (paper E).

Paper   "TemporalLens: Position-Aware Sparse Autoencoders for Interpreting Sequential Neural
        Representations", anonymous, under double-blind review (letter E in this project).
Run     python temporal_lens.py --layer 5,12,19                the paper's TemporalLens
        python temporal_lens.py --no-masks --uniform_weights   nothing depends on the position
        python temporal_lens.py --run RUN --eval core          the analysis of Sec. 6 again

The idea. A standard SAE treats every position of a sequence alike. TemporalLens multiplies each
feature by a gate between 0 and 1 that depends on the position only and is learnt with the feature:
soft at first (temperature 5), sharp at the end (0.1). Positions that reconstruct badly get more
weight in the loss. Afterwards one reads off where in the sequence each feature works. Beware: at
temperature 0.1, logits that nothing has moved still look like masks, so the analysis also says how
much of the masks is their random first draw.

Notation (paper -> code)
    h_t in R^d      residual stream at token t            x          (B, T, D)
    f_t in R^k      feature activations (the code)        f          (B, T, F)
    h_hat_t         reconstruction                        x_hat      (B, T, D)
    m_t, alpha_t    position mask and its logits          m, alpha   (T, F)
    w_t             weight of position t in the loss      position_weights(sae)   (T,)
    B sequences, T tokens, D model width, F features; "scored" tokens are those with mask = True
    (mask (B, T) has nothing to do with the paper's mask m).

Paper -> code
    Eq. 1           losses                          the standard SAE: w_t = 1 and a mask of ones
    Eq. 3           TemporalLens.code               masked features
    Eq. 4           TemporalLens.position_mask      sigmoid of logits over temperature
    Eq. 5           temperature                     5.0 -> 0.1, exponentially
    Eq. 6           update_position_weights         moving average of the error at each position
    Eq. 7           normalize_decoder               unit-norm decoder columns
    Eq. 8           losses, position_weights        weighted reconstruction and sparsity
    Sec. 3.3        losses                          position-dependent sparsity: w_t weighs L1 too
    Sec. 5          remove_parallel_gradient        "ConstrainedAdam": steps 4, 5, 6 of the loop
    Sec. 5          early_late, compare             paired t-tests over test sequences
    Sec. 5, 6.3     spans, cluster                  temporal span, clusters and their consistency
    Sec. 6          analyse, claims                 the paper's numbers beside this run's
    Fig. 1, 6.3     draw_positions, draw_clusters   positions.png, clusters.png

What the paper leaves open, and how it is settled here
    AMBIGUOUS A1    alpha ~ N(0, 1/T): 1/T is read as the variance, the usual meaning.
                    --alpha_init deviation: logits 11 times smaller at T = 128.
    AMBIGUOUS A2    "feature sparsity of 0.73": the fraction of features that are off, or the mean
                    mask. Both are reported; the L1 norm that Sec. 5 names is in position.json.
    AMBIGUOUS A3    Eq. 6 averages raw errors, Eq. 8 wants weights that sum to T. Code: averaged
                    raw, normalised where used, which keeps the momentum of 0.99. --ema_norm store
                    normalises what is stored; raw errors (tens and more) then swamp weights near 1.
    AMBIGUOUS A4    Eq. 8 sums over the positions of one sequence. Code: averaged over scored
                    tokens, so that w_t = 1 is the standard SAE's loss with the same lambda.
    AMBIGUOUS A5    "2048 sequences (32 per forward pass)" is taken at its word: 64 forward passes
                    to one optimiser step. --batch_size 32 is the other reading.
    UNSPECIFIED U1  ConstrainedAdam is only said to keep columns at norm 1. Code: as usual under
                    that name, the gradient along a column goes too (--no-project_gradient: stays).
                    Eq. 7 divides by one norm; code: each column by its own.
    UNSPECIFIED U2  "Static masks" (Sec. 6.4): alpha frozen as drawn; the temperature still falls.
    UNSPECIFIED U3  The temperature without annealing. Code: 0.1 (--tau_end) throughout, so that
                    only the way there differs.
    UNSPECIFIED U4  Other lengths than T. Shorter: the first rows. Longer: the last row goes on, as
                    late positions resemble each other and no token was trained with an average
                    mask. Single vectors, whose position is unknown: the mean mask.
    UNSPECIFIED U5  "Span". Code: the smallest contiguous window holding half of a feature's mean
                    activation over positions. A feature that ignores position has T / 2 = 64.
    UNSPECIFIED U6  Clustering. Code: Ward linkage on correlations of profiles, 8 clusters (not
                    tuned); consistency: adjusted Rand index, even against odd windows.
    UNSPECIFIED U7  Steps, tokens, weight decay, learning-rate schedule. Code: 4000 steps over 1M
                    tokens, no decay, 1000 steps of warm-up (papers A and D). With batches of 2048
                    sequences these are about 1,049 passes over the tokens.
    UNSPECIFIED U8  Initial values. Code: W_e = W_d^T, b_d the mean activation, b_e such that the
                    first code is that of h - b_d, w_t = 1. Eq. 3 has no b_d; --pre_bias adds it.
    DEVIATION D1    Activations are divided by one scalar so that their mean norm is sqrt(D), and
                    attention-sink tokens are masked (the paper says neither). Without the first,
                    lambda has no meaning; without the second, explained variance has none.
    DEVIATION D2    Tiny Shakespeare is about one batch of 2048 sequences: his complete works.
    DEVIATION D3    "bfloat16 precision": matrix products only; weights, masks, losses are fp32.

Does not include: Eq. 2 (the language model's own block); the sparse probing of Sec. 6.1, which is
--eval probing. For claims on two runs (Sec. 6.4: static masks -23 %, uniform weights +18 %) train
both and call `compare`.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    masks: bool = True              # learnt position masks (Eq. 3); --no-masks is a mask of ones   ABLATION
    static_masks: bool = False      # masks frozen at their initial logits (Sec. 6.4, U2)   ABLATION
    model: str = "auto"             # language model: auto, synthetic, or any causal LM of transformers (paper: gemma-2-2b)
    layer: str = "5,12,19"          # block whose output is read; 5,12,19 trains one SAE each (Sec. 5)
    data: str = "shakespeare"       # text: auto, pile, shakespeare, bundled, or a path (Sec. 5, D2)
    tokens: int = 1_000_000         # tokens of text harvested (not given, U7)
    heldout_tokens: int = 128_000   # held-out tokens for the evaluation (Sec. 5: 1000 sequences)
    T: int = 128                    # tokens per sequence (Sec. 5)
    expansion: int = 1              # F / D (Sec. 5: "matches" the hidden dimension)
    activation: str = "relu"        # relu (with L1) or topk (then no L1)   ABLATION
    k: int = 32                     # active features per token with topk (ours)
    pre_bias: bool = False          # encoder reads x - b_dec, as the standard SAE (Eq. 3 does not)   ABLATION
    # losses
    l1: float = 0.04                # lambda, sparsity (Sec. 4.2)
    recon_reduction: str = "sum"    # squared error summed over D (Eq. 8) or averaged (mean collapses)   ABLATION
    uniform_weights: bool = False   # w_t = 1 instead of Eq. 6 (Sec. 6.4)   ABLATION
    beta: float = 0.99              # momentum of the position weights (Eq. 6)
    ema_norm: str = "use"           # weights normalised where used or where stored (A3)   ABLATION
    # schedule
    steps: int = 4000               # optimiser steps; 0 = one pass over the tokens (U7)
    batch_size: int = 2048          # sequences per step (Sec. 5, A5)
    micro_batch: int = 32           # sequences per forward pass; 0 = the whole batch (Sec. 5)
    lr: float = 3e-4                # AdamW (Sec. 5)
    lr_warmup: int = 1000           # steps of linear learning-rate warm-up (U7)
    anneal: bool = True             # temperature falls (Eq. 5); --no-anneal: tau_end throughout (U3)   ABLATION
    tau_start: float = 5.0          # tau_0, temperature at the first step (Eq. 5)
    tau_end: float = 0.1            # temperature at the last step (Eq. 5)
    alpha_init: str = "variance"    # 1/T is the variance or the deviation of the logits (A1)   ABLATION
    project_gradient: bool = True   # remove the gradient along each decoder column (U1)   ABLATION
    # machine and run
    seed: int = 42                  # weights and order of the data (paper A's seed; not given in E)
    device: str = "auto"            # auto, cpu or cuda
    dtype: str = "auto"             # auto, float32 or bfloat16: matrix products only (D3)
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


LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=2500, batch_size=4, micro_batch=0,
              lm_batch=16)                                            # sizes and step counts only
CHOICES = dict(activation=("relu", "topk"), recon_reduction=("sum", "mean"),
               ema_norm=("use", "store"), alpha_init=("variance", "deviation"))
PAPER = {  # metric -> what the paper reports
    "claims.early_error": "-15 % (Abstract)", "claims.features_off": "0.73 (Abstract; A2)",
    "claims.mean_mask": "0.73 (Abstract; A2)", "claims.weight_difficulty_r": "0.82 (Sec. 1)",
    "claims.span": "L5 16, L12 32-48, L19 64 (6.3)"}
HISTORY = 100         # rows kept of the position weights over training
CLUSTERS = 8          # clusters of position profiles (U6); not tuned
MAX_CLUSTERED = 500   # features clustered: those with most activation; not tuned


def variant(cfg):
    """Name of the run's variant, used for the run folder."""
    name = "nomasks" if not cfg.masks else "static" if cfg.static_masks else "lens"
    name += "-uniform" if cfg.uniform_weights else ""
    name += "" if cfg.anneal else f"-tau{cfg.tau_end:g}"
    return name + ("" if cfg.activation == "relu" else f"-topk{cfg.k}")


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class TemporalLens(nn.Module):
    """Standard SAE times a mask that depends on the position. Token t never sees token u."""
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
        self.register_buffer("tau", torch.tensor(cfg.tau_end))            # set at every step
        self.register_buffer("error_ema", torch.ones(cfg.T))              # w of Eq. 6 (A3, U8)
        self.register_buffer("weight_history", torch.zeros(HISTORY, cfg.T))   # w_t over training
        if cfg.masks:                                                     # ABLATION
            alpha = initial_alpha(n_features, cfg)                        # (T, F)
            self.alpha = nn.Parameter(alpha, requires_grad=not cfg.static_masks)   # UNSPECIFIED U2

    def encode(self, x, mask=None):  # SAME AS tsae.py:TSAE.encode
        """Raw activations (B, L, D) or (N, D) -> features (..., F). mask is accepted, not needed.

        x[:, t] is taken to stand at position t, counted from the first token after the sink.
        """
        return common.dense_code(*self.code(x), len(self.b_enc))

    def code(self, x):  # DIFFERS FROM tsae.py:TSAE.code - the position mask
        """Raw activations (B, L, D) or (N, D) -> features (..., F) and None; with TopK, where that
        is faster, only the k active features and which they are: (..., k), (..., k).
        """
        bias = self.b_enc
        if self.cfg.pre_bias:                                             # ABLATION: not in Eq. 3
            bias = self.b_enc - self.b_dec @ self.W_enc
        # Eq. 3 (Sec. 4.1): f_t = ReLU(W_e h_t + b_e) ⊙ m_t
        x, L = x / self.scale, x.shape[-2] if x.dim() > 2 else None
        m = self.position_mask(L) if self.cfg.masks else None             # (L, F), L None: (F,)
        if common.gather_pays(self.cfg, len(self.b_enc), x.device):
            score = None if m is None else lambda pre: F.relu(pre) * m    # k largest after masks
            values, index = common.encode_topk(x, self.W_enc, bias, self.cfg.k, score)
            f = F.relu(values)                                            # (..., k)
            here = index if L is None else (torch.arange(L, device=x.device)[:, None], index)
            return (f if m is None else f * m[here]), index
        f = F.relu(x @ self.W_enc + bias)                                 # (..., F)
        f = f if m is None else f * m
        return (topk(f, self.cfg.k) if self.cfg.activation == "topk" else f), None

    def decode(self, f, index=None):  # SAME AS tsae.py:TSAE.decode
        """Features (..., F), or a list of the active ones (see code) -> raw (..., D); linear."""
        # Sec. 4.2: h_hat_t = W_d f_t + b_d
        x_hat = f @ self.W_dec if index is None else common.decode_topk(f, index, self.W_dec)
        return (x_hat + self.b_dec) * self.scale

    def forward(self, x, mask=None):  # SAME AS tsae.py:TSAE.forward
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f, index = self.code(x)
        return self.decode(f, index), common.dense_code(f, index, len(self.b_enc))

    def position_mask(self, length=None):   # EXERCISE 5
        """Masks of the first `length` positions (length, F); None: mean over positions (F,)."""
        # Eq. 4 (Sec. 4.1): m_{t,k} = σ(α_{t,k} / τ)
        m = (torch.sigmoid(self.alpha / self.tau) if self.cfg.masks else
             self.b_enc.new_ones(self.cfg.T, len(self.b_enc)))            # (T, F), fp32
        if length is None:                                                # UNSPECIFIED U4
            return m.mean(0)
        longer = length - len(m)
        return m[:length] if longer <= 0 else torch.cat([m, m[-1:].expand(longer, -1)])

    @torch.no_grad()
    def fold(self):
        """Make the masks hard for good, on where alpha > 0: the limit tau -> 0 of Eq. 4."""
        self.tau.fill_(1e-30)


def initial_alpha(n_features, cfg):   # EXERCISE 6
    """Logits of the masks as drawn from the seed: (T, F)."""
    # Sec. 4.1: α_{t,k} ~ N(0, 1/T)                                                    AMBIGUOUS A1
    std = cfg.T ** -0.5 if cfg.alpha_init == "variance" else 1 / cfg.T
    return std * torch.randn(cfg.T, n_features, generator=common.generator(cfg.seed, "alpha"))


def topk(pre, k):  # SAME AS tsae.py:topk
    """Keep the k largest entries of the last axis, set to zero where negative; the rest is 0."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, F.relu(values))


@torch.no_grad()
def normalize_decoder(sae):  # SAME AS tsae.py:normalize_decoder
    """Rows of W_dec back to norm 1."""
    # Eq. 7 (Sec. 4.2): W_d <- W_d / ||W_d||_2, the paper's columns one by one      UNSPECIFIED U1
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@torch.no_grad()
def remove_parallel_gradient(sae):  # SAME AS tsae.py:remove_parallel_gradient
    """Take from each decoder row's gradient its component along the row (it would be undone)."""
    W, grad = sae.W_dec, sae.W_dec.grad
    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def losses(sae, x, mask, n, step, cfg):  # DIFFERS FROM tsae.py:losses - positions are weighed
    """Terms of Eq. 8, already weighted; their sum is the loss. fp32 throughout.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reductions: reconstruction sums over D, sparsity sums over F; each token counts with the weight
    of its position and both are averaged over scored tokens.
    Also returns statistics to log and, for Eq. 6, the summed error and number of tokens (2, T).
    """
    f, index = sae.code(x)   # f (B, T, F); (B, T, k) where index is given
    error = (sae.decode(f, index).float() - x.float()) / sae.scale
    error = error.pow(2).sum(-1) * mask                                   # (B, T)
    f = f.float()
    # Eq. 8 (Sec. 4.2): L = sum_t w_t (||h_t - h_hat_t||_2^2 + λ ||f_t||_1)            AMBIGUOUS A4
    # Eq. 1 (Sec. 3.1) is the same with w_t = 1
    w = mask.float() if cfg.uniform_weights else mask * position_weights(sae)   # (B, T)   ABLATION
    recon = (w * error).sum() / n
    active = f.detach().sign().sum(-1)                                    # (B, T), f >= 0
    stats = {"error": error.sum() / n, "active": (active * mask).sum() / n}   # logged only
    if cfg.recon_reduction == "mean":                                     # ABLATION: collapses
        recon = recon / x.shape[-1]
    terms = {"recon": recon}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (w * f.sum(-1)).sum() / n                  # f >= 0: the L1 norm
    return terms, stats, torch.stack([error.sum(0), mask.sum(0)]).detach()


def position_weights(sae):
    """w_t of Eq. 8, normalised to sum to T, without gradient: (T,)."""
    return sae.error_ema * (len(sae.error_ema) / sae.error_ema.sum())     # AMBIGUOUS A3


@torch.no_grad()
def update_position_weights(sae, position_error, cfg):
    """Move the average by the batch's mean error at each position; position_error from losses."""
    error, count = common.total(position_error)
    # Eq. 6 (Sec. 4.2): w_t <- β w_t + (1 - β) ||h_t - h_hat_t||_2^2
    moved = cfg.beta * sae.error_ema + (1 - cfg.beta) * error / count.clamp(min=1)
    sae.error_ema.copy_(torch.where(count > 0, moved, sae.error_ema))     # none scored: unchanged
    if cfg.ema_norm == "store":                                           # AMBIGUOUS A3
        sae.error_ema.copy_(position_weights(sae))


# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------


def lr_factor(step, cfg):  # SAME AS tsae.py:lr_factor
    """Learning-rate multiplier: linear warm-up, then 1."""
    return min(1.0, (step + 1) / max(1, cfg.lr_warmup))


def temperature(step, steps, cfg):   # EXERCISE 4
    """Temperature at this step of `steps`: tau_start at the first, tau_end at the last."""
    if not cfg.anneal:                                                    # UNSPECIFIED U3
        return cfg.tau_end
    # Eq. 5 (Sec. 4.2): τ(s) = τ_0 exp(-λ s), here with λ = ln(τ_0 / τ_end) / (steps - 1)
    decay = math.log(cfg.tau_start / cfg.tau_end) / max(1, steps - 1)
    return cfg.tau_start * math.exp(-decay * step)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). Returns the evaluation.

    Writes the run folder (common.Run): config, log, checkpoints, weights, evaluation, figures.
    """
    if min(cfg.tau_start, cfg.tau_end) <= 0:
        raise common.UserError("--tau_start and --tau_end are temperatures: they must be positive.")
    sae = TemporalLens(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        sae.scale.fill_(acts.scale)                                       # DEVIATION D1
        sae.b_dec.copy_(acts.mean / acts.scale)
        if not cfg.pre_bias:                                              # UNSPECIFIED U8
            sae.b_enc.copy_(-sae.b_dec @ sae.W_enc)
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0,
                            fused=True)                                   # one pass over memory
    run = common.Run(__file__, variant(cfg), cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch: micro-batches that together hold cfg.batch_size sequences
        batch = acts.batch(step)   # [(x (B, T, D), mask (B, T))]
        n = common.total(sum(mask.sum() for _, mask in batch))   # scored tokens, all processes
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg)
        sae.tau.fill_(temperature(step, acts.steps, cfg))
        opt.zero_grad()
        # 2. forward and losses   3. backward
        sums, position_error = {}, 0.0
        for x, mask in batch:
            with acts.autocast():
                terms, stats, errors = compute(sae, x, mask, n, step, cfg)
            sum(terms.values()).backward()
            position_error = position_error + errors                      # (2, T)
            common.accumulate(sums, terms, **stats)
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient (Sec. 5: steps 4 to 6 are the paper's ConstrainedAdam, U1)
        if cfg.project_gradient:
            remove_parallel_gradient(sae)
        if step == 0:
            common.assert_gradients(sae, sums)
        # 5. step   6. renormalise
        opt.step()
        normalize_decoder(sae)
        # 7. bookkeeping
        update_position_weights(sae, position_error, cfg)
        sae.weight_history[step * HISTORY // acts.steps] = position_weights(sae)
        # ---------------------------------------------------------------------------------------
        run.log(step, sums, lr=opt.param_groups[0]["lr"], tau=temperature(step, acts.steps, cfg))
        run.save_if_due(step)

    results = run.evaluate(cfg.eval, PAPER, extra=lambda sae, acts: analyse(sae, acts, run.dir))
    return results


# After training: the analysis of Sec. 6 on held-out windows, the "test sequences" of Sec. 5


@torch.no_grad()
def analyse(sae, acts, folder):
    """Analyses of Sec. 5 and 6: numbers for eval.json; figures and position.json in the folder."""
    T, m = sae.cfg.T, sae.position_mask(sae.cfg.T).cpu().numpy()          # (T, F)
    errors, halves, off = measure(sae, acts)
    error, energy, scored = errors
    profile, tau = halves.mean(0), sae.tau.clone()                        # (T, F)
    live = profile.sum(0) > 0
    sae.fold()
    folding = (measure(sae, acts)[0][0].sum() - error.sum()) / energy.sum()
    sae.tau.copy_(tau)
    by = {"error": error.sum(0) / scored.sum(0).clip(1), "off": off, "mean_mask": m.mean(1),
          "weight": position_weights(sae).cpu().numpy(), "L1": profile.sum(1),   # by position (T,)
          "span": spans(profile[:, live]), "mask_span": spans(m)}         # by feature
    numbers = {
        "position": {k: early_late(*case) for k, case in sink_cases(sae, acts, errors).items()},
        "masks": {"features_off": off.mean(), "mean_mask": m.mean(dtype=float),
                  "decided": ((m < 0.1) | (m > 0.9)).mean(), "EV_lost_by_folding": folding},
        "span": {"median": np.median(by["span"]) if live.any() else math.nan,
                 "median_mask": np.median(by["mask_span"]), "ignoring_position": T // 2}}
    numbers["position"]["weight_difficulty_r"] = np.corrcoef(by["weight"], by["error"])[0, 1]
    if sae.cfg.masks:
        draw = initial_alpha(m.shape[1], sae.cfg).flatten()
        numbers["masks"]["r_with_first_draw"] = np.corrcoef(draw, sae.alpha.cpu().flatten())[0, 1]
    if live.sum() >= CLUSTERS:
        from sklearn.metrics import adjusted_rand_score
        top = np.argsort(-profile.sum(0), kind="stable")[:min(MAX_CLUSTERED, live.sum())]
        tree, labels = cluster(profile[:, top])
        agreement = adjusted_rand_score(*(cluster(half[:, top])[1] for half in halves))     # U6
        numbers["clusters"] = {"consistency": agreement, "sizes": np.bincount(labels)[1:].tolist()}
        draw_clusters(folder / "clusters.png", profile[:, top], tree, labels, agreement)
    numbers["claims"] = claims(numbers, acts, sae.cfg.uniform_weights)
    common.write_json(folder / "position.json", {k: np.round(v, 5) for k, v in by.items()})
    history = sae.weight_history[sae.weight_history.sum(1) > 0].cpu().numpy()
    draw_positions(folder / "positions.png", by, m, history, numbers, sae.cfg.uniform_weights)
    return numbers


@torch.no_grad()
def measure(sae, acts):
    """One pass over the held-out windows -> errors (3, N, T), profiles (2, T, F), off (T,).

    errors: squared error, squared distance from the mean, and 1 if scored, of every token; in units
    of scale^2, where a token has squared norm D; 0 where not scored. profiles: mean activation in
    even and in odd windows. off: fraction of features that are 0.
    """
    errors, mass, on, count = [], 0.0, 0.0, 0.0
    for x, mask in acts.heldout(16):                                      # even, so parity is kept
        x_hat, f = sae(x, mask)
        error, energy = (((y - x) / sae.scale).pow(2).sum(-1) * mask for y in (x_hat, acts.mean))
        errors.append(torch.stack([error, energy, mask]).cpu())
        f = f.float() * mask[..., None]
        on = on + (f > 0).sum((0, 2))
        mass = mass + torch.stack([f[0::2].sum(0), f[1::2].sum(0)]).double()
        count = count + torch.stack([mask[0::2].sum(0), mask[1::2].sum(0)])
    profiles = mass / count.clamp(min=1)[..., None]
    off = 1 - on.double() / (count.sum(0).clamp(min=1) * f.shape[-1])
    return torch.cat(errors, 1).double().numpy(), profiles.cpu().numpy(), off.cpu().numpy()


def early_late(error, energy, scored):
    """Positions 1-32 against later ones, early / late - 1; arrays (N, T) as measured.

    early_error: of the squared error a token; p: its paired t-test over sequences (Sec. 5);
    early_unexplained: of the error over the variance of the positions concerned.
    """
    from scipy.stats import ttest_rel
    T = error.shape[1]
    parts = slice(0, min(32, T // 4)), slice(min(32, T // 4), T)          # short windows: a quarter
    both = np.all([scored[:, part].sum(1) > 0 for part in parts], 0)      # sequences with both
    early, late = (error[both, part].sum(1) / scored[both, part].sum(1) for part in parts)
    unexplained = [error[:, part].sum() / energy[:, part].sum() for part in parts]
    return {"early_error": float(early.mean() / late.mean() - 1),
            "p": float(ttest_rel(early, late).pvalue),
            "early_unexplained": float(unexplained[0] / unexplained[1] - 1)}


def compare(sae_a, sae_b, acts):
    """Paired t-test between two SAEs' squared errors on the same sequences (Sec. 5, 6.4).

    In raw units: each SAE has its own scale, which depends on the seed.
    """
    from scipy.stats import ttest_rel
    a, b = (errors[0].sum(1) * sae.scale.item() ** 2 / errors[2].sum(1).clip(1)   # (N,) each
            for sae, errors in ((sae, measure(sae, acts)[0]) for sae in (sae_a, sae_b)))
    test = ttest_rel(a, b)
    return {"a_against_b": float(a.mean() / b.mean() - 1), "t": float(test.statistic),
            "p": float(test.pvalue), "sequences": len(a)}


@torch.no_grad()
def sink_cases(sae, acts, errors):
    """measure's errors, and what they become if the attention sink counts as position 1.

    sink_as_coded: with this SAE's error on the sink, which it was not trained on. sink_fitted: with
    error 0, as an SAE trained on it reaches: the sink is the same vector in every window.
    """
    cases, windows = {"no_sink": errors}, acts.heldout_with_sink()
    if windows is not None:
        x = next(iter(windows))[0][:1, 0]                                 # (1, D)
        x_hat = sae(x[None])[0][0]   # a window of one token: position 1
        coded, far = (((y - x) / sae.scale).pow(2).sum().item() for y in (x_hat, acts.mean))
        for name, error in (("sink_as_coded", coded), ("sink_fitted", 0.0)):
            front = np.broadcast_to(np.reshape([error, far, 1], (3, 1, 1)), (3, errors.shape[1], 1))
            cases[name] = np.concatenate([front, errors[..., :-1]], -1)   # (3, N, T)
    return cases


def spans(profile):
    """Smallest contiguous window of positions with half of each column's mass: (T, F) -> (F,)."""
    # UNSPECIFIED U5 (Sec. 5, 6.3: "temporal span")
    cumulative = np.insert(profile.astype(np.float64), 0, 0, axis=0).cumsum(0)   # (T + 1, F)
    half = cumulative[-1] / 2 * (1 - 1e-9)                                # despite rounding
    span = np.full(profile.shape[1], len(profile))
    for width in range(len(profile) - 1, 0, -1):
        span[(cumulative[width:] - cumulative[:-width]).max(0) >= half] = width
    return span


def cluster(profile):
    """Hierarchical clustering of features (columns of profile (T, F)) -> tree, labels (F,)."""
    from scipy.cluster.hierarchy import fcluster, linkage
    # UNSPECIFIED U6: between standardised profiles the squared distance is 2 T (1 - correlation)
    standard = (profile - profile.mean(0)) / profile.std(0).clip(1e-12)
    tree = linkage(standard.T, "ward")
    return tree, fcluster(tree, CLUSTERS, "maxclust")


def claims(numbers, acts, uniform=False):
    """Claims one run can judge -> "this run: verdict"; reproduced: within 25 % of the paper.

    uniform: the loss weighed all positions alike, so that Eq. 6's weights are not judged.
    """
    early, masks, span = numbers["position"]["no_sink"], numbers["masks"], numbers["span"]
    rows = {"early_error": (early["early_error"], -0.19, -0.11 if early["p"] < 0.05 else -1),
            "features_off": (masks["features_off"], 0.55, 0.91),          # AMBIGUOUS A2
            "mean_mask": (masks["mean_mask"], 0.55, 0.91),
            # close to 1 by construction: w_t is an average of that very error
            "weight_difficulty_r": (numbers["position"]["weight_difficulty_r"], 0.62, 1.0)}
    bounds = {"5": (12, 20), "12": (32, 48), "19": (48, 80)}.get(str(acts.layer))
    if bounds:
        rows["span"] = (span["median"], *bounds)
    out = {}
    for name, (value, low, high) in rows.items():
        verdict = "reproduced" if low <= value <= high else "refuted on this model"
        out[name] = f"{value:.3g}: {verdict if acts.lm else 'not testable on synthetic data'}"
    if bounds and span["median"] > 0.9 * span["ignoring_position"]:
        out["span"] += ", but a feature that ignores position has the same"
    if uniform:
        out["weight_difficulty_r"] = f"{rows['weight_difficulty_r'][0]:.3g}: weights not used"
    return out


def draw_positions(path, by, m, history, numbers, uniform=False):
    """positions.png: six views of what depends on the position; uniform as in claims."""
    plt, T, position = common.pyplot(), len(m), numbers["position"]
    t, here = np.arange(1, T + 1), "position (1 = first token after the sink)"
    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(15, 8))
    a.plot(t, by["error"], color="tab:red")
    a.axvspan(1, min(32, T // 4), color="tab:blue", alpha=0.12, label="early positions")
    a.set_ylim(0)
    order = np.argsort((m * t[:, None]).sum(0) / m.sum(0).clip(1e-12), kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(120, len(order))).astype(int)]
    bars = ((b, b.imshow(history, aspect="auto", origin="lower", interpolation="nearest",
                         cmap=plt.get_cmap("viridis", 10), extent=(0.5, T + 0.5, 0, 100),
                         vmax=np.quantile(history, 0.98) if len(history) else 1),
             "weight $w_t$ (mean 1; top 2 % cut)"),
            (c, c.scatter(by["error"], by["weight"], c=t, cmap="plasma", s=18), "position"),
            (e, e.imshow(m[:, order].T, aspect="auto", origin="lower", interpolation="nearest",
                         vmin=0, vmax=1, cmap=plt.get_cmap("gray_r", 5),
                         extent=(0.5, T + 0.5, 0, len(order))), "mask $m_{t,k}$"))
    for axis, image, label in bars:
        figure.colorbar(image, ax=axis, label=label)
    d.plot(t, by["off"], label="features off", color="tab:green")
    d.plot(t, by["mean_mask"], label="mean mask", color="tab:purple")
    d.axhline(0.73, color="grey", linestyle="--", label="the paper's 0.73")
    d.set_ylim(0, 1.02)
    f.hist([by["span"], by["mask_span"]], np.linspace(0.5, T + 0.5, 33), color=["tab:blue", "plum"],
           label=["activations", "mask alone"])
    f.axvline(T / 2, color="grey", linestyle="--", label="feature that ignores position")
    f.margins(y=0.4)
    drawn = numbers["masks"].get("r_with_first_draw", math.nan)
    unused = " (not used)" if uniform else ""
    for axis, xlabel, ylabel, title in (
            (a, here, "squared error a token (its squared norm: D)",
             f"Early positions: error {position['no_sink']['early_error']:+.1%}"),
            (b, here, "training done (%)", f"Weight of each position in the loss{unused}"),
            (c, "held-out squared error a token", "final weight $w_t$ (mean 1)",
             f"Weight, difficulty: r = {position['weight_difficulty_r']:.2f}{unused}"),
            (d, here, "fraction", "Sparsity in both readings"),
            (e, here, "feature (by mean position)", f"Masks; r with their first draw {drawn:.2f}"),
            (f, "span (positions with half of the activation)", "features",
             f"Spans of features: median {numbers['span']['median']:.0f} of {T}")):
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis, corner in ((a, "lower right"), (d, "lower right"), (f, "upper left")):
        axis.legend(loc=corner)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def draw_clusters(path, profile, tree, labels, agreement):
    """clusters.png: dendrogram of the features beside their profiles, in the same order."""
    from scipy.cluster.hierarchy import dendrogram
    plt, n = common.pyplot(), labels.max()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(1, 2.2))
    cut = tree[1 - n, 2] if n > 1 else 0                                  # lowest merge of clusters
    drawn = dendrogram(tree, orientation="left", no_labels=True, ax=left, color_threshold=cut)
    left.set(xlabel="Ward distance of profiles", ylabel="feature", title=f"{n} clusters")
    share = (profile / profile.max(0).clip(1e-12))[:, drawn["leaves"]]
    image = right.imshow(share.T, aspect="auto", origin="lower", cmap=plt.get_cmap("magma", 5),
                         extent=(0.5, len(share) + 0.5, 0, len(share.T)), interpolation="nearest")
    right.set(xlabel="position (1 = first token after the sink)", ylabel="feature (as on the left)",
              title=f"Where features are active; clusters from two halves agree {agreement:.2f}")
    figure.colorbar(image, ax=right, label="mean activation (share of the feature's maximum)")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, LAPTOP, CHOICES, TemporalLens, train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
