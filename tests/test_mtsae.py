"""mtsae.py (papers A and D) against a reference made of torch's own layers."""
import mtsae                        # before torch: common.py sets how OpenMP threads wait
import itertools

import torch
import torch.nn.functional as F

from tests.helpers import config, folder, log, mixed, shake, tiny
from tests.test_scripts import agree, logged
from tests.test_tsae import keep_largest

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
    (n, pairs), h = counts(mask), temporal_stage(x, mask, p, cfg)
    pre = h @ p["W_enc"] + p["b_enc"]                          # Eq. A.4, D.3
    f = keep_largest(pre, cfg.k) if cfg.activation == "topk" else torch.relu(pre)
    error = (x.double() / p["scale"] - f @ p["W_dec"] - p["b_dec"])[mask] ** 2         # Eq. A.5
    error = error.mean(-1) if cfg.recon_reduction == "mean" else error.sum(-1)
    error = error if cfg.recon == "squared" else torch.sqrt(error)
    terms = {"recon": cfg.recon_weight * error.sum() / n}
    if cfg.activation == "relu":
        terms["l1"] = cfg.l1 * f[mask].abs().sum() / n
    if cfg.variant == "extraction" and cfg.coherence:
        both = mask[:, 1:] & mask[:, :-1]
        terms["coherence"] = -cfg.coherence * cosine(f[:, 1:], f[:, :-1])[both].sum() / pairs
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
    """And D's Table 1: mean and deviation of each convolution over tokens and channels, raw."""
    x, mask = mixed(seed=5)
    for flags in CASES:
        sae, cfg = mts(**flags)

        def compute(sae):
            return mtsae.losses(sae, x.to(sae.W_dec), mask, counts(mask), 0, cfg)
        agree(sae, lambda sae: compute(sae)[0], lambda p: reference(p, x, mask, cfg), flags)
        logged(*compute(sae)[1:], sae, x, mask, flags)
        p = {name: value.double() for name, value in sae.state_dict().items()}
        whole = temporal_stage(x, torch.ones_like(mask), p, cfg).float()       # without a mask
        assert torch.allclose(sae.temporal(x), whole, atol=1e-5), flags
        table = mtsae.table_1(sae, x, mask, torch.clone)
        conv = torch.stack([convolutions(*window, p, cfg)[0] for window in zip(x, mask)], 1)
        for rate, y in zip(sae.rates, 2 * conv[:, mask]):
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


def test_mtsae_statistics_stay_fp32_under_autocast():
    """Matrix products may be bf16; norms and the cosines of branches may not."""
    x, mask = mixed(D=16)
    x = x.bfloat16()                                           # as the buffer keeps it
    for variant in PAPERS:
        sae, cfg = mts(variant, D=16)
        sae.scale.fill_(1.7)                                   # division by 2 would be exact
        exact = mtsae.losses(sae, x.float(), mask, counts(mask), 0, cfg)[0]
        with torch.autocast("cpu", torch.bfloat16):
            terms = mtsae.losses(sae, x, mask, counts(mask), 0, cfg)[0]
            h = sae.temporal(x, mask)
        assert torch.allclose(h, sae.temporal(x.float(), mask), atol=1e-6), variant
        assert abs(terms.get("separation", 0) - exact.get("separation", 0)) < 1e-6


def test_mtsae_kernels_start_as_declared():
    """identity: the token itself and a little noise; pytorch: nn.Conv1d's own range, in D too."""
    pytorch = 3 ** -0.5                                        # 1 / sqrt(kernel size)
    for variant, (init, limit), (padding, own) in itertools.product(
            PAPERS, (("identity", 0.1), ("pytorch", pytorch)), (("circular", 1), ("causal", 2))):
        cfg = config(mtsae, variant=variant, conv_init=init, padding=padding)
        w = mtsae.MTSAE(64, cfg).kernels.detach().clone()
        w[:, own] -= float(init == "identity" and variant == "unlearning")
        assert abs(w.abs().max() - limit) < 0.01 and abs(w.mean()) < 0.1 * limit, init


def after_a_step(sae):
    """AdamW with moments that are not 0 anywhere."""
    opt = torch.optim.AdamW(sae.parameters(), lr=1e-4)
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_mtsae_resampling_resets_the_right_rows():
    x, mask = mixed(seed=5)
    for variant in PAPERS:
        sae, cfg = mts(variant, dead_after=3, batch_size=3)
        opt, dead = after_a_step(sae), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
        sae.inactive[:] = torch.tensor([3, 4, 0, 3, 10, 2])        # dead: silent for *more* than 3
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        for step in (5, 6):                                        # at 6 nobody is dead
            mtsae.resample(sae, opt, x, mask, step, cfg)
            assert torch.equal(sae.resampled, dead.long())
            assert sae.inactive.tolist() == [3, 0, 0, 3, 0, 2]
        for name, p in sae.named_parameters():
            both = [p.detach(), before[name], opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]
            now, then, *moments = (v.t() for v in both) if name == "W_enc" else both
            rows = dead if name in ("W_dec", "W_enc", "b_enc") else torch.zeros(len(now)).bool()
            assert torch.equal(now[~rows], then[~rows]), name
            assert all((m[rows] == 0).all() and (m[~rows] != 0).all() for m in moments), name
        assert (sae.b_enc[dead] == 0).all()
        length = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
        assert torch.allclose(sae.W_enc[:, dead].norm(dim=0), length.expand(2), rtol=1e-4)


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
    """A.4.3 and Sec. D.5 in a real run."""
    with folder():
        found = tiny(mtsae, "a", 24, "--log_every", 1, "--resample_every", 8, "--dead_after", 4,
                     "--eval", "core", "--activation", "topk", "--k", 1, "--lr", 3e-3)["resampling"]
        rows = log("a")
    assert found["events"] > 5 and 0 < found["features"] <= 1
    assert rows[8]["resampled"] == 0 < rows[9]["resampled"]        # step 8 logs what it saw before
