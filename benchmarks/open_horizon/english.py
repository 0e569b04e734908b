"""English prose that a Unix machine has: its manual pages without their formatting, as text files in a folder."""

import gzip
import re
from pathlib import Path

MANUALS = Path("/usr/share/man")
ESCAPES = re.compile(r"\\f\(..|\\f\[.*?\]|\\f.|\\s[-+]?\d|\\&|\\/|\\,|\\\|")
NAMES = {"\\-": "-", "\\(aq": "'", "\\(dq": '"', "\\(bu": "*", "\\(em": " - ", "\\(en": "-", "\\e": "\\", "\\ ": " "}


def write_manuals(folder):
    """One text file per section of the manual; requests are dropped, running text and the words of .B, .I and so on stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sorted(MANUALS.glob("man[1-8]*")):
        for path in sorted(section.glob("*.gz")):
            if path.name.startswith("gcloud"):
                continue  # Generated pages that repeat each other, three quarters of all where they are installed.
            try:
                source = gzip.decompress(path.read_bytes()).decode()
            except (OSError, UnicodeDecodeError):
                continue  # A link whose page was not installed, or a page in another encoding.
            if len(text := plain(source)) > 500:
                (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    return folder


def plain(source):
    """The text of a manual page's source."""
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".so", ".de", ".ds", ".nr", ".if", ".ie", ".el")):
            continue
        if line.startswith((".", "'")):
            name, _, words = line[1:].partition(" ")
            if name in ("SH", "SS", "PP", "P", "LP", "TP", "IP", "Pp", "Sh"):
                lines.append("")
            line = words.replace('"', "")
        for name, character in NAMES.items():
            line = line.replace(name, character)
        lines.append(ESCAPES.sub("", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
