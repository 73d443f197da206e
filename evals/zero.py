"""The core metrics of an SAE whose weights are all zero, on the run's held-out text.

    python -m evals.zero RUN

This is what an evaluation reports when no training step was ever taken: L0 = L1 = 0, an L2 ratio
of 0, a negative explained variance (the error is taken from zero, the variance about the mean), a
reconstruction bias of 0/0 (SAEBench writes -1), the cross-entropy of scored positions set to 0.
Papers B to E print such values for trained models. Definitions: evals/core.py.
"""
import torch

from evals import core, run_eval


class ZeroSAE(torch.nn.Module):
    """f = 0 and x_hat = 0 for every x, with F features of width D as `sae` has."""
    causal = True

    def __init__(self, sae):
        super().__init__()
        self.W_dec = torch.zeros_like(sae.W_dec)                          # (F, D)

    def encode(self, x, mask=None):
        return x.new_zeros(*x.shape[:-1], len(self.W_dec))                # (..., F)

    def decode(self, f):
        return f @ self.W_dec                                             # (..., D)

    def forward(self, x, mask=None):
        return torch.zeros_like(x), self.encode(x)


def evaluate(sae, acts, folder=None):
    """The core metrics of the all-zero SAE, as a dict; works without a language model too."""
    return core.evaluate(ZeroSAE(sae), acts)


def main(argv=None):
    return run_eval("zero", evaluate, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
