"""Greedy continuations of a prompt without and with features edited.

    python -m evals.steer RUN "123:+8,77:=0" "The old man and"

An edit is FEATURE:+X, FEATURE:-X or FEATURE:=X, in units of the feature, applied at every token but
the sink and special tokens. What the SAE does not explain stays as it is.
"""
import contextlib
import functools
import re

import common  # before torch: it sets how threads wait
import torch

from evals import program
from evals.unlearning import feature_edit


def parse_steer(text, n_features):
    """'7:+8,5:=3' -> [(7, 1, 8.0), (5, 0, 3.0)]: f' = factor f + value."""
    edits = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(?:=|(?=[+-]))([+-]?(?:\d+\.?\d*|\.\d+))\s*", part)
        if not match or int(match[1]) >= n_features:
            raise common.UserError("an edit is FEATURE:+X, FEATURE:-X or FEATURE:=X, features "
                                   f"below {n_features}; not {part!r}.")
        edits.append((int(match[1]), int("=" not in part), float(match[2])))
    return edits


@torch.no_grad()
def steer(sae, acts, text, prompt, n=40):
    """-> {"plain": text, "steered": text}, n tokens each or fewer; edits as in parse_steer."""
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


def work(sae, acts, folder, args):
    for name, text in steer(sae, acts, args.edits, args.prompt).items():
        common.say(f"{name + ':':<9}{text}")


main = functools.partial(program, "steer", __doc__, work, needs_text=True,
                         edits=dict(help='such as "123:+8,77:=0"'),
                         prompt=dict(help="text to continue"))

if __name__ == "__main__":
    raise SystemExit(main())
