"""MTSAE: multi-scale temporal sparse autoencoders (papers A and D).

Paper   A: "MTSAE: Multi-Scale Temporal Feature Extraction for Interpretable Language Model
        Modification"; D: "Temporal Feature Disentanglement: Multi-Scale Sparse Autoencoders for
        Selective Model Unlearning"; both anonymous, under double-blind review.
Run     python mtsae.py --layer 19                         paper A, Run 3: rates 1, 4, 16 (Sec. 6.1)
        python mtsae.py --layer 19 --rates 1,2,4           paper A, Run 2: rates 1, 2, 4
        python mtsae.py --layer 19 --rates 1,2,4 --recon_weight 1            paper A, Run 1 (U4)
        python mtsae.py --variant unlearning               paper D
        python mtsae.py --variant unlearning --tokens 10000 --steps 0 --batch_size 16
                                                           paper D as reported: 4 steps (D3)
        python mtsae.py --variant unlearning --eval core,unlearning          and what it is for

The idea. A standard SAE encodes every token on its own. An MTSAE first lets each channel of the
residual stream look along the sequence: depth-wise convolutions of kernel 3, dilated by different
rates, read the tokens r before and r after. Paper A averages the branches with the tokens
themselves (a residual), normalises and encodes that, and asks neighbouring codes to point the same
way. Paper D normalises each branch for itself, gives the encoder all of them side by side, and asks
the branches to differ. Both reconstruct the token itself, so the rest of the sequence can only help
to choose features. The branches are parallel, not stacked: paper A reaches as far as its largest
rate, 16 tokens either way, not the 128 that it claims (mixing.reach in the results measures it).

Notation (paper -> code)
    A^l, h^l        residual stream at layer l            x          (B, T, D)
    h_i, z_k        one branch                            branches   (B, T, K, D)
    h               what the encoder reads                h          (B, T, D), in D (B, T, K D)
    f, e            features (the code)                   f          (B, T, F)
    g(f), h_hat     reconstruction                        x_hat      (B, T, D)
    r_i, r_k        dilation rates                        rates      K of them
    B sequences, T tokens, D model width, F features, K branches; "scored" tokens are those with
    mask = True. Equations are numbered A.1 ... A.6 and D.1 ... D.4 after their paper.

Paper -> code
    Eq. A.1         MTSAE.encode                      sequences of activations -> of codes
    Eq. A.3         MTSAE.temporal, merge_branches    dilated convolutions + residual, averaged
    Sec. A.4.1      MaskedBatchNorm                   batch normalisation after the temporal stage
    Eq. A.4, D.3    MTSAE.code                        ReLU encoder
    Eq. A.5         MTSAE.decode, normalize_decoder   linear decoder, unit-norm rows
    Eq. A.2, A.6    losses, NeighbourCosine           reconstruction + sparsity - coherence
    Sec. A.4.3      resample, lr_factor               neuron resampling, warm-up
    Sec. A.4.4      fill_masked, MTSAE.pad            circular and replication padding
    Eq. D.2         MTSAE.temporal, MTSAE.branches    branches, each with its own LayerNorm
    Eq. D.1, D.4    losses, Separation                norm + sparsity + separation of the branches
    Sec. D.4, D.5   lr_factor, monitor                schedule; gradient and branch statistics
    Abstract D      common.unlearning                 features suppressed inside the language model

What the papers leave open, and how it is settled here
    AMBIGUOUS A1    A: "batch normalization" after the residual: of each branch or of their average?
                    Code: of the average. --batch_norm average | branch | off.
    AMBIGUOUS A2    Norms and cosines without an axis. Code: squared error and norm over D, L1 over
                    F, cosine per pair of neighbours; each averaged over tokens (pairs). Eq. A.2
                    adds and A.6 subtracts the coherence term; A.2 has the sign inside L_temporal.
    AMBIGUOUS A3    D: "cosine learning rate warmup over 1000 steps". Code: linear warm-up, then a
                    cosine to 0 at the last step. --schedule constant | cosine | cosine-warmup
                    (the warm-up itself cosine-shaped, then constant).
    AMBIGUOUS A4    D: batch of 2048. Code: tokens (16 sequences), which alone gives the reported 4
                    steps from 10,000 tokens. Sequences: --batch_size 2048.
    AMBIGUOUS A5    D: Table 1's deviations (0.09 ... 0.08) cannot be those of z_k, which LayerNorm
                    sets to 1. Code: statistics of the convolutions before it, in raw units.
    UNSPECIFIED U1  A: kernel size. Code: 3, as in D. Neither says how the kernels start nor whether
                    they have a bias. Code: uniform in +-0.1 about the identity (in A that is the
                    residual; in D the tap at t gets 1), so that a token starts as itself; no bias
                    (the normalisation after it has one). --conv_init 0.577 is PyTorch's range:
                    neighbours start as noise, and training first has to push them out.
    UNSPECIFIED U2  A: what resampled neurons become. Code: W_dec row = direction of the sampled
                    token, W_enc column = direction of what the encoder read there, 0.2 times the
                    mean norm of the columns of live neurons, b_enc = 0 (Bricken et al. 2023).
                    Tokens are drawn with probability proportional to their squared error in the
                    current batch.
    UNSPECIFIED U3  A: weight decay, number of steps. Code: 0 and 4000.
    UNSPECIFIED U4  A: the loss weights of Run 1 (adjusted later). Code: reconstruction 1, not 2.
    UNSPECIFIED U5  D: what decays. Code: every parameter (AdamW's default), decoder rows too, which
                    are renormalised after it.
    UNSPECIFIED U6  How the encoder starts. Code: the decoder's transpose, in D a K-th for a branch.
    UNSPECIFIED U7  What a convolution reads at tokens that do not count. Code: the mean activation;
                    behind the last scored token, the last scored activation (A's replication).
    DEVIATION D1    Activations are divided by one scalar so that their mean norm is sqrt(D), and
                    attention-sink tokens are masked: see tsae.py. In A their mean is subtracted
                    first, which batch norm would do (exactly: it changes no output); not in D,
                    where LayerNorm stands behind the convolutions. --center, --no-center.
    DEVIATION D2    The gradient's component along each decoder row is removed, as in tsae.py.
    DEVIATION D3    D: 10,000 tokens are 4 steps, the "early termination" of Sec. 6.1. Code:
                    10,000,000.
    DEVIATION D4    Batch-norm statistics cover one forward pass: with --micro_batch, that.

Circular padding reads later tokens and joins the last token to the first. Spliced into the language
model, such a code can leak the answer: --padding causal reads t-2r, t-r, t (an option of ours).
Neither encoder subtracts the trained b_dec, as tsae.py's does (Eq. A.4, D.3): that alone makes the
first hundreds of steps slower than the control's, whatever the convolutions do.
Cost: the gradient of the kernels needs a sixth matrix product (a standard SAE has five), in D the
encoder has K D inputs: 6/5 and (3 K + 3)/5 of the control's arithmetic.

Does not include: branches stacked on each other, which would reach further; D's "adaptive dilation
rates" (future work).
"""
import math
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
    variant: str = "extraction"     # extraction (paper A) or unlearning (paper D)
    model: str = "auto"             # language model: auto, synthetic, or any causal LM (A: gemma-2-2b; D: pythia-70m)
    layer: str = "19"               # block whose output is read; 5,12,19 trains one SAE each (A: 19; D: 3)
    data: str = "auto"              # text: auto, pile, shakespeare, bundled, or a path (Sec. A.5.1, D.5: the Pile)
    tokens: int = 10_000_000        # tokens of text harvested (A: not given; D: 10,000, see D3)
    heldout_tokens: int = 131_072   # held-out tokens for the evaluation (not given)
    T: int = 128                    # tokens per sequence (Sec. A.4.4, D.5)
    expansion: int = 1              # F / D (Eq. A.1: k = d)
    activation: str = "relu"        # relu (with L1) or topk (then no L1)   ABLATION
    k: int = 32                     # active features per token with topk (ours)
    # temporal stage
    rates: str = "1,4,16"           # dilation rates, one branch each (Eq. A.3; Eq. D.2: 1,2,4,8)   ABLATION
    padding: str = "circular"       # circular (Sec. A.4.4, D.4) or causal (ours)   ABLATION
    conv_init: float = 0.1          # kernels start uniform in +- this about the identity (U1)   ABLATION
    batch_norm: str = "average"     # paper A: average, branch, off (A1)   ABLATION
    bn_momentum: float = 0.1        # of the running statistics (PyTorch's; not given)
    center: bool = True             # subtract the mean activation first (D1; D: no)   ABLATION
    # losses
    recon: str = "squared"          # squared error (Eq. A.6) or its root, norm (Eq. D.4)   ABLATION
    recon_reduction: str = "sum"    # squared error summed or averaged over D (A2; mean collapses)   ABLATION
    recon_weight: float = 2.0       # reconstruction (Eq. A.2; Eq. D.4: 1; U4)   ABLATION
    l1: float = 0.04                # sparsity (Eq. A.2, D.4)
    coherence: float = 0.15         # paper A: cosine of neighbouring codes (Eq. A.2)   ABLATION
    separation: float = 0.1         # paper D: lambda_2, cosine between branches (Eq. D.4)   ABLATION
    # schedule
    steps: int = 4000               # optimiser steps; 0 = one pass over the tokens (U3)
    batch_size: int = 125           # sequences per step (Sec. A.4.4; D: 2048 tokens, A4)
    micro_batch: int = 0            # sequences per forward pass; 0 = the whole batch (ours)
    lr: float = 3e-4                # AdamW (Sec. A.4.3, D.5)
    weight_decay: float = 0.0       # AdamW, on every parameter (A: not given, U3; Sec. D.5: 0.01, U5)
    lr_warmup: int = 1000           # steps of learning-rate warm-up (Sec. A.4.3, D.4)
    schedule: str = "constant"      # after the warm-up: constant (A), cosine (D) or cosine-warmup (A3)
    resample_every: int = 1000      # steps between resamplings; 0 = off (Sec. A.4.3; not in D)   ABLATION
    dead_after: int = 500           # inactive for more steps than this = dead (Sec. A.4.3)
    # machine and run
    seed: int = 42                  # weights and order of the data (Sec. A.5.1; not given in D)
    device: str = "auto"            # auto, cpu or cuda
    dtype: str = "auto"             # auto, float32 or bfloat16: matrix products only (A: bfloat16; D: float32)
    compile: bool = False           # torch.compile of the losses: needs a C++ compiler (CPU) or Triton (GPU)
    preset: str = "auto"            # paper, laptop, or auto: laptop on a CPU
    lm_batch: int = 32              # sequences per language-model pass (Sec. A.5.1, D.5)
    buffer: int = 2048              # sequences harvested and shuffled at a time (Sec. A.5.1, D.5)
    cache: str = "cache"            # folder for harvested activations; none = keep nothing
    out: str = "auto"               # run folder; auto = runs/<script>-<variant>-<model>-L<layer>-s<seed>
    resume: str = ""                # run folder to continue exactly where it stopped
    overwrite: bool = False         # replace a finished run
    run: str = ""                   # with --eval: a finished run to evaluate again
    eval: str = "core,temporal"     # also: reconstruction, zero, probing, unlearning, features, none
    export: str = ""                # write the SAE for saelens or dictionary_learning
    steer: str = ""                 # edit features in generation, such as 123:+8,77:off (with --prompt)
    prompt: str = ""                # text that --steer continues, with and without the edit
    log_every: int = 10             # steps between lines of log.jsonl (Sec. D.5: 10)
    save_every: int = 500           # steps between checkpoints


# what a variant sets where the user set nothing; Config's own defaults are paper A's
VARIANTS = {"extraction": {}, "unlearning": dict(
    # DEVIATION D3: tokens stay at 10,000,000
    model="EleutherAI/pythia-70m", layer="3", rates="1,2,4,8", center=False, recon="norm",
    recon_weight=1.0, batch_size=16, weight_decay=0.01, schedule="cosine", resample_every=0,
    dtype="float32")}
# sizes and step counts only
_SIZES = dict(tokens=131_072, heldout_tokens=16_384, steps=3000, batch_size=4, lm_batch=16)
LAPTOP = {"extraction": _SIZES, "unlearning": dict(_SIZES, model="auto", layer="19"),
          "extraction synthetic": dict(l1=0.4)}   # known features are too few for 0.04 to separate
CHOICES = dict(variant=tuple(VARIANTS), activation=("relu", "topk"), padding=("circular", "causal"),
               batch_norm=("average", "branch", "off"), recon=("squared", "norm"),
               recon_reduction=("sum", "mean"), schedule=("constant", "cosine", "cosine-warmup"))
PAPER = {  # metric -> what the paper reports
    "extraction": {
        "core.inactive": "0.50 (Sec. 6.1)", "mixing.reach": "128 (abstract)",
        "resampling.features": "0.15 (Sec. 6.3)"},
    "unlearning": {
        "core.EV": "-0.785 (Sec. 6.2)", "core.MSE": "47.25 (as 'L2 loss')", "core.L0": "0.0",
        "core.L1": "0.0", "core.relative_reconstruction_bias": "-1.0",
        "core.kl_div_score": "-0.5279", "core.ce_loss_score": "-0.5855",
        "steps": "4 (5 of 5 seeds, Sec. 6.1)",
        "branches.mean_1": "0.0012 (Table 1)", "branches.std_1": "0.0891 (Table 1)",
        "branches.mean_2": "0.0009", "branches.std_2": "0.0867", "branches.mean_4": "0.0007",
        "branches.std_4": "0.0842", "branches.mean_8": "0.0005", "branches.std_8": "0.0819"}}


def variant(cfg):
    """Name of the run's variant, used for the run folder."""
    return cfg.variant + ("" if cfg.activation == "relu" else f"-topk{cfg.k}")


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class MTSAE(nn.Module):
    """Sparse autoencoder behind dilated depth-wise convolutions (papers A and D).

    Encodes sequences only, since positions mix. Paper A's batch norm uses the batch in train() mode
    and running statistics in eval() mode, as any batch norm does.
    """

    def __init__(self, D, cfg):
        super().__init__()
        n_features = D * cfg.expansion
        assert cfg.activation != "topk" or cfg.k <= n_features, f"k={cfg.k} exceeds F={n_features}"
        self.cfg = cfg
        self.rates = parse_rates(cfg.rates)
        self.causal = cfg.padding == "causal"                             # else a spliced CE leaks
        K, R = len(self.rates), max(self.rates)
        self.extra = 2 * R                                                # tokens that pad() adds
        self.origin = 2 * R if self.causal else R                         # those before token 0
        taps = (-2, -1, 0) if self.causal else (-1, 0, 1)
        # where the K x 3 taps of token 0 stand in a padded sequence
        self.starts = [[self.origin + r * tap for tap in taps] for r in self.rates]
        copies = K if cfg.variant == "unlearning" else 1                  # encoder inputs over D
        W = torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights"))
        W = W / W.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        # UNSPECIFIED U6
        self.W_enc = nn.Parameter((W.repeat(1, copies) / copies).t())     # (D, F) or (K D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        self.register_buffer("mean", torch.zeros(D))                      # in units of scale
        # UNSPECIFIED U1
        uniform = torch.rand(K, 3, D, generator=common.generator(cfg.seed, "kernels")) * 2 - 1
        kernels = cfg.conv_init * uniform                                 # (K, 3, D)
        if cfg.variant == "unlearning":                                   # no residual: the token
            kernels[:, taps.index(0)] += 1.0
        self.kernels = nn.Parameter(kernels)
        if cfg.variant == "unlearning":
            self.ln_weight = nn.Parameter(torch.ones(K, D))               # one LayerNorm a branch
            self.ln_bias = nn.Parameter(torch.zeros(K, D))
        elif cfg.batch_norm != "off":
            shape = (K, D) if cfg.batch_norm == "branch" else (D,)        # AMBIGUOUS A1
            self.bn = MaskedBatchNorm(shape, cfg.bn_momentum)
        # per feature: steps since it was last active, and how often it was resampled
        self.register_buffer("inactive", torch.zeros(n_features, dtype=torch.int64))
        self.register_buffer("resampled", torch.zeros(n_features, dtype=torch.int64))

    def encode(self, x, mask=None):
        """Raw activations (B, T, D), mask (B, T) -> features (B, T, F); no mask: all count."""
        # Eq. A.1 (Sec. 3.1): f_theta: R^{T x d} -> R^{T x k}, k = d
        return common.dense_code(*self.code(self.temporal(x, mask)), len(self.b_enc))

    def decode(self, f, index=None):
        """Features (..., F), or a list of the active ones (see code) -> raw (..., D); linear."""
        # Eq. A.5 (Sec. 4.2): g(f) = W_dec f + b_dec, ||W_dec,i||_2 = 1; the same in D (Sec. 4)
        x_hat = f @ self.W_dec if index is None else common.decode_topk(f, index, self.W_dec)
        return (x_hat + self.b_dec) * self.scale

    def forward(self, x, mask=None):
        """Raw activations (B, T, D) -> reconstruction (B, T, D) and features (B, T, F)."""
        f, index = self.code(self.temporal(x, mask))
        return self.decode(f, index), common.dense_code(f, index, len(self.b_enc))

    def code(self, h):
        """What the encoder reads (..., D or K D) -> f (..., F), None; or as tsae.py:TSAE.code."""
        # Eq. A.4 (Sec. 4.2): f = ReLU(W_enc h + b_enc)
        # Eq. D.3 (Sec. 4): e = ReLU(W_enc [z_1; ...; z_K] + b_enc)
        if common.gather_pays(self.cfg, len(self.b_enc), h.device):
            values, index = common.encode_topk(h, self.W_enc, self.b_enc, self.cfg.k)
            return F.relu(values), index
        pre = h @ self.W_enc + self.b_enc                                 # (..., F)
        return (topk(pre, self.cfg.k) if self.cfg.activation == "topk" else F.relu(pre)), None

    def temporal(self, x, mask=None):
        """Raw activations (B, T, D) -> what the encoder reads (B, T, D or K D), fp32."""
        x = self.pad(x, mask)                                             # (B, T + 2R, D)
        if self.cfg.variant == "unlearning":
            # Eq. D.2 (Sec. 4): z_k = LayerNorm(C_{r_k}(h))
            z = F.layer_norm(self.branches(x), x.shape[-1:])              # (B, T, K, D)
            return torch.addcmul(self.ln_bias, z, self.ln_weight).flatten(2)
        # Eq. A.3 (Sec. 4.1): h_i = Conv_i(A, r_i) + A, r_i in {1, 4, 16}; Sec. 4.2: h = mean_i h_i
        if self.cfg.batch_norm == "branch":                               # AMBIGUOUS A1
            token = x[:, self.origin:][:, :x.shape[1] - self.extra]       # (B, T, D)
            return self.bn(self.branches(x) + token[:, :, None], mask).mean(2)
        weights, starts = merge_branches(self.kernels, self.starts, self.origin)
        h = DilatedFilter.apply(x, weights, starts, self.extra)           # (B, T, D)
        return h if self.cfg.batch_norm == "off" else self.bn(h, mask)

    def branches(self, x):
        """The K convolutions C_{r_k} of padded sequences: (B, T + 2R, D) -> (B, T, K, D)."""
        each = zip(self.kernels, self.starts)
        return torch.stack([DilatedFilter.apply(x, w, starts, self.extra) for w, starts in each], 2)

    def pad(self, x, mask=None):
        """Raw activations (B, T, D) -> scaled, filled, padded by 2R tokens (B, T + 2R, D), fp32."""
        if x.dim() != 3:
            raise ValueError(f"an MTSAE encodes sequences (B, T, D), since positions mix; not "
                             f"{tuple(x.shape)}")
        x = x.float() / self.scale - self.mean                            # fp32: filters and norms
        if mask is not None:
            x = fill_masked(x, mask)
        T, R = x.shape[1], max(self.rates)
        if self.causal:
            x = F.pad(x, (0, 0, 2 * R, 0))                                # zero is the mean
        else:
            # Sec. A.4.4: circular padding of T = 128 tokens; shorter sequences repeat their last
            # token up to that length first
            index = torch.arange(-R, T + R, device=x.device) % max(T, self.cfg.T)
            x = x.index_select(1, index.clamp(max=T - 1))
        return x if self.cfg.center else x + self.mean                    # DEVIATION D1


def parse_rates(text):
    """'1,4,16' -> [1, 4, 16]."""
    try:
        rates = [int(part) for part in text.split(",")]
    except ValueError:
        rates = [0]
    if min(rates) < 1:
        raise common.UserError(f"--rates takes dilation rates from 1 on, as 1,4,16; not {text!r}.")
    return rates


def fill_masked(x, mask):
    """What the convolutions read at tokens that do not count: centred x (B, T, D) -> (B, T, D).

    0, the mean activation, between scored tokens (attention sinks, special tokens); behind the last
    scored token (padding of a short sequence) that token again: replication padding (Sec. A.4.4).
    """
    # UNSPECIFIED U7
    T = x.shape[1]
    position = torch.arange(T, device=x.device)
    last = (mask * (position + 1)).amax(1, keepdim=True) - 1              # (B, 1), -1 for none
    source = torch.minimum(position, last.clamp(min=0))                   # (B, T)
    x = x.flatten(0, 1)[source + T * torch.arange(len(x), device=x.device)[:, None]]
    return torch.where(mask.gather(1, source)[..., None], x, 0.0)


def merge_branches(kernels, starts, origin):
    """mean_i (Conv_i + identity) as one filter: kernels (K, 3, D) -> weights (J, D), J starts.

    Convolutions are linear, so their mean and the residual are one filter. With rates 1, 4, 16 it
    has J = 7 taps, at -16, -4, -1, 0, 1, 4, 16, and one pass over the activations replaces four.
    """
    union = sorted({start for branch in starts for start in branch} | {origin})
    index = [union.index(start) for branch in starts for start in branch]
    index = torch.tensor(index, device=kernels.device)                    # (3 K,)
    weights = torch.zeros(len(union), kernels.shape[-1], device=kernels.device)
    weights[union.index(origin)] = 1.0                                    # the residual
    return weights.index_add(0, index, kernels.flatten(0, 1) / len(starts)), union


class DilatedFilter(torch.autograd.Function):
    """y_t = sum_j w_j * x_{t + start_j}, per channel: x (B, T + extra, D), w (J, D) -> (B, T, D).

    Shifted slices of x, added up in place. On a CPU with J = 7 forward and backward take 4 ms where
    one grouped convolution takes 36 and autograd through the same slices 11 (B = 16, D = 576).
    """

    @staticmethod
    def forward(ctx, x, w, starts, extra):
        ctx.save_for_backward(x, w)
        ctx.starts, T = starts, x.shape[1] - extra
        y = x[:, starts[0]:starts[0] + T] * w[0]
        for start, tap in zip(starts[1:], w[1:]):
            y.addcmul_(x[:, start:start + T], tap)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        slices = [slice(start, start + grad.shape[1]) for start in ctx.starts]
        # tokens, then sequences: 5 times as fast as both in one sum
        grad_w = torch.stack([(grad * x[:, part]).sum(1).sum(0) for part in slices])
        grad_x = None
        if ctx.needs_input_grad[0]:                                       # not in training
            grad_x = torch.zeros_like(x)
            for part, tap in zip(slices, w):
                grad_x[:, part].addcmul_(grad, tap)
        return grad_x, grad_w, None, None


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over the scored tokens of all processes; shape (D,) or (K, D). fp32."""

    def __init__(self, shape, momentum):
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, h, mask=None):
        """h (B, T, *shape), mask (B, T) -> the same shape, standardised by channel, affine."""
        mean, var = self.running_mean, self.running_var
        if self.training:                                                 # DEVIATION D4
            m = h.new_ones(h.shape[:2]) if mask is None else mask.float()
            m = m.reshape(1, -1)                                          # (1, B T)
            n = common.total(m.sum())
            first, second = Moments.apply(h.reshape(m.shape[1], -1), m).view(2, *mean.shape) / n
            mean, var = first, second - first.square()
            with torch.no_grad():                                         # a plain mean, then EMA
                self.updates.add_(1)
                rate = (1 / self.updates).clamp(min=self.momentum)
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(var, rate)
        # Sec. A.4.1: "batch normalization": gamma (h - mean) / sqrt(var + 1e-5) + beta
        gain = self.weight * (var + 1e-5).rsqrt()
        return torch.addcmul(self.bias - mean * gain, h, gain)


class Moments(torch.autograd.Function):
    """Masked sums over tokens and processes of h and of h^2: h (N, C), m (1, N) -> (2, C)."""

    @staticmethod
    def forward(ctx, h, m):
        ctx.save_for_backward(h, m)
        with torch.autocast(h.device.type, enabled=False):                # fp32: sums over tokens
            return common.total(torch.cat([m @ h, m @ h.square()]))

    @staticmethod
    def backward(ctx, grad):
        h, m = ctx.saved_tensors
        first, second = common.total(grad.contiguous())                   # used in all processes
        return torch.addcmul(first, h, 2 * second).mul_(m.t()), None


# SAME AS tsae.py:topk
def topk(pre, k):
    """Keep the k largest entries of the last axis, set to zero where negative; the rest is 0."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, F.relu(values))


# SAME AS tsae.py:normalize_decoder
@torch.no_grad()
def normalize_decoder(sae):
    """Rows of W_dec back to norm 1."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


# SAME AS tsae.py:remove_parallel_gradient
@torch.no_grad()
def remove_parallel_gradient(sae):
    """Take from each decoder row's gradient its component along the row (it would be undone)."""
    W, grad = sae.W_dec, sae.W_dec.grad
    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


# DIFFERS FROM tsae.py:losses - coherence or separation instead of lags; n also counts pairs
def losses(sae, x, mask, n, step, cfg):
    """Terms of Eq. A.6 or D.4, already weighted; their sum is the loss. fp32 throughout.

    x (B, T, D) raw, mask (B, T), n (2,) numbers of scored tokens and of scored pairs of neighbours
    in the whole (global) batch. Reductions: reconstruction sums over D (norm: the root of that sum,
    token by token), sparsity sums over F, separation averages over ordered pairs of branches; these
    three are averaged over scored tokens. Coherence: cosine over F, averaged over scored pairs.
    """
    # AMBIGUOUS A2
    tokens, pairs = n[0], n[1].clamp(min=1)
    h = sae.temporal(x, mask)                                             # (B, T, D or K D)
    f, index = sae.code(h)   # f (B, T, F); (B, T, k) where index is given
    # (B, T, D), mean norm of x: sqrt(D)
    error = (sae.decode(f, index).float() - x.float()) / sae.scale * mask[..., None]
    f = f.float()
    square = error.pow(2).sum(-1)                                         # (B, T), 0 where masked
    with torch.autocast(f.device.type, enabled=False):                    # fp32: sums over tokens
        fires = common.feature_sums(f.detach(), index, mask, len(sae.b_enc))   # (F,), f >= 0
    # logged, not part of the loss; fires goes to resampling
    stats = {"error": square.sum() / tokens, "fires": fires,
             "active": (f.detach().sign().sum(-1) * mask).sum() / tokens}
    if cfg.recon_reduction == "mean":                                     # ABLATION: the collapse
        square = square / x.shape[-1]
    # Eq. A.6: 2.0 ||A - g(f)||_2^2   Eq. D.1, D.4: ||h - h_hat||_2, the norm
    recon = square if cfg.recon == "squared" else square.clamp(min=1e-12).sqrt() * mask
    terms = {"recon": cfg.recon_weight * recon.sum() / tokens}
    if cfg.activation == "relu":
        # Eq. A.6: + 0.04 ||f||_1   Eq. D.4: + lambda_1 ||e||_1
        terms["l1"] = cfg.l1 * (f.sum(-1) * mask).sum() / tokens   # f >= 0: the L1 norm is the sum
    if cfg.variant == "extraction" and cfg.coherence:
        # Eq. A.2, A.6: - 0.15 cos(f_t, f_{t+1}); A.2 adds L_temporal = -cos
        cosine = neighbour_cosine(f, index, neighbours(mask), len(sae.b_enc))
        terms["coherence"] = -cfg.coherence * cosine / pairs
    if cfg.variant == "unlearning" and cfg.separation:
        # Eq. D.1, D.4: + lambda_2 1/(K(K-1)) sum_{i != j} max(0, cos(z_i, z_j))
        z = h.unflatten(2, (len(sae.rates), -1))                          # (B, T, K, D)
        terms["separation"] = cfg.separation * Separation.apply(z, mask) / tokens
    return terms, stats   # EXERCISE 9


def neighbour_cosine(f, index, pair, n_features):
    """Sum over scored pairs of cos(f_t, f_{t+1}) -> (): f (B, T, F), or (B, T, k) with its index.

    Of two lists the cosine needs only the features that both have: k^2 comparisons a pair.
    """
    if index is None or index.shape[-1] ** 2 > n_features:
        return NeighbourCosine.apply(common.dense_code(f, index, n_features), pair)
    with torch.autocast(f.device.type, enabled=False):                    # fp32, as the dense one
        same = (index[:, 1:, :, None] == index[:, :-1, None, :]).float()  # (B, T - 1, k, k)
        before = (same @ f[:, :-1, :, None])[..., 0]   # what was on at t, in the order of t + 1
        square = f.square().sum(-1)                                       # (B, T)
        inverse = torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)
        return ((f[:, 1:] * before).sum(-1) * inverse[:, 1:] * inverse[:, :-1] * pair).sum()


def neighbours(mask):   # EXERCISE 8
    """Pairs (t, t+1) of scored tokens: (B, T) -> (B, T - 1)."""
    return mask[:, 1:] & mask[:, :-1]


class NeighbourCosine(torch.autograd.Function):
    """Sum over scored pairs of cos(f_t, f_{t+1}): f (B, T, F), pair (B, T - 1) -> ().

    The gradient in closed form, c_t the cosine of pair (t, t+1) and a_t = 1 / (|f_t| |f_{t+1}|):
        d/df_t = a_{t-1} f_{t-1} + a_t f_{t+1} - (c_{t-1} + c_t) / |f_t|^2 f_t,
    3 passes over the features, 5 times as fast as autograd through F.cosine_similarity. A token
    without active features has cosine 0 and no gradient.
    """

    @staticmethod
    def forward(ctx, f, pair):
        norm = torch.linalg.vector_norm(f, dim=-1)                        # (B, T)
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        a = inverse[:, 1:] * inverse[:, :-1] * pair                       # (B, T - 1)
        cosine = a * torch.linalg.vecdot(f[:, 1:], f[:, :-1])
        both = F.pad(cosine, (1, 0)) + F.pad(cosine, (0, 1))              # (B, T)
        ctx.save_for_backward(f, a[..., None], (both * inverse.square())[..., None])
        return cosine.sum()

    @staticmethod
    def backward(ctx, grad):
        f, a, own = ctx.saved_tensors
        out = f * (-grad * own)
        out[:, 1:].addcmul_(f[:, :-1], grad * a)
        out[:, :-1].addcmul_(f[:, 1:], grad * a)
        return out, None


class Separation(torch.autograd.Function):
    """Mean over i != j of max(0, cos(z_i, z_j)), summed over scored tokens: z (B, T, K, D) -> ().

    All pairs from one K x K Gram matrix a token. The gradient is another K x K matrix times z: off
    the diagonal 2 / (|z_i| |z_j|) where the cosine is positive, on it minus the sum over j of
    2 max(0, cos(z_i, z_j)) / |z_i|^2.
    """

    @staticmethod
    def forward(ctx, z, mask):
        K = z.shape[2]
        with torch.autocast(z.device.type, enabled=False):                # fp32
            gram = z @ z.transpose(2, 3)                                  # (B, T, K, K)
        inverse = gram.diagonal(dim1=2, dim2=3).clamp(min=1e-12).rsqrt()  # 1 / |z_k|, (B, T, K)
        weight = mask[..., None, None] * (1 - torch.eye(K, device=z.device)) / max(1, K * (K - 1))
        scale = inverse[..., None] * inverse[..., None, :]
        cosine = F.relu(gram * scale) * weight
        own = cosine.sum(-1) * inverse.square()                           # (B, T, K)
        ctx.save_for_backward(z, 2 * ((gram > 0) * scale * weight - torch.diag_embed(own)))
        return cosine.sum()

    @staticmethod
    def backward(ctx, grad):
        z, slope = ctx.saved_tensors
        return (grad * slope) @ z, None


# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step
# ---------------------------------------------------------------------------------------------


# DIFFERS FROM tsae.py:lr_factor - paper D's cosine needs the last step
def lr_factor(step, cfg, total):
    """Learning-rate multiplier: warm-up, then 1 (Sec. A.4.3) or a cosine to 0 at `total` (D.4)."""
    warm = min(1.0, (step + 1) / max(1, cfg.lr_warmup))
    if cfg.schedule == "cosine-warmup":                                   # AMBIGUOUS A3
        return 0.5 * (1 - math.cos(math.pi * warm))
    if cfg.schedule == "cosine" and step >= cfg.lr_warmup:
        done = (step - cfg.lr_warmup) / max(1, total - cfg.lr_warmup)
        return 0.5 * (1 + math.cos(math.pi * done))
    return warm


def resample_due(step, cfg):
    """Sec. A.4.3: at step 1000, 2000, ...; a run of 4000 steps does not end on a resampling."""
    return cfg.resample_every > 0 and step > 0 and step % cfg.resample_every == 0


@torch.no_grad()
def resample(sae, opt, batch, step, cfg):
    """Sec. A.4.3: neurons silent for more than 500 steps restart from inputs of high error.

    The draw is over the whole batch, the same in every process and for any number of them. AdamW's
    moments of these rows and columns go back to 0.
    """
    # UNSPECIFIED U2
    dead = (sae.inactive > cfg.dead_after).nonzero()[:, 0]
    if len(dead) == 0:
        return
    sae.eval()                                                            # running statistics
    seen, errors = [], []
    for x, mask in batch:
        h = sae.temporal(x, mask)
        target = x.float() / sae.scale
        error = sae.decode(*sae.code(h)).float() / sae.scale - target
        errors.append(error.square().sum(-1) * mask)                      # (b, T)
        seen.append(torch.cat([target - sae.b_dec, h], -1))               # (b, T, D + D or K D)
    sae.train()
    error, seen = torch.cat(errors), torch.cat(seen)
    size, T, D = common.world(), error.shape[1], sae.b_dec.shape[0]
    # sequence i of the whole batch lies on process i % size
    weight = error.new_zeros(-(-cfg.batch_size // size), size, T)
    weight[:len(error), common.rank()] = error
    weight = common.total(weight).flatten()
    gen = common.generator(cfg.seed, f"resample{step}", weight.device)
    pick = torch.multinomial(weight, len(dead), replacement=len(dead) > int((weight > 0).sum()),
                             generator=gen)
    sequence, token = pick // T, pick % T
    mine = sequence % size == common.rank()
    new = seen.new_zeros(len(dead), seen.shape[-1])
    new[mine] = seen[sequence[mine] // size, token[mine]]
    new = common.total(new)
    alive = sae.inactive <= cfg.dead_after
    length = sae.W_enc[:, alive].norm(dim=0).mean() if alive.any() else 1.0
    sae.W_dec[dead] = F.normalize(new[:, :D], dim=1)
    sae.W_enc[:, dead] = 0.2 * length * F.normalize(new[:, D:], dim=1).t()
    sae.b_enc[dead] = 0.0
    for p, rows in ((sae.W_enc, (slice(None), dead)), (sae.b_enc, dead), (sae.W_dec, dead)):
        for moment in ("exp_avg", "exp_avg_sq"):
            opt.state[p][moment][rows] = 0.0
    sae.inactive[dead] = 0
    sae.resampled[dead] += 1


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). Returns the evaluation.

    Writes the run folder (common.Run): config, log, checkpoints, weights, evaluation, figures.
    """
    sae = MTSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        sae.scale.fill_(acts.scale)                                       # DEVIATION D1
        sae.b_dec.copy_(acts.mean / acts.scale)
        sae.mean.copy_(sae.b_dec)
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999),
                            weight_decay=cfg.weight_decay, fused=True)    # UNSPECIFIED U3, U5
    run = common.Run(__file__, variant(cfg), cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch: micro-batches that together hold cfg.batch_size sequences
        batch = acts.batch(step)   # [(x (B, T, D), mask (B, T))]
        n = sum(torch.stack([mask.sum(), neighbours(mask).sum()]) for _, mask in batch)
        n = common.total(n)                                               # scored tokens and pairs
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg, run.total)
        opt.zero_grad()
        # 2. forward and losses   3. backward
        sums = {}
        for x, mask in batch:
            with acts.autocast():
                terms, stats = compute(sae, x, mask, n, step, cfg)
            sum(terms.values()).backward()
            common.accumulate(sums, terms, **stats)
        common.sum_gradients(sae)                                         # across processes
        fires = common.total(sums.pop("fires")) > 0                       # (F,)
        statistics = monitor(sae, batch, fires) if run.log_due(step) else {}
        # 4. constrain the gradient
        remove_parallel_gradient(sae)                                     # DEVIATION D2
        if step == 0:
            common.assert_gradients(sae, sums)
        # 5. step   6. renormalise
        opt.step()
        normalize_decoder(sae)
        # 7. bookkeeping: how long each neuron has been silent; the dead restart
        sae.inactive.add_(1).mul_(~fires)
        if resample_due(step, cfg):
            resample(sae, opt, batch, step, cfg)
        # ---------------------------------------------------------------------------------------
        run.log(step, sums, lr=opt.param_groups[0]["lr"], **statistics)
        run.save_if_due(step)

    results = run.evaluate(cfg.eval, PAPER[cfg.variant], extra=extra_metrics)
    return results


@torch.no_grad()
def monitor(sae, batch, fires):
    """Sec. D.5, on log steps: gradient norm, convolution statistics (Table 1), activation patterns.

    Returns grad_norm (of the whole loss, before the projection), conv_mean_r and conv_std_r of each
    branch, alive (share of the features active in this batch), resampled (share ever resampled).
    """
    out = {"grad_norm": nn.utils.get_total_norm([p.grad for p in sae.parameters()])}
    out.update({f"conv_{name}": value for name, value in branch_statistics(sae, batch).items()})
    return {**out, "alive": fires.float().mean(), "resampled": (sae.resampled > 0).float().mean()}


@torch.no_grad()
def branch_statistics(sae, batches, total=common.total):
    """Mean and deviation of each convolution's output over scored tokens and channels, raw."""
    # AMBIGUOUS A5
    sums = 0.0
    for x, mask in batches:
        y = (sae.branches(sae.pad(x, mask))[mask] * sae.scale).double()   # (n, K, D)
        ones = torch.ones_like(y)
        sums = sums + torch.stack([v.sum((0, 2)) for v in (y, y.square(), ones)])
    first, square, count = total(sums)                                    # (K,) each
    mean = first / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    both = {"mean": mean, "std": std}
    return {f"{name}_{r}": v for name in both for r, v in zip(sae.rates, both[name])}


@torch.no_grad()
def extra_metrics(sae, acts):
    """What the convolutions learnt, and how many neurons were resampled."""
    out = {"mixing": mixing(sae, acts),
           "resampling": {"features": (sae.resampled > 0).double().mean().item(),
                          "events": sae.resampled.sum().item()}}
    if sae.cfg.variant == "unlearning":
        here = branch_statistics(sae, acts.heldout(), torch.clone)        # one process evaluates
        out["branches"] = {name: value.item() for name, value in here.items()}
    return out


def mixing(sae, acts):   # EXERCISE 7
    """How far tokens reach, and with what weight.

    reach: the largest distance at which a change of one token changes a code, found by trying (the
    middle token of a held-out window). neighbours: share of the kernels' energy on other tokens.
    """
    x, _ = next(acts.heldout(1))
    middle = x.shape[1] // 2
    changed = x.clone()
    changed[:, middle] = -changed[:, middle]
    moved = (sae.encode(x) != sae.encode(changed)).any(-1)[0].nonzero()[:, 0]
    w = sae.kernels
    if sae.cfg.variant == "extraction":
        w, starts = merge_branches(sae.kernels, sae.starts, sae.origin)
        own = w[starts.index(sae.origin)].square().sum()
    else:
        own = w[:, 2 if sae.causal else 1].square().sum()
    reach = (moved - middle).abs().max().item() if len(moved) else 0
    return {"reach": reach, "neighbours": (1 - own / w.square().sum()).item()}


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, LAPTOP, CHOICES, MTSAE, train, argv, VARIANTS)


if __name__ == "__main__":
    raise SystemExit(main())
