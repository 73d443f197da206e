"""docs/choices.md: what the papers leave open, collected from the lines of code that settle it.

    python docs/choices.py            write the page
    python docs/choices.py --check    write nothing; exit status 1 if the page is out of date
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("tsae.py", "temporal_lens.py", "evals/positions.py", "mtsae.py", "hierarchical_sae.py")
page = """# What the papers leave open, and how it is settled

Written by `python docs/choices.py` from the comments at the lines that settle each point: the paper
/ here / why / the flag for another reading. To go there: `grep -n "open C.norm" *.py evals/*.py`
"""
rows = {}                                        # (id, question, in short, argument): files
for file in FILES:
    _, doc, body = (HERE.parent / file).read_text().replace("|", "\\|").split('"""', 2)
    index = dict(re.findall(r"^ +open ([A-ES]\.\w+) +(.+)", doc, re.M))
    for name, text in re.findall(r"^ *# open ([A-ES]\.\w+): (.*(?:\n *#   .*)*)", body, re.M):
        text = re.sub(r"\s+(#\s+)?", " ", text)
        question, _, flag = re.sub("; (?=--)", "  ", index[name]).partition("  ")
        rows.setdefault((name, question, flag.strip(), text), []).append(file)
for letter in "CEADBS":                          # the order in which the papers are read
    title = "All papers" if letter == "S" else f"Paper {letter}"
    page += f"\n## {title}\n\n| id | open | in short | settled | in |\n|---|---|---|---|---|\n"
    page += "".join(f"| {' | '.join((*row, ', '.join(files)))} |\n"
                    for row, files in sorted(rows.items()) if row[0][0] == letter)
if "--check" in sys.argv:
    sys.exit((HERE / "choices.md").read_text() != page and "docs/choices.md is out of date")
(HERE / "choices.md").write_text(page)
