"""What the text says about the code is so: maps, open points, commands, paths, copies, imports."""
import ast
import importlib
import re
import shutil
import subprocess
import sys
import types

import test_all
from tests import exercises, helpers
from tests.helpers import HERE, SCRIPTS, folder, modules, replaced, run, skip

import common

BOUNDS = {"tsae.py": 380, "temporal_lens.py": 400, "mtsae.py": 500, "hierarchical_sae.py": 580,
          "common.py": 1100, "test_all.py": 80, "evals/*.py": 250}         # lines of one file
TOGETHER = {"tests": 3700, "benchmarks": 1900, "all": 11900}
PATHS = [path for name in ("*.py", "evals/*.py", "benchmarks/*.py", "data/*.py", "docs/*.py",
                           "tests/*.py") for path in HERE.glob(name)]
SOURCES = {str(path.relative_to(HERE)): path.read_text() for path in PATHS}
DOCS = {str(path.relative_to(HERE)): path.read_text() for path in (
    HERE / "README.md", HERE / "benchmarks/README.md", *sorted(HERE.glob("docs/*.md")))}
ROOMS = {**dict.fromkeys(SCRIPTS, "scripts"), "test_all": "tests"}
DOWN = {"common": (), "scripts": ("common",), "data": ("common", "data"), "docs": (),
        "evals": ("common", "data", "evals"),
        "benchmarks": ("common", "data", "evals", "scripts", "benchmarks")}


def parts(path):
    """(docstring, body) of a module."""
    doc = ast.get_docstring(ast.parse(SOURCES[path]), clean=False) or ""
    return doc, SOURCES[path][SOURCES[path].find(doc) + len(doc):]


def has(owner, names):
    """Whether owner.a.b exists; a field of a dataclass counts, and what an SAE makes of itself."""
    for name in names.split("."):
        source = SOURCES.get(f"{getattr(owner, '__module__', '')}.py", "")
        if name in getattr(owner, "__dataclass_fields__", {}) or f"self.{name}" in source:
            return True
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def test_line_bounds():
    lines = {path: len(text.splitlines()) for path, text in SOURCES.items()}
    for pattern, bound in BOUNDS.items():
        for path in HERE.glob(pattern):
            assert lines[str(path.relative_to(HERE))] <= bound, f"{path} exceeds {bound} lines"
    for room, bound in TOGETHER.items():
        n = sum(n for path, n in lines.items() if room in ("all", path.split("/")[0]))
        assert n <= bound, f"{room}: {n} lines of Python together, more than {bound}"


def test_imports_never_run_upwards():
    """tests, benchmarks -> scripts, evals -> common; common opens others by name at run time."""
    for path, text in SOURCES.items():
        room = path.split("/")[0].removesuffix(".py")
        room, tree = ROOMS.get(room, room), ast.parse(text)
        for node in ast.iter_child_nodes(tree) if room == "common" else ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            for name in (name.split(".")[0] for name in names):
                known = ROOMS.get(name, name) in DOWN or name == "tests"
                assert room == "tests" or not known or ROOMS.get(name, name) in DOWN[room], (
                    f"{path} imports {name}")
        if room == "scripts":
            assert "autograd.Function" not in text and text.index("\nimport common") < text.index(
                "\nimport torch"), path
        for word in ("torch.load(", "pickle.load", "trust_remote_code=True", "allow_pickle=True"):
            assert room == "tests" or word not in text, (path, word)


def test_paper_maps_name_what_exists_and_each_equation_is_cited():
    for script, module in SCRIPTS.items():
        doc, body = parts(f"{script}.py")
        text = re.search(r"^Paper *(?:->|→) *code.*\n((?:(?: .*)?\n)+?)(?=\S)", doc, re.M)[1]
        rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip()]
        rows = [row for row in rows if re.match(r"([A-E]\.|Eq|Sec|Alg|Table|Fig)", row[0])]
        assert len(rows) >= 6, script
        for place, names, *_ in rows:
            for name in re.findall(r"[A-Za-z_][\w./]*", names):
                found = (HERE / name).exists() if "/" in name else has(module, name)
                assert found, f"{script}: {place} names {name}, which does not exist"
            for equation in re.findall(r"(?:\b[A-E]\.)?\d+", place.split("Sec")[0]):
                assert re.search(rf"Eqs?\. [A-E\d., -]*\b{equation}\b", body), (script, place)


def test_open_points_are_declared_argued_and_mean_one_thing():
    meaning = {}
    for path in [f"{name}.py" for name in SCRIPTS] + [p for p in SOURCES if p.startswith("evals/")]:
        doc, body = parts(path)
        declared = dict(re.findall(r"^ +open ([A-ES]\.\w+) +(.+)", doc, re.M))
        assert set(re.findall(r"# open ([A-ES]\.\w+):", body)) == set(declared), path
        assert len(declared) >= 4 or path.startswith("evals/"), path
        for name, text in declared.items():
            question = re.split(r"  +|--", text)[0].strip()
            assert meaning.setdefault(name, question) == question, (name, meaning[name], question)
            for flag in re.findall(r"--([a-z]\w*(?:-\w+)?)", text):
                fields = SCRIPTS[path.removesuffix(".py")].Config.__dataclass_fields__
                bare = flag.removeprefix("no-")
                assert bare in fields and (bare == flag or fields[bare].default is True), flag
    for path, text in DOCS.items():
        named = set(re.findall(r"`([A-ES]\.[a-z_]\w+)`", text))
        assert named <= set(meaning), f"{path} names {named - set(meaning)}"
    done = subprocess.run([sys.executable, HERE / "docs/choices.py", "--check"])
    assert done.returncode == 0, "run python docs/choices.py"


def test_guarded_copies_have_not_drifted():
    def functions(path):
        found = {}

        def visit(node, prefix):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                    found[prefix + child.name] = child
                    visit(child, prefix + child.name + ".")
        visit(ast.parse(SOURCES[path]), "")
        return found

    def shape(node):
        node.body = [n for n in node.body if not (
            isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]     # without docstring
        return ast.dump(node)
    marks = [(path, line, *mark) for path, text in SOURCES.items()
             for line, code in enumerate(text.splitlines(), 1)
             for mark in re.findall(r"# SAME AS ([\w/]+\.py):([\w.]+)", code)]
    assert len(marks) >= 4
    for path, line, other, there in marks:                 # on the definition's line or above it
        node = min((n.lineno, n.name, n) for n in functions(path).values() if n.lineno >= line)[2]
        assert shape(node) == shape(functions(other)[there]), (
            f"{path}:{node.name} has drifted from {other}:{there}")


def test_commands_parse():
    """Each command in the pages and docstrings is taken by its program."""
    def configured(argv):
        return common.guard(lambda: common.configure(
            module.Config, module.LAPTOP, getattr(module, "defaults", None), argv) and 0)
    count, parser = 0, types.SimpleNamespace(main=configured)
    texts = {**DOCS, **{path: parts(path)[0] for path in SOURCES}}
    command = r"python3? (-m [\w.]+|[\w/]+\.py)([^\n`#|>;&]*)"
    for path, text in texts.items():
        for program, words in re.findall(command, text.replace("\\\n", " ")):
            words = re.split(r" {2,}", words.strip())[0]           # a remark may stand behind
            words = re.sub(r"[][]|\.\.\.|…", " ", words).split()
            name, count = program.removeprefix("-m ").removesuffix(".py"), count + 1
            if (module := SCRIPTS.get(name)) and "--resume" not in words:
                status, _, err = run(parser, *words)
                assert status == 0 or "--device" in words, (path, program, words, err)
            elif name == "test_all":
                assert all(word == "--slowest" or test_all.collect([word]) for word in words), path
            elif name.split(".")[0] in ("evals", "benchmarks") or not program.startswith("-m"):
                file = HERE / (name.replace(".", "/") + ".py")
                assert file.exists() or file.stem.isupper(), f"{path}: {program}"     # NAME
    assert count >= 30


def test_links_paths_and_names_exist():
    count, modules = 0, "|".join([*SCRIPTS, "common", r"evals\.\w+", r"benchmarks\.\w+"])
    for page, text in DOCS.items():
        for path in re.findall(r"\]\(((?!http)[^)\s#]+)", text):
            assert ((HERE / page).parent / path).exists(), f"{page} links to {path}"
        for path in re.findall(rf"`((?:results|{'|'.join(DOWN)}|tests)/[\w./-]+\.\w+)`", text):
            assert (HERE / path).exists(), f"{page} names {path}"
        for name, attribute in re.findall(rf"`({modules})\.([A-Za-z_][\w.]*)\b", text):
            if attribute != "py":
                assert has(importlib.import_module(name), attribute), f"{page}: {name}.{attribute}"
                count += 1
    assert count >= 20


def test_exercises_pass_when_right_and_fail_when_unchanged_or_wrong():
    tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-s", "-i"]
    if not shutil.which(tool[0]):
        skip("neither git nor patch is on this machine")
    marked = {int(n): script for script in SCRIPTS
              for n in re.findall(r"# EXERCISE (\d+)", SOURCES[f"{script}.py"])}
    checks = {int(name.split("_")[1]) for name in vars(exercises) if name.startswith("exercise_")}
    pages = [set(map(int, re.findall(r"^### Exercise (\d+)", DOCS[f"docs/{name}.md"], re.M)))
             for name in ("exercises", "teachers")]
    assert test_all.collect(["exercise_1"]) == [("exercises", "exercise_1")] != test_all.collect([])
    assert set(marked) == checks == pages[0] == pages[1] and len(checks) >= 12
    for n, script in sorted(marked.items()):
        for kind in ("unchanged", "", "_wrong"):
            module, said = types.ModuleType(script), None
            with folder() as here:
                module.__file__ = shutil.copy(HERE / f"{script}.py", here)
                if kind != "unchanged":
                    patch = HERE / f"docs/solutions/exercise_{n}{kind}.patch"
                    done = subprocess.run([*tool, patch], cwd=here, capture_output=True, text=True)
                    assert done.returncode == 0, f"{patch.name} does not apply: {done.stderr}"
                with replaced(helpers, "SCRIPTS", {**SCRIPTS, script: module}), \
                        modules(**{script: module}):
                    exec(compile((here / f"{script}.py").read_text(), script, "exec"), vars(module))
                    try:
                        getattr(exercises, f"exercise_{n}")()
                    except AssertionError as error:
                        said = str(error)
            assert (said is None) == (kind == ""), f"exercise {n}, {kind or 'right'}: {said}"
