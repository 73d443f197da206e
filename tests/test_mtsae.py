"""mtsae.py (papers A and D) against token-by-token references and torch's own layers."""
import mtsae                        # before torch: common.py sets how OpenMP threads wait
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import Heldout, config, folder, log, run, tiny
from tests.test_scripts import (agree, cosine, keep_largest, layer_norm, logged, mixed, reads,
                                shake)

CIRCULAR, CAUSAL = (-1, 0, 1), (-2, -1, 0)      # taps of the kernels, times the dilation rate
PAPERS = ("extraction", "unlearning")


def mts(variant="extraction", D=6, **values):
    """An untrained MTSAE with random kernels, gains and biases; its Config."""
    cfg = config(mtsae, variant=variant, **{"T": 20, "k": 3, **values})
    sae, gen = shake(mtsae.MTSAE(D, cfg)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.kernels.copy_(0.5 * torch.randn(sae.kernels.shape, generator=gen))
        sae.mean.copy_(0.3 * torch.randn(D, generator=gen))
    return sae, cfg


def counts(mask):
    """Scored tokens and scored pairs of neighbours: what losses() divides by."""
    return torch.stack([mask.sum(), (mask[:, 1:] & mask[:, :-1]).sum()])


# --- Eq. A.2 to A.6, D.2 to D.4, and the paddings of Sec. A.4.4 ------------------------------


def read(x, mask, t, p, cfg):
    """What a convolution reads at place t of one window, x (T, D) in units of the scale."""
    last = max((u for u, scored in enumerate(mask) if scored), default=-1)
    if cfg.padding == "circular":
        t = t % max(len(x), cfg.T)                             # circular padding of T tokens
    t = min(t, last)                                           # replication of the last token
    mean = 0.0 if cfg.center else p["mean"]
    if t < 0 or not mask[t]:
        return torch.zeros_like(p["mean"]) + mean              # no token that counts: the mean
    return x[t] - p["mean"] + mean


def convolution(x, mask, t, k, rate, p, cfg):
    """C_r of kernel 3, depth-wise, at token t."""
    taps = CAUSAL if cfg.padding == "causal" else CIRCULAR
    return sum(p["kernels"][k, j] * read(x, mask, t + rate * tap, p, cfg)
               for j, tap in enumerate(taps))


def batch_norm(h, mask, gain, bias):
    """h[b][t]: each channel over the scored tokens of the batch; variance in two passes."""
    scored = [h[b][t] for b in range(len(h)) for t in range(len(h[b])) if mask[b][t]]
    mean = sum(scored) / len(scored)
    variance = sum((v - mean) ** 2 for v in scored) / len(scored)
    return [[(v - mean) / torch.sqrt(variance + 1e-5) * gain + bias for v in row] for row in h]


def temporal_stage(x, mask, p, cfg):
    """Eq. A.3 with its batch norm, or Eq. D.2: what the encoder reads, h[b][t]."""
    rates = [int(r) for r in cfg.rates.split(",")]
    x, mask = x.double() / p["scale"], mask.tolist()

    def everywhere(function):
        return [[function(x[b], mask[b], t) for t in range(x.shape[1])] for b in range(len(x))]
    if cfg.variant == "unlearning":
        # z_k = LayerNorm(C_{r_k}(h)); [z_1; ...; z_K]
        return everywhere(lambda x, m, t: torch.cat([
            layer_norm(convolution(x, m, t, k, r, p, cfg), p[f"ln.{k}.weight"], p[f"ln.{k}.bias"])
            for k, r in enumerate(rates)]))
    # h_i = Conv_i(A, r_i) + A
    branches = [everywhere(lambda x, m, t: convolution(x, m, t, k, r, p, cfg)
                           + read(x, m, t, p, cfg)) for k, r in enumerate(rates)]
    if cfg.batch_norm == "branch":
        branches = [batch_norm(h, mask, p[f"bn.{k}.weight"], p[f"bn.{k}.bias"])
                    for k, h in enumerate(branches)]
    h = [[sum(branch[b][t] for branch in branches) / len(rates) for t in range(x.shape[1])]
         for b in range(len(x))]
    return batch_norm(h, mask, p["bn.weight"], p["bn.bias"]) if cfg.batch_norm == "average" else h


def reference(x, mask, cfg):
    """Eq. A.2, A.6 or Eq. D.4: the weighted terms, averaged over scored tokens or pairs."""
    def terms(p):
        n, pairs = counts(mask).tolist()
        h = temporal_stage(x, mask, p, cfg)
        out = {"recon": 0.0}
        for b in range(len(x)):
            f = []
            for t in range(x.shape[1]):
                pre = h[b][t] @ p["W_enc"] + p["b_enc"]        # Eq. A.4, D.3
                f.append(keep_largest(pre, cfg.k) if cfg.activation == "topk" else torch.relu(pre))
                if not mask[b, t]:
                    continue
                error = x[b, t].double() / p["scale"] - (f[t] @ p["W_dec"] + p["b_dec"])   # Eq. A.5
                square = (error ** 2).sum()
                square = square / len(error) if cfg.recon_reduction == "mean" else square
                recon = square if cfg.recon == "squared" else torch.sqrt(square)
                out["recon"] = out["recon"] + cfg.recon_weight * recon / n
                if cfg.activation == "relu":
                    out["l1"] = out.get("l1", 0.0) + cfg.l1 * f[t].abs().sum() / n
                if cfg.variant == "unlearning" and cfg.separation:
                    K = len(cfg.rates.split(","))
                    z = h[b][t].view(K, -1)
                    total = sum(cosine(z[i], z[j]).clamp(min=0) for i in range(K) for j in range(K)
                                if i != j)
                    share = cfg.separation * total / max(1, K * (K - 1)) / n
                    out["separation"] = out.get("separation", 0.0) + share
            if cfg.variant == "extraction" and cfg.coherence:
                for t in range(x.shape[1] - 1):
                    if mask[b, t] and mask[b, t + 1]:
                        share = -cfg.coherence * cosine(f[t], f[t + 1]) / pairs
                        out["coherence"] = out.get("coherence", 0.0) + share
        return out
    return terms


CASES = tuple(dict(variant=variant, **flags) for variant in ("extraction", "unlearning")
              for flags in ({}, dict(padding="causal"), dict(rates="1,2,4"), dict(T=26),
                            dict(padding="causal", T=26), dict(activation="topk"),
                            dict(activation="topk", expansion=4),   # F / k = 8: the fast path
                            dict(l1=1.0, recon_reduction="mean"), dict(rates="2", recon="norm")))
CASES += (dict(center=False), dict(variant="unlearning", center=True, recon="squared"),
          dict(variant="unlearning", padding="causal", center=True), dict(coherence=0.0),
          dict(coherence=3.0), dict(variant="unlearning", separation=0.0),
          dict(variant="unlearning", separation=3.0), dict(batch_norm="off"),
          dict(batch_norm="average"), dict(batch_norm="average", padding="causal", rates="2,16"),
          dict(batch_norm="off", center=False, padding="causal"))


def test_mtsae_losses_equal_the_equations():
    x, mask = mixed()
    for flags in CASES:
        sae, cfg = mts(**flags)

        def compute(sae):
            return mtsae.losses(sae, x.to(sae.W_dec), mask, counts(mask), 0, cfg)
        agree(sae, lambda sae: compute(sae)[0], reference(x, mask, cfg), flags)
        logged(*compute(sae)[1:], sae, x, mask, flags)
# --- torch's own layers, limits, what reads what ---------------------------------------------


def norms(sae):
    """The batch norms of a model."""
    bn = getattr(sae, "bn", [])
    return bn if isinstance(bn, nn.ModuleList) or not bn else [bn]


def conv1d(x, kernel, rate, padding):
    """nn.Conv1d, depth-wise and dilated, with our kernel (3, D): (B, T, D) -> (B, T, D)."""
    D, causal = kernel.shape[1], padding == "causal"
    conv = nn.Conv1d(D, D, 3, dilation=rate, groups=D, bias=False,
                     padding=0 if causal else rate, padding_mode="circular")
    conv.weight.data = kernel.detach().t()[:, None]
    return conv(F.pad(x.transpose(1, 2), (2 * rate * causal, 0))).transpose(1, 2)


def test_mtsae_equals_torch_layers():
    """Conv1d, BatchNorm1d (with its running statistics) and LayerNorm on unmasked windows."""
    x, _ = mixed(T=40)
    for padding in ("circular", "causal"):
        for norm in ("branch", "average", "off"):
            sae, _ = mts(T=40, padding=padding, batch_norm=norm)
            token = x / 2 - sae.mean
            h = torch.stack([conv1d(token, w, r, padding) + token
                             for w, r in zip(sae.kernels, sae.rates)]).detach()    # (K, B, T, D)
            h = h.mean(0, keepdim=True) if norm == "average" else h
            for i, ours in enumerate(norms(sae)):
                bn = nn.BatchNorm1d(6, momentum=1.0)
                bn.weight.data, bn.bias.data = ours.weight.detach(), ours.bias.detach()
                h[i] = bn(h[i].flatten(0, 1)).view_as(h[i]).detach()
            assert torch.allclose(sae.temporal(x), h.mean(0), atol=1e-5), (padding, norm)
            sae.eval()                         # after one batch the running statistics are its own
            assert torch.allclose(sae.temporal(x), h.mean(0), atol=1e-4), (padding, norm)
        sae, _ = mts("unlearning", T=40, padding=padding, center=True)
        for w, rate, ln, z in zip(sae.kernels, sae.rates, sae.ln, sae.temporal(x).split(6, -1)):
            conv = conv1d(x / 2 - sae.mean, w, rate, padding)
            assert torch.allclose(z, F.layer_norm(conv, (6,), ln.weight, ln.bias), atol=1e-5), rate


def test_mtsae_reads_three_tokens_a_branch_and_repeats_short_sequences():
    """t - r, t, t + r round the circle, or t, t - r, t - 2 r; and Sec. A.4.4: 25 tokens alone,
    padded and masked, or padded by hand with the last one, have the same codes."""
    x, _ = mixed(T=40)
    mask = (torch.arange(40) < 25).expand(3, 40)
    by_hand = torch.cat([x[:, :25], x[:, 24:25].expand(-1, 15, -1)], 1)
    for variant in PAPERS:
        for padding, taps in (("circular", CIRCULAR), ("causal", CAUSAL)):
            for rates in ("1,4,16", "2", "1,2,4,8"):
                sae, _ = mts(variant, T=40, rates=rates, padding=padding)
                changed = {30 - r * tap for r in sae.rates for tap in taps}
                want = {t % 40 if padding == "circular" else t for t in changed
                        if padding == "circular" or t < 40}
                assert reads(sae, x, 30) == want, (variant, padding, rates)
            for code in (sae.encode(x[:, :25]), sae.encode(x, mask)[:, :25]):
                assert torch.allclose(code, sae.encode(by_hand)[:, :25], atol=1e-5), variant


def test_mtsae_batch_norm_survives_offsets_and_empty_batches():
    """Channels 1000 deviations from 0 come out with variance 1; no scored token changes nothing."""
    x, mask = mixed(T=40)
    far = (x + 2000.0) / 2
    for norm in ("branch", "average"):
        for bn in norms(mts(batch_norm=norm)[0]):
            y, variance = bn(far, mask)[mask], far[mask].var(0, unbiased=False)
            assert ((y.mean(0) - bn.bias).abs() < 1e-2).all()
            assert ((y.std(0, unbiased=False) / bn.weight.abs() - 1).abs() < 1e-2).all()
            assert torch.allclose(bn.running_var, variance, rtol=1e-2)
            before = torch.stack([bn.running_mean, bn.running_var])
            assert bn(far, mask & False).isfinite().all()
            assert torch.equal(before, torch.stack([bn.running_mean, bn.running_var]))
    for variant in PAPERS:
        sae, cfg = mts(variant, T=40)
        terms = mtsae.losses(sae, x, mask & False, counts(mask & False), 0, cfg)[0]
        sum(terms.values()).backward()
        assert all(v.isfinite() for v in terms.values()), variant
        assert all(p.grad.isfinite().all() for p in sae.parameters()), variant


def test_mtsae_statistics_stay_fp32_under_autocast():
    """Matrix products may be bf16; norms, the L1 term and the cosines of branches may not."""
    x, mask = mixed(D=16)
    for variant in PAPERS:
        sae, cfg = mts(variant, D=16)
        exact, h = mtsae.losses(sae, x, mask, counts(mask), 0, cfg)[0], sae.temporal(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            terms, _, f = mtsae.losses(sae, x, mask, counts(mask), 0, cfg)
            assert torch.allclose(sae.temporal(x, mask), h, atol=1e-6), variant
        assert abs(terms["l1"] - 0.04 * f.float()[mask].sum() / mask.sum()) < 1e-5, variant
        if variant == "unlearning":
            assert abs(terms["separation"] - exact["separation"]) < 1e-6


def test_mtsae_kernels_start_as_declared():
    """identity: the token itself and a little noise; pytorch: nn.Conv1d's own range, in D too."""
    torch.manual_seed(0)
    pytorch = nn.Conv1d(512, 512, 3, groups=512).weight.abs().max()
    for variant in PAPERS:
        for init, limit in (("identity", 0.1), ("pytorch", pytorch)):
            for padding, own in (("circular", 1), ("causal", 2)):
                cfg = config(mtsae, variant=variant, conv_init=init, padding=padding)
                w = mtsae.MTSAE(64, cfg).kernels.detach().clone()
                w[:, own] -= float(init == "identity" and variant == "unlearning")
                assert abs(w.abs().max() - limit) < 0.01 and abs(w.mean()) < 0.1 * limit, init


# --- Resampling, monitoring, reach, steps ----------------------------------------------------


def after_a_step(sae):
    """AdamW with moments that are not 0 anywhere."""
    opt = torch.optim.AdamW(sae.parameters(), lr=1e-4)
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_mtsae_resampling_resets_the_right_rows():
    x, mask = mixed()
    for variant in PAPERS:
        sae, cfg = mts(variant, dead_after=3, batch_size=3)
        opt, dead = after_a_step(sae), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
        sae.inactive[:] = torch.tensor([3, 4, 0, 3, 10, 2])        # dead: silent for *more* than 3
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        mtsae.resample(sae, opt, x, mask, 5, cfg)
        assert sae.resampled.tolist() == [0, 1, 0, 0, 1, 0] and sae.training
        assert sae.inactive.tolist() == [3, 0, 0, 3, 0, 2]
        for name, p in sae.named_parameters():
            both = [p.detach(), before[name], opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]
            now, then, *moments = (v.t() for v in both) if name == "W_enc" else both
            rows = dead if name in ("W_dec", "W_enc", "b_enc") else torch.zeros(len(now)).bool()
            assert torch.equal(now[~rows], then[~rows]), name
            assert all((m[rows] == 0).all() and (m[~rows] != 0).all() for m in moments), name
            assert not rows.any() or not torch.equal(now[rows], then[rows]), name
        assert torch.allclose(sae.W_dec[dead].norm(dim=1), torch.ones(2), atol=1e-5)
        length = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
        assert torch.allclose(sae.W_enc[:, dead].norm(dim=0), length.expand(2), rtol=1e-4)
        mtsae.resample(sae, opt, x, mask, 6, cfg)                  # nobody is dead: nothing happens
        assert sae.resampled.sum() == 2


def test_mtsae_resampling_draws_scored_tokens_by_their_squared_error():
    x, mask = mixed(T=40)
    sae, cfg = mts(T=40, expansion=30, batch_size=3, batch_norm="off", padding="causal")
    opt = after_a_step(sae)
    with torch.no_grad():
        sae.W_dec.zero_(), sae.b_dec.zero_()                       # reconstruction 0: error |x|^2
        x[0, 10] *= 15                                             # one token carries most of it
        x[2, 11] *= 1e3                                            # ... but this one is not scored
        mask[0, 10] = True
    sae.inactive.fill_(1000)
    mtsae.resample(sae, opt, x, mask, 5, cfg)
    similarity, token = (sae.W_dec @ F.normalize(x.flatten(0, 1), dim=1).t()).max(1)
    assert (similarity > 0.999).all() and mask.flatten()[token].all()
    share = (x[0, 10].square().sum() / x[mask].square().sum()).item()
    assert 0.3 < share < 0.9 and abs((token == 10).float().mean() - share) < 0.12, share


def test_mtsae_run_counts_silence_resamples_and_logs():
    """A.4.3 and Sec. D.5 in a real run; and paper D as reported: 10,000 // 2,048 = 4 steps."""
    with folder():
        found = tiny(mtsae, "a", 24, "--log_every", 1, "--resample_every", 8, "--dead_after", 4,
                     "--eval", "core", "--activation", "topk", "--k", 1, "--lr", 3e-3)["resampling"]
        rows = log("a")
        assert found["events"] > 5 and 0 < found["features"] <= 1
        assert rows[8]["resampled"] == 0 < rows[9]["resampled"]    # step 8 logs what it saw before
        assert {"grad_norm", "conv_mean_1", "conv_std_16", "alive", "buffer_norm"} <= set(rows[0])
        status, _, err = run(mtsae, "--variant", "unlearning", "--model", "synthetic", "--T", 128,
                             "--tokens", 10000, "--steps", 0, "--batch_size", 16,
                             "--heldout_tokens", 1024, "--out", "b", "--eval", "none")
        assert status == 0, err
        assert json.loads(Path("b/eval.json").read_text())["steps"] == 4


def test_mtsae_table_1_by_hand():
    """Mean and deviation of each convolution over scored tokens and channels, raw units."""
    x, mask = mixed()
    for flags in (dict(variant="unlearning"), dict(center=False), dict(padding="causal")):
        sae, cfg = mts(**flags)
        found = mtsae.table_1(sae, x, mask, torch.clone)
        p = {name: value.double() for name, value in sae.state_dict().items()}
        for k, rate in enumerate(sae.rates):
            y = torch.cat([2 * convolution(x[b].double() / 2, mask[b].tolist(), t, k, rate, p, cfg)
                           for b, t in mask.nonzero().tolist()])
            for name, value in (("mean", y.mean()), ("std", y.std(unbiased=False))):
                assert abs(found[f"{name}_{rate}"] - value) < 1e-5, (flags, name, rate)


def test_mtsae_mixing_measures_the_reach():
    """Found by trying, in windows too short for it, too: rates 1,4,100 reach 100 and not 28."""
    x, mask = mixed(T=32)
    for flags, reach in ((dict(), 16), (dict(rates="1,2,4"), 4), (dict(rates="1,4,100"), 100),
                         (dict(variant="unlearning"), 8), (dict(rates="2", padding="causal"), 4)):
        sae, cfg = mts(**{"T": 32, **flags})
        sae.eval()
        found = mtsae.mixing(sae, Heldout(x, mask))
        assert found["reach"] == reach and 0 < found["neighbours"] < 1, (flags, found)
        sae.kernels.data.zero_()
        sae.kernels.data[:, 1] += float(cfg.variant == "unlearning")
        assert mtsae.mixing(sae, Heldout(x, mask)) == {"reach": 0, "neighbours": 0.0}, flags
