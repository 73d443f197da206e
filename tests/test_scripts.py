"""What holds for all four scripts, in tables; and what their own tests share: `follows` compares
losses with a reference that was written straight from a paper, token by token."""
import common                       # before torch: it sets how OpenMP threads wait
import contextlib
import copy
import math
import sys
from unittest import mock

import torch

import evals
import hierarchical_sae
import mtsae
import temporal_lens
import tsae
from tests.helpers import (SCRIPTS, config, configured, folder, log, mixed, model, replaced, tiny,
                           weights)

# --- Comparing with a reference --------------------------------------------------------------


def follows(losses, reference, sae, x, mask, case):
    """Each term of losses(sae, x) equals reference(p)'s, in value and every parameter's gradient;
    as logged, error is squared and summed over D, active counts features on, both a scored token.

    p: float64 copies of parameters (leaves) and buffers. Compared in float64 to 1e-9, which leaves
    no room for another formula, and as it runs, in fp32: values to 1e-5, gradients to 1e-4 (where a
    code is nearly 0, a cosine's gradient is that badly conditioned; all but a few agree to 1e-5).
    """
    twin = copy.deepcopy(sae).double()
    names = [name for name, q in sae.named_parameters() if q.requires_grad]
    p = {name: value.detach().clone().requires_grad_(name in names)
         for name, value in twin.state_dict().items()}

    def measured(terms, leaves):
        zero = 0 * sum(q.sum() for q in leaves)            # a term need not depend on each
        terms = {name: term + zero for name, term in terms.items()}
        return {name: (term.item(), torch.autograd.grad(term, leaves, retain_graph=True))
                for name, term in terms.items()}
    want = measured(reference(p), [p[name] for name in names])
    for version, bound, slope_bound in ((twin, 1e-9, 1e-9), (sae, 1e-5, 1e-4)):
        with contextlib.ExitStack() as stack:
            if version is twin:            # new tensors are float64, and float() leaves them so
                torch.set_default_dtype(torch.float64)
                stack.callback(torch.set_default_dtype, torch.float32)
                stack.enter_context(replaced(
                    torch.Tensor, "float", lambda t: t if t.is_floating_point() else t.double()))
            terms, stats, *_ = losses(version, x.to(version.W_dec))
            found = measured(terms, [version.get_parameter(name) for name in names])
        assert set(found) == set(want), (case, set(found), set(want))
        for term, (b, slopes) in want.items():
            a, ours = found[term]
            assert abs(a - b) <= bound * max(abs(b), 1e-6), (case, term, version.W_dec.dtype, a, b)
            floor = 1e-2 * max(g.norm() for g in slopes) + 1e-5        # 0 has no direction
            for name, a, b in zip(names, ours, slopes):
                gap = (a.double() - b).norm() / max(b.norm(), floor)
                assert gap <= slope_bound, (case, term, name, version.W_dec.dtype, gap)
    f = sae(x, mask)[1]
    error = (((x - sae.decode(f)) / sae.scale)[mask] ** 2).sum(-1).mean()
    assert abs(stats["error"] - error) < 1e-4 * error, case
    assert abs(stats["active"] - (f[mask] != 0).sum(-1).float().mean()) < 1e-4, case


# --- Invariants of any model: what may influence what ----------------------------------------


CASES = [(script, flags) for script, rows in {    # these are also trained, below
    "tsae": ("", "--no-temporal", "--layer_norm post", "--activation topk --k 4",
             "--no-temporal --activation topk --k 4", "--no-buffers --ramp_from 10"),
    "temporal_lens": ("", "--static_masks", "--no-masks --clip 1",
                      "--activation topk --k 4 --alpha_lr 0.1 --ema_norm store"),
    "mtsae": ("", "--variant unlearning", "--batch_norm average --padding causal",
              "--activation topk --k 8", "--variant unlearning --padding causal",
              "--conv_init pytorch --clip 1 --no-project_gradient"),
    "hierarchical_sae": (
        *(f"--variant {v}" for v in hierarchical_sae.VARIANTS), "--levels 1",
        "--compose parallel --causal --routing top1", "--compose literal --causal",
        "--no-conv --routing soft --levels 5 --consistency cosine --no-adapt",
        "--activation topk --k 9 --causal --lambda_temp 0")}.items() for flags in rows]


def values(script, flags):
    """The fields that the flags set, and what they are set to."""
    cfg, given = common.parse_args(SCRIPTS[script].Config, flags.split(), "")
    return {name: getattr(cfg, name) for name in given}


def test_invariants_of_every_model():
    """Masked tokens are heard by nobody; only models that are not causal look ahead; rows of W_dec
    have norm 1, and the projection removes the gradient along them and nothing else."""
    x, mask = mixed(D=16)
    loud = torch.where(mask[..., None], x, 1e3)
    for case in CASES:
        module, sae = SCRIPTS[case[0]], model(case[0], **{"T": 20, "expansion": 1, **values(*case)})
        codes = [sae.encode(z, mask)[mask] for z in (x, loud)]
        assert torch.allclose(*codes, atol=1e-4), case
        assert sae.W_enc.t().is_contiguous(), case             # the fast TopK wants it so

        W, slope = sae.W_dec.detach().clone(), torch.randn(sae.W_dec.shape)
        sae.W_dec.grad = slope.clone()
        module.remove_parallel_gradient(sae)
        across = slope - (slope * W).sum(1, keepdim=True) * W
        assert torch.allclose(sae.W_dec.grad, across, atol=1e-5), case
        sae.W_dec.data.mul_(3.0)
        module.normalize_decoder(sae)
        assert torch.allclose(sae.W_dec, W, atol=1e-5), case

        sae.eval()
        other = torch.cat([x[:, :7], 1 - 2 * x[:, 7:8], x[:, 8:]], 1)
        moved = (sae.encode(x) - sae.encode(other)).abs().amax((0, 2)) > 1e-6
        seen = set(moved.nonzero().flatten().tolist())         # whose code changes with token 7
        assert 7 in seen and sae.causal == (min(seen) >= 7), (case, seen)
        mixes = getattr(sae.cfg, "variant", "") in ("extraction", "unlearning", "temporal")
        assert mixes or seen == {7}, case
        if mixes:                                              # vectors without their sequence
            with contextlib.suppress(ValueError, common.UserError):
                sae.encode(torch.zeros(5, 16))
                raise AssertionError(case)


def test_no_tensor_is_made_on_the_wrong_device():
    """Whole training steps with all tensors on torch's meta device: mixing with the CPU raises."""
    meta, AdamW, x = torch.device("meta"), torch.optim.AdamW, torch.randn(4, 32, 16, device="meta")
    loop = mock.Mock(total=2, steps=lambda: range(2), log_due=lambda step: False)
    acts = mock.Mock(D=16, steps=2, scale=1.0, mean=x[0, 0], device=meta,
                     batch=lambda step: (x, x[..., 0] > 0), autocast=contextlib.nullcontext)
    adamw = lambda *args, **flags: AdamW(*args, **{**flags, "fused": False})   # fused: not on meta
    seeded = lambda seed, name, device="cpu": torch.Generator() if device == "cpu" else None
    with replaced(torch.optim, "AdamW", adamw), mock.patch.multiple(
            common, Run=lambda *_: loop, generator=seeded, gather_pays=lambda *_: True):
        for case in CASES:
            SCRIPTS[case[0]].train(config(SCRIPTS[case[0]], **values(*case)), acts)
            for call in loop.log.call_args_list:
                assert all(v.device == meta and v.dim() == 0 for v in call.args[1].values()), case


# --- Schedules and defaults ------------------------------------------------------------------


def eq_4(t):
    """w(t) as printed in paper C."""
    return 2.0 if t < 1000 else 1.0 + (1 - (t - 1000) / 1000) if t < 2000 else 1.0


SCHEDULES = (  # function, flags, number of steps where it is asked for, {step: value}
    (tsae.recon_boost, dict(warmup=2000), (), {
        t: eq_4(t) for t in (0, 999, 1000, 1500, 1999, 2000, 5000)}),
    (tsae.recon_boost, dict(warmup=0), (), {0: 1, 1: 1}),
    (tsae.lr_factor, dict(lr_warmup=1000), (), {0: 0.001, 499: 0.5, 999: 1, 9999: 1}),
    (tsae.lr_factor, dict(lr_warmup=0), (), {0: 1, 9: 1}),
    (mtsae.lr_factor, dict(lr_warmup=1000), (4000,), {0: 0.001, 999: 1, 3999: 1}),
    (mtsae.lr_factor, dict(lr_warmup=1000, schedule="cosine"), (3000,), {
        0: 0.001, 499: 0.5, 1000: 1, 2000: 0.5, 3000: 0}),
    (mtsae.lr_factor, dict(lr_warmup=0, schedule="cosine"), (1,), {0: 1}),
    (mtsae.lr_factor, dict(lr_warmup=1000, schedule="cosine-warmup"), (3000,), {
        499: 0.5, 999: 1, 2999: 1}),
    # Eq. 5 of paper E: 5 exp(-lambda s), 0.1 at the last step
    (temporal_lens.temperature, {}, (301,), {0: 5.0, 150: math.sqrt(0.5), 300: 0.1}),
    (temporal_lens.temperature, {}, (1,), {0: 5.0}))


def test_schedules_at_their_corners():
    for function, flags, steps, expected in SCHEDULES:
        cfg = config(sys.modules[function.__module__], **flags)
        last = (*steps, cfg) if function is temporal_lens.temperature else (cfg, *steps)
        for step, value in expected.items():
            found = function(step, *last)
            assert abs(found - value) < 1e-9, (function, flags, step, found)


DEFAULTS = (  # what decides a paper's result; what a variant and the laptop preset change
    (tsae, "", dict(lr=3e-4, l1=0.04, T=128, expansion=1, steps=4000, warmup=2000, clip=2.0,
                    lambda_short=0.01, lambda_medium=0.005, lambda_long=0.001)),
    (tsae, "--no-temporal", dict(clip=0.0)), (tsae, "--no-temporal --clip 1", dict(clip=1.0)),
    (tsae, "--preset laptop --steps 400", dict(warmup=200, lr_warmup=100, clip=2.0, batch_size=4)),
    (tsae, "--model synthetic --preset auto --warmup 2000", dict(warmup=2000)),
    (mtsae, "", dict(rates="1,4,16", recon="squared", recon_weight=2.0, coherence=0.15)),
    (mtsae, "--variant unlearning --rates 1,2", dict(
        rates="1,2", recon="norm", recon_weight=1.0, separation=0.1, weight_decay=0.01, layer="3",
        batch_size=16, schedule="cosine", resample_every=0, center=False)),
    (hierarchical_sae, "", dict(lambda_temp=0.2, tau=2.0, percentile=0.85, levels=3)),
    (temporal_lens, "", dict(layer="5,12,19", beta=0.99, tau_start=5.0, tau_end=0.1)))


def test_defaults_are_the_papers_and_presets_scale_the_schedules():
    for module, flags, expected in DEFAULTS:
        preset = "" if "--preset" in flags else "--preset paper "
        cfg = configured(module, (preset + flags).split())
        wrong = {k: getattr(cfg, k) for k, v in expected.items() if getattr(cfg, k) != v}
        assert not wrong, (module.__name__, flags, wrong)


# --- Training --------------------------------------------------------------------------------


def test_every_parameter_moves_and_the_loss_falls():
    """And a step without any scored token is survived."""
    def batch(self, step, real=common.Activations.batch):
        x, mask = real(self, step)
        return x, mask & (step != 1)
    for case in CASES:
        script, flags = case
        more = ("--gru_divisor", 8) if script == "hierarchical_sae" else ()
        with folder(), replaced(common.Activations, "batch", batch):
            for out, steps in (("a", 1), ("b", 30)):
                tiny(SCRIPTS[script], out, steps, "--eval", "none", "--lr", 3e-3, "--lr_warmup", 1,
                     "--log_every", 1, *more, *flags.split())
            a, b, rows = weights("a"), weights("b"), log("b")
            evals.open_run("b")                                # the weights fit their config.json
        same = {name for name, value in a.items() if value.is_floating_point() and value.numel() > 1
                and torch.equal(value, b[name])}
        still = {"alpha"} if "static" in flags else set()
        still |= {"margin_mean", "margin_std"} if "no-adapt" in flags else set()
        assert same - {"mean", "route_ema"} == still, (case, same)
        assert (b["W_dec"].norm(dim=1) - 1).abs().max() < 1e-5, case
        assert all(math.isfinite(v) for row in rows for v in row.values()), case
        errors = [row["error"] for row in rows]
        assert errors[1] == 0 < errors[2] and errors[-1] < 0.95 * errors[0], (case, errors)


def test_without_their_mechanism_scripts_are_the_standard_sae_bit_for_bit():
    for topk in ((), ("--activation", "topk", "--k", 16)):
        with folder():
            for out, module, flags in (
                    ("standard", tsae, "--no-temporal"),
                    ("tsae", tsae, "--temporal_scale 0 --layer_norm off --boost 1 --grad_noise 0 "
                                   "--no-buffers --clip 0"),
                    ("lens", temporal_lens, "--no-masks --uniform_weights --pre_bias"),
                    ("other", tsae, "--layer_norm off --boost 1 --no-buffers --clip 0")):
                tiny(module, out, 12, "--eval", "none", *flags.split(), *topk)
            standard = weights("standard")
            for out in ("tsae", "lens", "other"):
                same = [torch.equal(weights(out)[k], v) for k, v in standard.items()]
                assert all(same) == (out != "other"), (out, topk)


def test_the_planted_truth_is_found():
    """Features; windows, by sparse codes and a rate of the masks' own (the paper's lambda does not
    decide the masks); the tree: parents on lower levels, tokens with a child routed otherwise."""
    features = lambda r: r["mean_max_cosine"] > 0.7 > r["random_dictionary"] + 0.3
    tree = lambda r: r["parents_lower"] > 0 and r["router_shift"] > 0.05
    sharp = lambda r: (min(r["iou"], r["decided"]) > 0.5 and
                       r["mask_inside"] > r["mask_outside"] + 0.3)
    vague = lambda r: max(r["iou"], r["decided"]) < 0.5
    for script, flags, right in (
            *((script, "", features) for script in ("tsae", "mtsae", "temporal_lens")),
            ("tsae", "--no-temporal", features),
            ("mtsae", "--variant unlearning --l1 0.1", features),      # a norm, no square
            ("hierarchical_sae", "--variant hierarchical", features),
            ("hierarchical_sae", "--variant hierarchical --plant tree", tree),
            ("temporal_lens", "--plant windows --alpha_lr 0.03", sharp),
            ("temporal_lens", "--plant windows --l1 0.04", vague)):
        with folder():
            found = tiny(SCRIPTS[script], "a", 400, "--tokens", 65_536, "--heldout_tokens", 8_192,
                         "--T", 64, "--l1", 1, "--eval", "core", *flags.split())["recovery"]
        assert right(found), (script, flags, found)
