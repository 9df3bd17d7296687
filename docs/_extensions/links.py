"""Links to files of the repository that are no pages: on GitHub where they are, on the site to GitHub."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
_KINDS = (addnodes.pending_xref, addnodes.download_reference)


class RepositoryLinks(SphinxTransform):
    """Replace what MyST takes for pages and downloads; of files that do not exist it warns itself."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        options = self.config.html_theme_options
        for node in list(self.document.findall(lambda node: isinstance(node, _KINDS))):
            if isinstance(node, addnodes.pending_xref):
                if node["refdomain"] != "doc" or node["reftarget"] in self.env.found_docs:
                    continue
                path = Path(self.env.srcdir, f"{node['reftarget']}.md")
            else:
                path = Path(self.env.relfn2path(node["reftarget"], self.env.docname)[1])
            inside = path.resolve().relative_to(ROOT).as_posix()
            address = f"{options['source_repository']}blob/{options['source_branch']}/{inside}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=address, internal=False))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True}
