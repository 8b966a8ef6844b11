"""Hook of MkDocs: pictures outside docs/, such as those of experiments/results, become part of the site.

A page shows such a picture as `![text](../experiments/results/x.png)`, which GitHub renders as it is. MkDocs knows
files below docs/ only, so this hook adds the picture to the site and points the page to the copy.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

_OUTSIDE = re.compile(r"(!\[[^\]]*\]\()\.\./(?!\.\.)([^)\s]+\.png)\)")


def on_page_markdown(markdown, page, config, files):
    """The text of a page, whose pictures from outside docs/ are files of the site."""
    root = Path(config.docs_dir).parent

    def moved(match):
        name = f"pictures/{match[2]}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(root / match[2])))
        return f"{match[1]}{name})"

    return _OUTSIDE.sub(moved, markdown)
