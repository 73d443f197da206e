"""Evaluations and tools for a finished run: `python -m evals.NAME RUN`, one file each.

An evaluation has evaluate(sae, acts, folder) -> dict, which `--eval NAME` of a script calls too. It
knows no script: the SAE's class is found from the run's config.json.
"""
import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import common  # before torch: it sets how threads wait
import torch

from common import HERE, UserError


def open_run(folder, device="auto", cache=None):
    """A finished run -> sae (eval mode), its common.Activations, its folder (Path).

    UserError if anything is missing or damaged, or if the language model's weights have changed.
    """
    folder = Path(folder)
    saved = common.read_json(folder / "config.json")
    script, name = str(saved.get("script")), str(saved.get("class"))
    ours = re.fullmatch(r"(benchmarks\.)?[a-z_]+", script)
    there = ours and (HERE / f"{script.replace('.', '/')}.py").exists()
    module = importlib.import_module(script) if there else None
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise UserError(f"{folder}/config.json names no SAE of this project.")
    cfg = common.config_of_run(module.Config, folder)
    cfg = dataclasses.replace(cfg, layer=str(saved.get("layer")), device=device, resume="",
                              cache=cache or cfg.cache)
    tensors, _ = common.load_tensors(folder / "sae_weights.safetensors")
    common.fast_process(common.pick_device(device))
    acts = next(iter(common.open_activations(common.check(cfg))))
    stands = saved.get("stands_on") if isinstance(saved.get("stands_on"), dict) else {}
    text = acts.train_store.tokens if acts.lm else acts.train_store.x
    here = {"weights of the model": acts.lm.revision if acts.lm else "none",
            "text": common.checksum({"": text})[:16]}
    for name, value in here.items():
        if stands.get(name) != value:
            raise UserError(f"{folder} was trained on another {name} than the one that is here.")
    sae = kind(acts.D, cfg).to(acts.device)
    try:
        sae.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{folder}/sae_weights.safetensors does not fit its config.json.") from None
    return sae.eval(), acts, folder


def coded(sae, acts):
    """Held-out batches as the SAE sees them: x, x_hat (B, T, D), f (B, T, F), all fp32, mask.
    UserError behind the last one if no token was scored."""
    scored = False
    for x, mask in acts.heldout():
        x_hat, f = sae(x, mask)
        yield x, x_hat.float(), f.float(), mask
        scored = scored or mask.any()
    if not scored:
        raise UserError("no scored held-out token: all are special, padding or sinks; take more "
                        "text with --heldout_tokens or other --data.")


def program(name, doc, work, argv=None, needs_text=False, **more):
    """Main of a program for a finished run -> exit status, that of work(sae, acts, folder, args)
    or 0. more: its further arguments, as argparse takes them."""
    def job():
        parser = argparse.ArgumentParser(f"python -m evals.{name}", description=doc,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("RUN", help="folder of a finished run")
        for argument, options in more.items():
            parser.add_argument(argument, **options)
        parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
        parser.add_argument("--cache", help="folder of harvested activations (default: the run's)")
        args = parser.parse_args(argv)
        sae, acts, folder = open_run(args.RUN, args.device, args.cache)
        if needs_text and acts.lm is None:
            raise UserError(f"evals.{name} needs a language model; synthetic data has none.")
        return work(sae, acts, folder, args)
    return common.guard(job)


def run_eval(name, evaluate, doc, argv=None, **options):
    """Main of an evaluation: adds its results to RUN/eval.json and prints them -> exit status."""
    return program(name, doc, lambda *run: record(name, evaluate, *run[:3]), argv, **options)


def record(name, evaluate, sae, acts, folder):
    """Add an evaluation's results to eval.json and print them; 3 if something could not be had."""
    results = common.read_json(folder / "eval.json")
    results[name] = evaluate(sae, acts, folder)
    common.write_json(folder / "eval.json", results)
    print_rows(flatten({name: results[name]}), {})
    for text in results[name].get("skipped", []):
        print(f"skipped: {text}", file=sys.stderr)
    return 3 if results[name].get("skipped") else 0


def finish(run, paper, extras):
    """After training: weights, evaluations of --eval, the script's own, curve, eval.json, table."""
    common.save_tensors(run.dir / "sae_weights.safetensors", run.sae.state_dict())
    results, which = {}, [n for n in run.cfg.eval.split(",") if n not in ("", "none")]
    try:
        for name in which:
            module = importlib.import_module(f"evals.{name}")
            results[name] = module.evaluate(run.sae, run.acts, run.dir)
        if which:
            for extra in extras:
                results.update(extra(run.sae, run.acts))
            if run.acts.truth is not None:
                planted = importlib.import_module("data.planted")
                results["recovery"] = planted.recovery(run.sae, run.acts)
            importlib.import_module("evals.figures").training(run.dir)
        results.update(steps=run.total, train_seconds=run.train_seconds)
    except (KeyboardInterrupt, common.Stopped) as stop:
        raise common.Stopped(stop.args[0] if stop.args else 130, "stopped in the evaluation; the "
                             f"trained SAE is saved: --resume {run.dir} evaluates it.") from None
    common.write_json(run.dir / "eval.json", results)
    (run.dir / "checkpoint.safetensors").unlink(missing_ok=True)
    print_table(paper, results, run.sae.causal, run.dir)
    return results


def flatten(results, prefix=""):
    """Nested results -> {'core.EV': value}; lists are left to eval.json."""
    out = {}
    for key, value in results.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}."))
        elif not isinstance(value, (list, tuple)):
            out[prefix + key] = value
    return out


def print_table(paper, results, causal, folder):
    """Metric, the paper's value, this run's; a sentence where a number needs one.

    Results nested more deeply than name.metric are left to eval.json, unless the paper has them.
    """
    flat, core = flatten(results), results.get("core", {})
    shown = [key for key in {**flat, **paper} if key in paper or key.count(".") < 2]
    print_rows({key: flat.get(key, "not run") for key in shown}, paper)
    if core and core["L0"] > 0.25 * core["features"]:
        common.say(f"dense: {core['L0']:.0f} of {core['features']} features are on at a token: no "
                   "dictionary to read. Raise --l1, or take --activation topk --k 32.")
    if "ce_loss_score" in core and not causal:
        common.say("leakage: this encoder reads later tokens, so the cross-entropy with its "
                   "reconstruction in the model is partly the answer: compare --padding causal or "
                   "--causal.")
    common.say(f"saved: {folder}; its features in a browser: python -m evals.features {folder}")


def print_rows(flat, paper):
    common.say(f"\n{'metric':<38} {'paper':<32} this run")
    for key, value in flat.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        common.say(f"{key:<38} {paper.get(key, '-'):<32} {text}")
