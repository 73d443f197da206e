"""What a training run costs, against its two floors, measured in one run, interleaved and repeated.

    python benchmarks/throughput.py [--layer 19] [--repeats 7] [--expansions 1,4,16] [--dtypes float32]

1. The SAE step alone (forward, backward, AdamW, renormalisation, every script) on 2048 tokens of random
   activations, against the five matrix products that a step cannot avoid (encode, decode, and in the backward
   pass the gradients of W_dec, f and W_enc), timed with torch.mm in the same dtype.
2. The language model to the layer, and the share of a whole run (harvest once, train one epoch) that it takes:
   share = LM time / (LM time + SAE time) for the same number of tokens. Harvesting and training do not overlap
   on a CPU, so the two times add.
Medians over interleaved repeats; json and a figure into results/.
"""
import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import torch

import common

CASES = {  # label: (script, fields that differ)
    "standard, ReLU": ("tsae", dict(temporal=False)),
    "standard, TopK 32": ("tsae", dict(temporal=False, activation="topk")),
    "TSAE": ("tsae", {}),
    "TemporalLens": ("temporal_lens", {}),
    "MTSAE extraction": ("mtsae", dict(variant="extraction")),
    "MTSAE unlearning": ("mtsae", dict(variant="unlearning")),
    "hierarchical": ("hierarchical_sae", {}),
}


class RandomActivations:
    """What train() needs, over fixed random sequences: 16 of 128 tokens a step."""

    def __init__(self, D, steps, dtype):
        self.D, self.T, self.layer, self.lm, self.truth, self.several = D, 128, 0, None, None, False
        self.steps, self.device, self.dtype = steps, common.pick_device(), dtype
        gen = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 128, D, generator=gen).to(self.device)
        self.mask = torch.ones(16, 128, dtype=torch.bool, device=self.device)
        self.mean, self.scale, self.variance = torch.zeros(D, device=self.device), 1.0, float(D)

    def batch(self, step):
        return [(self.x, self.mask)]

    autocast = common.Activations.autocast


class Stopwatch:
    """Stands in for common.Run: yields steps, keeps the seconds of each, writes nothing."""
    current = None

    def __init__(self, *args):
        self.acts, self.seconds, self.dir, self.total = args[3], [], None, args[3].steps
        Stopwatch.current = self

    def steps(self):
        for step in range(self.acts.steps):
            start = time.perf_counter()
            yield step
            sync()
            self.seconds.append(time.perf_counter() - start)

    def log(self, *args, **more):
        pass

    log_due = lambda self, step: False
    save_if_due = log

    def evaluate(self, *args, **more):
        return self.seconds


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def floor(D, n_features, dtype, repeats):
    """Median seconds of the five matrix products of one step on 2048 tokens."""
    device = common.pick_device()
    x, f = torch.randn(2048, D, device=device, dtype=dtype), torch.randn(2048, n_features, device=device, dtype=dtype)
    W, g = torch.randn(D, n_features, device=device, dtype=dtype), torch.randn(2048, D, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        torch.mm(x, W), torch.mm(f, W.t()), torch.mm(f.t(), g), torch.mm(g, W), torch.mm(x.t(), f)
        sync()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def step_seconds(script, values, D, dtype, steps):
    """Median seconds of a training step of one script."""
    module = importlib.import_module(script)
    cfg = module.Config(**{**getattr(module, "VARIANTS", {}).get(values.get("variant"), {}), **values})
    cfg.batch_size, cfg.micro_batch, cfg.steps, cfg.T = 16, 0, steps, 128
    real, common.Run = common.Run, Stopwatch
    try:
        module.train(cfg, RandomActivations(D, steps, dtype))
    finally:
        common.Run = real
    return statistics.median(Stopwatch.current.seconds[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--expansions", default="1,4")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--cases", default="", help="only cases whose label holds one of these texts (comma)")
    args = parser.parse_args()
    lm = common.load_lm("auto", common.pick_device(), "auto")
    tokens = torch.randint(0, 1000, (8, 129), device=lm.device)
    cases = {k: v for k, v in CASES.items() if any(text in k for text in args.cases.split(","))}
    rows = {}
    for repeat in range(args.repeats):                       # interleaved: every case once a repeat
        start = time.perf_counter()
        common.hidden_states(lm, tokens, [args.layer])
        sync()
        rows.setdefault("LM", []).append((time.perf_counter() - start) / tokens[:, 1:].numel())
        for name in args.dtypes.split(","):
            dtype = getattr(torch, name)
            for expansion in map(int, args.expansions.split(",")):
                key = f"{name} F={expansion}D"
                rows.setdefault(f"{key} floor", []).append(floor(lm.D, expansion * lm.D, dtype, 3) / 2048)
                for label, (script, values) in cases.items():
                    seconds = step_seconds(script, {**values, "expansion": expansion}, lm.D, dtype, 6)
                    rows.setdefault(f"{key} {label}", []).append(seconds / 2048)
    median = {label: statistics.median(values) for label, values in rows.items()}
    table = {"seconds_per_token": median, "lm_tokens_per_s": 1 / median["LM"], "layer": args.layer, "D": lm.D,
             "versions": common.versions(), "repeats": args.repeats, "share_of_lm_only_rate": {}, "share_of_floor": {}}
    print(f"LM to block {args.layer}: {1 / median['LM']:,.0f} tokens/s")
    print(f"{'case':<42} {'tokens/s':>10} {'floor/step':>11} {'run/LM-only':>12} {'min-max':>15}")
    for label, value in median.items():
        if label == "LM" or label.endswith("floor"):
            continue
        key = " ".join(label.split()[:2]) + " floor"
        table["share_of_floor"][label] = median[key] / value
        table["share_of_lm_only_rate"][label] = median["LM"] / (median["LM"] + value)
        spread = f"{1 / max(rows[label]):,.0f}-{1 / min(rows[label]):,.0f}"
        print(f"{label:<42} {1 / value:>10,.0f} {median[key] / value:>11.2f} "
              f"{table['share_of_lm_only_rate'][label]:>12.2f} {spread:>15}")
    common.write_json(HERE / "results" / "throughput.json", table)


if __name__ == "__main__":
    main()
