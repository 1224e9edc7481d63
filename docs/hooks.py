"""Hooks of MkDocs: links to files of the repository, and names of code as links.

Pages link to files outside of docs/ by relative paths, as GitHub needs them. The site has
some of these files as pages, and shows the others as source code. A link to what does not
exist stays as it is, and MkDocs reports it.
"""

import posixpath
import re
from pathlib import Path

from griffe import Extension, NameResolutionError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Files outside of docs/ that are pages of the site. The README is the home page on GitHub.
PAGES = {
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md',
    'README.md': 'index.md',
    'benchmarks/README.md': 'benchmarks.md',
}
_LINK = re.compile(r'(?<=\]\()([^)#:\s]+)')
_NAME = re.compile(r'`(overlock_mm(?:\.\w+)+)`')
_FENCED = re.compile(r'(^```.*?^```$)', re.M | re.S)
_LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yml': 'yaml', '.json': 'json'}


def on_files(files, config):
    """Add the pages that lie outside of docs/, and the sources that pages link to."""
    for path, uri in PAGES.items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for file in list(files.documentation_pages()):
        source = _repository_path(file.src_uri)
        for link in _LINK.findall(Path(file.abs_src_path).read_text()):
            path, uri = _resolved(source, link)
            if uri and uri.startswith('files/') and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=_as_page(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrite links to the repository; link names such as `overlock_mm.fold` to the API."""
    uri = page.file.src_uri
    if uri.startswith('files/'):
        return markdown
    source = _repository_path(uri)

    def rewritten(match):
        _, target = _resolved(source, match[1])
        return posixpath.relpath(target, posixpath.dirname(uri)) if target else match[1]

    parts = _FENCED.split(_LINK.sub(rewritten, markdown))
    parts[::2] = [
        _NAME.sub(lambda match: _reference(match[1], match[1]), part) for part in parts[::2]
    ]
    return ''.join(parts)


def _reference(name: str, identifier: str) -> str:
    """A name as a link to its place in the API, if it has one."""
    return f'<autoref optional identifier="{identifier}"><code>{name}</code></autoref>'


def _repository_path(uri: str) -> str:
    """The path in the repository of a page of the site."""
    outside = {page: path for path, page in PAGES.items() if page != 'index.md'}
    return outside.get(uri, f'docs/{uri}')


def _resolved(source: str, link: str) -> tuple[str, str | None]:
    """The file that ``source`` links to, and its place on the site; None: there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if (ROOT / path / 'README.md').is_file():  # a folder, as GitHub shows it
        path = f'{path}/README.md'
    if path.startswith('..') or not (ROOT / path).is_file():
        return path, None
    if path.startswith('docs/'):
        return path, path.removeprefix('docs/')
    return path, PAGES.get(path, f'files/{path}.md')


def _as_page(path: str) -> str:
    """A text file as a page that is not searched."""
    language = _LANGUAGES.get(posixpath.splitext(path)[1], 'text')
    text = (ROOT / path).read_text()
    return (
        f'---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [toc]\n---\n'
        f'# `{path}`\n\n````{language}\n{text}````\n'
    )


class Roles(Extension):
    """Docstrings have a few roles and links of Sphinx: write them as Markdown."""

    def on_object(self, *, obj, **_):
        """Change the docstring of a class, function or module."""
        if obj.docstring is None:
            return

        def linked(match):
            try:
                return _reference(match[1], obj.resolve(match[1]))
            except NameResolutionError:
                return _reference(match[1], match[1])

        text = re.sub(r':(?:class|func|meth):`~?\.?([\w.]+)`', linked, obj.docstring.value)
        text = re.sub(r'`([^`]+?)\s*<(http[^>]+)>`_', r'[\1](\2)', text)
        obj.docstring.value = re.sub(r'::\n', ':\n', text)
