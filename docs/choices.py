"""docs/choices.md: what the papers leave open, collected from the lines of code that settle it.

    python docs/choices.py            write the page
    python docs/choices.py --check    write nothing; exit status 1 if the page is out of date
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("tsae.py", "temporal_lens.py", "evals/positions.py", "mtsae.py", "hierarchical_sae.py")
SECTIONS = {"C": "Paper C", "E": "Paper E", "A": "Paper A", "D": "Paper D", "B": "Paper B",
            "S": "All papers"}
HEAD = """# What the papers leave open, and how it is settled

Written by `python docs/choices.py` from the comments at the lines that settle each point: the paper
/ here / why / the flag for another reading. To go there: `grep -n "open C.norm" *.py evals/*.py`"""


def page():
    """The page: of each point its question (docstring), its argument (comment) and its flags."""
    rows = {}                                              # (id, question, argument, flags): files
    for file in FILES:
        _, doc, body = (HERE.parent / file).read_text().replace("|", "\\|").split('"""', 2)
        index = dict(re.findall(r"^ +open ([A-ES]\.\w+) +(.+)", doc, re.M))
        for name, text in re.findall(r"^ *# open ([A-ES]\.\w+): (.*(?:\n *#   .*)*)", body, re.M):
            text = re.sub(r"\s+(#\s+)?", " ", text)
            flags = dict.fromkeys(re.findall(r"--[a-z][\w-]*", f"{index[name]} {text}"))
            flags = ", ".join(f"`{flag}`" for flag in flags)
            text = re.sub(r" /( --[\w-]+,?)+$", "", text)  # flags alone have a column of their own
            row = name, re.split(r"  |; --", index[name])[0], text, flags
            rows.setdefault(row, []).append(file)
    lines = [HEAD]
    for letter, title in SECTIONS.items():
        lines += [f"\n## {title}\n", "| id | open | settled | flag | in |", "|---" * 5 + "|"]
        lines += ["| " + " | ".join((*row, ", ".join(files))) + " |"
                  for row, files in sorted(rows.items(), key=lambda item: item[0][0])
                  if row[0][0] == letter]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit((HERE / "choices.md").read_text() != page() and "docs/choices.md is out of date")
    (HERE / "choices.md").write_text(page())
