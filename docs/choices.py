"""docs/choices.md, written from the scripts' docstrings: what the papers leave open, and how it is settled.

    python docs/choices.py
"""
import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = {"tsae": "C", "temporal_lens": "E", "mtsae": "A and D", "hierarchical_sae": "B"}


def entries(script):
    """The declared choices of a script -> [(kind, id, text, flags)], in the order of its docstring."""
    source = (HERE.parent / f"{script}.py").read_text()
    found = re.findall(r"^    (AMBIGUOUS|UNSPECIFIED|DEVIATION) ([AUD]\d+) +(.*?)(?=^    [A-Z]{6,} [AUD]\d|^\s*$)",
                       ast.get_docstring(ast.parse(source), clean=False), flags=re.M | re.S)
    rows = []
    for kind, name, text in found:
        text = " ".join(text.split()).replace("|", "/").replace("*", "")
        rows.append((kind, name, text, list(dict.fromkeys(re.findall(r"--[a-z][a-z_-]*", text)))))
    return rows


def page():
    """The whole page."""
    lines = ["# What the papers leave open, and how it is settled", "",
             "Written by `python docs/choices.py` from the docstrings of the scripts, where each id is repeated at the",
             "line that settles it: `grep -n 'AMBIGUOUS A3' tsae.py`. AMBIGUOUS: the paper can be read in two ways (or",
             "contradicts itself); UNSPECIFIED: it says nothing; DEVIATION: it says something else than the code does."]
    for script, paper in SCRIPTS.items():
        lines += ["", f"## {script}.py ({'papers' if 'and' in paper else 'paper'} {paper})", "",
                  "| id | kind | what is open, and what the code does | flag |", "|---|---|---|---|"]
        lines += [f"| {name} | {kind.lower()} | {text} | {', '.join(f'`{flag}`' for flag in flags)} |"
                  for kind, name, text, flags in entries(script)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "choices.md").write_text(page())
