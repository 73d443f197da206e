"""mtsae.py (papers A and D) against a reference made of torch's own layers."""
import mtsae                        # before torch: common.py sets how OpenMP threads wait
import itertools

import torch
import torch.nn.functional as F

from tests.helpers import folder, log, mixed, model, tiny
from tests.test_scripts import follows
from tests.test_tsae import keep_largest, shaken, standard

PAPERS = ("extraction", "unlearning")


def cosine(a, b):
    """Over the last axis; 0, and no gradient, where one of the two is 0."""
    return torch.where(a.any(-1) & b.any(-1), F.cosine_similarity(a, b, dim=-1), 0.0)


def convolutions(x, mask, p, cfg):
    """C_r of kernel 3, depth-wise, for one window x (T, D): of all rates (K, T, D), and x."""
    T, rates = len(x), [int(r) for r in cfg.rates.split(",")]
    x = torch.where(mask[:, None], x.double() / p["scale"] - p["mean"], 0.0)   # not scored: mean
    last = mask.nonzero().max() if mask.any() else 0           # it goes on up to the end
    length = T if cfg.padding == "causal" else max(T, cfg.T)
    x, out = x[torch.arange(length).clamp(max=last)].t(), []
    back = 0.0 if cfg.center else p["mean"][:, None]
    for r, kernel in zip(rates, p["kernels"]):
        padded = F.pad(x, (2 * r, 0)) if cfg.padding == "causal" else F.pad(x, (r, r), "circular")
        kernel = kernel.t()[:, None]                           # (D, 1, 3)
        out.append(F.conv1d(padded + back, kernel, groups=len(x), dilation=r)[:, :T].t())
    return torch.stack(out), (x + back)[:, :T].t()


def temporal_stage(x, mask, p, cfg):
    """Eq. A.3 with its batch norm, or Eq. D.2: what the encoder reads (B, T, D or K D)."""
    windows = [convolutions(*window, p, cfg) for window in zip(x, mask)]
    conv, x = (torch.stack(parts) for parts in zip(*windows))
    conv, width = conv.unbind(1), x.shape[-1:]                 # K (B, T, D)
    if cfg.variant == "unlearning":                            # z_k = LayerNorm(C_{r_k}(h))
        return torch.cat([F.layer_norm(c, width, p[f"ln.{k}.weight"], p[f"ln.{k}.bias"])
                          for k, c in enumerate(conv)], -1)    # [z_1; ...; z_K]

    def batch_norm(h, name):
        out = torch.zeros_like(h)
        out[mask] = F.batch_norm(h[mask], None, None, p[f"{name}.weight"], p[f"{name}.bias"], True)
        return out
    h = [c + x for c in conv]                                  # h_i = Conv_i(A, r_i) + A
    if cfg.batch_norm == "branch":
        h = [batch_norm(h_i, f"bn.{i}") for i, h_i in enumerate(h)]
    h = sum(h) / len(h)
    return batch_norm(h, "bn") if cfg.batch_norm == "average" else h


def reference(p, x, mask, cfg):
    """Eq. A.2, A.6 or Eq. D.4: the weighted terms, averaged over scored tokens or pairs."""
    n, both, h = mask.sum(), mask[:, 1:] & mask[:, :-1], temporal_stage(x, mask, p, cfg)
    pre = h @ p["W_enc"] + p["b_enc"]                          # Eq. A.4, D.3
    f = keep_largest(pre, cfg.k) if cfg.activation == "topk" else torch.relu(pre)
    terms = standard(p, x, f, mask, cfg)                       # Eq. A.5
    terms["recon"] = cfg.recon_weight * terms["recon"]
    if cfg.variant == "extraction" and cfg.coherence:
        terms["coherence"] = -cfg.coherence * cosine(f[:, 1:], f[:, :-1])[both].mean()
    if cfg.variant == "unlearning" and cfg.separation:
        z = h[mask].unflatten(-1, (-1, x.shape[-1])).unbind(1)
        apart = sum(cosine(a, b).clamp(min=0).sum() for a, b in itertools.permutations(z, 2))
        terms["separation"] = cfg.separation * apart / max(1, len(z) * (len(z) - 1)) / n
    return terms


CASES = tuple(dict(variant=variant, **flags) for variant in PAPERS for flags in (
    {}, dict(padding="causal"), dict(rates="1,2,4", T=26), dict(activation="topk"),
    dict(activation="topk", expansion=4),   # F / k = 8: the fast path
    dict(l1=1.0, recon_reduction="mean"), dict(rates="2", recon="norm"),
    dict(coherence=0.0, separation=0.0), dict(coherence=3.0, separation=3.0)))
CASES += (dict(center=False), dict(variant="unlearning", center=True, recon="squared"),
          dict(batch_norm="average"), dict(batch_norm="off", center=False, padding="causal"))


def test_mtsae_losses_equal_the_equations():
    """And D's Table 1: mean and deviation of each convolution over tokens and channels, raw. Under
    autocast products may be bf16; norms and the cosines of branches may not."""
    x, mask = mixed(seed=5)
    x = x.bfloat16().float()                                   # as the buffer keeps it
    for flags in CASES:
        sae, n = shaken("mtsae", **flags), torch.stack([mask.sum(), mtsae.neighbours(mask).sum()])

        def compute(sae, x):
            return mtsae.losses(sae, x, mask, n, 0, sae.cfg)
        follows(compute, lambda p: reference(p, x, mask, sae.cfg), sae, x, mask, flags)
        with torch.autocast("cpu", torch.bfloat16):
            terms, h = compute(sae, x.bfloat16())[0], sae.temporal(x.bfloat16(), mask)
        assert torch.allclose(h, sae.temporal(x, mask), atol=1e-6), flags
        apart = [found.get("separation", 0) for found in (terms, compute(sae, x)[0])]
        assert abs(apart[0] - apart[1]) < 1e-6, flags
        p = {name: value.double() for name, value in sae.state_dict().items()}
        whole = temporal_stage(x, torch.ones_like(mask), p, sae.cfg).float()       # without a mask
        assert torch.allclose(sae.temporal(x), whole, atol=1e-5), flags
        table = mtsae.table_1(sae, x, mask, torch.clone)
        conv = torch.stack([convolutions(*window, p, sae.cfg)[0] for window in zip(x, mask)], 1)
        for rate, y in zip(sae.rates, sae.scale * conv[:, mask]):
            assert abs(table[f"mean_{rate}"] - y.mean()) < 1e-5, (flags, rate)
            assert abs(table[f"std_{rate}"] - y.std(unbiased=False)) < 1e-5, (flags, rate)


def test_mtsae_batch_norm_over_the_steps():
    """Running statistics are plain means of the first 10 batches, then move by 0.1; a batch
    without a scored token changes nothing. Channels lie 1000 deviations from 0."""
    x, mask = mixed(T=40)
    bn, running = mtsae.MaskedBatchNorm(6), torch.zeros(2, 6)
    for batch in range(12):
        h = 1000.0 + x * (1 + batch) / 2
        y, now = bn(h, mask)[mask], torch.stack([h[mask].mean(0), h[mask].var(0, unbiased=False)])
        assert ((y.std(0) - 1).abs() < 1e-2).all()
        running = running + (now - running) / min(10, batch + 1)
        assert torch.allclose(torch.stack([bn.running_mean, bn.running_var]), running, rtol=1e-2)
        assert bn(h, mask & False).isfinite().all()
    bn.eval()
    assert torch.allclose(bn(h), F.batch_norm(h.mT, *running).mT, atol=1e-2)


def test_mtsae_kernels_start_as_declared():
    """identity: the token itself and a little noise; pytorch: nn.Conv1d's own range, in D too."""
    pytorch = 3 ** -0.5                                        # 1 / sqrt(kernel size)
    for variant, (init, limit), (padding, own) in itertools.product(
            PAPERS, (("identity", 0.1), ("pytorch", pytorch)), (("circular", 1), ("causal", 2))):
        sae = model("mtsae", 64, variant=variant, conv_init=init, padding=padding)
        w = sae.kernels.detach().clone()
        w[:, own] -= float(init == "identity" and variant == "unlearning")
        assert abs(w.abs().max() - limit) < 0.01 and abs(w.mean()) < 0.1 * limit, init


def test_mtsae_resampling():
    """Dead rows, and nothing else, restart at scored tokens drawn by their squared error."""
    for variant in PAPERS:
        x, mask = mixed(T=40)
        sae = shaken("mtsae", variant=variant, T=40, expansion=60, batch_size=3, dead_after=3)
        x[0, 10] *= 15                                         # one token carries most of the error
        x[2, 11] *= 1e3                                        # ... but this one is not scored
        mask[0, 10] = True
        opt = torch.optim.AdamW(sae.parameters(), lr=1e-4)     # its moments are not 0 anywhere
        for p in sae.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        sae.W_dec.data.zero_()                                 # x_hat is b_dec
        read = sae.eval().temporal(x, mask).flatten(0, 1)      # eval: running statistics
        sae.train().inactive.copy_(torch.arange(360) % 7)
        silent, dead = sae.inactive.clone(), sae.inactive > 3  # silent for *more* than 3
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        for step in (5, 6):                                    # at 6 nobody is dead
            mtsae.resample(sae, opt, x, mask, step, sae.cfg)
            assert torch.equal(sae.resampled, dead.long())
            assert torch.equal(sae.inactive, silent * ~dead) and sae.training
        for name, p in sae.named_parameters():
            both = [p.detach(), before[name], opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]
            now, then, *moments = (v.t() for v in both) if name == "W_enc" else both
            rows = dead if name in ("W_dec", "W_enc", "b_enc") else torch.zeros(len(now)).bool()
            assert torch.equal(now[~rows], then[~rows]), name
            assert all((m[rows] == 0).all() and (m[~rows] != 0).all() for m in moments), name
        rest = x / sae.scale - sae.b_dec
        similarity, token = (sae.W_dec[dead] @ F.normalize(rest.flatten(0, 1), dim=1).t()).max(1)
        assert (similarity > 0.999).all() and mask.flatten()[token].all()
        length = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
        want = length * F.normalize(read[token], dim=1)
        assert torch.allclose(sae.W_enc[:, dead].t(), want, atol=1e-5)
        assert not sae.b_enc[dead].any()
        share = (rest[0, 10].square().sum() / rest[mask].square().sum()).item()
        assert 0.3 < share < 0.9 and abs((token == 10).float().mean() - share) < 0.12, share


def test_mtsae_run_counts_silence_resamples_and_logs():
    """A.4.3 and Sec. D.5 in a real run."""
    with folder():
        found = tiny(mtsae, "a", 24, "--log_every", 1, "--resample_every", 8, "--dead_after", 4,
                     "--eval", "core", "--activation", "topk", "--k", 1, "--lr", 3e-3)["resampling"]
        rows = log("a")
    assert found["events"] > 5 and 0 < found["features"] <= 1
    assert rows[8]["resampled"] == 0 < rows[9]["resampled"]        # step 8 logs what it saw before
