"""What the site of the documentation needs beyond mkdocs: pages of the repository that lie outside of docs/.

On a page of the repository a link such as ../benchmarks/README.md leads out of docs/. On the site these files lie below its root, so
the hook adds every file that a page links to, and shortens the links.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("benchmarks", "examples", "model_cards", "scripts")
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = [(Path(file.abs_src_path), Path("docs") / file.src_uri) for file in files.documentation_pages()]
    added = set()
    while waiting:
        path, name = waiting.pop()
        for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            linked = (ROOT / name.parent / target).resolve()
            if not linked.is_file() or not linked.is_relative_to(ROOT) or linked in added:
                continue
            inside = linked.relative_to(ROOT)
            if inside.parts[0] in OUTSIDE:
                added.add(linked)
                files.append(File.generated(config, inside.as_posix(), abs_src_path=str(linked)))
                waiting += [(linked, inside)] if linked.suffix == ".md" else []
    return files


def on_page_markdown(markdown, page, **_):
    """Links out of docs/ become links within the site."""
    # A page below docs/ is one level higher on the site, and so is what a page beside docs/ links to in it.
    outside = page.file.src_uri.startswith(OUTSIDE)
    before, after = ("/docs/", "/") if outside else ("../", "")
    return LINK.sub(lambda found: f"]({found[1].replace(before, after, 1)}{found[2] or ''})", markdown)
