"""SAEBench: its core values under its names, and SAEBench itself on this SAE.

    python -m evals.saebench RUN                   its core values on the run's held-out text
    python -m evals.saebench RUN sparse_probing    SAEBench itself: its eight data sets
    python -m evals.saebench RUN unlearning        SAEBench itself: WMDP-bio and four sets of MMLU

The first equals sae-bench 0.6.0 (sae_bench/evals/core) on the same tensors. Where its values differ
from evals/core.py, that one is right:

    explained_variance          1 - R / (S - (S / D)^2), with R and S the means over batches of the
                                mean ||x - x_hat||^2 and ||x||^2: nearly a variance about zero, so
                                too large, and above 1 where a sink is counted
    explained_variance_legacy   mean over tokens of 1 - error / squared distance to the batch mean:
                                the value of all published tables
    mse                         divided by the batch's number of tokens once more, so it depends on
                                the batch size
    relative_reconstruction_bias  a mean of the batches' ratios

The other two run sae-bench's program, data sets and settings; results go to RUN/saebench/ in its
format. They need `pip install sae-bench`, best in an environment of its own, which also runs this
project; the hub; and for unlearning WMDP's gated bio-forget-corpus where sae-bench looks for it.
"""
import importlib
from functools import partial
from pathlib import Path

import common  # before torch: it sets how threads wait
import torch
import torch.nn.functional as F

from evals import coded, program, record

KS = [1, 2, 5, 10, 20, 50]          # paper E's; SAEBench's default is the first three


@torch.no_grad()
def evaluate(sae, acts, folder=None):
    """SAEBench's core values on the held-out windows, as a dict; needs no language model."""
    return metrics(coded(sae, acts), sae.W_dec, getattr(sae, "W_enc", None))


def metrics(batches, W_dec=None, W_enc=None):
    """SAEBench's values from batches of (x, x_hat (B, T, D), f (B, T, F), mask (B, T)), as a dict;
    with the weights W_dec (F, D), W_enc (D, F) also the mean largest cosine to another feature."""
    tokens, ratios, active = [], [], 0                     # of all tokens, of all batches, (F,)
    for x, x_hat, f, mask in batches:
        x, x_hat, f = x[mask].double(), x_hat[mask].double(), f[mask]     # (n, D), (n, D), (n, F)
        if len(x) == 0:
            continue
        error, square, out = ((v * v).sum(-1) for v in (x - x_hat, x, x_hat))
        dot, centred = (x * x_hat).sum(-1), (x - x.mean(0)).pow(2).sum(-1)
        tokens.append(torch.stack([(f != 0).double().sum(-1), f.double().sum(-1), square.sqrt(),
                                   out.sqrt(), (out / square).sqrt(), dot / (square * out).sqrt(),
                                   error / len(x), 1 - error / centred], 1).cpu())
        ratios.append(torch.stack([square.mean(), error.mean(), out.mean() / dot.mean()]).cpu())
        active = active + (f > 0).double().sum(0)
        D = x.shape[1]
    tokens, (S, R, bias) = torch.cat(tokens), torch.stack(ratios).mean(0).tolist()
    names = ("l0", "l1", "l2_norm_in", "l2_norm_out", "l2_ratio", "cossim", "mse",
             "explained_variance_legacy")
    density = active / len(tokens)                                        # (F,)
    result = {**dict(zip(names, tokens.mean(0).tolist())), "relative_reconstruction_bias": bias,
              "explained_variance": 1 - R / (S - (S / D) ** 2),
              "frac_alive": (density > 0).double().mean().item()}
    for percent in (1, 10):
        often = density > percent / 100
        share = density[often].sum() / density.sum().clamp(min=1e-300)
        result[f"freq_over_{percent}_percent"] = often.double().mean().item()
        result[f"normalized_freq_over_{percent}_percent"] = share.item()
    for name, W in (("decoder", W_dec), ("encoder", None if W_enc is None else W_enc.t())):
        if W is not None:
            result[f"average_max_{name}_cosine_sim"] = max_cosine(W).mean().item()
    return result


def max_cosine(W, block=4096):
    """For each row of W (F, D) the largest cosine to another row (F,); never (F, F) at once."""
    W, best = F.normalize(W.float(), dim=1), []
    for rows in torch.arange(len(W), device=W.device).split(block):
        cosine = (W[rows] @ W.t()).scatter_(1, rows[:, None], -1.0)       # itself left out
        best.append(cosine.max(1).values)
    return torch.cat(best)


class ForSAEBench(torch.nn.Module):
    """This project's SAE as these two suites read one: encode (B, L, D), linear decode, W_dec,
    device, dtype and cfg. Features are in raw units, as SAEBench's multipliers are.

    A sequence is encoded in windows of T tokens from position 1; position 0 (BOS, an attention
    sink) has no feature. Weights stay in fp32; dtype is that of what encode and decode return.
    """

    def __init__(self, sae, acts):
        from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
        super().__init__()
        self.sae, self.T, self.threshold = sae, acts.T, acts.heldout_store.threshold
        self.device, self.dtype, self.scale = acts.device, torch.float32, float(sae.scale)
        d_sae, d_in = sae.W_dec.shape
        self.cfg = CustomSAEConfig(acts.lm.name.split("/")[-1], d_in, d_sae, int(acts.layer),
                                   f"blocks.{acts.layer}.hook_resid_post", context_size=128,
                                   architecture=type(sae).__name__, dtype="float32")

    def encode(self, x):
        f = []
        for window in x[:, 1:].float().split(self.T, 1):                  # (B, <= T, D)
            norm = window.norm(dim=-1)
            f.append(self.sae.encode(window, (norm > 0) & (norm <= self.threshold)) * self.scale)
        return F.pad(torch.cat(f, 1), (0, 0, 1, 0)).to(self.dtype)        # (B, L, F)

    def decode(self, f):
        return self.sae.decode(f.float() / self.scale).to(self.dtype)

    def to(self, device=None, dtype=None):
        self.device, self.dtype = device or self.device, dtype or self.dtype
        self.cfg.dtype = str(self.dtype)[6:]
        self.sae.to(self.device)
        return self

    W_dec = property(lambda self: self.sae.W_dec.detach().to(self.dtype))


def run_suite(suite, sae, acts, folder):
    """SAEBench's own `suite` on this SAE -> its metrics; {"skipped": [...]} where its data or
    language model cannot be had. UserError without sae-bench."""
    if acts.lm is None:
        return {"skipped": [f"SAEBench's {suite} needs a language model; synthetic data has none"]}
    kept = folder / "saebench" if acts.cfg.cache == "none" else Path(acts.cfg.cache) / "saebench"
    try:
        adapter = ForSAEBench(sae, acts)
        program = importlib.import_module(f"sae_bench.evals.{suite}.main")
        model, batch, more = adapter.cfg.model_name, acts.cfg.lm_batch, {}
        if suite == "sparse_probing":
            config, more = program.SparseProbingEvalConfig(k_values=KS), {"save_activations": False}
        else:                      # a chat model with the SAE of its base model; long sequences
            model, batch = {"gemma-2-2b": "gemma-2-2b-it"}.get(model, model), max(1, batch // 8)
            config = program.UnlearningEvalConfig()
        config.model_name, config.llm_batch_size = model, batch
        config.llm_dtype = str(acts.lm.dtype)[6:]
        # named by its weights too: SAEBench goes on from what it finds under a name
        name = f"{folder.name}-{common.checksum(sae.state_dict())[:8]}"
        found = program.run_eval(config, [(name, adapter)], str(acts.device),
                                 str(folder / "saebench"), True, artifacts_path=str(kept), **more)
    except ImportError as error:
        raise common.UserError("SAEBench is not installed (pip install sae-bench, best in an "
                               f"environment of its own): {error}.") from None
    except Exception as error:      # hub, gated data, models it does not know: many kinds
        why = f"{type(error).__name__}: {common.one_line(error)}"
        return {"skipped": [f"SAEBench's {suite}: {why}"]}
    groups = found.popitem()[1]["eval_result_metrics"]
    return {metric: value for group in groups.values() for metric, value in group.items()
            if value is not None}


def work(sae, acts, folder, args):
    if args.suite is None:
        return record("saebench", evaluate, sae, acts, folder)
    return record(f"saebench_{args.suite}", partial(run_suite, args.suite), sae, acts, folder)


main = partial(program, "saebench", __doc__, work,
               suite=dict(nargs="?", choices=["sparse_probing", "unlearning"]))

if __name__ == "__main__":
    raise SystemExit(main())
