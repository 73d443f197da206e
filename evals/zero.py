"""The core metrics of an SAE whose weights are all zero, on the run's held-out text.

    python -m evals.zero RUN

This is what an evaluation reports when no training step was ever taken: L0 = L1 = 0, an L2 ratio
of 0, a negative explained variance (the error is taken from zero, the variance about the mean), a
reconstruction bias of 0/0 (SAEBench writes -1), the cross-entropy of scored positions set to 0.
Papers B to E print such values for trained models. Definitions: evals/core.py.
"""
import functools

from evals import core, run_eval


def evaluate(sae, acts, folder=None):
    """The core metrics of the all-zero SAE, as a dict; works without a language model too."""
    def zero(x, mask=None):                                               # -> x_hat, f = 0, 0
        return x.new_zeros(x.shape), x.new_zeros(*x.shape[:-1], len(sae.W_dec))
    return core.evaluate(zero, acts)


main = functools.partial(run_eval, "zero", evaluate, __doc__)

if __name__ == "__main__":
    raise SystemExit(main())
