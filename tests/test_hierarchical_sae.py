"""hierarchical_sae.py (paper B) against token-by-token references and torch's own layers."""
import hierarchical_sae             # before torch: common.py sets how OpenMP threads wait
import math

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import common
import tsae
from tests.helpers import config
from tests.test_scripts import agree, cosine, keep_largest, logged, mixed, recovered, shake

VARIANTS = tuple(hierarchical_sae.VARIANTS)


def hs(D=16, shift=0.6, **values):
    """An untrained model in which nothing is zero; its Config."""
    cfg = config(hierarchical_sae, **{"T": 10, "k": 6, "gru_divisor": 4, "checkpointing": False,
                                      **values})
    sae = shake(hierarchical_sae.HierarchicalSAE(D, cfg), scale=1.7)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.b_enc.add_(shift)
        for name, p in sae.named_parameters():
            if p.dim() == 2 and not name.startswith(("W_enc", "W_dec")):
                p.copy_(torch.randn(p.shape, generator=gen) / math.sqrt(p.shape[1]))
        for name, value in sae.named_buffers():
            if name in ("margin_mean", "margin_std", "attribution"):
                value.copy_(0.3 * torch.rand(value.shape, generator=gen))
        if hasattr(sae, "margin_mean"):
            sae.margin_mean[::5] = 0.0                         # features not seen yet
    return sae, cfg


# --- Eq. 1, 2, 9, 10: token mixing -----------------------------------------------------------


def linear_layer(p, name, v):
    out = p[f"{name}.weight"] @ v
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def local(p, h, mask, cfg):
    """Eq. 10: Conv1D(ReLU(Conv1D(h))), kernel 3, padding 1; masked tokens stay 0."""
    before = (-2, -1, 0) if cfg.causal else (-1, 0, 1)

    def convolve(name, rows):
        zero = torch.zeros_like(rows[0])
        out = []
        for t in range(len(rows)):
            window = [rows[t + i] if 0 <= t + i < len(rows) else zero for i in before]
            out.append(linear_layer(p, name, torch.cat(window)))
        return out
    hidden = [torch.relu(v) * mask[t] for t, v in enumerate(convolve("conv1", h))]
    return convolve("conv2", hidden)


def attend(p, h, mask, cfg, heads=8):
    """Eq. 2, 9: MultiHead(W_Q x, W_K x, W_V x); keys are the scored tokens and oneself."""
    size = len(h[0]) // heads
    q, k, v = (torch.stack(rows) for rows in zip(*[
        linear_layer(p, "W_qkv", row).view(3, heads, size).unbind() for row in h]))   # (T, H, size)
    out = []
    for t in range(len(h)):
        if not mask[t]:
            out.append(torch.zeros_like(h[t]))                 # nobody reads it
            continue
        keys = [u for u in range(len(h)) if (mask[u] or u == t) and (u <= t or not cfg.causal)]
        each = []
        for i in range(heads):
            weight = torch.exp(k[keys, i] @ q[t, i] / math.sqrt(size))
            each.append(weight / weight.sum() @ v[keys, i])
        out.append(linear_layer(p, "W_out", torch.cat(each)))
    return out


def context(p, h, mask, cfg):
    """Eq. 1, as it is composed: what the encoder reads."""
    h = [row * mask[t] for t, row in enumerate(h)]
    near = local(p, h, mask, cfg) if cfg.conv else h
    if cfg.compose == "literal":                               # f_temp(f_local(h))
        return attend(p, near, mask, cfg)
    if cfg.compose == "parallel":                              # Sec. 5.3: complementary
        far = attend(p, h, mask, cfg)
        return [a + b + c if cfg.conv else a + b for a, b, c in zip(h, far, near)]
    return [a + b for a, b in zip(h, attend(p, near, mask, cfg))]


# --- Sec. 1, 3.2: levels, routing, code ------------------------------------------------------


def route(p, h, levels, cfg):
    """The router's choice for one token (sums to 1), and the gate that multiplies each level."""
    if levels == 1:
        return torch.ones(1).double(), torch.ones(1).double()
    logits = linear_layer(p, "router", h)
    share = torch.exp(logits) / torch.exp(logits).sum()
    if cfg.routing == "soft":
        return share, levels * share
    choice = torch.zeros(levels).double()
    choice[share.argmax()] = 1.0
    choice = choice + share - share.detach()                   # straight-through: forward one-hot
    if cfg.routing == "top1":
        return choice, choice
    return choice, torch.stack([sum(choice[level:]) for level in range(levels)])   # nested


def encode_window(p, x, mask, sizes, cfg, parts):
    """Codes f_t and choices of levels of one window, x (T, D) in units of the scale."""
    h = [v - p["b_dec"] for v in x]
    read = context(p, h, mask, cfg) if parts["temporal"] else h
    codes, choices = [], []
    for t in range(len(h)):
        choice, gate = route(p, h[t], len(sizes), cfg)
        rest, code, first = read[t], [], 0
        for level, size in enumerate(sizes):                   # level l codes what is left over
            here = slice(first, first + size)
            pre = rest @ p["W_enc"][:, here] + p["b_enc"][here]
            if cfg.activation == "topk":
                share = (cfg.k + len(sizes) - 1 - level) // len(sizes)     # larger ones first
                z = keep_largest(pre, min(cfg.k, size) if cfg.routing == "top1" else share)
            else:
                z = torch.relu(pre)
            code.append(z * gate[level])
            rest, first = rest - code[-1] @ p["W_dec"][here], first + size
        codes.append(torch.cat(code))
        choices.append(choice)
    return codes, choices


def consistency(a, b, p, cfg):
    """c_psi: cosine of the codes, each feature times its learned positive weight."""
    if cfg.consistency == "learned":
        a, b = a * torch.exp(p["log_psi"]), b * torch.exp(p["log_psi"])
    return cosine(a, b)


def gru(p, rows):
    """Two GRU layers over one window, then W_next."""
    for layer in range(2):
        w, u, b, c = (p[f"gru.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih",
                                                             "bias_hh"))
        state, out = torch.zeros(len(b) // 3).double(), []
        for v in rows:
            i, s = (w @ v + b).chunk(3), (u @ state + c).chunk(3)
            reset, update = torch.sigmoid(i[0] + s[0]), torch.sigmoid(i[1] + s[1])
            new = torch.tanh(i[2] + reset * s[2])
            state = (1 - update) * new + update * state
            out.append(state)
        rows = out
    return [linear_layer(p, "W_next", v) for v in rows]


def nearest_cosines(columns):
    """s_i: the largest cosine of each vector to another one."""
    return [max((cosine(a, b) for j, b in enumerate(columns) if j != i), key=lambda v: v.item())
            for i, a in enumerate(columns)]


def adversarial(p, codes, cfg, parts):
    """Eq. 3 to 7, 16: lambda_adv L_adv. codes: f_t of all scored tokens."""
    columns = list(torch.stack(codes).t()) if cfg.similarity == "code" else list(p["W_dec"])
    s, total, spurious = nearest_cosines(columns), 0.0, 0.0
    if parts["margin"]:
        alpha = cfg.margin_decay if cfg.adapt else 1.0
        for i, value in enumerate(s):
            v, mean, std = value.item(), p["margin_mean"][i].item(), p["margin_std"][i].item()
            mean = v if mean == 0 else alpha * mean + (1 - alpha) * v          # Eq. 3
            std = math.sqrt(alpha * std ** 2 + (1 - alpha) * (v - mean) ** 2)         # Eq. 4
            total = total + (value - (mean + 2 * std)).clamp(min=0) ** 2              # Eq. 5
    if parts["orthogonality"]:
        A = [v / max(p["attribution"].max().item(), 1e-30) for v in p["attribution"].tolist()]
        limit = numpy.quantile(A, cfg.percentile)
        above = [i for i in range(len(A)) if A[i] > limit]
        for i in above:
            total = total + parts["orthogonality"] * A[i] * s[i].clamp(min=0) ** 2
        if cfg.spurious == "attribution":
            spurious = sum(A[i] for i in above) / max(1, len(above))
        else:
            weighted = sum(A[i] * max(0.0, s[i].item()) for i in above)
            spurious = weighted / max(sum(A[i] for i in above), 1e-30)
    return cfg.adv_scale * max(spurious - 0.5, 0.1) * total                           # Eq. 7


def reference(x, mask, sizes, cfg):
    """Eq. 8, 16: the weighted terms."""
    parts = hierarchical_sae.VARIANTS[cfg.variant]

    def terms(p):
        n, out, scored, share = mask.sum().item(), {"recon": 0.0}, [], 0.0
        for b in range(len(x)):
            m, h = mask[b].tolist(), x[b].double() / p["scale"]
            if not any(m):
                continue
            f, choices = encode_window(p, h, m, sizes, cfg, parts)
            image = [f[t] @ p["W_dec"] * m[t] for t in range(len(f))]
            for t in range(len(f)):
                if not m[t]:
                    continue
                error = ((h[t] - (image[t] + p["b_dec"])) ** 2).sum()
                error = error / len(h[t]) if cfg.recon_reduction == "mean" else error
                out["recon"] = out["recon"] + error / n
                if cfg.activation == "relu":
                    size = f[t].sum() / (len(f[t]) if cfg.l1_reduction == "mean" else 1)   # f >= 0
                    out["l1"] = out.get("l1", 0.0) + cfg.l1 * size / n
                share = share + choices[t]
                scored.append(f[t])
            if not (parts["temporal"] and cfg.lambda_temp):
                continue
            predicted = gru(p, image)
            for t in range(len(f) - 1):
                if not (m[t] and m[t + 1]):
                    continue
                c = {u: consistency(f[t], f[u], p, cfg) for u in range(len(f)) if u != t and m[u]}
                rest = sum(torch.exp(v / cfg.tau) for v in c.values())
                gap = (predicted[t] - image[t + 1].detach()) ** 2
                for name, value in (("consistency", 1 - c[t + 1]),
                                    ("contrastive", torch.log(rest) - c[t + 1] / cfg.tau),
                                    ("prediction", gap.sum() / len(gap))):
                    out[name] = out.get(name, 0.0) + cfg.lambda_temp * value / n
        if len(sizes) > 1:
            share = share / share.sum()
            entropy = -sum(v * torch.log(v.clamp(min=1e-12)) for v in share)
            out["routing"] = cfg.routing_weight * (math.log(len(sizes)) - entropy)
        if parts["margin"] or parts["orthogonality"]:
            out["adversarial"] = adversarial(p, scored, cfg, parts)
        return out
    return terms


def terms_of(sae, x, mask, cfg):
    """All terms of a step, as train() puts them together; statistics; what losses returns."""
    terms, stats, (f, p, gate) = hierarchical_sae.losses(sae, x, mask, mask.sum(), 0, cfg)
    if sae.parts["margin"] or sae.parts["orthogonality"]:
        terms["adversarial"] = hierarchical_sae.adversarial_loss(sae, f, mask, cfg)[0]
    return terms, stats, f


CASES = tuple(dict(variant=name) for name in VARIANTS) + (
    dict(conv=False), dict(compose="literal"), dict(compose="parallel"), dict(causal=True),
    dict(compose="parallel", conv=False, causal=True), dict(consistency="cosine", tau=0.2),
    dict(lambda_temp=0.0), dict(gru_divisor=1, checkpointing=True), dict(activation="topk"),
    *(dict(variant="hierarchical", **flags) for flags in (
        dict(levels=1), dict(levels=5), dict(routing="top1"), dict(routing="soft"),
        dict(activation="topk", expansion=3), dict(activation="topk", routing="top1"),
        dict(activation="topk", routing="soft"),
        dict(recon_reduction="mean", l1_reduction="mean"))),
    *(dict(variant="self-aligning", **flags) for flags in (
        dict(similarity="decoder"), dict(adapt=False), dict(margin_decay=0.5))),
    *(dict(variant="adversarial", **flags) for flags in (
        dict(activation="topk", expansion=4), dict(l1=1.0), dict(percentile=0.3),
        dict(adv_scale=7.0), dict(spurious="similarity", similarity="decoder", percentile=0.0))),
    dict(variant="disentangled", spurious="similarity"))


def check(flags, x, mask, **more):
    sae, cfg = hs(**flags, **more)

    def compute(sae):
        return terms_of(sae, x.to(sae.W_dec), mask, cfg)
    agree(sae, lambda sae: compute(sae)[0], reference(x, mask, sae.sizes, cfg), flags)
    _, stats, f = compute(sae)
    logged(stats, f, sae, x, mask, flags)
    return f.detach()


def test_hierarchical_losses_equal_the_equations():
    x, mask = mixed(T=10, D=16, seed=6)
    for flags in CASES:
        check(flags, x, mask)


def test_hierarchical_tokens_without_a_feature():
    """Their c_psi is 0 and passes no gradient (through the straight-through gate it would, 1e8)."""
    x, mask = mixed(T=10, D=16, seed=2)
    for flags in ({}, dict(routing="top1"), dict(activation="topk", routing="top1")):
        f = check(flags, x, mask, shift=0.0)
        assert not f[mask].any(-1).all(), flags


# --- Limits, torch's own layers, who reads whom ----------------------------------------------


def test_hierarchical_one_level_is_the_standard_sae():
    x, mask = mixed(T=10, D=16)
    for flags in ({}, dict(activation="topk"), dict(activation="topk", expansion=4)):
        sae, cfg = hs(variant="hierarchical", levels=1, **flags)
        plain = tsae.TSAE(16, config(tsae, temporal=False, k=6, **flags))
        state = sae.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        assert torch.allclose(sae.encode(x, mask), plain.encode(x), atol=1e-5) and sae.causal
        ours, theirs = (module.losses(model, x, mask, mask.sum(), 0, model.cfg)[0]
                        for module, model in ((hierarchical_sae, sae), (tsae, plain)))
        assert set(ours) == set(theirs) and not hasattr(sae, "router")
        assert all(abs(ours[k] - theirs[k]) < 1e-5 * theirs[k] for k in ours), flags


def test_hierarchical_levels_are_gated_as_declared():
    """depth: a level only on top of those below it; top1: one level a token; soft: all of them.
    The router sees its own token only; with TopK no token has more than k features."""
    x, mask = mixed(T=10, D=16)
    other = x.clone()
    other[:, 5] += 1
    for routing in ("depth", "top1", "soft"):
        sae, cfg = hs(variant="hierarchical", routing=routing, shift=2.0)      # features are on
        f, p, choice = sae.code(x, mask)
        on = torch.stack([(part > 0).any(-1) for part in f.split(sae.sizes, -1)], -1)   # (B, T, 3)
        level, chosen = torch.arange(3), p.argmax(-1)[..., None]
        want = {"depth": level <= chosen, "top1": level == chosen, "soft": level < 3}[routing]
        assert torch.equal(on, want.expand_as(on)) and chosen.unique().numel() == 3, routing
        assert torch.allclose(choice.sum(-1), torch.ones(3, 10)) and sae.sizes == [6, 5, 5]
        sparse, _ = hs(variant="hierarchical", routing=routing, activation="topk", shift=2.0)
        assert (sparse.encode(x) > 0).sum(-1).max() == 6, routing
        mixing, _ = hs(routing=routing)
        moved = (mixing.code(x, mask)[1] - mixing.code(other, mask)[1]).abs().amax((0, 2)) > 0
        assert moved.nonzero().flatten().tolist() == [5], routing


def test_hierarchical_equals_torch_layers():
    """Conv1d and MultiheadAttention; a GRU that never looks ahead; no key at all is no NaN."""
    x, mask = mixed(T=10, D=16)
    h, some = x[:2] / 2, mask[:2].clone()
    some[:, 0] = True                                          # else token 0 has no key at all
    for causal in (False, True):
        sae, _ = hs(causal=causal)
        v = h.transpose(1, 2)
        for layer in (sae.conv1, sae.conv2):
            conv = nn.Conv1d(16, 16, 3, padding=0 if causal else 1)
            conv.weight.data = layer.weight.detach().view(16, 3, 16).transpose(1, 2)
            conv.bias.data = layer.bias.detach()
            v = F.relu(v) if layer is sae.conv2 else v
            v = conv(F.pad(v, (2, 0)) if causal else v)
        ours = sae.local(h, torch.ones_like(some))
        assert torch.allclose(ours, v.transpose(1, 2), atol=1e-5), causal
        ref = nn.MultiheadAttention(16, hierarchical_sae.HEADS, bias=False, batch_first=True)
        ref.in_proj_weight, ref.out_proj.weight = sae.W_qkv.weight, sae.W_out.weight
        hide = torch.ones(10, 10, dtype=torch.bool).triu(1) if causal else None
        y = ref(h, h, h, key_padding_mask=~some, attn_mask=hide, need_weights=False)[0]
        assert torch.allclose(sae.attend(h, some)[some], y[some], atol=1e-5), causal
        assert sae.encode(x, mask & False).isfinite().all()
    other = x.clone()
    other[:, 5] += 1
    early = (sae.predict(x) - sae.predict(other)).abs().amax((0, 2))
    assert (early[:5] == 0).all() and (early[5:] > 0).all()
    try:
        hs(D=12)
    except common.UserError as error:
        assert "heads" in str(error)
    else:
        raise AssertionError("a width that 8 heads do not divide was accepted")


# --- Terms and statistics by hand ------------------------------------------------------------


def test_hierarchical_routing_and_contrast_by_hand():
    """Routing: 0 if the levels share the batch evenly, however tokens choose; log L if one has all.
    Constant codes: 1 - c_psi = 0, but the contrast sees nothing to prefer: log 8 a pair."""
    mask, eye = torch.tensor([[True] * 4, [True, True, False, False]]), torch.eye(3)
    for choice, want in (
            (torch.full((2, 4, 3), 1 / 3), 0.0), (eye[torch.zeros(2, 4).long()], math.log(3)),
            (eye[torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])], 0.0),
            (eye[torch.tensor([[0, 1, 0, 1], [0, 1, 2, 2]])], math.log(3) - math.log(2))):
        assert abs(hierarchical_sae.routing_loss(choice, mask, mask.sum()) - want) < 1e-5, want
    sae, cfg = hs()
    f, mask = torch.rand(2, 1, 16).expand(-1, 9, -1), torch.ones(2, 9, dtype=torch.bool)
    terms = hierarchical_sae.temporal_losses(sae, f, torch.zeros(2, 9, 16), mask, cfg)
    assert abs(terms["consistency"]) < 1e-4 and abs(terms["contrastive"] - 16 * math.log(8)) < 1e-4


def test_hierarchical_margin_by_hand():
    """Eq. 3 to 5: a jump passes its margin, a drift never, noise at 2 % of the steps. Eq. 7."""
    def margins(values, **flags):
        sae, cfg = hs(variant="self-aligning", **flags)
        sae.margin_mean.fill_(0.0), sae.margin_std.fill_(0.0)
        return [(s, hierarchical_sae.update_margin(sae, s, cfg)) for s in values]
    mean, std, values = 0.2, 0.0, (0.2, 0.4, 0.4, 0.1)
    for s, margin in margins([torch.full((16,), s) for s in values]):
        mean = 0.95 * mean + 0.05 * s[0]
        std = math.sqrt(0.95 * std ** 2 + 0.05 * (s[0] - mean) ** 2)
        assert torch.allclose(margin, mean + 2 * torch.tensor(std)), s[0]
    fixed = margins([torch.full((16,), s) for s in values], adapt=False)
    assert all(torch.allclose(margin, torch.tensor(0.2)) for _, margin in fixed)
    drift = margins([torch.full((16,), 0.1 + 0.002 * step) for step in range(200)])
    assert any(s[0] > m[0] for s, m in drift[:10]) and not any(s[0] > m[0] for s, m in drift[60:])
    gen = torch.Generator().manual_seed(0)
    noise = margins([0.3 + 0.05 * torch.randn(16, generator=gen) for _ in range(1000)])[200:]
    assert 0.01 < sum((s > m).float().mean().item() for s, m in noise) / len(noise) < 0.03
    found = hierarchical_sae.adversarial_weight(torch.tensor([0.0, 0.6, 0.61, 0.9, 1.0]))
    assert torch.allclose(found, torch.tensor([0.1, 0.1, 0.11, 0.4, 0.5]))


def test_hierarchical_attribution_is_the_gradient_at_the_code():
    """Eq. 6 for a linear decoder: dL/dz = 2/n (x_hat - x) W_dec^T + lambda_1/n, scored tokens."""
    x, mask = mixed(T=10, D=16)
    found = {}
    for which in ("active", "all"):
        sae, cfg = hs(variant="adversarial", attribution=which, similarity="decoder")
        terms, _, f = terms_of(sae, x, mask, cfg)
        sum(terms.values()).backward()
        hierarchical_sae.update_attribution(sae, f, cfg)
        grad = 2 * ((sae.decode(f) - x) / 1.7) @ sae.W_dec.t() + 0.04
        grad = grad / mask.sum() * (f > 0 if which == "active" else 1)
        assert torch.allclose(sae.attribution, grad[mask].norm(dim=0), rtol=1e-4), which
        found[which] = sae.attribution
    assert (found["active"] <= found["all"]).all() and not found["all"].requires_grad


def test_hierarchical_monitor_by_hand():
    """Sec. 5.2: plain means until their weight falls to 1 - 0.99, then the newest counts 1 %;
    Sec. 6.1 from them; a step without a scored token leaves every statistic."""
    x, mask = mixed(T=10, D=16)
    sae, cfg = hs(variant="hierarchical")
    means = []
    for step, batch in ((0, x), (1, 2 * x), (1000, 3 * x)):
        f, p, choice = (v.detach() for v in sae.code(batch, mask))
        hierarchical_sae.update_monitor(sae, f, p, choice, mask, mask.sum(), step, cfg)
        f, p, choice = f[mask], p[mask], choice[mask]
        means.append((torch.stack([f.mean(0), f.square().mean(0), (f > 0).float().mean(0)]),
                      torch.stack([choice.mean(0), -(p * p.log()).mean(0)])))
        for ema, values in zip((sae.feature_ema, sae.route_ema), zip(*means)):
            want = sum(values[:2]) / len(values[:2])
            want = want if step < 1000 else 0.99 * want + 0.01 * values[2]
            assert torch.allclose(ema, want, rtol=1e-4, atol=1e-6), step
    levels, (mean, square, active) = hierarchical_sae.level_metrics(sae), sae.feature_ema
    variance = [part.mean() for part in (square - mean ** 2).split(sae.sizes)]
    assert abs(levels["variance_drop"] - (1 - variance[2] / variance[0])) < 1e-6
    assert abs(levels["L0_2"] - active[6:11].sum()) < 1e-6
    assert abs(levels["share_3"] - sae.route_ema[0, 2]) < 1e-6
    sae, cfg = hs()
    sae.margin_mean.fill_(0.5)
    before = {name: value.clone() for name, value in sae.named_buffers()}
    terms, _, f = terms_of(sae, x, mask & False, cfg)
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())
    for name in ("margin_mean", "margin_std"):
        assert torch.equal(before[name], getattr(sae, name)), name


def test_hierarchical_readings_differ_where_they_should():
    """Two readings of an open point: other terms where it acts, the same where it cannot."""
    x, mask = mixed(T=10, D=16)

    def terms(**flags):
        sae, cfg = hs(**flags)
        return {name: value.item() for name, value in terms_of(sae, x, mask, cfg)[0].items()}
    for flag, values, acts, idle in (
            ("similarity", ("code", "decoder"), "self-aligning", "hierarchical"),
            ("spurious", ("attribution", "similarity"), "adversarial", "self-aligning"),
            ("routing", ("depth", "top1"), "hierarchical", "adversarial"),
            ("routing", ("depth", "soft"), "temporal", "disentangled"),
            ("compose", ("residual", "literal"), "temporal", "hierarchical"),
            ("consistency", ("learned", "cosine"), "temporal", "hierarchical")):
        a, b = (terms(variant=acts, **{flag: value}) for value in values)
        assert any(abs(a[name] - b[name]) > 1e-4 * abs(a[name]) for name in a), (flag, values)
        a, b = (terms(variant=idle, **{flag: value}) for value in values)
        assert a == b, (flag, values)


def test_hierarchical_finds_the_tree():
    """Parents on lower levels than children; the router tells tokens with a child from others."""
    found = recovered("hierarchical_sae", "--plant", "tree", "--variant", "hierarchical")
    assert found["parents_lower"] > 0 and found["router_shift"] > 0.05, found
