"""Greedy continuations of a prompt without and with features edited, side by side.

    python -m evals.steer RUN "123:+8,77:off" "The old man and"

An edit is FEATURE:+X, FEATURE:-X, FEATURE:=X or FEATURE:off, in units of the feature, applied at
every token but the sink and special tokens. What the SAE does not explain stays as it is.
"""
import argparse
import contextlib
import itertools
import re
import textwrap

import common  # before torch: it sets how threads wait

import torch

from evals import open_run
from evals.unlearning import feature_edit


def parse_steer(text, n_features):
    """'7:+8,9:off,5:=3' -> [(7, 1.0, 8.0), (9, 0.0, 0.0), (5, 0.0, 3.0)]: f' = factor f + value."""
    edits = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(?:(off)|(=-?|[+-])(\d+\.?\d*|\.\d+))\s*", part)
        if not match or int(match[1]) >= n_features:
            raise common.UserError(
                "an edit is FEATURE:+X, FEATURE:-X, FEATURE:=X or FEATURE:off, features below "
                f"{n_features}; not {part!r}.")
        feature, off, sign, number = match.groups()
        value = 0.0 if off else -float(number) if "-" in sign else float(number)
        edits.append((int(feature), 0.0 if off or "=" in sign else 1.0, value))
    return edits


@torch.no_grad()
def steer(sae, acts, text, prompt, n=40):
    """-> {"plain": text, "steered": text}, n tokens each or fewer; edits as in parse_steer."""
    if acts.lm is None:
        raise common.UserError("steering needs a language model; synthetic data has none.")
    lm, edits, out = acts.lm, parse_steer(text, len(sae.W_dec)), {}

    def change(f):
        f = f.clone()
        for feature, factor, value in edits:
            f[..., feature] = factor * f[..., feature] + value
        return f
    for name in ("plain", "steered"):
        ids = [lm.bos] + lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        first = len(ids)
        while len(ids) < first + n:
            tokens = torch.tensor([ids], device=lm.device)
            mask = ~torch.isin(tokens[:, 1:], lm.special)
            edit = feature_edit(sae, change, mask, acts.heldout_store.threshold)
            edited = common.intervene(lm, acts.layer, edit)
            with edited if name == "steered" else contextlib.nullcontext():
                logits = lm.model(input_ids=tokens, use_cache=False).logits
            ids.append(logits[0, -1].argmax().item())
            if ids[-1] == lm.tokenizer.eos_token_id:
                break
        out[name] = lm.tokenizer.decode(ids[first:], skip_special_tokens=True)
    return out


def side_by_side(titles, texts, width=48):
    """Texts in columns, under their titles -> lines."""
    columns = [[title, "-" * width, *itertools.chain.from_iterable(
        textwrap.wrap(line, width) for line in text.splitlines())]
        for title, text in zip(titles, texts)]
    return ["  ".join(cell.ljust(width) for cell in row).rstrip()
            for row in itertools.zip_longest(*columns, fillvalue="")]


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m evals.steer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("RUN", help="folder of a finished run")
    parser.add_argument("edits", help='such as "123:+8,77:off"')
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cache", help="folder of harvested activations (default: the run's)")
    args = parser.parse_args(argv)

    def work():
        sae, acts, _ = open_run(args.RUN, args.device, args.cache)
        out = steer(sae, acts, args.edits, args.prompt)
        for line in side_by_side(("plain", f"steered {args.edits}"), out.values()):
            common.say(line)
    return common.guard(work)


if __name__ == "__main__":
    raise SystemExit(main())
