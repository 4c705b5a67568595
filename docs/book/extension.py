"""Two things that Sphinx lacks: formulas without MathJax, and modules as pages."""

from pathlib import PurePosixPath

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.parsers import Parser
from sphinx.writers.html5 import HTML5Translator


class SourceParser(Parser):
    """A page for a module: its name, where it lies, its text."""

    supported = ("source",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        env: BuildEnvironment = document.settings.env
        path = PurePosixPath(f"{env.docname}.py")
        section = nodes.section(ids=["source"], names=["source"])
        section += nodes.title(text=path.name)
        section += nodes.paragraph("", "", nodes.literal(text=str(path)))
        section += nodes.literal_block(inputstring, inputstring, language="python")
        document += section
        # The sidebar names fedlib's modules only; links lead to the others.
        env.metadata[env.docname]["orphan"] = True


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_source_parser(SourceParser)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
