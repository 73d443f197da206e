"""What the text says about the code is so: maps, open points, commands, paths, copies, imports."""
import ast
import fnmatch
import inspect
import operator
import re
import shutil
import subprocess
import sys
import textwrap
import types
from unittest import mock

from tests import exercises
from tests.helpers import HERE, SAES, SCRIPTS, configured, folder

BOUNDS = {"tsae.py": 380, "temporal_lens.py": 400, "mtsae.py": 500, "hierarchical_sae.py": 580,
          "common.py": 1100, "test_all.py": 80, "evals/*.py": 250}         # lines of one file
TOGETHER = {"tests/*.py": 2500, "benchmarks/*.py": 1900, "*.py": 9000}    # * takes / as well
DOWN = {"common": (), "scripts": ("common",), "data": ("common", "data"), "docs": (),
        "evals": ("common", "data", "evals"),
        "benchmarks": ("common", "data", "evals", "scripts", "benchmarks")}
DOWN["tests"] = (*DOWN, "tests")
SOURCES = {str(path.relative_to(HERE)): path.read_text() for folder_name in (".", *DOWN)
           for path in HERE.glob(f"{folder_name}/*.py")}
TESTS = [name for path, text in SOURCES.items() if path.startswith("tests/")
         for name in (path, *re.findall(r"def (\w+)", text))]
DOCS = {str(path.relative_to(HERE)): path.read_text() for path in (
    HERE / "README.md", HERE / "benchmarks/README.md", *sorted(HERE.glob("docs/*.md")))}


def room(name):
    """The key of DOWN for a path or an import."""
    name = re.split(r"[/.]", name)[0]
    return "scripts" if name in SCRIPTS else "tests" if name == "test_all" else name


def parts(path):
    """(docstring, body) of a module."""
    return re.match(r'(?s)(?:"""(.*?)""")?(.*)', SOURCES[path]).groups("")


def test_line_bounds():
    lines = {path: len(text.splitlines()) for path, text in SOURCES.items()}
    for pattern, bound in BOUNDS.items():
        long = [path for path in fnmatch.filter(lines, pattern) if lines[path] > bound]
        assert not long, f"{long} exceeds {bound} lines"
    for pattern, bound in TOGETHER.items():
        n = sum(lines[path] for path in fnmatch.filter(lines, pattern))
        assert n <= bound, f"{pattern}: {n} lines together, more than {bound}"


def test_imports_never_run_upwards_and_nothing_is_unpickled():
    """common opens others by name, inside its functions."""
    for path, text in SOURCES.items():
        indent = "" if path == "common.py" else " *"
        for name in map(room, re.findall(rf"^{indent}(?:from|import) ([\w.]+)", text, re.M)):
            assert name not in DOWN or name in DOWN[room(path)], f"{path} imports {name}"
        for word in ("torch.load(", "pickle.load", "trust_remote_code=True", "allow_pickle=True"):
            assert room(path) == "tests" or word not in text, (path, word)


def test_paper_maps_name_what_exists_and_each_equation_is_cited():
    for path in (f"{name}.py" for name in SCRIPTS):
        doc, body = parts(path)
        text = re.search(r"^Paper *(?:->|→) *code.*\n((?:(?: .*)?\n)+?)(?=\S)", doc, re.M)[1]
        rows = re.findall(r"^ +((?:[A-E]\.|Eq|Sec|Alg|Table|Fig).*?)  +(.*?)(?:  .*)?$", text, re.M)
        assert len(rows) >= 6, path
        for place, names in rows:
            for name in re.findall(r"[A-Za-z_][\w/]*(?:\.py)?", names):
                defined = re.search(rf"^ *(def |class |.*self\.)?{name}\b", body, re.M)
                assert defined or (HERE / name).is_file(), f"{path}: {place}: there is no {name}"
            for equation in re.findall(r"(?:\b[A-E]\.)?\d+", place.split("Sec")[0]):
                assert re.search(rf"Eqs?\. [A-E\d., -]*\b{equation}\b", body), (path, place)


def test_open_points_are_declared_argued_and_mean_one_thing():
    meaning = {}
    for path in (path for path in SOURCES if room(path) in ("scripts", "evals")):
        doc, body = parts(path)
        declared = dict(re.findall(r"^ +open ([A-ES]\.\w+) +(.+)", doc, re.M))
        assert set(re.findall(r"# open ([A-ES]\.\w+):", body)) == set(declared), path
        assert len(declared) >= 4 or room(path) == "evals", path
        for name, text in declared.items():
            question = re.split(r"  +|--", text)[0].strip()
            assert meaning.setdefault(name, question) == question, (name, meaning[name], question)
            for flag in re.findall(r"--(?:no-)?([a-z]\w*)", text):
                assert hasattr(SCRIPTS[path.removesuffix(".py")].Config, flag), (path, flag)
    named = set(re.findall(r"`([A-ES]\.[a-z_]\w+)`", "".join(DOCS.values())))
    assert named <= set(meaning), f"the pages name {named - set(meaning)}"
    done = subprocess.run([sys.executable, HERE / "docs/choices.py", "--check"])
    assert done.returncode == 0, "run python docs/choices.py"


def test_guarded_copies_have_not_drifted():
    def shape(function):
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        node.body = node.body[ast.get_docstring(node) is not None:]
        return ast.dump(node)
    for script, module in SCRIPTS.items():
        text = SOURCES[f"{script}.py"]
        copies = re.findall(r"def (\w+)\(.*# SAME AS (\w+)\.py:([\w.]+)", text)
        assert len(copies) == text.count("# SAME AS"), script
        for name, other, there in copies:
            here = getattr(getattr(module, SAES[script]), name, None) or getattr(module, name)
            same = shape(here) == shape(operator.attrgetter(there)(SCRIPTS[other]))
            assert same, f"{script}.py: {name} is not the same as {other}.py:{there}"


def test_commands_parse():
    """Each command in the pages and docstrings is taken by its program."""
    for path, text in {**DOCS, **{path: parts(path)[0] for path in SOURCES}}.items():
        for program, words in re.findall(r"python3? (?:-m )?([\w./]+)([^\n`#|>;&]*)",
                                         text.replace("\\\n", " ")):
            words = re.split(r" {2,}", words.strip())[0]           # a remark may stand behind
            words, name = re.sub(r"[][]|\.\.\.|…", " ", words).split(), program.removesuffix(".py")
            if name in SCRIPTS and not {"--resume", "--device"} & set(words):
                configured(SCRIPTS[name], words)
            elif name == "test_all":
                assert all(any(word in test for test in TESTS) for word in words), path
            elif name.split(".")[0] in DOWN or program.endswith(".py"):
                file = HERE / (name.replace(".", "/") + ".py")
                assert file.exists() or file.stem.isupper(), f"{path}: {program}"     # NAME


def test_links_and_paths_exist():
    for page, text in DOCS.items():
        for path in re.findall(r"\]\(((?!http)[^)\s#]+)", text):
            assert ((HERE / page).parent / path).exists(), f"{page} links to {path}"
        for path in re.findall(rf"`((?:results|{'|'.join(DOWN)})/[\w./-]+\.\w+)`", text):
            assert (HERE / path).exists(), f"{page} names {path}"


def test_exercises_pass_when_right_and_fail_when_unchanged_or_wrong():
    marked = {int(n): script for script in SCRIPTS
              for n in re.findall(r"# EXERCISE (\d+)", SOURCES[f"{script}.py"])}
    checks = {int(name.split("_")[1]) for name in vars(exercises) if name.startswith("exercise_")}
    for page in ("exercises", "teachers"):
        told = set(map(int, re.findall(r"^### Exercise (\d+)", DOCS[f"docs/{page}.md"], re.M)))
        assert told == checks == set(marked) and len(checks) >= 12, page
    for n, script in marked.items():
        for kind in ("unchanged", "", "_wrong"):
            module, said = types.ModuleType(f"exercise_{n}{kind}"), None
            with folder() as here:
                module.__file__ = shutil.copy(HERE / f"{script}.py", here)
                if kind != "unchanged":
                    patch = HERE / f"docs/solutions/exercise_{n}{kind}.patch"
                    subprocess.run(["git", "apply", patch], cwd=here, check=True)
                sys.modules[module.__name__] = module          # dataclasses look here
                with mock.patch.dict(SCRIPTS, {script: module}):
                    exec(compile((here / f"{script}.py").read_text(), script, "exec"), vars(module))
                    try:
                        getattr(exercises, f"exercise_{n}")()
                    except AssertionError as error:
                        said = str(error)
            assert (said is None) == (kind == ""), f"exercise {n}, {kind or 'right'}: {said}"
