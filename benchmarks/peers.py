"""One training step here against the same step in other SAE libraries: same tokens, taken in turn.

    pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3
    pip uninstall torchvision        # only with a CPU build of torch: nnsight's does not fit it
    python benchmarks/peers.py             -> results/peers.json (experiments.py tables: the page)

2048 random tokens a step, D = 576, F = D, 4 D and 16 D; ReLU + L1 and TopK 32; fp32, and bf16
autocast over fp32 weights. Each library runs its own code with its own defaults. A step is what
passes from one request for a batch to the next, the first left out. Read in these versions:

ours                 tsae.train, standard SAE: fused AdamW, warm-up, gradient projected, decoder
                     renormalised, active features counted. No dead-feature counts, no bar.
SAELens              SAETrainer.fit: L1 times decoder norms, TopK rescaled by them. Adam, clipping,
                     dead-feature counts, scheduler, bar. No projection, no renormalisation.
dictionary_learning  trainer.update: Adam, projection, renormalisation, scheduler; TopK also clips
                     and counts. bf16 by torch.autocast around update, as trainSAE has it on a GPU.
sparsify             Trainer.fit on a module that returns the batch: schedule-free sign descent,
                     projection, renormalisation, encoder gradient and decoder by index, bar. No
                     ReLU SAE; bf16 on CUDA only; its Triton decoder is off without a GPU.

No feature counts as dead so early, so no auxiliary loss runs. Each library has a process of its
own, started in turn, with torch's default threads. Our scripts set two things for the whole process
(common.fast_process); "ours (plain process)" is our step without them, like with like. A library
that is not installed is a row that says so.
"""
import collections
import contextlib
import importlib.metadata
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common

import torch

from benchmarks import throughput
from benchmarks.throughput import LENGTH, SEQUENCES, TOKENS, RandomActivations

K = 32

# --- Drivers: (activation, D, F, dtype, steps) -> seconds of each step after the first ---

def batches(acts):
    """The same batch (2048, D) fp32 for ever; acts notes when it is asked for."""
    while True:
        yield acts.batch()[0].flatten(0, 1)


def ours(activation, D, width, dtype, steps):
    script, flags = throughput.CASES[f"standard, {activation}"]
    flags = [*flags, f"--expansion={width // D}"]
    return throughput.step_seconds(script, flags, D, dtype, steps + 1)


def saelens(activation, D, width, dtype, steps):
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    kind, more = ("Standard", {}) if activation == "ReLU" else ("TopK", {"k": K})
    acts, device = RandomActivations(D, dtype), str(common.pick_device())
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=width, device=device, **more)
    trainer = SAETrainerConfig(                            # neither first nor last step is measured
        total_training_samples=(steps + 2) * TOKENS, train_batch_size_samples=TOKENS, lr_end=3e-4,
        device=device, autocast=dtype == torch.bfloat16)
    SAETrainer(trainer, getattr(sae_lens, f"{kind}TrainingSAE")(cfg), batches(acts)).fit()
    return acts.seconds()[1:]


def dictionary_learning(activation, D, width, dtype, steps):
    from dictionary_learning.trainers import StandardTrainer, TopKTrainer
    Trainer, more = (StandardTrainer, {}) if activation == "ReLU" else (TopKTrainer, {"k": K})
    acts = RandomActivations(D, dtype)
    trainer = Trainer(steps=10_000, activation_dim=D, dict_size=width, layer=0, lm_name="none",
                      device=str(acts.device), **more)     # steps: for its schedules
    for step, x in zip(range(steps + 2), batches(acts)):
        with acts.autocast():
            trainer.update(step, x.to(dtype))
    return acts.seconds()[1:]


class FixedModel(torch.nn.Module):
    """What sparsify asks of a language model; its only block gives the next batch."""
    base_model = property(lambda self: self)
    dummy_inputs = property(lambda self: {"input_ids": torch.zeros(1, 1, dtype=torch.long,
                                                                   device=self.device)})

    def __init__(self, batches):
        super().__init__()
        self.block, self.batches, self.device = torch.nn.Identity(), batches, common.pick_device()

    def forward(self, input_ids):
        return self.block(next(self.batches).unflatten(0, (SEQUENCES, LENGTH)))


def sparsify(activation, D, width, dtype, steps):
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if activation == "ReLU" or bf16 != (dtype == torch.bfloat16):
        raise ValueError("no ReLU SAE; bf16 on CUDA only, and there always")
    acts = RandomActivations(D, dtype)
    model = FixedModel(batches(acts))
    data = [{"input_ids": torch.zeros(LENGTH, dtype=torch.long)}] * (SEQUENCES * (steps + 2))
    with tempfile.TemporaryDirectory() as here:            # it saves what it trained
        Trainer(TrainConfig(SparseCoderConfig(num_latents=width, k=K), batch_size=SEQUENCES,
                            hookpoints=["block"], log_to_wandb=False, save_dir=here),
                data, model).fit()
    return acts.seconds()[2:]                              # it asked once before, to learn D


LIBRARIES = {  # name: (package, driver)
    "ours": ("", ours), "ours (plain process)": ("", ours), "SAELens": ("sae-lens", saelens),
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "sparsify": ("eai-sparsify", sparsify)}


def one(library, D, dtypes, expansions):
    """Every case of a library in this process -> [{activation, dtype, F, seconds or reason}]."""
    rows, (package, driver) = [], LIBRARIES[library]
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    if library == "ours":
        common.fast_process(common.pick_device())
    for activation, name, e in itertools.product(("ReLU", f"TopK {K}"), dtypes, expansions):
        dtype, row = getattr(torch, name), {"activation": activation, "dtype": name, "F": e * D}
        steps = 2 * min(3, max(expansions) // e)           # narrow ones are short: three times
        try:
            row["seconds"] = driver(activation, D, e * D, dtype, steps)
        except Exception as error:                         # theirs: a row says it, the others go on
            if not package:
                raise
            row["reason"] = common.one_line(repr(error), 90)
        rows.append(row)
    return rows


def measure(D, dtypes, expansions, repeats):
    """Medians over all steps of all repeats. ours/this: how many times as fast our step is;
    plain/this: in a plain process."""
    packages, found, seconds, rows = {}, {}, collections.defaultdict(list), []
    for name, (package, _) in LIBRARIES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(package) if package else "this checkout"
    for repeat in range(repeats):
        for name in [*packages][repeat:] + [*packages][:repeat]:          # each first once
            for row in throughput.in_process(f"peers.one{name, D, dtypes, expansions}"):
                case = row["activation"], row["dtype"], row["F"]
                found.setdefault((*case, name), row.get("reason", ""))
                seconds[*case, name] += row.get("seconds", ())
    median = {case: statistics.median(times) for case, times in seconds.items() if times}
    for (*case, name), reason in sorted(found.items(), key=lambda item: item[0][:3]):
        row = {**dict(zip(("activation", "dtype", "F"), case)), "library": name}
        if times := seconds[*case, name]:
            step = median[*case, name]
            row |= {"thousand tokens/s": TOKENS / step / 1e3, "slowest": TOKENS / max(times) / 1e3,
                    "fastest": TOKENS / min(times) / 1e3,
                    "plain/this": step / median[*case, "ours (plain process)"],
                    "ours/this": step / median[*case, "ours"]}
        rows.append({**row, "reason": reason})
    rows += [{"library": name, "reason": "not installed"} for name in LIBRARIES
             if name not in packages]
    return {"rows": rows, "D": D, "packages": packages, "device": str(common.pick_device())}


def main(argv=None):
    args = throughput.arguments(__doc__).parse_args(argv)
    table = measure(576, ("float32", "bfloat16"), (1, 4, 16), args.repeats)
    throughput.record(args, "peers", table)


if __name__ == "__main__":
    raise SystemExit(main())
