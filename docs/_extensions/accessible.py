"""What Sphinx and furo leave out for those who read by ear or by keyboard; axe-core asks for it."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# Each is left as it is when it is met a second time, in a page that was not written anew.
REPLACEMENTS = {
    'role="heading">': 'role="heading" aria-level="2">',  # captions of the navigation
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="Pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="On this page">',
    '<aside class="toc-drawer no-toc">': '<aside class="toc-drawer no-toc" aria-label="On this page">',
    "<pre>": '<pre tabindex="0">',  # which scroll
}


def _finish(app: Sphinx, exception: Exception | None) -> None:
    for path in Path(app.outdir).glob("*.html"):
        text = path.read_text()
        for found, better in REPLACEMENTS.items():
            text = text.replace(found, better)
        path.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True}
