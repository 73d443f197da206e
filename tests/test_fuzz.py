"""Wrong flags and damaged files: status 2, one sentence, no traceback, nothing changed."""
import os
import typing

from tests.helpers import OFFLINE, SCRIPTS, TINY, folder, refused, replaced, run, saved_lm, tiny

import common

import tsae
from evals import temporal

REFUSED = [  # script, flags, what the sentence names
    ("tsae", "--laye 19", "unrecognized"), ("tsae", "--data pile", "synthetic"),
    ("tsae", "--activation topk --k 65", "64 features"), ("tsae", "--buffer 2", "--buffer"),
    ("tsae", "--tokens 9", "--tokens"), ("tsae", "--expansion 1000000", "GB"),
    ("tsae", "--eval probing", "language model"), ("hierarchical_sae", "--levels 65", "--levels"),
    ("hierarchical_sae", "--levels 9 --activation topk --k 8", "--levels")]
TEXTS = [  # file, contents, what the sentence names
    ("empty.txt", b"", "no text"), ("short.txt", b"w1 w2 w3", "short.txt"),
    ("binary.txt", bytes(range(256)) * 20, "UTF-8"), ("nul.txt", b"w1\0 " * 50, "UTF-8"),
    ("bad.jsonl", b'{"text": "w1"}\n{"txt": 1}\n', "line 2"), ("list.jsonl", b"[1]\n", "line 1"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1")]
LONG = "x" * 5000
STRINGS = {  # bad values of the fields that are free text; FILE and FOREIGN are made
    "model": ("", "no-such/model", "/dev/null", LONG, "FILE", "FOREIGN", "a b", ".."),
    "layer": ("", "x", "-1", "1,1", "1,", "1.5", "9" * 30, "1;2", "19"),
    "data": ("", "missing.txt", "/dev/null", LONG, "FOREIGN/empty", "pile "),
    "device": ("", "tpu", "cuda:99", "CPU", "cpu:1", "cuda:-1", "cuda:x"),
    "cache": ("", "FILE", "FILE/x", "/dev/null/x", "/proc/nothing/x", LONG),
    "out": ("", "FILE", "FOREIGN", "FILE/x", "/dev/null", "/proc/nothing/x", LONG),
    "resume": ("nowhere", "FILE", "FOREIGN", LONG, "/dev/null", "FILE/x", "..."),
    "eval": ("x", "core,x", "..", "steer", "__init__", "CORE", "core temporal"),
    "rates": ("", "x", "0", "-1", "1,1", "1.5", "1,,4")}
GARBAGE = (b"", b"null", b"[]", b'"x"', b"\xff" * 64, b"[" * 10 ** 5)
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


def test_bad_flags_and_texts_are_refused():
    """Flags that do not go together, texts that are none, and every field with bad values."""
    with folder() as here, replaced(os, "environ", OFFLINE):
        for script, flags, word in REFUSED:
            refused(*TINY, *flags.split(), words=[word], module=SCRIPTS[script])
        real = (*saved_lm(here), "--layer", 1, "--steps", 4, "--eval", "none", "--overwrite")
        refused(*real, "--layer", 4, words=["blocks 0 to 3"])
        for name, raw, word in TEXTS:
            (here / name).write_bytes(raw)
            refused(*real, "--data", here / name, words=[word, name])
        (here / "FILE").write_text("mine")
        (here / "FOREIGN/empty").mkdir(parents=True)
        (here / "FOREIGN/config.json").write_text('{"model_type": "x"}')
        run(tsae, *real, "--out", "fills_the_cache")
        for script, module in SCRIPTS.items():
            text = run(module, "--help")[1]
            for name, hint in common.field_types(module.Config).items():
                assert f"--{name}" in text, (script, name)
                base = real if hint is str and name != "resume" else ()
                for value in bad_values(name, hint):
                    refused(*base, f"--{name}={value}", module=module)


def wrong_json(path, *names):
    """Write the json object with a wrong or no value at one of the names; yield each time."""
    whole = common.read_json(path)
    for name in names:
        inner = whole["config"] if name in whole["config"] else whole
        good = inner.pop(name)
        yield common.write_json(path, whole)
        for value in WRONG:
            if type(value) is not type(good) and not (value == 0 and type(good) is float):
                inner[name] = value
                yield common.write_json(path, whole)
        inner[name] = good


def wrong_tensors(path):
    """One bit turned round; then well-formed, but a tensor or a note does not belong there."""
    raw, (tensors, meta) = path.read_bytes(), common.load_tensors(path)
    for place in (*range(0, 2000, 191), *range(2000, len(raw), len(raw) // 5)):
        flipped = bytes([raw[place] ^ 1 << place % 8])
        yield path.write_bytes(raw[:place] + flipped + raw[place + 1:])
    for name, t in tensors.items():
        yield common.save_tensors(path, {k: v for k, v in tensors.items() if k != name}, meta)
        if t.dim():
            yield common.save_tensors(path, {**tensors, name: t.new_zeros(3)}, meta)
    for key in set(meta or ()) - {"world"}:
        for value in WRONG:
            if type(value) not in (type(meta[key]), bool, int):
                yield common.save_tensors(path, tensors, {**meta, key: value})


def test_damaged_runs_are_refused():
    """Files that are cut, of another type, or well-formed with something wrong inside."""
    fields, half, done = tuple(tsae.Config.__dataclass_fields__), ("--resume", "half"), ("done",)
    with folder() as here:
        tiny(tsae, "done", 12)
        with replaced(common.Run, "evaluate", lambda *_: {}):
            run(tsae, *TINY, "--steps", 12, "--out", "half")
        for path, module, flags, wrong, *names in (
                (here / "done/config.json", temporal, done, wrong_json, "script", "class", "config",
                 *fields), (here / "half/config.json", tsae, half, wrong_json, *fields),
                (here / "done/eval.json", temporal, done, wrong_json),
                (here / "done/sae_weights.safetensors", temporal, done, wrong_tensors),
                (here / "half/checkpoint.safetensors", tsae, half, wrong_tensors)):
            raw = path.read_bytes()
            for text in (*GARBAGE, raw[1:], *(raw[:len(raw) * i // 8] for i in range(1, 8))):
                path.write_bytes(text)
                refused(*flags, module=module)
            path.write_bytes(raw)
            for _ in wrong(path, *names):
                refused(*flags, module=module)
            path.write_bytes(raw)
        assert run(tsae, *half)[0] == run(temporal, *done)[0] == 0, "the originals are good"
