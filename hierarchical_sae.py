"""Hierarchical temporal-aware sparse autoencoder and its four relatives (paper B).

Paper   "Temporal-Aware Sparse Autoencoders with Hierarchical Feature Routing for Language Model
        Interpretability", anonymous, under double-blind review (letter B in this project).
Run     python hierarchical_sae.py --layer 19                # everything: the temporal-aware SAE
        python hierarchical_sae.py --layer 5,12,19           # the paper's three layers, one LM pass
        python hierarchical_sae.py --variant hierarchical    # one of Sec. 6.3, see VARIANTS
        Sec. 6.2 ablates: --no-conv, --margin_decay 0.9, --no-adapt, --percentile 0.75, --levels 1

The idea. Three things are wrong with coding each token alone in one flat dictionary: the code
cannot use the sentence, all features stand on one level, and features become near copies of each
other. So (1) two convolutions and a self-attention mix the tokens before the encoder, and losses
ask that neighbouring codes agree and that the next one can be predicted; (2) the dictionary is
cut into three levels, each coding what the levels below it left over, and a router decides how
many of them a token gets; (3) a penalty pushes features away from their nearest neighbours when
their similarity jumps above a running margin, and those with much gradient always. The paper
reports that none of this moves its unlearning score from 0.0.

Notation (paper -> code)
    h_t in R^d      residual stream at token t            x          (B, T, D)
    z_t in R^k      features (also f_t)                   f          (B, T, F)
    c_psi           temporal consistency in [0, 1]        c          (B, T, T)
    s_i, m_i, A_i   largest similarity, margin, attribution of feature i     (F,)
    B sequences, T tokens, D model width, F features, L levels (1 lowest); "scored": mask = True.

Paper -> code
    Sec. 3.2        HierarchicalSAE.code, HierarchicalSAE.decode    the autoencoder
    Eq. 1           HierarchicalSAE.context         local and temporal parts put together
    Eq. 2, 9        HierarchicalSAE.attend          multi-head self-attention
    Eq. 10          HierarchicalSAE.local           two convolutions of kernel 3
    Sec. 1, 5.2     HierarchicalSAE.route, routing_loss   causal routing, its entropy
    Sec. 3.2, 5.1   temporal_losses                 1 - c_psi, contrast, prediction
    Sec. 1, 5.1     HierarchicalSAE.predict         GRU: feature tracking, evolution prediction
    Eq. 3-5, 11-13  update_margin                   dynamic margin (printed twice in the paper)
    Eq. 6, 14       update_attribution              attribution, from the backward pass
    Eq. 7, 8, 15, 16   adversarial_loss, losses     lambda_adv; the total
    Sec. 5.2, 6.1   update_monitor, level_metrics   EMA of feature statistics; each level's

What the paper leaves open; each is argued at the line that settles it: grep -n "open B.gate" *.py
    open B.variants     which variant has which part           table VARIANTS
    open B.size         k of R^k                               --expansion
    open B.ema          0.95 or 0.99 for feature statistics    --margin_decay --monitor_decay
    open B.causal       attention without a mask               --causal
    open B.levels       how levels share F and a token         --levels
    open B.gate         what "causal routing" routes           --routing depth | top1 | soft
    open B.compose      convolutions before attention, beside  --compose residual|literal|parallel
    open B.gru          what the GRU reads and predicts        --gru_divisor
    open B.reduction    sums or means: can lambda_2 act        --recon_reduction --l1_reduction
    open B.entropy      which entropy is regularised           --routing_weight
    open B.weights      two terms that Eq. 8 does not have     inside L_temp, weight 1
    open B.pairs        pairs of the contrastive term          tokens of the window
    open B.psi          what c_psi is                          --consistency learned | cosine
    open B.adv          L_adv is never written down            margin and orthogonality
    open B.similarity   similarity of what                     --similarity code | decoder
    open B.spurious     what A_spurious is                     --spurious attribution | similarity
    open B.attribution  which L, tokens, derivative            --attribution active | all
    open S.start        first values of the weights            tied; b_dec the mean
    open S.decay        AdamW's weight decay                   --weight_decay
    open S.projection   gradient along decoder rows            --no-project_gradient
    open S.scale        unit of the activations                mean norm sqrt(D)
    open S.lambda       ... and so of lambda                   --l1 VALUE
    open S.sinks        attention sinks                        masked

Does not include: feature pruning and cross-layer constraints, which the paper names as future work.
"""
import math
from dataclasses import dataclass
from typing import Literal

import common                       # before torch: it sets how OpenMP's threads wait
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Count, Fraction, NonNegative, Positive, Steps
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------
# open B.variants: Sec. 6.3 has a line for each / here that part; "increased" orthogonality: x 10
# open B.size: not given / here F = D, as in paper A / --expansion

VARIANTS = {  # Sec. 6.3: parts of each variant; orthogonality: its weight, not tuned
    "temporal":      dict(temporal=True,  hierarchy=True,  margin=True,  orthogonality=1.0),
    "hierarchical":  dict(temporal=False, hierarchy=True,  margin=False, orthogonality=0.0),
    "disentangled":  dict(temporal=False, hierarchy=False, margin=False, orthogonality=10.0),
    "adversarial":   dict(temporal=False, hierarchy=False, margin=False, orthogonality=1.0),
    "self-aligning": dict(temporal=False, hierarchy=False, margin=True,  orthogonality=0.0)}
HEADS = 8                           # attention heads (Sec. 5.1)


@dataclass
class Config(common.RunConfig):     # model, text, device, run folder: common.py
    variant: Literal[tuple(VARIANTS)] = "temporal"   # which parts (Sec. 6.3)   ABLATION
    tokens: Count = 4_096_000       # tokens of text (not given: one pass in 1000 steps)
    expansion: Count = 1            # F / D (B.size)
    activation: Literal["relu", "topk"] = "relu"   # relu (with L1) or topk (then no L1)   ABLATION
    k: Count = 32                   # with topk: most active features of a token (ours)
    # losses
    l1: NonNegative = 0.04          # lambda_1, sparsity (Sec. 4.4; S.lambda)
    recon_reduction: Literal["sum", "mean"] = "sum"   # over D (B.reduction)   ABLATION
    l1_reduction: Literal["sum", "mean"] = "sum"      # over F (B.reduction)   ABLATION
    lambda_temp: NonNegative = 0.2  # lambda_2; 0 also drops the GRU (Sec. 4.4)   ABLATION
    tau: Positive = 2.0             # contrastive temperature (Sec. 5.1)
    consistency: Literal["learned", "cosine"] = "learned"   # c_psi (B.psi)   ABLATION
    routing_weight: NonNegative = 1.0   # routing entropy (B.entropy, not tuned)   ABLATION
    adv_scale: NonNegative = 1.0    # multiplies lambda_adv (ours)   ABLATION
    similarity: Literal["code", "decoder"] = "code"    # s_i: of what (B.similarity)   ABLATION
    spurious: Literal["attribution", "similarity"] = "attribution"   # A_spurious (B.spurious)
    attribution: Literal["active", "all"] = "active"   # tokens A_i counts (B.attribution)
    percentile: Fraction = 0.85     # attribution threshold (Sec. 4.3)   ABLATION
    margin_decay: Fraction = 0.95   # alpha of the margins (Sec. 4.2)   ABLATION
    adapt: bool = True              # adapt margins, or keep the first (Sec. 6.2)   ABLATION
    # architecture
    levels: Count = 3               # levels of the hierarchy; 1 = no routing (Sec. 1)   ABLATION
    routing: Literal["depth", "top1", "soft"] = "depth"   # levels of a token (B.gate)   ABLATION
    conv: bool = True               # convolutions before the attention (Sec. 6.2)   ABLATION
    compose: Literal["residual", "literal", "parallel"] = "residual"   # (B.compose)   ABLATION
    causal: bool = False            # mask convolutions and attention (B.causal)   ABLATION
    gru_divisor: Count = 1          # GRU width = D / this (Sec. 5.1: the input size)
    checkpointing: bool = True      # recompute instead of keeping: memory, not results (Sec. 5.6)
    # schedule
    steps: Steps = 1000             # optimiser steps; 0 = one pass over the tokens (Sec. 5.2)
    batch_size: Count = 32          # sequences per step (Sec. 5)
    lr: Positive = 3e-4             # Adam (Sec. 5.1)
    lr_warmup: Steps = 0            # steps of linear learning-rate warm-up (none given)
    weight_decay: NonNegative = 0.0     # AdamW's (S.decay)
    clip: NonNegative = 0.0         # gradient-norm clipping, 0 = off (none given)   ABLATION
    project_gradient: bool = True   # remove the gradient along each decoder row (S.projection)
    monitor_decay: Fraction = 0.99  # EMA of feature statistics for the log (Sec. 5.2)


LAPTOP = dict(tokens=131_072, heldout_tokens=16_384, batch_size=4, lm_batch=16,   # sizes and
              gru_divisor=4, checkpointing=False)                                 # memory only
PAPER = {"levels.variance_drop": "0.40 (Sec. 6.1)", "unlearning.score": "0.0 (all variants)"}

# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------
class HierarchicalSAE(nn.Module):
    """The SAE of paper B with the parts of cfg.variant. Only the temporal variant mixes tokens."""

    def __init__(self, D, cfg):
        super().__init__()
        n_features = D * cfg.expansion
        self.cfg, self.parts = cfg, VARIANTS[cfg.variant]
        self.levels = cfg.levels if self.parts["hierarchy"] else 1
        if not self.levels <= (cfg.k if cfg.activation == "topk" else n_features) <= n_features:
            raise common.UserError(f"--levels or --k (with topk) exceeds the {n_features} features,"
                                   " or --levels exceeds --k.")
        self.sizes, self.ks = ([len(part) for part in torch.arange(n).tensor_split(self.levels)]
                               for n in (n_features, cfg.k))   # features of each level, active ones
        if cfg.routing == "top1":
            self.ks = [min(cfg.k, size) for size in self.sizes]
        # open B.causal: Eq. 9, 10 print no mask, Sec. 1 has "causal routing" / here both sides are
        #   seen (leakage where the code is spliced into the LM), by all but the router / --causal
        self.causal = cfg.causal or not self.parts["temporal"]
        # open S.start: not given / here as usual W_enc = W_dec^T, b_enc = 0, b_dec the mean
        W = F.normalize(torch.randn(n_features, D, generator=common.generator(cfg.seed, "weights")))
        self.W_dec = nn.Parameter(W)                                      # (F, D), unit-norm rows
        self.W_enc = nn.Parameter(W.t().clone())                          # (D, F)
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(()))                     # raw norm / sqrt(D)
        self.register_buffer("feature_ema", torch.zeros(3, n_features))   # f, f^2, f > 0
        self.register_buffer("route_ema", torch.zeros(2, self.levels))    # choice, -p log p
        if self.parts["margin"]:                                          # 0: not seen yet
            self.register_buffer("margin_mean", torch.zeros(n_features))
            self.register_buffer("margin_std", torch.zeros(n_features))
        if self.parts["orthogonality"]:
            self.register_buffer("attribution", torch.zeros(n_features))  # of the previous step
        if self.parts["temporal"] and D % HEADS:
            raise common.UserError(f"the width {D} does not divide into {HEADS} heads.")
        with torch.random.fork_rng(devices=[]):   # torch's own initial values, by the run's seed
            torch.manual_seed(common.generator(cfg.seed, "layers").initial_seed())
            if self.levels > 1:
                self.router = nn.Linear(D, self.levels)
            if self.parts["temporal"]:
                if cfg.conv:                                              # Sec. 5.1: kernel size 3
                    self.conv1, self.conv2 = nn.Linear(3 * D, D), nn.Linear(3 * D, D)
                self.W_qkv, self.W_out = (nn.Linear(D, n * D, bias=False) for n in (3, 1))
                self.W_out.weight.data.mul_(0.1)   # near a standard SAE; not tuned (0: conv1 dies)
            if self.parts["temporal"] and cfg.lambda_temp:                # Sec. 5.1: two layers
                width = max(1, D // cfg.gru_divisor)
                self.gru = nn.GRU(D, width, num_layers=2, batch_first=True)
                self.W_next = nn.Linear(width, D, bias=False)             # a GRU's state is bounded
                if cfg.consistency == "learned":
                    self.log_psi = nn.Parameter(torch.zeros(n_features))  # weights of c_psi

    def encode(self, x, mask=None):
        """Raw activations (B, T, D), mask -> features (B, T, F). Not temporal: also (N, D)."""
        return self.code(x, mask)[0]

    def decode(self, f):
        """Features (..., F) -> raw activations (..., D); linear."""
        return (f @ self.W_dec + self.b_dec) * self.scale                 # Sec. 3.2: g_phi(z_t)

    def forward(self, x, mask=None):
        """Raw activations (..., D) -> reconstruction (..., D) and features (..., F)."""
        f = self.encode(x, mask)
        return self.decode(f), f

    def code(self, x, mask=None):
        """encode's features (..., F); the router's probabilities and choice of a level (..., L)."""
        h = x.float() / self.scale - self.b_dec                           # fp32, as `rest` is
        p, choice, gate = self.route(h)
        rest, codes = self.context(h, mask) if self.parts["temporal"] else h, []
        W_enc, b_enc = self.W_enc.split(self.sizes, 1), self.b_enc.split(self.sizes)
        W_dec = self.W_dec.split(self.sizes)
        # open B.levels: "hierarchical decomposition" / here a third of the features each; level l
        #   codes the rest of those below, by ReLU, as attention is not sparse / --levels
        for level in range(self.levels):
            if level:
                rest = rest - codes[-1] @ W_dec[level - 1]
            pre = rest @ W_enc[level] + b_enc[level]                      # (..., F / L)
            z = topk(pre, self.ks[level]) if self.cfg.activation == "topk" else F.relu(pre)
            codes.append(z * gate[..., level, None])
        return torch.cat(codes, -1).float(), p, choice

    def route(self, h):
        """Centred h (..., D) -> probabilities, choice of a level, gates of all levels: (..., L)."""
        # open B.gate: "causal routing" / here the router chooses a token's level: this one and
        #   those below code the token, each the rest of the last; L1 pays for it, too. "top1":
        #   only that level, nothing is decomposed (--plant tree: EV .963, not .978, children not
        #   above parents); "soft": codes are rescaled, nothing is routed / --routing
        p = self.router(h).float().softmax(-1) if self.levels > 1 else torch.ones_like(h[..., :1])
        if self.cfg.routing == "soft":
            return p, p, self.levels * p
        choice = F.one_hot(p.argmax(-1), self.levels) - p.detach() + p    # straight-through
        nested = choice.flip(-1).cumsum(-1).flip(-1)                      # l or a level above it
        return p, choice, choice if self.cfg.routing == "top1" else nested

    def context(self, h, mask):
        """Token mixing: centred, scaled h (B, T, D) -> the encoder's input (B, T, D)."""
        if h.dim() != 3:
            raise common.UserError("the temporal variant codes sequences (B, T, D), not vectors.")
        mask = torch.ones_like(h[..., 0], dtype=torch.bool) if mask is None else mask
        h = h.masked_fill(~mask[..., None], 0.0)
        local = self.local(h, mask) if self.cfg.conv else h
        # Eq. 1 (Sec. 4.1): z_t = f_theta(h_t) = f_temp(f_local(h_t))
        # open B.compose: Eq. 1; "complemented by" in Sec. 5.3 / here Eq. 1 as a correction of h, to
        #   keep token t / --compose literal (Eq. 1), parallel (Sec. 5.3)
        if self.cfg.compose == "literal":
            return self.attend(local, mask)
        if self.cfg.compose == "parallel":
            return self.attend(h, mask) + (h + local if self.cfg.conv else h)
        return h + self.attend(local, mask)

    def local(self, h, mask):
        """Two convolutions over tokens, kernel 3, padding 1 (as linear layers: faster on a CPU)."""
        def near(h):   # tokens t-1, t, t+1 (causal: t-2, t-1, t) side by side, (B, T, 3 D)
            h = F.pad(h, (0, 0, 2, 0) if self.causal else (0, 0, 1, 1))
            return torch.cat([h[:, :-2], h[:, 1:-1], h[:, 2:]], -1)
        # Eq. 10 (Sec. 5.3): f_local(h) = Conv1D(ReLU(Conv1D(h))); masked tokens stay 0 in between
        hidden = F.relu(self.conv1(near(h))).masked_fill(~mask[..., None], 0.0)
        return self.conv2(near(hidden))

    def attend(self, h, mask):
        """Multi-head self-attention over each sequence's scored tokens, (B, T, D) -> (B, T, D)."""
        # Eq. 2 (Sec. 4.1), Eq. 9 (Sec. 5.3): f_temp(x) = MultiHead(W_Q x, W_K x, W_V x)
        B, T, D = h.shape
        q, k, v = self.W_qkv(h).view(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        # keys: scored tokens, and always oneself, because a row without any key would be NaN
        allowed = mask[:, None, None, :] | torch.eye(T, dtype=torch.bool, device=h.device)
        allowed = allowed.tril() if self.causal else allowed              # (B, 1, T, T)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.W_out(mixed.transpose(1, 2).reshape(B, T, D))

    def predict(self, image):   # EXERCISE 12
        """The features' image z_t W_dec at all t -> the prediction of it at t+1, both (B, T, D)."""
        # Sec. 1, 5.1: a two-layer GRU tracks features; its state predicts them
        # open B.gru: "hidden dimensions matching the input size" / here it reads z_t W_dec (width D
        #   whatever F is) and predicts that of z_{t+1}, which gets no gradient / --gru_divisor
        state, _ = self.gru(image)
        return self.W_next(state)                                         # (B, T, D)

    def recompute(self, stage, *inputs):
        """stage(*inputs); with checkpointing its inner tensors are computed again when needed."""
        if self.cfg.checkpointing and torch.is_grad_enabled():            # Sec. 5.6
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)
        return stage(*inputs)


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
    """Terms of Eq. 8, 16 but L_adv, and routing; all weighted; statistics; (f, p, choice). fp32.

    x (B, T, D) raw, mask (B, T), n () number of scored tokens in the whole (global) batch.
    Reductions: reconstruction sums over D, sparsity over F, prediction averages over D, the other
    temporal terms are one number a pair; all are divided by the scored tokens. Routing: one number.
    """
    n = n.clamp(min=1)
    f, p, choice = sae.recompute(sae.code, x, mask)
    if f.requires_grad:
        f.retain_grad()                                                   # for Eq. 6, 14
    image, m = (f @ sae.W_dec).float(), mask[..., None]                   # (B, T, D), (B, T, 1)
    error = (image + sae.b_dec - x.float() / sae.scale) * m               # (decode(f) - x) / scale
    # Eq. 8 (Sec. 4.4), Eq. 16 (Sec. 5.6):
    #   L = ||h - g(f(h))||^2 + lambda_1 ||f(h)||_1 + lambda_2 L_temp + lambda_3 L_adv (lambda_adv)
    recon = error.pow(2).sum() / n   # EXERCISE 11
    stats = {"error": recon.detach(), "active": ((f > 0) * m).sum() / n}  # logged, not in the loss
    # open B.reduction: norms / here sums, as printed; beside them lambda_2 is weak; both "mean": it
    #   weighs D times more (neighbour cosine 0.80 -> 0.85 at D = 64) / --recon_reduction
    if cfg.recon_reduction == "mean":
        recon = recon / x.shape[-1]
    terms, width = {"recon": recon}, f.shape[-1] if cfg.l1_reduction == "mean" else 1
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * (f * m).sum() / (n * width)   # f >= 0: the L1 norm is the sum
    if sae.levels > 1:
        terms["routing"] = cfg.routing_weight * routing_loss(choice, mask, n)
    # open B.weights: contrast and prediction (Sec. 1, 5.1) are not in Eq. 8 / here inside L_temp
    if sae.parts["temporal"] and cfg.lambda_temp:
        for name, term in temporal_losses(sae, f, image * m, mask, cfg).items():
            terms[name] = cfg.lambda_temp * term / n
    return terms, stats, (f, p, choice)


def routing_loss(choice, mask, n):
    """log L - entropy of the levels' shares of the batch, 0 to log L: (). choice (B, T, L)."""
    # open B.entropy: "preventing degenerate solutions" / here of the levels' shares: a token may
    #   choose, no level may starve (without it all tokens go to one) / --routing_weight
    share = common.total_with_gradient((choice * mask[..., None]).sum((0, 1))) / n    # (L,)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return (math.log(len(share)) - entropy) / common.world()              # each process its part


@torch.autocast("cuda", enabled=False)   # fp32: codes that are nearly equal, states of T steps
@torch.autocast("cpu", enabled=False)
def temporal_losses(sae, f, image, mask, cfg):
    """Parts of L_temp, each summed over scored pairs (t, t+1): dict of (). f (B, T, F).

    image (B, T, D): z_t W_dec, 0 at masked tokens; its prediction averages over D.
    """
    pair = mask[:, :-1] & mask[:, 1:]                                     # (B, T-1)
    # open B.psi: "R^k x R^k -> [0, 1]" / here the cosine of codes (>= 0), features times learned
    #   weights, which alone lower 1 - c_psi by favouring always-on features / --consistency
    z = f * sae.log_psi.exp() if cfg.consistency == "learned" else f
    z = F.normalize(z, dim=-1) * f.any(-1, keepdim=True)   # empty code: c = 0, and no gradient
    c = z @ z.transpose(1, 2)                                             # (B, T, T), 0 to 1
    positive = c.diagonal(offset=1, dim1=1, dim2=2)                       # (B, T-1)
    # Sec. 3.2: L_temp = E_t[1 - c_psi(z_t, z_{t+1})]
    consistency = (1 - positive) * pair
    # Sec. 1, 5.1: -log softmax of c_psi / tau, tau = 2.0
    # open B.pairs: "temporal contrastive learning" / here z_{t+1} against the window's other scored
    #   tokens, else a constant code were best; with tau = 2 it can gain half a nat / the window
    candidate = mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    logits = (c / cfg.tau).masked_fill(~candidate, -1e4)                  # (B, T, T)
    contrastive = (logits.logsumexp(2)[:, :-1] - positive / cfg.tau) * pair
    # Sec. 1, 5.1: evolution prediction
    surprise = sae.recompute(sae.predict, image)[:, :-1] - image[:, 1:].detach()
    prediction = surprise.pow(2).mean(-1) * pair
    return {"consistency": consistency.sum(), "contrastive": contrastive.sum(),
            "prediction": prediction.sum()}


def adversarial_loss(sae, f, mask, cfg):
    """lambda_adv L_adv of Eq. 16, summed over features: (); scalars for the log. f (B, T, F)."""
    # open B.similarity: "observed activation patterns" / here of features' codes over the step's
    #   tokens; decoder rows are slow, 0.01 % instead of 2.5 % pass their margin / --similarity
    columns = (f * mask[..., None]).flatten(0, 1) if cfg.similarity == "code" else sae.W_dec.t()
    s = similarity(columns)                                               # (F,)
    L_adv, A_spurious, log = 0.0, torch.zeros_like(s[0]), {"similarity": s.detach().mean()}
    # open B.adv: no formula / here a margin for all, orthogonality for the few with a_i > 0:
    #   L_adv = Σ_i max(0, s_i - m_i)^2 + w Σ_i a_i max(0, s_i)^2, a_i = A_i/max A above the
    #   percentile, else 0 ("proportional to attribution strength") / w: VARIANTS
    if sae.parts["margin"]:
        margin = update_margin(sae, s.detach(), cfg)
        L_adv = L_adv + F.relu(s - margin).square().sum()
        log["over_margin"] = (s > margin).float().mean()
    if sae.parts["orthogonality"]:
        A = sae.attribution / sae.attribution.max().clamp(min=1e-30)      # A_i over max A, (F,)
        above = A > torch.quantile(A, cfg.percentile)                     # Sec. 4.3
        a = A * above
        L_adv = L_adv + sae.parts["orthogonality"] * (a * F.relu(s).square()).sum()
        # open B.spurious: no formula / here, as its letter says, the mean of A_i above the
        #   percentile; "similarity": that of s_i weighted by a_i (of rows: below 0.5) / --spurious
        A_spurious = a.sum() / above.sum().clamp(min=1)
        if cfg.spurious == "similarity":
            A_spurious = a @ F.relu(s.detach()) / a.sum().clamp(min=1e-30)
        log["A_spurious"] = A_spurious
    # Eq. 7 (Sec. 4.3), Eq. 15 (Sec. 5.5): lambda_adv = max(A_spurious - 0.5, 0.1)
    log["lambda_adv"] = cfg.adv_scale * (A_spurious - 0.5).clamp(min=0.1)
    return log["lambda_adv"] * L_adv / common.world(), log               # each process its part


def similarity(columns):
    """Cosine of each column to its nearest other column, over all processes: (N, F) -> (F,)."""
    u = columns / common.total_with_gradient(columns.square().sum(0)).clamp(min=1e-24).sqrt()
    with torch.no_grad():   # a maximum's gradient is that of the pair which attains it
        nearest = common.total(u.t() @ u).fill_diagonal_(-2.0).argmax(1)  # not itself
    return common.total_with_gradient((u * u[:, nearest]).sum(0))


@torch.no_grad()
def update_margin(sae, s, cfg):
    """Running mean and deviation of each feature's s (F,) -> margins (F,): only jumps pass them."""
    alpha = torch.where(s == 0, 1.0, cfg.margin_decay if cfg.adapt else 1.0)   # silent: no s_t
    mean, std = sae.margin_mean, sae.margin_std
    # Eq. 3 (Sec. 4.2), Eq. 11 (Sec. 5.4): mu_t = alpha mu_{t-1} + (1 - alpha) s_t, mu_0 = s_0
    mean.copy_(torch.where(mean == 0, s, alpha * mean + (1 - alpha) * s))
    # Eq. 4, Eq. 12 (Sec. 5.4): sigma_t = sqrt(alpha sigma_{t-1}^2 + (1 - alpha) (s_t - mu_t)^2)
    std.copy_((alpha * std.square() + (1 - alpha) * (s - mean).square()).sqrt())
    # Eq. 5, Eq. 13 (Sec. 5.4): m_t = mu_t + 2 sigma_t
    return mean + 2 * std   # EXERCISE 10

# ---------------------------------------------------------------------------------------------
# Schedules: pure functions of the step; statistics that run over the steps
# ---------------------------------------------------------------------------------------------
def lr_factor(step, cfg):  # SAME AS tsae.py:lr_factor
    """Learning-rate multiplier: linear warm-up, then 1."""
    return min(1.0, (step + 1) / max(1, cfg.lr_warmup))


@torch.no_grad()
def update_attribution(sae, f, cfg):
    """A_i for the next step's L_adv, from the gradient that the backward pass left at the code."""
    # Eq. 6 (Sec. 4.3), Eq. 14 (Sec. 5.5): A_i = ||dL / dz_i||_2
    # open B.attribution: which L, tokens, derivative / here Eq. 16, last step; tokens with the
    #   feature on: "highly activated" (63 % of ΣA^2 came from others, where it reaches nothing);
    #   partial: not by way of higher levels (the total one: 80 % the same) / --attribution all
    grad = f.grad * (f > 0) if cfg.attribution == "active" else f.grad    # (B, T, F)
    sae.attribution.copy_(common.total(grad.square().sum((0, 1))).sqrt())


@torch.no_grad()
def update_monitor(sae, f, p, choice, mask, n, step, cfg):
    """Sec. 5.2: EMAs of features and routing, plain means at first; n () tokens in all."""
    # open B.ema: 0.95 (Sec. 5.1, 6.1) or 0.99 (Sec. 5.2) for feature statistics / here 0.95 for the
    #   margins (Eq. 3), 0.99 for what is monitored / --margin_decay, --monitor_decay
    def mean(*values):
        sums = torch.stack([(v * mask[..., None]).sum((0, 1)) for v in values])
        return common.total(sums) / n.clamp(min=1)
    rate = max(1 - cfg.monitor_decay, 1 / (step + 1)) * (n > 0)           # no token: no change
    sae.feature_ema.lerp_(mean(f, f.square(), f > 0), rate)               # (3, F)
    sae.route_ema.lerp_(mean(choice, torch.special.entr(p)), rate)        # (2, L)


@torch.no_grad()
def level_metrics(sae):
    """Sec. 6.1: variance, mean square, L0, share and entropy of each level, from the EMAs."""
    mean, square, active = sae.feature_ema
    table = {"variance": [v.mean() for v in (square - mean.square()).split(sae.sizes)],
             "mean_square": [v.mean() for v in square.split(sae.sizes)],
             "L0": [v.sum() for v in active.split(sae.sizes)],
             "share": sae.route_ema[0], "entropy": sae.route_ema[1]}
    out = {f"{k}_{i + 1}": v for k, column in table.items() for i, v in enumerate(column)}
    for name in ("variance", "mean_square"):   # top level against lowest; the paper: 0.40
        out[f"{name}_drop"] = 1 - table[name][-1] / table[name][0].clamp(min=1e-30)
    return {**out, "entropy": sae.route_ema[1].sum()}                     # of a token, <= log L

# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def train(cfg, acts):
    """Train one SAE on the activations of one layer (common.Activations). -> evaluation."""
    sae = HierarchicalSAE(acts.D, cfg).to(acts.device)
    with torch.no_grad():
        # open S.scale: not given / here one scalar makes the mean norm sqrt(D)
        # open S.lambda: on activations of norm 1, 0.04 is 0.04 sqrt(D) here (D = 576: 0.96) / --l1
        # open S.sinks: not given / here masked (norm > 10 times the median) / else EV is 0.999
        sae.scale.fill_(acts.scale)
        sae.b_dec.copy_(acts.mean / acts.scale)
    # open S.decay: "Adam" (Sec. 5.1) / here AdamW without decay, which is Adam / --weight_decay
    opt = torch.optim.AdamW(sae.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    name = cfg.variant + f"-topk{cfg.k}" * (cfg.activation == "topk")
    run = common.Run(__file__, name, cfg, acts, sae, opt)
    compute = common.compiled(losses, cfg)   # --compile, or losses itself

    for step in run.steps():
        # 1. batch
        x, mask = acts.batch(step)                                        # (b, T, D), (b, T)
        n = common.total(mask.sum())                                      # scored, all processes
        # 2. forward and losses   3. backward
        with acts.autocast():
            terms, stats, (f, p, choice) = compute(sae, x, mask, n, step, cfg)
        scalars = {}
        if sae.parts["margin"] or sae.parts["orthogonality"]:
            terms["adversarial"], scalars = adversarial_loss(sae, f, mask, cfg)
        opt.zero_grad()
        sum(terms.values()).backward()
        common.sum_gradients(sae)                                         # across processes
        # 4. constrain the gradient
        # open S.projection: not given / here the part along a row goes / --no-project_gradient
        if cfg.project_gradient:
            remove_parallel_gradient(sae)
        if cfg.clip:
            nn.utils.clip_grad_norm_(sae.parameters(), cfg.clip)
        # 5. step   6. renormalise
        opt.param_groups[0]["lr"] = cfg.lr * lr_factor(step, cfg)
        opt.step()
        normalize_decoder(sae)
        # 7. bookkeeping
        if sae.parts["orthogonality"]:
            update_attribution(sae, f, cfg)
        update_monitor(sae, f, p, choice, mask, n, step, cfg)
        # ---------------------------------------------------------------------------------------
        run.log(step, {**terms, **stats}, lr=opt.param_groups[0]["lr"], **scalars,
                **(level_metrics(sae) if run.log_due(step) else {}))
    return run.evaluate(PAPER, extra_metrics)


def extra_metrics(sae, acts):
    """Results beside the evaluations of --eval."""
    out = {"levels": {k: v.item() for k, v in level_metrics(sae).items()}} if sae.levels > 1 else {}
    if hasattr(sae, "gru"):
        out["evolution"] = {"skill": prediction_skill(sae, acts)}
    return out


@torch.no_grad()
def prediction_skill(sae, acts):
    """1 - squared error of the evolution prediction / that of "nothing changes" (0 = no better)."""
    sums = {"error": 0.0, "unchanged": 0.0}
    for x, mask in acts.heldout():
        image = sae.encode(x, mask) @ sae.W_dec * mask[..., None]
        pair = (mask[:, :-1] & mask[:, 1:])[..., None]
        for name, guess in (("error", sae.predict(image)), ("unchanged", image)):
            sums[name] += ((guess[:, :-1] - image[:, 1:]) * pair).double().square().sum().item()
    return 1 - sums["error"] / max(sums["unchanged"], 1e-30)

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------
def main(argv=None):
    """Command line; returns the exit status."""
    return common.launch(__doc__, Config, train, LAPTOP, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
