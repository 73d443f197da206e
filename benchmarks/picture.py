"""docs/picture.png: one held-out sentence through two finished runs, features over tokens, activation as colour.

    python benchmarks/picture.py [RUN_ABOVE RUN_BELOW] [--cache CACHE] [--skip 0] [--features 14]

Above a standard TopK SAE, below a TSAE with the same number of active features a token. Nothing is chosen by
hand. The sentence: the first held-out stretch of SHORTEST to LONGEST scored tokens that begins after the end
of a sentence, ends with one, holds no line break and nothing but letters and plain punctuation; --skip takes a
later one. The features: the --features of each run with the most activation in it, each row divided by its own
largest value there, ordered by the token at which half of that activation is reached.
Printed and in the titles: length of a stretch (tokens in a row for which a feature stays on) and cosine of
neighbouring codes, over *all* features, in this sentence and in all held-out text.
"""
import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]
import torch

import common
from experiments import run_folder

SHORTEST, LONGEST = 22, 40
MODELS = {"tsae": "TSAE", "mtsae": "MTSAE", "hierarchical_sae": "HierarchicalSAE", "temporal_lens": "TemporalLens"}


def load(folder, cache):
    """A finished run -> (SAE, its Activations, label)."""
    saved = common.read_json(folder / "config.json")
    module = importlib.import_module(saved["script"])
    cfg = module.Config(**saved["config"])
    # "auto" is settled by measuring, so the language model's dtype is taken from the run
    cfg = dataclasses.replace(cfg, layer=str(saved["layer"]), cache=cache or cfg.cache,
                              dtype=saved["model"]["dtype"].removeprefix("torch."))
    acts = next(iter(common.open_activations(cfg)))
    sae = getattr(module, MODELS[saved["script"]])(acts.D, cfg)
    sae.load_state_dict(common.load_tensors(folder / "sae_weights.safetensors")[0])
    temporal = getattr(cfg, "temporal", True)
    return sae.eval(), acts, "TSAE" if temporal else "Standard TopK SAE" if cfg.activation == "topk" else "Standard SAE"


def sentence(acts, skip):
    """(window, first token, one past the last, texts of the tokens) by the rule above."""
    store = acts.heldout_store
    for window in range(store.N):
        texts = common.token_texts(acts, window, 0, store.T)
        mask = store.get(torch.tensor([window]), "cpu")[1][0]
        stops = [t for t in range(store.T) if re.fullmatch(r"[.!?]", texts[t].strip())]
        for before, last in zip(stops, stops[1:]):
            first, length, text = before + 1, last - before, "".join(texts[before + 1:last + 1])
            if SHORTEST <= length <= LONGEST and mask[first:last + 1].all() and re.fullmatch(r"[A-Za-z ,;:.!?’'-]+", text):
                if skip == 0:
                    return window, first, last + 1, texts[first:last + 1]
                skip -= 1
    raise SystemExit("no such sentence in the held-out text")


def stretches(f):
    """Mean number of tokens in a row for which a feature stays on, as common.temporal's span: f (T, F)."""
    on = f > 0
    return (on.sum() / (on[0].sum() + (on[1:] & ~on[:-1]).sum()).clamp(min=1)).item()


@torch.no_grad()
def view(sae, acts, window, first, end, n):
    """Shares (n, tokens) of the chosen features, and the numbers of the title."""
    x, mask = acts.heldout_store.get(torch.tensor([window]), acts.device)
    f = sae.encode(x.float(), mask)[0, first:end].float().cpu()              # (tokens, F)
    chosen = f.sum(0).topk(n).indices
    half = (f[:, chosen].cumsum(0) >= f[:, chosen].sum(0) / 2).float().argmax(0)
    chosen = chosen[half.argsort(stable=True)]
    everywhere = common.temporal(sae, acts)
    cosine = torch.nn.functional.cosine_similarity(f[1:], f[:-1], dim=-1).mean().item()
    return {"share": (f[:, chosen] / f[:, chosen].amax(0).clamp(min=1e-12)).t(), "features": chosen.tolist(),
            "L0": (f > 0).sum(-1).float().mean().item(), "stretch": stretches(f), "cosine": cosine,
            "stretch_all": everywhere["span"], "cosine_all": everywhere["neighbour_cosine"]}


def draw(path, texts, panels):
    """panels: [(label, view)], one above the other. 900 px wide, and twice that for sharp screens."""
    plt = common.pyplot()
    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 6.3), sharex=True, constrained_layout=True)
    for axis, (label, v) in zip(axes, panels):
        share = v["share"].masked_fill(v["share"] == 0, float("nan"))         # off is white, not pale
        image = axis.imshow(share, aspect="auto", interpolation="nearest", cmap="YlGnBu", vmin=0, vmax=1)
        axis.set_yticks(range(len(v["features"])), v["features"], fontsize=7)
        axis.set_ylabel("feature")
        axis.set_title(f"{label}, {v['L0']:.0f} features on at each token: a feature stays on for {v['stretch']:.2f} tokens "
                       f"({v['stretch_all']:.2f} in all held-out text),\nneighbouring codes have cosine {v['cosine']:.2f} "
                       f"({v['cosine_all']:.2f})", loc="left", fontsize=9)
        axis.set_xticks([t - 0.5 for t in range(1, len(texts))], minor=True)
        axis.set_yticks([i - 0.5 for i in range(1, len(v["features"]))], minor=True)
        axis.grid(which="minor", color="0.88", linewidth=0.6)
        axis.tick_params(which="both", length=0)
    axes[-1].set_xticks(range(len(texts)), [text.strip() or "␣" for text in texts], rotation=60, ha="right",
                        rotation_mode="anchor")
    axes[-1].set_xlabel("token")
    figure.colorbar(image, ax=axes, label="activation (share of the row's largest; white: off)", aspect=40, pad=0.01)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = [run_folder("tsae_l0", label, 42, 19) for label in ("TopK 32", "  x 3")]
    parser.add_argument("runs", nargs="*", type=Path, help=f"two run folders [{standard[0]} {standard[1]}]")
    parser.add_argument("--cache", default="", help="folder of harvested activations [that of the runs]")
    parser.add_argument("--skip", type=int, default=0, help="sentences to pass over [0]")
    parser.add_argument("--features", type=int, default=14, help="features shown of each run [14]")
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "picture.png")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    panels, place = [], None
    for folder in args.runs or standard:
        sae, acts, label = load(folder, args.cache)
        place = place or sentence(acts, args.skip)
        window, first, end, texts = place
        panels.append((label, view(sae, acts, window, first, end, args.features)))
        print(f"{folder}: {label}; " + ", ".join(f"{k} {v:.3f}" for k, v in panels[-1][1].items() if isinstance(v, float)))
    print(f"held-out window {window}, tokens {first} to {end - 1}: {''.join(texts).strip()}")
    draw(args.out, texts, panels)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
