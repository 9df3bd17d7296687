"""The site of docs/: it builds without a warning, is whole, and asks no other server for anything."""

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import tve_hf
from tve_hf.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Page(HTMLParser):
    """What a page refers to, what may be referred to in it, and what is missing for those who cannot see it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.images_without_text: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(given["href"])
        if tag == "img" and not given.get("alt"):
            self.images_without_text.append(given["src"])
        needed = {"aside": "aria-label", "pre": "tabindex"}.get(tag)
        needed = "aria-level" if given.get("role") == "heading" else needed
        if needed is not None and needed not in given:
            self.unlabelled.append(f"{tag} {given}")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, as `make site` builds it."""
    target = tmp_path_factory.mktemp("site")
    (options,) = re.findall(r"sphinx-build (.*) docs build/site", (ROOT / "Makefile").read_text())
    assert "--fail-on-warning" in options
    command = [sys.executable, "-m", "sphinx", *options.split(), "-d", target / "doctrees", DOCS, target / "html"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return target / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in sorted(site.glob("*.html"))}


def test_every_document_is_a_page_and_links_lead_somewhere(site, pages) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in pages}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path.name, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, (path.name, link)


def test_links_to_the_repository_are_to_files_that_exist(pages) -> None:
    prefix = "https://github.com/tve-hf/tve_hf/blob/main/"
    found = {link.removeprefix(prefix) for page in pages.values() for link in page.links if link.startswith(prefix)}
    assert {"model_cards/README.md", "examples/compare_methods.sh"} <= found
    assert all((ROOT / path).exists() for path in found if not path.startswith("docs/")), found


def test_nothing_is_loaded_from_elsewhere(site, pages) -> None:
    loaded = {address for page in pages.values() for address in page.loaded}
    assert loaded and not any(urlsplit(address).netloc for address in loaded)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", style.read_text()), style


def test_search_knows_pages_names_and_options(site) -> None:
    index = (site / "searchindex.js").read_text()
    assert (site / "_static" / "searchtools.js").exists()
    for wanted in ("troubleshooting", "split_classifier", "--coalitions-per-image", "spearman"):
        assert wanted in index, wanted


def test_pictures_are_described_and_landmarks_named(pages) -> None:
    assert not [page.images_without_text for page in pages.values() if page.images_without_text]
    assert not [page.unlabelled for page in pages.values() if page.unlabelled]


def test_every_public_name_is_in_the_reference(site, pages) -> None:
    ids = pages[site / "api.html"].ids
    assert [name for name in tve_hf.__all__ if not {f"tve_hf.{name}", f"module-tve_hf.{name}"} & ids] == []
    methods = pages[site / "methods.html"].ids
    assert {f"tve_hf.methods.{name}.explain" for name in tve_hf.methods.available()} <= methods


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_reference(site, pages, capsys, command) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    options = {option for option in re.findall(r"--([\w-]+)", usage)} - {"help"}
    options -= {option.replace("-", "_") for option in options if "-" in option}
    ids = pages[site / "cli.html"].ids
    assert len(options) > 3
    assert [option for option in options if f"cmdoption-tve-hf-{command}-{option.replace('_', '-')}" not in ids] == []


def test_from_the_first_page_one_click_leads_to_three_lines_for_ones_own_model(site, pages) -> None:
    assert "your_model.html" in pages[site / "index.html"].links
    assert "docs/your_model.md" in (ROOT / "README.md").read_text()
    first = re.findall(r"```python\n(.*?)```", (DOCS / "your_model.md").read_text(), flags=re.DOTALL)[0]
    lines = [line for line in first.splitlines() if line and "import" not in line]
    assert len(lines) == 2 and 'classifier="my-classifier"' in lines[0]


def test_every_answer_names_a_test_that_exists() -> None:
    rows = [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if "https://github.com/" in line]
    assert len(rows) > 40
    for row in rows:
        (path, name), *_ = re.findall(r"\| `([\w/]+\.py)::(\w+)` \|$", row) or [("", "")]
        assert path, row
        functions = ast.walk(ast.parse((ROOT / "tests" / path).read_text()))
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, row
