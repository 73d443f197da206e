"""Wrong flags and damaged files: status 2, one sentence, no traceback, nothing changed.

`FUZZ=10 python test_all.py fuzz` tries ten times as many random damages as the default.
"""
import json
import os
import random
import shutil
import typing

from tests.helpers import SCRIPTS, TINY, folder, replaced, run, saved_lm, tiny

import common

import tsae
from evals import figures, temporal

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


def violation(here, module, *flags):
    """What is wrong with how the command was refused, or None."""
    def contents():
        return {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    before = contents()
    try:
        status, _, err = run(module, *flags)
    except Exception as error:                             # what a user would see as a traceback
        return f"{type(error).__name__}: {error}"
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if status != 2 or len(said) != 1:
        return f"status {status}, said {err[-300:]!r}"
    return None if contents() == before else f"the folder has changed; {said[0]}"


def test_every_field_refuses_bad_values():
    bad, cases = [], 0
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
                values = bad_values(name, hint)
                assert len(values) >= 6 and f"--{name}" in text, (script, name)
                base = real if hint is str and name != "resume" else ()
                found = {str(value)[:40]: violation(here, module, *base, f"--{name}={value}")
                         for value in values}
                bad += [(script, name, *case) for case in found.items() if case[1]]
                cases += len(values)
    print(f"{cases} bad values, {len(bad)} not refused")
    assert not bad, f"{len(bad)} of {cases}: " + "\n".join(map(str, bad[:60]))


def damaged_json(raw, rng, *names):
    """No such file: cut, of another type, or with a wrong or no value at one of the names."""
    yield from (b"", b"null", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 10 ** 5, raw[:1], raw[1:])
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
    yield from (raw[:rng.randrange(len(raw) - 1)] for _ in range(4 * ROUNDS))
    for _ in range(12 * ROUNDS):
        place = rng.randrange(len(raw) if rng.random() < 0.5 else 2000)
        yield raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1:]
    others = [({k: v for k, v in tensors.items() if k != name}, meta) for name in tensors]
    others += [({**tensors, name: t.new_zeros(3)}, meta) for name, t in tensors.items() if t.dim()]
    notes = [{**meta, key: value} for key in meta or () for value in WRONG
             if key != "world" and type(value) not in (type(meta[key]), bool, int)]
    notes += WRONG if meta else ()
    for case in others + [(tensors, note) for note in notes]:
        common.save_tensors(path, *case)
        yield path.read_bytes()


def test_damaged_runs_are_refused():
    rng, bad, cases = random.Random(0), [], 0
    resume, again = (tsae, "--resume", "half"), (temporal, "done")
    fields = tuple(tsae.Config.__dataclass_fields__)
    with folder() as here:
        tiny(tsae, "done", 12)
        with replaced(common.Run, "evaluate", lambda *_: {}):
            run(tsae, *TINY, "--steps", 12, "--out", "half")
        good = shutil.copytree(here, here.with_suffix(".good"))
        for name, command, *names in (
                ("done/config.json", again, "script", "class", "config", *fields),
                ("half/config.json", resume, *fields), ("done/eval.json", again),
                ("done/log.jsonl", (figures, "done")), ("half/log.jsonl", resume),
                ("done/sae_weights.safetensors", again),
                ("half/checkpoint.safetensors", resume)):
            path, raw = here / name, (here / name).read_bytes()
            tensors = name.endswith("tensors")
            for text in damaged_tensors(path, rng) if tensors else damaged_json(raw, rng, *names):
                if name == "half/log.jsonl" and len(text) >= len(raw):
                    continue                               # a resumed run checks its length only
                if name == "done/log.jsonl" and raw.startswith(text) and b"}" in text[-2:]:
                    continue                               # so many whole lines
                path.write_bytes(text)
                found, cases = violation(here, *command), cases + 1
                if found:
                    bad.append((name, text[:40], found))
                    shutil.copytree(good, here, dirs_exist_ok=True)
                    (here / "half/eval.json").unlink(missing_ok=True)
            path.write_bytes(raw)
        shutil.rmtree(good)
        assert run(*resume)[0] == 0 and run(*again)[0] == 0, "the originals are good"
    print(f"{cases} damaged files, {len(bad)} not refused")
    assert cases >= 60 and not bad, f"{len(bad)} of {cases}: " + "\n".join(map(str, bad[:60]))
