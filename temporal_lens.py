"""TemporalLens: a sparse autoencoder with one learnt on/off mask per position (paper E).

Paper   "TemporalLens: Position-Aware Sparse Autoencoders for Interpreting Sequential Neural
        Representations", anonymous, under double-blind review (letter E in this project).
Run     python temporal_lens.py --layer 5,12,19               three SAEs, as in the paper
        python temporal_lens.py --no-masks --uniform_weights  nothing depends on the position
        python temporal_lens.py --model synthetic --plant windows --l1 1 --alpha_lr 3e-2
                                                              masks that have something to find

The idea. A standard SAE treats every position of a sequence alike. TemporalLens multiplies each
feature by a gate between 0 and 1 that depends on the position only and is learnt with the feature:
soft at first (temperature 5), sharp at the end (0.1). Positions that reconstruct badly get more
weight in the loss. Afterwards one reads off where in the sequence each feature works.
Beware. At temperature 0.1, logits that nothing has moved still look like masks, so the analysis
also says how much of them is their random first draw. And lambda decides what masks can do: at 0.04
most features are on at every token and on text no mask is decided (see E.alpha_lr).

Notation (paper -> code)
    h_t in R^d      residual stream at token t            x          (B, T, D)
    f_t in R^k      feature activations (the code)        f          (B, T, F)
    h_hat_t         reconstruction                        x_hat      (B, T, D)
    m_t, alpha_t    position mask and its logits          m, alpha   (T, F)
    w_t             weight of position t in the loss      sae.position_weights() (T,) of error_ema
    B sequences, T tokens, D model width, F features; "scored" tokens are those with mask = True
    (mask (B, T) has nothing to do with the paper's mask m).

Paper -> code
    Eq. 1           losses                                the standard SAE: w_t = 1, a mask of ones
    Eq. 3           TemporalLens.encode                   masked features
    Eq. 4           TemporalLens.position_mask            sigmoid of logits over temperature
    Eq. 5           temperature                           5.0 -> 0.1, exponentially
    Eq. 6           update_position_weights               moving average of each position's error
    Eq. 7           normalize_decoder                     unit-norm decoder columns
    Eq. 8           losses, TemporalLens.position_weights   weighted reconstruction, sparsity
    Sec. 3.3        losses                                position-dependent sparsity: w_t weighs L1
    Sec. 4.1        TemporalLens.initial_alpha            first draw of the logits
    Sec. 5          remove_parallel_gradient              "ConstrainedAdam": 4 to 6 in the loop
    Sec. 5, 6       evals/positions.py                    errors, t-tests, spans, clusters, figures

What the paper leaves open; each is argued at the line that settles it: grep -n "open E.alpha" *.py
    open E.alpha        N(0, 1/T): variance or deviation       --alpha_init variance | deviation
    open E.alpha_lr     learning rate of the logits            --alpha_lr
    open E.ema          where weights are normalised           --ema_norm use | store
    open E.sum          Eq. 8 sums over the positions          averaged over scored tokens
    open E.static       "static masks" (Sec. 6.4)              --static_masks: frozen as drawn
    open E.anneal       the temperature without annealing      --no-anneal, --tau_end
    open E.length       other lengths than T                   first rows; the last row goes on
    open E.bias         Eq. 3 does not subtract b_d            --pre_bias; and what b_e starts as
    open E.norm         Eq. 7 divides by one norm              each column by its own
    open E.batch        "2048 sequences (32 per forward)"      --batch_size 2048 | 32
    open E.steps        steps, tokens, learning-rate schedule  --steps --tokens --lr_warmup
    open E.text         Tiny Shakespeare is one batch          the complete works; --data
    open E.bf16         "bfloat16 precision"                   matrix products only; --dtype
    open S.decay        AdamW's weight decay                   --weight_decay
    open S.start        first values of the weights            tied; b_dec the mean
    open S.projection   gradient along decoder rows            --no-project_gradient
    open S.scale        unit of the activations                mean norm sqrt(D)
    open S.lambda       ... and so of lambda                   --l1 VALUE
    open S.sinks        attention sinks                        masked

Does not include: Eq. 2 (the language model's own block); the sparse probing of Sec. 6.1, which is
--eval probing. For claims on two runs (Sec. 6.4: static masks -23 %, uniform weights +18 %) train
both and compare them: python -m evals.positions RUN RUN2.
"""
import math
from dataclasses import dataclass
from typing import Literal

import common                       # before torch: it sets how OpenMP's threads wait
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Count, Fraction, Natural, NonNegative, Positive, Steps

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------
# open E.batch: "2048 sequences (32 per forward pass)" / here, as printed, 64 forward passes to an
#   optimiser step / --batch_size 32 takes a step after each
# open E.steps: not given / here 4000 steps, about 1,049 passes over 1M tokens; the learning rate
#   rises over the first 1000, as in papers A and D / --steps, --tokens, --lr_warmup
# open E.text: Tiny Shakespeare is about 300k tokens, one batch of 2048 sequences / here
#   Shakespeare's complete works / --data
# open E.bf16: "bfloat16 precision" / here of matrix products; weights, masks and losses are fp32 /
#   --dtype


@dataclass
class Config(common.RunConfig):     # model, device, run folder: common.py
    masks: bool = True              # learnt position masks (Eq. 3); --no-masks: ones   ABLATION
    static_masks: bool = False      # masks frozen as drawn (Sec. 6.4; E.static)   ABLATION
    layer: str = "5,12,19"          # block whose output is read; one SAE each (Sec. 5)
    data: str = "shakespeare"       # text: auto, pile, shakespeare, bundled, or a path (Sec. 5)
    tokens: Count = 1_000_000       # tokens of text harvested (E.steps)
    heldout_tokens: Count = 128_000      # held-out tokens (Sec. 5: 1000 sequences)
    expansion: Count = 1            # F / D (Sec. 5: "matches" the hidden dimension)
    activation: Literal["relu", "topk"] = "relu"   # relu (with L1) or topk (then no L1)   ABLATION
    k: Count = 32                   # active features per token with topk (ours)
    pre_bias: bool = False          # encoder reads x - b_dec (E.bias)   ABLATION
    # losses
    l1: NonNegative = 0.04          # lambda, sparsity (Sec. 4.2; S.lambda)
    recon_reduction: Literal["sum", "mean"] = "sum"   # error over D (Eq. 8)   ABLATION
    uniform_weights: bool = False   # w_t = 1 instead of Eq. 6 (Sec. 6.4)   ABLATION
    beta: Fraction = 0.99           # momentum of the position weights (Eq. 6)
    ema_norm: Literal["use", "store"] = "use"   # weights normalised where used or stored (E.ema)
    # schedule
    steps: Steps = 4000             # optimiser steps; 0 = one pass over the tokens (E.steps)
    batch_size: Count = 2048        # sequences per step (Sec. 5; E.batch)
    micro_batch: Natural = 32       # sequences per forward pass; 0 = all (Sec. 5)
    lr: Positive = 3e-4             # AdamW (Sec. 5)
    alpha_lr: NonNegative = 0.0     # learning rate of the mask logits; 0 = lr (E.alpha_lr)
    lr_warmup: Steps = 1000         # steps of linear learning-rate warm-up (E.steps)
    weight_decay: NonNegative = 0.0      # AdamW's (S.decay)
    clip: NonNegative = 0.0         # gradient-norm clipping; 0 = off (ours: see tsae.py)
    project_gradient: bool = True   # remove the gradient along each decoder row (S.projection)
    anneal: bool = True             # the temperature falls (Eq. 5; E.anneal)   ABLATION
    tau_start: Positive = 5.0       # tau_0, temperature at the first step (Eq. 5)
    tau_end: Positive = 0.1         # temperature at the last step (Eq. 5)
    alpha_init: Literal["variance", "deviation"] = "variance"   # what 1/T is (E.alpha)   ABLATION
    eval: str = "core,temporal,positions"   # evaluations at the end


LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, steps=2500, batch_size=4, micro_batch=0,
              lm_batch=16)                                            # sizes
PAPER = {"positions.no_sink.early_error": "-15 % (Abstract)",
         "positions.features_off": "0.73 (Abstract)", "positions.mean_mask": "0.73 (Abstract)",
         "positions.weight_difficulty_r": "0.82 (Sec. 1)",
         "positions.span": "L5 16, L12 32-48, L19 64 (Sec. 6.3)"}
HISTORY = 100         # rows kept of the position weights over training

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
        self.cfg, self.k = cfg, cfg.k if cfg.activation == "topk" else None   # most that are on
        W = F.normalize(torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights")))
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        self.register_buffer("tau", torch.tensor(cfg.tau_end))            # set at every step
        self.register_buffer("error_ema", torch.ones(cfg.T))              # w of Eq. 6; starts at 1
        self.register_buffer("weight_history", torch.zeros(HISTORY, cfg.T))   # w_t over training
        if cfg.masks:
            # open E.static: "static masks" / here as drawn, while the temperature falls
            self.alpha = nn.Parameter(self.initial_alpha(), requires_grad=not cfg.static_masks)

    def encode(self, x, mask=None):  # DIFFERS FROM tsae.py:TSAE.encode - the position mask
        """Raw activations (B, L, D) or (N, D) -> features (..., F). mask is accepted, not needed.

        x[:, t] is taken to stand at position t, counted from the first token after the sink.
        """
        # open E.bias: Eq. 3 subtracts no b_d / here neither, but b_e starts so that the first code
        #   is that of h - b_d (see train) / --pre_bias subtracts it, as the standard SAE does
        x, bias = x / self.scale, self.b_enc
        if self.cfg.pre_bias:                                             # ABLATION
            bias = bias - self.b_dec @ self.W_enc
        # Eq. 3 (Sec. 4.1): f_t = ReLU(W_e h_t + b_e) ⊙ m_t
        f = F.relu(x @ self.W_enc + bias)                                 # (..., F)
        if self.cfg.masks:
            f = f * self.position_mask(x.shape[-2] if x.dim() > 2 else None)
        return topk(f, self.k) if self.cfg.activation == "topk" else f

    def decode(self, f, k=None):  # SAME AS tsae.py:TSAE.decode
        """Features (..., F) -> raw (..., D); linear. k: at most so many are on, which is faster."""
        # Sec. 4.2: h_hat_t = W_d f_t + b_d
        product = f @ self.W_dec if k is None else common.decode_topk(f, self.W_dec, k)
        return (product + self.b_dec) * self.scale

    def forward(self, x, mask=None):  # SAME AS tsae.py:TSAE.forward
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f = self.encode(x, mask)
        return self.decode(f, self.k), f

    def position_mask(self, length=None):   # EXERCISE 5
        """Masks of the first `length` positions (length, F); None: mean over positions (F,)."""
        # Eq. 4 (Sec. 4.1): m_{t,k} = σ(α_{t,k} / τ)
        m = (torch.sigmoid(self.alpha / self.tau) if self.cfg.masks else
             self.b_enc.new_ones(self.cfg.T, len(self.b_enc)))            # (T, F), fp32
        # open E.length: not given / shorter: the first rows; longer: the last row goes on, as late
        #   positions resemble each other; vectors without a position: the mean mask
        if length is None:
            return m.mean(0)
        longer = length - len(m)
        return m[:length] if longer <= 0 else torch.cat([m, m[-1:].expand(longer, -1)])

    def initial_alpha(self):   # EXERCISE 6
        """Logits of the masks as drawn from the seed: (T, F)."""
        # Sec. 4.1: α_{t,k} ~ N(0, 1/T)
        # open E.alpha: is 1/T variance or deviation / here the variance, as usual: logits 11 times
        #   as large (T = 128), and static masks have 6.3 times the error of learnt ones instead of
        #   1.32 times (the paper: 1.23) / --alpha_init deviation
        std = self.cfg.T ** (-0.5 if self.cfg.alpha_init == "variance" else -1)
        gen = common.generator(self.cfg.seed, "alpha")
        return std * torch.randn(self.cfg.T, len(self.b_enc), generator=gen)

    def position_weights(self):
        """w_t of Eq. 8, normalised to sum to T, without gradient: (T,)."""
        return self.error_ema * (len(self.error_ema) / self.error_ema.sum())


def topk(pre, k):  # SAME AS tsae.py:topk
    """Keep the k largest entries of the last axis, set to zero where negative; the rest is 0."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, F.relu(values))


@torch.no_grad()
def normalize_decoder(sae):  # SAME AS tsae.py:normalize_decoder
    """Rows of W_dec back to norm 1."""
    # Eq. 7 (Sec. 4.2): W_d <- W_d / ||W_d||_2
    # open E.norm: printed is one norm for the matrix / here each of the paper's columns has its own
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
    """Terms of Eq. 8, already weighted (their sum is the loss), statistics. fp32 outside the SAE.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reconstruction sums over D, sparsity over F; each token counts with the weight of its position,
    and both average over n. Also, for Eq. 6, each position's summed error and tokens (2, T).
    """
    x_hat, f = (t.float() for t in sae(x, mask))                          # (B, T, D), (B, T, F)
    error = ((x_hat - x.float()) / sae.scale).pow(2).sum(-1) * mask       # (B, T)
    # Eq. 8 (Sec. 4.2): L = Σ_t w_t (||h_t - h_hat_t||_2^2 + λ ||f_t||_1); Eq. 1: the same, w_t = 1
    # open E.sum: over the T positions of one sequence / here averaged over scored tokens, so that
    #   w_t = 1 is the standard SAE's loss with the same lambda
    w = mask.float() if cfg.uniform_weights else mask * sae.position_weights()   # (B, T)   ABLATION
    recon = (w * error).sum() / n
    stats = {"error": error.detach().sum() / n,
             "active": (f.count_nonzero(-1) * mask).sum() / n}            # logged only
    if cfg.recon_reduction == "mean":   # ABLATION: collapses
        recon = recon / x.shape[-1]
    terms = {"recon": recon}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (w * f.abs().sum(-1)).sum() / n
    return terms, stats, torch.stack([error.sum(0), mask.sum(0)]).detach()


@torch.no_grad()
def update_position_weights(sae, position_error, cfg):
    """Move the average to the step's mean error at each position; position_error from losses."""
    error, count = common.total(position_error)                           # (T,) each, all processes
    # Eq. 6 (Sec. 4.2): w_t <- β w_t + (1 - β) ||h_t - h_hat_t||_2^2
    moved = cfg.beta * sae.error_ema + (1 - cfg.beta) * error / count.clamp(min=1)
    sae.error_ema.copy_(torch.where(count > 0, moved, sae.error_ema))     # none scored: unchanged
    # open E.ema: Eq. 6 averages raw errors, Eq. 8 wants weights that sum to T / here the average is
    #   raw and normalised where it is used, which keeps the momentum; normalised where it is
    #   stored, weights near 1 meet raw errors of tens and follow the last batch / --ema_norm store
    if cfg.ema_norm == "store":
        sae.error_ema.copy_(sae.position_weights())

# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------
def lr_factor(step, cfg):  # SAME AS tsae.py:lr_factor
    """Learning-rate multiplier: linear warm-up (as in papers A and D), then 1."""
    return min(1.0, (step + 1) / max(1, cfg.lr_warmup))


def temperature(step, steps, cfg):   # EXERCISE 4
    """Temperature at this step of `steps`: tau_start at the first, tau_end at the last."""
    # open E.anneal: without annealing, which temperature / here the last one, so that only the way
    #   there differs / --no-anneal --tau_end VALUE
    if not cfg.anneal:
        return cfg.tau_end
    # Eq. 5 (Sec. 4.2): τ(s) = τ_0 exp(-λ s), here with λ = ln(τ_0 / τ_end) / (steps - 1)
    decay = math.log(cfg.tau_start / cfg.tau_end) / max(1, steps - 1)
    return cfg.tau_start * math.exp(-decay * step)

# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). -> evaluation."""
    sae = TemporalLens(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        # open S.scale: not given / here one scalar makes the mean norm sqrt(D), whatever the model
        # open S.lambda: had theirs norm 1, 0.04 would be 0.04 sqrt(D) here (D = 576: 0.96) / --l1
        # open S.sinks: not given / here masked: at 100 times the norm they are nearly all variance
        # open S.start: not given / as usual W_enc = W_dec^T, b_dec = the mean activation
        sae.scale.fill_(acts.scale)
        sae.b_dec.copy_(acts.mean / acts.scale)
        if not cfg.pre_bias:
            sae.b_enc.copy_(-sae.b_dec @ sae.W_enc)
    # open S.decay: not given / here 0, as usual for SAEs / --weight_decay 0.01 is PyTorch's default
    # open E.alpha_lr: one rate is given / here also that of the logits, although a logit learns
    #   from B tokens a step, a weight from B T / on planted windows 0.51 of the masks are decided
    #   (below 0.1 or above 0.9) as printed, 0.97 with lambda 2 and a rate of 0.1, IoU 0.70 and 0.94
    #   (results/controls.json) / --alpha_lr VALUE
    masks = [p for name, p in sae.named_parameters() if name == "alpha" and p.requires_grad]
    others = [p for name, p in sae.named_parameters() if name != "alpha"]
    groups = [{"params": others, "base": cfg.lr}, {"params": masks, "base": cfg.alpha_lr or cfg.lr}]
    opt = torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lr,
                            weight_decay=cfg.weight_decay, fused=True)
    name = "nomasks" if not cfg.masks else "static" if cfg.static_masks else "lens"
    name += "-uniform" * cfg.uniform_weights + f"-tau{cfg.tau_end:g}" * (not cfg.anneal)
    name += f"-topk{cfg.k}" * (cfg.activation == "topk")
    run = common.Run(__file__, name, cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch
        x, mask = acts.batch(step)                                        # (b, T, D), (b, T)
        n = common.total(mask.sum()).clamp(min=1)                         # scored, all processes
        sae.tau.fill_(temperature(step, acts.steps, cfg))
        # 2. forward and losses   3. backward, a micro-batch at a time
        opt.zero_grad()
        sums, position_error = {}, 0.0
        for part in zip(*(t.split(cfg.micro_batch or len(t)) for t in (x, mask))):
            with acts.autocast():
                terms, stats, errors = compute(sae, *part, n, step, cfg)
            sum(terms.values()).backward()
            position_error = position_error + errors                      # (2, T)
            sums = {k: sums.get(k, 0.0) + v.detach() for k, v in {**terms, **stats}.items()}
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient (parts 4 to 6 are the paper's ConstrainedAdam, Sec. 5)
        # open S.projection: it "maintains unit-norm decoder columns" / here, as usual under that
        #   name, the gradient along a column goes, too / --no-project_gradient
        if cfg.project_gradient:
            remove_parallel_gradient(sae)
        if cfg.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        # 5. step   6. renormalise
        for group in opt.param_groups:
            group["lr"] = group["base"] * lr_factor(step, cfg)
        opt.step()
        normalize_decoder(sae)
        # 7. bookkeeping
        update_position_weights(sae, position_error, cfg)
        sae.weight_history[step * HISTORY // acts.steps] = sae.position_weights()
        # ---------------------------------------------------------------------------------------
        run.log(step, sums, lr=opt.param_groups[0]["lr"], tau=sae.tau)
    return run.evaluate(PAPER)

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, train, LAPTOP, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
