"""Text for --data, and its token windows.

bundled · shakespeare · pile · a path: a text, a jsonl file with 'text' fields, a folder of them.

common.py opens this file by name. A text belongs to one split, 'train' or 'heldout', for good.
"""
import hashlib
import json
import lzma
import re
from pathlib import Path

import torch

from common import HERE, UserError, generator, say

PLAYS = 8              # `bundled` holds every 8th Shakespeare document
HELDOUT = 2000         # the Pile's first documents are held out
MIN_TAIL = 16          # a document's last window is kept if it has this many tokens; not tuned
PIECE = 20_000         # characters after which a long local text is cut, at the next line end


def make_windows(texts, lm, T, n_windows):
    """Windows BOS + T tokens -> tokens (N, 1+T) int32, lengths (N,) int32, N <= n_windows. None
    crosses documents. A document's tail of at least MIN_TAIL tokens is kept and padded by repeating
    its last token (lengths says how many are real); shorter tails are dropped."""
    tokens, lengths, texts = [], [], iter(texts)
    while len(tokens) < n_windows and (group := [text for _, text in zip(range(256), texts)]):
        for ids in lm.tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            for start in range(0, len(ids), T):
                piece = ids[start:start + T]
                if len(piece) >= min(MIN_TAIL, T):
                    tokens.append([lm.bos] + piece + [piece[-1]] * (T - len(piece)))
                    lengths.append(len(piece))
    tokens = torch.tensor(tokens[:n_windows], dtype=torch.int32).reshape(-1, 1 + T)
    return tokens, torch.tensor(lengths[:n_windows], dtype=torch.int32)


def windows(cfg, lm, split):
    """Windows of one split, in an order that mixes documents: tokens (N, 1+T), lengths (N,)."""
    wanted = (cfg.tokens if split == "train" else cfg.heldout_tokens) // cfg.T
    most = wanted if cfg.data == "pile" else 10 ** 9
    tokens, lengths = make_windows(documents(cfg.data, split), lm, cfg.T, most)
    if len(tokens) == 0:
        raise UserError(f"--data {cfg.data}: its {split} part has no window of {MIN_TAIL} tokens.")
    if cfg.data != "pile":           # the same mixture whatever --tokens and --seed are
        order = torch.randperm(len(tokens), generator=generator(0, f"windows-{split}"))[:wanted]
        tokens, lengths = tokens[order], lengths[order]
    if len(tokens) < wanted and split == "train":
        say(f"data: {cfg.data} has {len(tokens) * cfg.T:,} tokens in windows of {cfg.T}, fewer "
            f"than --tokens {cfg.tokens:,}: the run goes over them more than once.")
    return tokens, lengths


def documents(data, split):
    """Iterable of texts."""
    if data in ("bundled", "shakespeare"):
        plays = bundled("shakespeare", split)
        rows = plays if data == "shakespeare" else bundled("corpus", split) + plays[::PLAYS]
        return [row["text"] for row in rows]
    return pile(split) if data == "pile" else local(Path(data), split)


def bundled(name, split=None, domains=None):
    """Rows of data/<name>.jsonl.xz, of one split, of domains: dicts with text, split, domain ..."""
    with lzma.open(HERE / "data" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if split in (None, row["split"])
                and (domains is None or row["domain"] in domains)]


def content(data):
    """What the text is, by the checksums of its files where they are here: a key for caches."""
    if data == "pile":
        return data
    names = {"bundled": ("corpus", "shakespeare"), "shakespeare": ("shakespeare",)}.get(data, ())
    files = [HERE / f"data/{name}.jsonl.xz" for name in names] or files_of(Path(data))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def pile(split):
    """The Pile Uncopyrighted, streamed; UserError where it cannot be had."""
    try:
        from datasets import load_dataset
        stream = load_dataset("monology/pile-uncopyrighted", split="train", streaming=True)
        for row in stream.take(HELDOUT) if split == "heldout" else stream.skip(HELDOUT):
            yield row["text"]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"the Pile cannot be streamed ({type(error).__name__}); --data bundled "
                        "needs no network.") from None


def files_of(path):
    files = sorted(p for p in (path, *path.rglob("*")) if p.is_file())
    if not files:
        raise UserError(f"--data {path} is no text file and no folder of text files (known names: "
                        "pile, shakespeare, bundled).")
    return files


def local(path, split):
    """Texts of a file or folder, long ones in pieces; every 10th is held out (of one: its end)."""
    texts = []
    for file in files_of(path):
        raw = file.read_bytes()
        try:
            if b"\0" in raw:
                raise ValueError("a binary file")
            raw = raw.decode("utf-8-sig")                  # skips a byte-order mark
        except ValueError:
            if path.is_dir():                              # a folder may hold pictures
                continue
            raise UserError(f"--data {file} is not UTF-8 text.") from None
        for text in jsonl_texts(file, raw) if file.suffix == ".jsonl" else [raw]:
            texts += re.findall(rf"(?s).{{{PIECE},}}?\n|.+", text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--data {path} holds no text.")
    if len(texts) == 1:
        cut = int(len(texts[0]) * 0.9)
        return [texts[0][:cut] if split == "train" else texts[0][cut:]]
    step = min(10, len(texts))
    return [t for i, t in enumerate(texts, 1) if (i % step == 0) == (split == "heldout")]


def jsonl_texts(file, raw):
    """The 'text' of each line. Lines end at \\n only: U+2028 and U+0085 may stand in a string."""
    for number, line in enumerate(raw.split("\n"), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()                              # no lone surrogate
                yield text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"--data {file}, line {number}: no json object whose 'text' is a "
                                "string.") from None
