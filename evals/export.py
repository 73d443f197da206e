"""Write a finished run's SAE as a folder that SAELens or dictionary_learning loads.

    python -m evals.export RUN saelens                  -> RUN/export-saelens
    python -m evals.export RUN dictionary_learning      -> RUN/export-dictionary_learning

Both formats hold f = act((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, for raw x. The scale
s is folded into the biases (b_enc s, b_dec s), so decoder rows keep norm 1 and exported features
are s times ours. An SAE whose encoder is another function is refused.
"""
import functools
import io

import common  # before torch: it sets how threads wait
import torch

from evals import program

FORMATS = ("saelens", "dictionary_learning")


@torch.no_grad()
def export(sae, acts, folder, fmt):
    """Write the SAE to folder in a format of FORMATS; UserError where the format cannot hold it:
    code and reconstruction are compared on held-out activations before anything is written."""
    own = {name for name, _ in sae.named_parameters()} - {"W_enc", "b_enc", "W_dec", "b_dec"}
    refused = f"this SAE cannot be exported to {fmt}, a linear encoder with relu or topk:"
    if own:
        raise common.UserError(f"{refused} its code also depends on {', '.join(sorted(own))}.")
    s, k = acts.scale, sae.cfg.k if sae.cfg.activation == "topk" else None
    W_enc, b_enc, W_dec, b_dec = weights = [t.detach().float().cpu() for t in (
        sae.W_enc, sae.b_enc * s, sae.W_dec, sae.b_dec * s)]
    x, mask = next(iter(acts.heldout(4)))
    f, fits = sae.encode(x, mask), len(W_enc) == x.shape[-1]              # one encoder matrix
    if fits:
        h = x.cpu() - b_dec
        code = common.encode_topk(h, W_enc, b_enc, k) if k else (h @ W_enc + b_enc).relu()
        pairs = (code, s * f), (code @ W_dec + b_dec, sae.decode(f))
        fits = all(close(a, b.float().cpu(), mask.cpu()) for a, b in pairs)
    if not fits:
        raise common.UserError(f"{refused} on held-out activations it gives another code.")
    folder.mkdir(parents=True, exist_ok=True)
    (saelens if fmt == "saelens" else dictionary_learning)(folder, acts, *weights, k)


def close(a, b, mask):
    """Whether a and b (B, T, ...) agree to 1e-4 of the largest value on scored tokens."""
    return bool((a - b)[mask].abs().max() <= 1e-4 * b[mask].abs().max())


def saelens(folder, acts, W_enc, b_enc, W_dec, b_dec, k):
    """SAELens: sae_weights.safetensors and cfg.json."""
    common.save_tensors(folder / "sae_weights.safetensors",
                        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})
    common.write_json(folder / "cfg.json", {
        "architecture": "topk" if k else "standard", **({"k": k} if k else {}),
        "d_in": acts.D, "d_sae": len(W_dec), "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": acts.lm.name if acts.lm else "synthetic",
                     "hook_name": f"blocks.{acts.layer}.hook_resid_post",
                     "hook_layer": int(acts.layer),
                     "context_size": acts.T + 1, "prepend_bos": True, "feature_scale": acts.scale,
                     "sae_lens_version": "6.0.0"}})   # of the format; without it metadata is lost


def dictionary_learning(folder, acts, W_enc, b_enc, W_dec, b_dec, k):
    """dictionary_learning: ae.pt, a pickle (this project writes it and never reads one), and
    config.json."""
    state = {"encoder.weight": W_enc.t().contiguous(), "encoder.bias": b_enc,
             "decoder.weight": W_dec.t().contiguous(), "b_dec" if k else "bias": b_dec}
    if k:
        state.update(k=torch.tensor(k, dtype=torch.int), threshold=torch.tensor(-1.0))
    file = io.BytesIO()
    torch.save(state, file)
    common.write_atomic(folder / "ae.pt", file.getvalue())
    common.write_json(folder / "config.json", {
        "trainer": {"dict_class": "AutoEncoderTopK" if k else "AutoEncoder",
                    "activation_dim": acts.D, "dict_size": len(W_dec), "layer": acts.layer,
                    "lm_name": acts.lm.name if acts.lm else "synthetic",
                    "submodule_name": f"resid_post_layer_{acts.layer}", **({"k": k} if k else {})},
        "buffer": {"d_submodule": acts.D, "io": "out", "ctx_len": acts.T + 1}})


def work(sae, acts, folder, args):
    export(sae, acts, folder / f"export-{args.format}", args.format)
    common.say(f"saved: {folder}/export-{args.format}")


main = functools.partial(program, "export", __doc__, work, format=dict(choices=FORMATS))

if __name__ == "__main__":
    raise SystemExit(main())
