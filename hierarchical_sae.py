"""Hierarchical temporal-aware sparse autoencoder and its four relatives (paper B).

Paper   "Temporal-Aware Sparse Autoencoders with Hierarchical Feature Routing for Language Model
        Interpretability", anonymous, under double-blind review (letter B in this project).
Run     python hierarchical_sae.py --layer 19                everything: the temporal-aware SAE
        python hierarchical_sae.py --layer 5,12,19           the paper's three layers, one LM pass
        python hierarchical_sae.py --variant hierarchical    also disentangled, adversarial,
                                                             self-aligning (Sec. 6.3)

The idea. Three things are wrong with coding each token alone in one flat dictionary: the code
cannot use the sentence, all features stand on one level, and features become near copies of each
other. So (1) two convolutions and a self-attention mix the tokens before the encoder, and losses
ask that neighbouring codes agree and that the next one can be predicted; (2) the dictionary is
cut into three levels, each coding what the levels below it left over, and a router decides how
loud each level is at this token; (3) a penalty pushes a feature away from its nearest neighbour
when their similarity jumps above a running margin, and when much gradient goes through it.
The paper reports that none of this moves its unlearning score from 0.0.

Notation (paper -> code)
    h_t in R^d      residual stream at token t            x          (B, T, D)
    z_t in R^k      features (also f_t)                   f          (B, T, F)
    f_local, f_temp token mixing before the encoder       local, attend
    g_phi           decoder                               decode
    c_psi           temporal consistency in [0, 1]        consistency_matrix, log_psi
    s_i, m_i        largest similarity, its margin        similarity, update_margin
    A_i             attribution of feature i              attribution
    B sequences, T tokens, D model width, F features, L levels (1 is the lowest), H attention heads;
    "scored" tokens are those with mask = True.

Paper -> code
    Sec. 3.2        HierarchicalSAE.decode, losses  the autoencoder and its first three terms
    Eq. 1           HierarchicalSAE.context         local and temporal parts put together
    Eq. 2, 9        HierarchicalSAE.attend          multi-head self-attention
    Eq. 10          HierarchicalSAE.local           two convolutions of kernel 3
    Sec. 1, 3.2     HierarchicalSAE.encode          three levels with causal routing
    Sec. 1          HierarchicalSAE.route           the router
    Sec. 1, 5.2     routing_loss                    entropy against degenerate routing
    Sec. 3.2        consistency_matrix              c_psi
    Sec. 3.2, 5.1   temporal_losses                 1 - c_psi, contrastive term, prediction
    Sec. 1, 5.1     HierarchicalSAE.predict         GRU: feature tracking, evolution prediction
    Eq. 3-5, 11-13  update_margin                   dynamic margin (printed twice in the paper)
    Eq. 6, 14       HierarchicalSAE.watch           attribution, from the backward pass
    Eq. 7, 15       adversarial_weight              lambda_adv
    Eq. 8, 16       losses, adversarial_loss        the total
    Sec. 5.2        update_monitor, monitor         EMA of feature statistics, routing entropy
    Sec. 6.1        level_metrics                   activation variance of each level

What the paper leaves open, and how it is settled here
    AMBIGUOUS A1    Eq. 1 feeds the convolutions into the attention, Sec. 5.3 calls the two
                    complementary. Code: h + f_temp(f_local(h)), Eq. 1 as a correction of h, so
                    that the code still holds token t. --compose literal (Eq. 1) | parallel.
    AMBIGUOUS A2    Feature statistics decay with 0.95 (Sec. 5.1) or 0.99 (Sec. 5.2). Code: 0.95
                    for the margins (--margin_decay), 0.99 for the log (--monitor_decay).
    AMBIGUOUS A3    "causal routing" beside an attention without a mask. Code: the router reads
                    token t only, level l only the levels below it; convolutions and attention see
                    both sides, as printed (spliced into the LM that is leakage). --causal masks.
    UNSPECIFIED U1  L_adv is never written down. Code, summed over features i:
                        max(0, s_i - m_i)^2 + w a_i max(0, s_i)^2 if A_i is above the percentile,
                    a dynamic margin for all, orthogonality for the few; a_i = A_i / max A
                    ("proportional to attribution strength"); w = 1, or 10 in the disentangled
                    variant, not tuned; m_i and a_i carry no gradient. Self-aligning (no
                    attribution) uses lambda_adv's floor, 0.1.
    UNSPECIFIED U2  A_spurious. Code: mean of s_i over the features above the percentile, weighted
                    by A_i. 0.5: attribution sits on features 60 degrees from their neighbour.
    UNSPECIFIED U3  Which L and which tokens A_i takes. Code: norm over the batch's scored tokens
                    of the gradient of Eq. 16 at the code, out of the *previous* step's backward
                    pass (no second pass; L_adv does not depend on z, so nothing is circular).
    UNSPECIFIED U4  c_psi. Code: cosine of the codes, each feature times a learned positive weight;
                    in [0, 1] because codes are >= 0. --consistency cosine: no weights. The weights
                    can lower 1 - c_psi without any change of the code, by moving to always-on
                    features.
    UNSPECIFIED U5  The contrastive pairs. Code: InfoNCE on c_psi / 2.0; z_{t+1} is z_t's positive,
                    the window's other scored tokens are negatives (against the constant code that
                    1 - c_psi alone would reward). With tau = 2 it can gain half a nat at most.
    UNSPECIFIED U6  GRU and contrastive term are missing from Eq. 8. Code: in L_temp, weight 1.
    UNSPECIFIED U7  What the GRU reads and predicts. Code: the features' image z_t W_dec (width D,
                    "matching the input size"; width F is out of reach) -> that of z_{t+1}, which
                    gets no gradient; squared error averaged over D. --gru_divisor narrows it.
    UNSPECIFIED U8  Nothing makes an attention's output sparse. Code: a ReLU encoder follows it.
    UNSPECIFIED U9  The levels. Code: thirds of F; level l codes what those below it have not
                    reconstructed; its code is multiplied by L times its softmax gate (uniform: 1).
    UNSPECIFIED U10 The entropy regulariser. Code: log L minus the entropy of a window's mean gate:
                    a token may choose, a window may not starve a level. Weight 1, not tuned.
    UNSPECIFIED U11 Similarity of features. Code: cosine of decoder rows.
    UNSPECIFIED U12 Which variant has which part: the table VARIANTS, read off Sec. 6.3.
    UNSPECIFIED U13 k of R^k (Code: F = D, --expansion), position embeddings (Code: none), the
                    reduction of the squared error (Code: summed over D; --recon_reduction mean).
    UNSPECIFIED U14 Initial values. Code: W_enc = W_dec^T, random rows; b_enc = 0; b_dec the mean
                    activation, as in tsae.py.
    DEVIATION D1    Activations are divided by one scalar so that their mean norm is sqrt(D), and
                    attention-sink tokens are masked, as in all four scripts.
    DEVIATION D2    Decoder rows have norm 1, else long rows escape the L1, and their gradient loses
                    its part along the row. The paper names plain Adam and neither of the two.
    DEVIATION D3    s_i is computed for at most --sim_rows random features a step (all up to F =
                    2304), the sum scaled up: all pairs of 36,864 would cost more than the step.

Predict before you run. A margin mu + 2 sigma follows s_i. Under a steady drift sigma grows to the
lag of mu, so s_i stays *below* its margin; under pure noise about 2 % of the features exceed it
(alpha = 0.95). The margin answers to jumps only, whatever its decay: compare Sec. 6.2's "no
significant impact".

Ablations (Sec. 6.2): --no-conv | --no-adapt, --margin_decay 0.9 | --percentile 0.75 | --levels 1.
Cost. In operations over those of a standard SAE step at F = D (10 D^2 a token): convolutions 3.6,
attention 2.4, GRU with its prediction 7.8, whatever F is; --checkpointing adds about a third to
these (a second forward pass). Step times over the standard SAE's (results/throughput.json: two CPU
cores, fp32, D = 576, 16 x 128 tokens, laptop preset): hierarchical 2.2 at F = D and 2.0 at F = 4 D,
temporal 10.2 and 4.1.

Does not include: feature pruning and cross-layer constraints, which the paper names as future work.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    variant: str = "temporal"       # which parts, see VARIANTS (Sec. 6.3)   ABLATION
    model: str = "auto"             # language model: auto, synthetic, or any causal LM of transformers (paper: gemma-2-2b)
    layer: str = "19"               # block whose output is read; 5,12,19 trains one SAE each (Sec. 5: 5, 12, 19)
    data: str = "auto"              # text: auto, pile, shakespeare, bundled, or a path (Sec. 5: the Pile)
    tokens: int = 4_096_000         # tokens of text harvested (not given; one pass in 1000 steps)
    heldout_tokens: int = 131_072   # held-out tokens for the evaluation (not given)
    T: int = 128                    # tokens per sequence (Sec. 5)
    expansion: int = 1              # F / D (U13)
    activation: str = "relu"        # relu (with L1) or topk (then no L1)   ABLATION
    k: int = 32                     # active features per token with topk, split over the levels (ours)
    # losses
    l1: float = 0.04                # lambda_1, sparsity (Sec. 4.4)
    recon_reduction: str = "sum"    # squared error summed or averaged over D (U13)   ABLATION
    lambda_temp: float = 0.2        # lambda_2, temporal; 0 also drops the GRU (Sec. 4.4)   ABLATION
    tau: float = 2.0                # contrastive temperature (Sec. 5.1)
    consistency: str = "learned"    # c_psi: learned or cosine (U4)   ABLATION
    routing_weight: float = 1.0     # routing-entropy regulariser (U10, not tuned)   ABLATION
    adv_scale: float = 1.0          # multiplies lambda_adv (ours)   ABLATION
    percentile: float = 0.85        # attribution threshold (Sec. 4.3)   ABLATION
    margin_decay: float = 0.95      # alpha of the margins (Sec. 4.2, A2)   ABLATION
    adapt: bool = True              # adapt the margins, or keep their first values (Sec. 6.2)   ABLATION
    sim_rows: int = 2304            # features whose similarity is computed each step (D3)
    # architecture
    levels: int = 3                 # levels of the hierarchy; 1 = no routing (Sec. 1)   ABLATION
    conv: bool = True               # convolutions before the attention (Sec. 6.2)   ABLATION
    compose: str = "residual"       # Eq. 1 and Sec. 5.3: residual, literal, parallel (A1)   ABLATION
    causal: bool = False            # mask convolutions and attention (A3)   ABLATION
    gru_divisor: int = 1            # GRU width = D / this (U7; Sec. 5.1: the input size)
    checkpointing: bool = True      # recompute instead of keeping: memory, not results (Sec. 5.6)
    # schedule
    steps: int = 1000               # optimiser steps; 0 = one pass over the tokens (Sec. 5.2)
    batch_size: int = 32            # sequences per step (Sec. 5)
    micro_batch: int = 0            # sequences per forward pass; 0 = the whole batch (ours)
    lr: float = 3e-4                # Adam (Sec. 5.1)
    monitor_decay: float = 0.99     # EMA of feature statistics for the log (Sec. 5.2)
    # machine and run
    seed: int = 42                  # weights and order of the data (paper A's seed; not given in B)
    device: str = "auto"            # auto, cpu or cuda
    dtype: str = "auto"             # auto, float32 or bfloat16: matrix products only (Sec. 5: bfloat16)
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


VARIANTS = {  # Sec. 6.3: parts of each variant; orthogonality: that term's weight   UNSPECIFIED U12
    "temporal":      dict(temporal=True,  hierarchy=True,  margin=True,  orthogonality=1.0),
    "hierarchical":  dict(temporal=False, hierarchy=True,  margin=False, orthogonality=0.0),
    "disentangled":  dict(temporal=False, hierarchy=False, margin=False, orthogonality=10.0),
    "adversarial":   dict(temporal=False, hierarchy=False, margin=False, orthogonality=1.0),
    "self-aligning": dict(temporal=False, hierarchy=False, margin=True,  orthogonality=0.0)}
HEADS = 8                           # attention heads (Sec. 5.1)
LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, batch_size=4, lm_batch=16,   # sizes and
              gru_divisor=4, sim_rows=576, checkpointing=False)                    # memory only
CHOICES = dict(variant=tuple(VARIANTS), recon_reduction=("sum", "mean"),
               activation=("relu", "topk"), consistency=("learned", "cosine"),
               compose=("residual", "literal", "parallel"))
PAPER = {  # metric -> what the paper reports
    "levels.variance_drop": "0.40 (Sec. 6.1)", "minutes per evaluation": "23 (H100, Sec. 6)",
    "unlearning.score": "0.0 (every variant, Sec. 6.3)"}


def variant(cfg):
    """Name of the run's variant, used for the run folder."""
    return cfg.variant + ("" if cfg.activation == "relu" else f"-topk{cfg.k}")


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class HierarchicalSAE(nn.Module):
    """The SAE of paper B with the parts of cfg.variant. Only the temporal variant mixes tokens."""

    def __init__(self, D, cfg):
        super().__init__()
        n_features = D * cfg.expansion
        assert cfg.activation != "topk" or cfg.k <= n_features, f"k={cfg.k} exceeds F={n_features}"
        positive = min(cfg.levels, cfg.gru_divisor, cfg.sim_rows, cfg.tau) > 0
        if not positive or not 0 <= cfg.percentile <= 1:
            raise common.UserError("--levels, --gru_divisor, --sim_rows and --tau must be "
                                   "positive, --percentile between 0 and 1.")
        self.cfg, self.parts = cfg, VARIANTS[cfg.variant]
        self.levels = cfg.levels if self.parts["hierarchy"] else 1
        most = min(cfg.k, n_features) if cfg.activation == "topk" else n_features
        if self.levels > most:                                            # some would be empty
            raise common.UserError(f"--levels {cfg.levels} exceeds the {most} features "
                                   "(with topk: active features) that the levels share.")
        self.sizes = split(n_features, self.levels)                       # features of each level
        self.causal = cfg.causal or not self.parts["temporal"]            # AMBIGUOUS A3
        W = torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights"))
        W = W / W.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F), U14
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        if self.levels > 1:                                               # 0: even gates at first
            self.W_route = nn.Parameter(torch.zeros(D, self.levels))
            self.b_route = nn.Parameter(torch.zeros(self.levels))
        if self.parts["temporal"]:
            self.add_temporal_parts(D, n_features)
        if self.parts["margin"]:                                          # NaN: not seen yet
            self.register_buffer("margin_mean", torch.full((n_features,), math.nan))
            self.register_buffer("margin_std", torch.zeros(n_features))
        if self.parts["orthogonality"]:
            self.register_buffer("attribution", torch.zeros(n_features))  # of the previous step
        self.register_buffer("feature_ema", torch.zeros(3, n_features))   # E f, E f^2, P(f > 0)
        if self.levels > 1:
            self.register_buffer("route_ema", torch.zeros(2, self.levels))    # E g, E(-g log g)
        # sums over the tokens of one step, emptied at its end
        self.register_buffer("tally", torch.zeros(4, n_features), persistent=False)
        self.register_buffer("route_tally", torch.zeros(2, self.levels), persistent=False)

    def add_temporal_parts(self, D, n_features):
        """Parameters of f_local, f_temp, the GRU and c_psi; all drawn from the run's seed."""
        cfg = self.cfg
        if D % HEADS:
            raise common.UserError(f"the model's width {D} does not divide into {HEADS} heads.")
        gen = common.generator(cfg.seed, "temporal")

        def uniform(*shape, gain=1.0):
            value = torch.empty(shape).uniform_(-gain, gain, generator=gen)
            return nn.Parameter(value / math.sqrt(shape[0]))
        if cfg.conv:
            self.W_conv1, self.b_conv1 = uniform(3 * D, D), nn.Parameter(torch.zeros(D))
            self.W_conv2, self.b_conv2 = uniform(3 * D, D), nn.Parameter(torch.zeros(D))
        self.W_qkv = uniform(D, 3 * D)
        # small: training starts near the standard SAE; not 0: the layers before it need a gradient
        self.W_out = uniform(D, D, gain=0.1)
        if not cfg.lambda_temp:
            return
        width = max(1, D // cfg.gru_divisor)
        self.W_track = uniform(D, width) if width < D else None
        self.gru = nn.GRU(width, width, num_layers=2, batch_first=True)   # Sec. 5.1
        self.W_next = uniform(width, D)                                   # a GRU's state is bounded
        with torch.no_grad():
            for p in self.gru.parameters():
                p.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=gen)
        if cfg.consistency == "learned":
            self.log_psi = nn.Parameter(torch.zeros(n_features))          # UNSPECIFIED U4

    def encode(self, x, mask=None):
        """Raw activations (B, T, D) -> features (B, T, F). Without temporal parts also (N, D).

        mask (B, T): False tokens count as the mean and are never attended to.
        """
        h = x.float() / self.scale                                        # fp32, as `rest` is
        bias = self.b_enc - self.b_dec @ self.W_enc                       # multiplied out: tsae.py
        gate = self.route(x)                                              # (..., L)
        if self.parts["temporal"]:
            if x.dim() != 3:
                raise common.UserError("the temporal variant codes sequences (B, T, D), not single "
                                       "vectors: its encoder mixes tokens.")
            h, bias = self.context(h - self.b_dec, mask), self.b_enc
        # Sec. 1, 3.2: level l encodes what the levels below it left over     UNSPECIFIED U8, U9
        W_enc, bias = self.W_enc.split(self.sizes, 1), bias.split(self.sizes)
        W_dec, ks = self.W_dec.split(self.sizes), split(self.cfg.k, self.levels)
        codes, rest = [], h
        for level in range(self.levels):
            pre = rest @ W_enc[level] + bias[level]                       # (..., F_l)
            z = topk(pre, ks[level]) if self.cfg.activation == "topk" else F.relu(pre)
            if self.levels > 1:
                z = z * (self.levels * gate[..., level, None])
            codes.append(z)
            if level + 1 < self.levels:
                rest = rest - z @ W_dec[level]
        return torch.cat(codes, -1)

    def decode(self, f):  # DIFFERS FROM tsae.py:TSAE.decode - dense: statistics need all features
        """Features (..., F) -> raw activations (..., D); linear."""
        return (f @ self.W_dec + self.b_dec) * self.scale

    def forward(self, x, mask=None):  # DIFFERS FROM tsae.py:TSAE.forward - may recompute
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f = self.recompute(self.encode, x, mask)
        return self.decode(f), f

    def recompute(self, stage, *inputs):
        """stage(*inputs); with checkpointing its inner tensors are computed again when needed."""
        if self.cfg.checkpointing and torch.is_grad_enabled():            # Sec. 5.6
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)
        return stage(*inputs)

    def route(self, x):
        """Gates of the levels (..., L), positive with sum 1, from token t alone."""
        if self.levels == 1:
            return torch.ones_like(x[..., :1])
        logits = (x / self.scale - self.b_dec) @ self.W_route + self.b_route
        return logits.float().softmax(-1)                                 # fp32: softmax

    def context(self, h, mask):
        """Token mixing: centred h (B, T, D), units of sqrt(D) -> the encoder's input (B, T, D)."""
        if mask is None:
            mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        h = h.masked_fill(~mask[..., None], 0.0)
        local = self.local(h, mask) if self.cfg.conv else h
        # Eq. 1 (Sec. 4.1): z_t = f_theta(h_t) = f_temp(f_local(h_t))     AMBIGUOUS A1
        if self.cfg.compose == "literal":
            return self.attend(local, mask)
        if self.cfg.compose == "parallel":                                # Sec. 5.3
            return self.attend(h, mask) + (h + local if self.cfg.conv else h)
        return h + self.attend(local, mask)

    def local(self, h, mask):
        """Two full (not depth-wise) convolutions over tokens, kernel 3, padding 1: 6 D^2 a token.

        Each is one product with three shifted copies side by side: the same as Conv1d, without its
        transposing. Masked tokens are 0 in between too, so padding equals the end of the text.
        """
        # Eq. 10 (Sec. 5.3): f_local(h) = Conv1D(ReLU(Conv1D(h)))
        hidden = F.relu(neighbours(h, self.causal) @ self.W_conv1 + self.b_conv1)
        hidden = hidden.masked_fill(~mask[..., None], 0.0)
        return neighbours(hidden, self.causal) @ self.W_conv2 + self.b_conv2

    def attend(self, h, mask):
        """Multi-head self-attention over each sequence's scored tokens, (B, T, D) -> (B, T, D)."""
        # Eq. 2 (Sec. 4.1), Eq. 9 (Sec. 5.3): f_temp(x) = MultiHead(W_Q x, W_K x, W_V x)
        B, T, D = h.shape
        qkv = (h @ self.W_qkv).view(B, T, 3, HEADS, D // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # (B, H, T, D / H) each
        # keys: scored tokens, and always oneself, because a row without any key would be NaN
        allowed = mask[:, None, None, :] | torch.eye(T, dtype=torch.bool, device=h.device)
        if self.causal:                                                   # AMBIGUOUS A3
            allowed = allowed.tril()                                      # (B, 1, T, T)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return mixed.transpose(1, 2).reshape(B, T, D) @ self.W_out

    def predict(self, image):   # EXERCISE 12
        """The features' image z_t W_dec at all t -> the prediction of it at t+1, both (B, T, D)."""
        # Sec. 1, 5.1: a two-layer GRU tracks features; its state predicts them     UNSPECIFIED U7
        read = image if self.W_track is None else image @ self.W_track
        state = common.run_gru(self.gru, read)
        return state @ self.W_next                                        # (B, T, D)

    def watch(self, f, gate, mask):
        """Add this micro-batch to the step's sums; the fourth fills in the backward pass."""
        with torch.no_grad():
            scored = f.detach() * mask[..., None]
            self.tally[0] += scored.sum((0, 1))
            self.tally[1] += torch.linalg.vector_norm(scored, dim=(0, 1)).square()
            self.tally[2] += (scored > 0).sum((0, 1))
            g = torch.stack([gate, torch.special.entr(gate)]).detach()    # (2, B, T, L)
            self.route_tally += (g * mask[..., None]).sum((1, 2))
        if self.parts["orthogonality"]:
            # Eq. 6 (Sec. 4.3), Eq. 14 (Sec. 5.5): A_i = ||dL / dz_i||_2     UNSPECIFIED U3
            def add(grad):
                self.tally[3] += torch.linalg.vector_norm(grad.float(), dim=(0, 1)).square()
            f.register_hook(add)


def split(n, parts):
    """n as a sum of nearly equal whole numbers, larger ones first: split(64, 3) = [22, 21, 21]."""
    return [(n + parts - 1 - i) // parts for i in range(parts)]


def neighbours(h, causal):
    """Tokens t-1, t, t+1 (causal: t-2, t-1, t) side by side: (B, T, D) -> (B, T, 3 D)."""
    T = h.shape[1]
    padded = F.pad(h, (0, 0, 2, 0) if causal else (0, 0, 1, 1))
    return torch.cat([padded[:, :T], padded[:, 1:T + 1], padded[:, 2:]], -1)


def topk(pre, k):  # SAME AS tsae.py:topk
    """Keep the k largest entries of the last axis, set to zero where negative; the rest is 0."""
    values, index = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, index, F.relu(values))


@torch.no_grad()
def normalize_decoder(sae):  # SAME AS tsae.py:normalize_decoder
    """Rows of W_dec back to norm 1."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


@torch.no_grad()
def remove_parallel_gradient(sae):  # SAME AS tsae.py:remove_parallel_gradient
    """Take from each decoder row's gradient its component along the row (it would be undone)."""
    W, grad = sae.W_dec, sae.W_dec.grad
    grad.addcmul_((grad * W).sum(1, keepdim=True), W, value=-1)


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def losses(sae, x, mask, n, step, cfg):  # DIFFERS FROM tsae.py:losses - routing, temporal terms
    """Terms of Eq. 16 that tokens enter, already weighted (adversarial_loss is the last one). fp32.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reductions: reconstruction sums over D, sparsity sums over F, prediction averages over D, the
    other temporal terms and routing are one number a token; all are averaged over scored tokens.
    """
    x_hat, f = sae(x, mask)
    error = (x_hat.float() - x.float()) / sae.scale * mask[..., None]     # units of sqrt(D)
    f, gate = f.float(), sae.route(x)
    sae.watch(f, gate, mask)
    # Eq. 8 (Sec. 4.4), Eq. 16 (Sec. 5.6):
    #   L = ||h - g(f(h))||^2 + lambda_1 ||f(h)||_1 + lambda_2 L_temp + lambda_adv L_adv
    recon = error.pow(2).sum() / n   # EXERCISE 11
    # logged, not part of the loss
    stats = {"error": recon, "active": (f.detach().sign().sum(-1) * mask).sum() / n}   # f >= 0
    if cfg.recon_reduction == "mean":                                     # UNSPECIFIED U13
        recon = recon / x.shape[-1]
    terms = {"recon": recon}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (f.sum(-1) * mask).sum() / n   # f >= 0: the L1 norm is the sum
    if sae.levels > 1:
        terms["routing"] = cfg.routing_weight * routing_loss(gate, mask) / n
    if sae.parts["temporal"] and cfg.lambda_temp:
        for name, term in temporal_losses(sae, f, x_hat.float(), mask, cfg).items():
            terms[name] = cfg.lambda_temp * term / n                      # UNSPECIFIED U6
    return terms, stats


def routing_loss(gate, mask):
    """Sum over windows of (scored tokens) * (log L - entropy of the window's mean gate): ().

    gate (B, T, L). A token's part is 0 if the levels share its window evenly, log L if one has it
    all. By windows and not by the batch's mean gate, so that micro-batches add up exactly.
    """
    # Sec. 1, 5.2: routing entropy against degenerate routing     UNSPECIFIED U10
    count = mask.sum(1, keepdim=True)                                     # (B, 1)
    share = (gate * mask[..., None]).sum(1) / count.clamp(min=1)          # (B, L)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1, keepdim=True)
    return (count * (math.log(gate.shape[-1]) - entropy)).sum()


def temporal_losses(sae, f, x_hat, mask, cfg):
    """The three parts of L_temp, each summed over scored pairs (t, t+1): dict of ().

    f (B, T, F), x_hat (B, T, D) raw. A pair's consistency and contrastive terms are one number
    each, its prediction error averages over D. The caller divides by the number of scored tokens.
    """
    pair = mask[:, :-1] & mask[:, 1:]                                     # (B, T-1)
    c = consistency_matrix(f, getattr(sae, "log_psi", None))              # (B, T, T)
    positive = c.diagonal(offset=1, dim1=1, dim2=2)                       # (B, T-1)
    # Sec. 3.2: L_temp = E_t[1 - c_psi(z_t, z_{t+1})]
    consistency = (1 - positive) * pair
    # Sec. 1, 5.1: -log softmax over the window of c_psi / tau, tau = 2.0     UNSPECIFIED U5
    candidate = mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    logits = (c / cfg.tau).masked_fill(~candidate, -1e4)                  # (B, T, T)
    contrastive = (logits.logsumexp(2)[:, :-1] - positive / cfg.tau) * pair
    # Sec. 1, 5.1: evolution prediction     UNSPECIFIED U7
    image = features_image(sae, x_hat, mask)
    surprise = sae.recompute(sae.predict, image)[:, :-1].float() - image[:, 1:].detach()
    prediction = surprise.pow(2).mean(-1) * pair
    return {"consistency": consistency.sum(), "contrastive": contrastive.sum(),
            "prediction": prediction.sum()}


def features_image(sae, x_hat, mask):
    """z_t W_dec (B, T, D), out of the raw reconstruction; 0 at masked tokens."""
    return (x_hat / sae.scale - sae.b_dec).masked_fill(~mask[..., None], 0.0)


def consistency_matrix(f, log_psi=None):
    """c_psi of all pairs of tokens of a window: (B, T, F) -> (B, T, T), each in [0, 1]."""
    # Sec. 3.2: c_psi: R^k x R^k -> [0, 1]; here the cosine of psi * z >= 0     UNSPECIFIED U4
    with torch.autocast(f.device.type, enabled=False):                    # fp32: near-equal codes
        z = f if log_psi is None else f * log_psi.exp()
        norm = z.norm(dim=-1).clamp(min=1e-8)                             # (B, T)
        return z @ z.transpose(1, 2) / (norm[:, :, None] * norm[:, None, :])


def adversarial_loss(sae, step, cfg):
    """lambda_adv L_adv of Eq. 16 and scalars for the log. No token enters it: once a step.

    Summed over features: largest similarity s_i below its dynamic margin, and towards 0 for the
    features above the attribution percentile.
    """
    n_features, device = sae.W_dec.shape[0], sae.W_dec.device
    rows = torch.arange(n_features, device=device)
    if cfg.sim_rows < n_features:                                         # DEVIATION D3
        gen = common.generator(cfg.seed, f"rows{step}", device)
        rows = torch.randperm(n_features, generator=gen, device=device)[:cfg.sim_rows]
    s = similarity(sae.W_dec, rows)                                       # (R,)
    L_adv, A_spurious, log = 0.0, torch.zeros((), device=device), {"similarity": s.detach().mean()}
    if sae.parts["margin"]:                                               # UNSPECIFIED U1
        margin = update_margin(sae, s.detach(), rows, cfg)
        L_adv = L_adv + F.relu(s - margin).square().sum()
        log["over_margin"] = (s.detach() > margin).float().mean()
    if sae.parts["orthogonality"]:
        A = sae.attribution                                               # (F,), without a gradient
        above = A[rows] * (A[rows] > torch.quantile(A, cfg.percentile))   # Sec. 4.3
        a = above / A.max().clamp(min=1e-30)
        L_adv = L_adv + sae.parts["orthogonality"] * (a * F.relu(s).square()).sum()   # U1
        A_spurious = above @ F.relu(s.detach()) / above.sum().clamp(min=1e-30)   # UNSPECIFIED U2
        log["A_spurious"] = A_spurious
    log["lambda_adv"] = cfg.adv_scale * adversarial_weight(A_spurious)
    return log["lambda_adv"] * L_adv * (n_features / len(rows)), log


def similarity(W_dec, rows, block=1024):
    """Cosine of decoder rows (of norm 1) to their nearest other row: (F, D), (R,) -> (R,).

    The nearest row is found in blocks without a gradient, so no (R, F) matrix is ever kept; the
    gradient of a maximum is that of the pair which attains it.
    """
    with torch.no_grad():
        nearest = []
        for part in rows.split(block):
            cosine = W_dec[part] @ W_dec.t()                              # (block, F)
            nearest.append(cosine.scatter_(1, part[:, None], -2.0).argmax(1))   # not itself
    return (W_dec[rows] * W_dec[torch.cat(nearest)]).sum(1)               # UNSPECIFIED U11


@torch.no_grad()
def update_margin(sae, s, rows, cfg):
    """Running mean and deviation of s (R,) for the features `rows` (R,); returns their margins."""
    alpha = cfg.margin_decay if cfg.adapt else 1.0                        # AMBIGUOUS A2
    mean, std = sae.margin_mean[rows], sae.margin_std[rows]
    # Eq. 3 (Sec. 4.2), Eq. 11 (Sec. 5.4): mu_t = alpha mu_{t-1} + (1 - alpha) s_t, mu_0 = s_0
    mean = torch.where(mean.isnan(), s, alpha * mean + (1 - alpha) * s)
    # Eq. 4, Eq. 12 (Sec. 5.4): sigma_t = sqrt(alpha sigma_{t-1}^2 + (1 - alpha) (s_t - mu_t)^2)
    std = (alpha * std.square() + (1 - alpha) * (s - mean).square()).sqrt()
    sae.margin_mean[rows], sae.margin_std[rows] = mean, std
    # Eq. 5, Eq. 13 (Sec. 5.4): m_t = mu_t + 2 sigma_t
    return mean + 2 * std   # EXERCISE 10


# ---------------------------------------------------------------------------------------------
# Schedules: the learning rate is constant; weights and running statistics
# ---------------------------------------------------------------------------------------------


def adversarial_weight(A_spurious):
    """Eq. 7 (Sec. 4.3), Eq. 15 (Sec. 5.5): lambda_adv = max(A_spurious - 0.5, 0.1)."""
    return (A_spurious - 0.5).clamp(min=0.1)


def monitor_rate(step, cfg):
    """Weight of the newest value in the averages of the log: a plain mean first, then 1 - 0.99."""
    return max(1 - cfg.monitor_decay, 1 / (step + 1))


@torch.no_grad()
def update_monitor(sae, n, step, cfg):
    """Sec. 5.2: the step's sums into the EMAs and the attribution; n () scored tokens in all."""
    tally = common.total(sae.tally)
    sae.feature_ema.lerp_(tally[:3] / n, monitor_rate(step, cfg))         # AMBIGUOUS A2
    if sae.levels > 1:
        sae.route_ema.lerp_(common.total(sae.route_tally) / n, monitor_rate(step, cfg))
    if sae.parts["orthogonality"]:
        sae.attribution.copy_(tally[3].sqrt())
    sae.tally.zero_()
    sae.route_tally.zero_()


@torch.no_grad()
def monitor(sae):
    """Scalars for the log: each level's variance, share of the routing and part of its entropy."""
    mean, square, _ = sae.feature_ema
    out = {}
    for level, variance in enumerate((square - mean.square()).split(sae.sizes)):
        if sae.levels > 1:
            out[f"share_{level + 1}"] = sae.route_ema[0, level]
            out[f"entropy_{level + 1}"] = sae.route_ema[1, level]
        out[f"variance_{level + 1}"] = variance.mean()
    return out


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). Returns the evaluation.

    Writes the run folder (common.Run): config, log, checkpoints, weights, evaluation, figures.
    """
    sae = HierarchicalSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        sae.scale.fill_(acts.scale)                                       # DEVIATION D1
        sae.b_dec.copy_(acts.mean / acts.scale)                           # UNSPECIFIED U14
    opt = torch.optim.Adam(sae.parameters(), lr=cfg.lr, betas=(0.9, 0.999),
                           fused=True)                                    # Sec. 5.1, 5.6
    run = common.Run(__file__, variant(cfg), cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch: micro-batches that together hold cfg.batch_size sequences
        batch = acts.batch(step)   # [(x (B, T, D), mask (B, T))]
        n = common.total(sum(mask.sum() for _, mask in batch))   # scored tokens, all processes
        opt.zero_grad()
        # 2. forward and losses   3. backward
        sums, scalars = {}, {}
        for x, mask in batch:
            with acts.autocast():
                terms, stats = compute(sae, x, mask, n, step, cfg)
            sum(terms.values()).backward()
            common.accumulate(sums, terms, **stats)
        if sae.parts["margin"] or sae.parts["orthogonality"]:             # no tokens: once a step
            term, scalars = adversarial_loss(sae, step, cfg)
            term = term / common.world()
            term.backward()
            common.accumulate(sums, {"adversarial": term})
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient
        remove_parallel_gradient(sae)                                     # DEVIATION D2
        if step == 0:
            common.assert_gradients(sae, sums)
        # 5. step   6. renormalise
        opt.step()
        normalize_decoder(sae)                                            # DEVIATION D2
        # 7. bookkeeping: attribution for the next step, statistics for the log
        update_monitor(sae, n, step, cfg)
        # ---------------------------------------------------------------------------------------
        run.log(step, sums, lr=cfg.lr, **scalars, **(monitor(sae) if run.log_due(step) else {}))
        run.save_if_due(step)

    results = run.evaluate(cfg.eval, PAPER, extra=extra_metrics)
    return results


@torch.no_grad()
def extra_metrics(sae, acts):
    """Sec. 6.1: statistics of the levels on held-out text; the skill of the GRU's prediction."""
    out = {}
    if sae.levels > 1:
        out["levels"] = level_metrics(sae, acts)
    if hasattr(sae, "gru"):
        out["evolution"] = {"skill": prediction_skill(sae, acts)}
    return out


def level_metrics(sae, acts):
    """Activation variance, mean square, L0 and routing of each level, over held-out scored tokens.

    variance_l: variance over tokens, averaged over the level's features (squared units of sqrt(D)).
    variance_drop: 1 - that of the top level / that of the lowest (the paper: 0.40); the drop of the
    mean square beside it tells how much of this is only that higher levels have smaller codes.
    entropy: of a token's gates, at most log L; entropy_l is level l's part of it.
    """
    n, moments, routing = 0, 0.0, 0.0
    for x, mask in acts.heldout():
        f, gate = sae.encode(x, mask)[mask], sae.route(x)[mask].double()  # (n, F), (n, L)
        n += len(f)
        sums = (t.sum(0, dtype=torch.float64) for t in (f, f.square(), f > 0))
        moments = moments + torch.stack(list(sums))                       # (3, F)
        routing = routing + torch.stack([gate.sum(0), torch.special.entr(gate).sum(0)])
    mean, square, active = moments / n                                    # (F,) each
    share, entropy = routing / n                                          # (L,) each
    table = {"variance": [v.mean() for v in (square - mean.square()).split(sae.sizes)],
             "mean_square": [v.mean() for v in square.split(sae.sizes)],
             "L0": [v.sum() for v in active.split(sae.sizes)], "share": share, "entropy": entropy}
    out = {f"{k}_{i + 1}": v.item() for k, column in table.items() for i, v in enumerate(column)}
    out["entropy"] = entropy.sum().item()
    for name in ("variance", "mean_square"):
        out[f"{name}_drop"] = 1 - out[f"{name}_{sae.levels}"] / max(out[f"{name}_1"], 1e-30)
    return out


def prediction_skill(sae, acts):
    """1 - squared error of the evolution prediction / that of "nothing changes" (0 = no better)."""
    error = unchanged = 0.0
    for x, mask in acts.heldout():
        image = features_image(sae, sae(x, mask)[0], mask)
        pair = mask[:, :-1] & mask[:, 1:]
        now, then = image[:, :-1][pair], image[:, 1:][pair]
        predicted = sae.predict(image)[:, :-1][pair]
        error += (predicted - then).double().square().sum().item()
        unchanged += (now - then).double().square().sum().item()
    return 1 - error / max(unchanged, 1e-30)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, LAPTOP, CHOICES, HierarchicalSAE, train, argv)


if __name__ == "__main__":
    raise SystemExit(main())
