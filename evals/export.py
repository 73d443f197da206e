"""Write a finished run's SAE as a folder that SAELens loads: RUN/export-saelens.

    python -m evals.export RUN

The format holds f = act((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, for raw x. The scale s
is folded into the biases (b_enc s, b_dec s), so decoder rows keep norm 1 and exported features are
s times ours. An SAE whose encoder is another function is refused.
"""
import functools

import common  # before torch: it sets how threads wait
import torch

from evals import program


@torch.no_grad()
def export(sae, acts, folder):
    """Write sae_weights.safetensors and cfg.json; UserError where the format cannot hold the SAE:
    code and reconstruction are compared on held-out activations before anything is written."""
    s, k = acts.scale, sae.cfg.k if sae.cfg.activation == "topk" else None
    W_enc, b_enc, W_dec, b_dec = (t.detach().float().cpu() for t in (
        sae.W_enc, sae.b_enc * s, sae.W_dec, sae.b_dec * s))
    x, mask = next(iter(acts.heldout(4)))
    x_hat, f = sae(x, mask)
    fits = len(W_enc) == acts.D                                           # one encoder matrix
    if fits:
        h = x.cpu() - b_dec
        code = common.encode_topk(h, W_enc, b_enc, k) if k else (h @ W_enc + b_enc).relu()
        for got, want in (code, s * f), (code @ W_dec + b_dec, x_hat):
            got, want = (v.float().cpu()[mask.cpu()] for v in (got, want))
            fits &= bool((got - want).abs().max() <= 1e-4 * want.abs().max())
    if not fits:
        raise common.UserError("this SAE cannot be exported to SAELens, a linear encoder with relu "
                               "or topk: on held-out activations it gives another code.")
    folder.mkdir(parents=True, exist_ok=True)
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


def work(sae, acts, folder, args):
    export(sae, acts, folder / "export-saelens")
    common.say(f"saved: {folder}/export-saelens")


main = functools.partial(program, "export", __doc__, work)

if __name__ == "__main__":
    raise SystemExit(main())
