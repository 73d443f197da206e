"""Wrong flags and damaged files: status 2, one sentence, no traceback, nothing changed.

`FUZZ=10 python test_all.py fuzz` tries ten times as many random damages as the default.
"""
import json
import os
import random
import typing

from tests.helpers import SCRIPTS, TINY, folder, refused, replaced, run, saved_lm, tiny

import common

import tsae
from evals import temporal

ROUNDS = int(os.environ.get("FUZZ", 1))
LONG = "x" * 5000
STRINGS = {  # bad values of the fields that are free text; FILE, BINARY and FOREIGN are made
    "model": ("", "no-such/model", "/dev/null", LONG, "FILE", "FOREIGN", "a b", ".."),
    "layer": ("", "x", "-1", "1,1", "1,", "1.5", "9" * 30, "1;2", "19"),
    "data": ("", "missing.txt", "/dev/null", LONG, "BINARY", "FOREIGN/empty", "pile "),
    "device": ("", "tpu", "cuda:99", "CPU", "cpu:1", "cuda:-1", "cuda:x"),
    "cache": ("", "FILE", "FILE/x", "/dev/null/x", "/proc/nothing/x", LONG),
    "out": ("", "FILE", "FOREIGN", "FILE/x", "/dev/null", "/proc/nothing/x", LONG),
    "resume": ("nowhere", "FILE", "FOREIGN", LONG, "/dev/null", "FILE/x", "..."),
    "eval": ("x", "core,x", "..", "steer", "__init__", "CORE", "core temporal"),
    "rates": ("", "x", "0", "-1", "1,1", "1.5", "1,,4")}
WRONG = (None, [], {}, "x", -1, 1e300, True, 0, [[None]])


def bad_values(name, hint):
    """At least six values that a field of this type must refuse."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        found = ["x", "", "nan", "1,5", "1e999", "-inf", "0x10", args[1] - 1, args[2] * 2 + 1]
        return found + ["1.5", "1e3"] * (args[0] is int)
    if origin is typing.Literal:
        return ["x", "", f"{args[0]} ", f"{args[0]}!", args[0].title(), args[0][:-1], "None"]
    return ["x", "", "1", "nan", "None", "true"] if hint is bool else STRINGS[name]


def refuses(case, module, *flags):
    """As `refused`; also what a user would see as a traceback is told with the case."""
    try:
        refused(*flags, module=module)
    except Exception as error:
        raise AssertionError(case) from error


def test_every_field_refuses_bad_values():
    with folder() as here, replaced(os, "environ", {**os.environ, "HF_HUB_OFFLINE": "1"}):
        real = (*saved_lm(here), "--layer", 1, "--steps", 4, "--eval", "none")
        (here / "FILE").write_text("mine")
        (here / "BINARY").write_bytes(bytes(range(256)) * 20)
        (here / "FOREIGN/empty").mkdir(parents=True)
        (here / "FOREIGN/config.json").write_text('{"model_type": "x"}')
        run(tsae, *real, "--out", "fills_the_cache")
        for script, module in SCRIPTS.items():
            text = run(module, "--help")[1]
            for name, hint in common.field_types(module.Config).items():
                assert f"--{name}" in text, (script, name)
                base = real if hint is str and name != "resume" else ()
                for value in bad_values(name, hint):
                    refuses((script, name, value), module, *base, f"--{name}={value}")


def damaged_json(raw, rng, *names):
    """No such file: cut, of another type, or with a wrong or no value at one of the names."""
    yield from (b"", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 10 ** 5, raw[1:])
    yield from (raw[:rng.randrange(len(raw) - 2)] for _ in range(5 * ROUNDS))
    for name in names:
        whole = json.loads(raw)
        inner = whole["config"] if name in whole["config"] else whole
        good = inner.pop(name)
        yield json.dumps(whole).encode()
        for value in WRONG:
            if type(value) is not type(good) and not (value == 0 and type(good) is float):
                inner[name] = value
                yield json.dumps(whole).encode()


def damaged_tensors(path, rng):
    """Cut, of another type, with one bit turned round; then well-formed, but with a tensor or a
    note that does not belong there."""
    raw, (tensors, meta) = path.read_bytes(), common.load_tensors(path)
    yield from (b"", b"null", raw[:8], raw[8:], b"\xff" * 64, raw + b"\0", raw[:-1])
    for _ in range(12 * ROUNDS):
        place = rng.randrange(len(raw) if rng.random() < 0.5 else 2000)
        yield raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1:]
    others = [({k: v for k, v in tensors.items() if k != name}, meta) for name in tensors]
    others += [({**tensors, name: t.new_zeros(3)}, meta) for name, t in tensors.items() if t.dim()]
    notes = [{**meta, key: value} for key in meta or () for value in WRONG
             if key != "world" and type(value) not in (type(meta[key]), bool, int)]
    for case in others + [(tensors, note) for note in notes]:
        common.save_tensors(path, *case)
        yield path.read_bytes()


def test_damaged_runs_are_refused():
    rng, fields = random.Random(0), tuple(tsae.Config.__dataclass_fields__)
    resume, again = (tsae, "--resume", "half"), (temporal, "done")
    with folder() as here:
        tiny(tsae, "done", 12)
        with replaced(common.Run, "evaluate", lambda *_: {}):
            run(tsae, *TINY, "--steps", 12, "--out", "half")
        for name, command, *names in (
                ("done/config.json", again, "script", "class", "config", *fields),
                ("half/config.json", resume, *fields), ("done/eval.json", again),
                ("done/sae_weights.safetensors", again),
                ("half/checkpoint.safetensors", resume)):
            path, raw = here / name, (here / name).read_bytes()
            tensors = name.endswith("tensors")
            for text in damaged_tensors(path, rng) if tensors else damaged_json(raw, rng, *names):
                path.write_bytes(text)
                refuses((name, text[:40]), *command)
            path.write_bytes(raw)
        assert run(*resume)[0] == 0 and run(*again)[0] == 0, "the originals are good"
