"""What the text says about the code is so: maps, open points, commands, paths, copies, imports."""
import ast
import inspect
import operator
import re
import shutil
import subprocess
import sys
import textwrap
import types

import test_all
from tests import exercises, helpers
from tests.helpers import HERE, SAES, SCRIPTS, folder, modules, replaced, run, skip

import common

BOUNDS = {"tsae.py": 380, "temporal_lens.py": 400, "mtsae.py": 500, "hierarchical_sae.py": 580,
          "common.py": 1100, "test_all.py": 80, "evals/*.py": 250}         # lines of one file
TOGETHER = {"tests": 3700, "benchmarks": 1900, "all": 11900}
DOWN = {"common": (), "scripts": ("common",), "data": ("common", "data"), "docs": (),
        "evals": ("common", "data", "evals"),
        "benchmarks": ("common", "data", "evals", "scripts", "benchmarks")}
DOWN["tests"] = (*DOWN, "tests")
SOURCES = {str(path.relative_to(HERE)): path.read_text() for folder_name in (".", *DOWN)
           for path in HERE.glob(f"{folder_name}/*.py")}
DOCS = {str(path.relative_to(HERE)): path.read_text() for path in (
    HERE / "README.md", HERE / "benchmarks/README.md", *sorted(HERE.glob("docs/*.md")))}


def room(name):
    """The key of DOWN for a path, or for an import's name."""
    name = re.split(r"[/.]", name)[0]
    return "scripts" if name in SCRIPTS else "tests" if name == "test_all" else name


def parts(path):
    """(docstring, body) of a module."""
    doc = ast.get_docstring(ast.parse(SOURCES[path]), clean=False) or ""
    return doc, SOURCES[path][SOURCES[path].find(doc) + len(doc):]


def defines(path, names):
    """Whether a module has what is called a.b: functions, classes, fields, attributes of self."""
    body = parts(path)[1]
    return all(re.search(rf"^ *(def |class |.*self\.)?{n}\b", body, re.M) for n in names.split("."))


def test_line_bounds():
    lines = {path: len(text.splitlines()) for path, text in SOURCES.items()}
    for pattern, bound in BOUNDS.items():
        for path in HERE.glob(pattern):
            assert lines[str(path.relative_to(HERE))] <= bound, f"{path} exceeds {bound} lines"
    for name, bound in TOGETHER.items():
        n = sum(n for path, n in lines.items() if name in ("all", path.split("/")[0]))
        assert n <= bound, f"{name}: {n} lines of Python together, more than {bound}"


def test_imports_never_run_upwards_and_nothing_is_unpickled():
    """tests, benchmarks -> scripts, evals -> common; common opens others by name at run time."""
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
            for name in re.findall(r"[A-Za-z_][\w./]*", names):
                found = (HERE / name).exists() if "/" in name else defines(path, name)
                assert found, f"{path}: {place} names {name}, which does not exist"
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
            for no, flag in re.findall(r"--(no-)?([a-z]\w*)", text):
                field = SCRIPTS[path.removesuffix(".py")].Config.__dataclass_fields__[flag]
                assert not no or field.default is True, (path, flag)
    for path, text in DOCS.items():
        named = set(re.findall(r"`([A-ES]\.[a-z_]\w+)`", text))
        assert named <= set(meaning), f"{path} names {named - set(meaning)}"
    done = subprocess.run([sys.executable, HERE / "docs/choices.py", "--check"])
    assert done.returncode == 0, "run python docs/choices.py"


def test_guarded_copies_have_not_drifted():
    def shape(function):
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        node.body = node.body[ast.get_docstring(node) is not None:]
        return ast.dump(node)
    count = 0
    for script, module in SCRIPTS.items():
        for function in (*vars(module).values(), *vars(getattr(module, SAES[script])).values()):
            mark = inspect.isfunction(function) and re.search(
                r"# SAME AS (\w+)\.py:([\w.]+)", inspect.getsource(function))
            if mark:
                there = operator.attrgetter(mark[2])(SCRIPTS[mark[1]])
                assert shape(function) == shape(there), f"{script}.py: no more {mark[0]}"
                count += 1
    assert count == sum(SOURCES[f"{name}.py"].count("# SAME AS") for name in SCRIPTS) >= 4


def test_commands_parse():
    """Each command in the pages and docstrings is taken by its program."""
    def configured(argv):
        return common.guard(lambda: common.configure(
            module.Config, module.LAPTOP, getattr(module, "defaults", None), argv) and 0)
    count, parser = 0, types.SimpleNamespace(main=configured)
    for path, text in {**DOCS, **{path: parts(path)[0] for path in SOURCES}}.items():
        for program, words in re.findall(r"python3? (-m [\w.]+|[\w/]+\.py)([^\n`#|>;&]*)",
                                         text.replace("\\\n", " ")):
            words = re.split(r" {2,}", words.strip())[0]           # a remark may stand behind
            words = re.sub(r"[][]|\.\.\.|…", " ", words).split()
            name, count = program.removeprefix("-m ").removesuffix(".py"), count + 1
            if (module := SCRIPTS.get(name)) and "--resume" not in words:
                status, _, err = run(parser, *words)
                assert status == 0 or "--device" in words, (path, program, words, err)
            elif name == "test_all":
                assert all(word == "--slowest" or test_all.collect([word]) for word in words), path
            elif name.split(".")[0] in DOWN or not program.startswith("-m"):
                file = HERE / (name.replace(".", "/") + ".py")
                assert file.exists() or file.stem.isupper(), f"{path}: {program}"     # NAME
    assert count >= 30


def test_links_paths_and_names_exist():
    count = 0
    for page, text in DOCS.items():
        for path in re.findall(r"\]\(((?!http)[^)\s#]+)", text):
            assert ((HERE / page).parent / path).exists(), f"{page} links to {path}"
        for path in re.findall(rf"`((?:results|{'|'.join(DOWN)})/[\w./-]+\.\w+)`", text):
            assert (HERE / path).exists(), f"{page} names {path}"
        for name, attribute in re.findall(r"`([a-z_.]+)\.([A-Za-z_][\w.]*)\b", text):
            path = name.replace(".", "/") + ".py"
            if path in SOURCES and attribute != "py":
                assert defines(path, attribute), f"{page} names {name}.{attribute}"
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
                    subprocess.run([*tool, HERE / f"docs/solutions/exercise_{n}{kind}.patch"],
                                   cwd=here, check=True)
                with replaced(helpers, "SCRIPTS", {**SCRIPTS, script: module}), \
                        modules(**{script: module}):
                    exec(compile((here / f"{script}.py").read_text(), script, "exec"), vars(module))
                    try:
                        getattr(exercises, f"exercise_{n}")()
                    except AssertionError as error:
                        said = str(error)
            assert (said is None) == (kind == ""), f"exercise {n}, {kind or 'right'}: {said}"
