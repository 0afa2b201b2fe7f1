"""Docstrings of installed Python packages, read from their source files and cleaned for reading and searching.

Packages are parsed, never imported: importing forty packages takes minutes and runs their code.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


STANDARD_LIBRARY = "python"
"""Stands for the standard library in a list of packages."""

_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages tests test testing vendor vendored third_party extern externals internal deprecated"
    " idlelib lib2to3 turtledemo ensurepip distutils benchmarks conformance codegen v1".split()
)
_ABBREVIATIONS = frozenset("e.g i.e etc vs cf al approx eq fig resp no incl viz w.r.t dr mr ca sec ver".split())


@dataclass(frozen=True)
class DocRecord:
    """One documented function, method or class.

    Attributes:
        name: Dotted name by source file, unique: `sklearn.linear_model._base.LinearRegression.fit`.
        title: The same without private parts: `sklearn.linear_model.LinearRegression.fit`.
        package: The top-level package, or `"python"` for the standard library.
        signature: As one would call it, without annotations.
        summary: First sentence of the docstring.
        body: The rest of the docstring.
    """

    name: str
    title: str
    package: str
    signature: str
    summary: str
    body: str


def package_root(package: str) -> Path | None:
    """The folder of an installed package's source, or `None` where there is none. Nothing is imported."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    # A dotted name would import its parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(package: str) -> list[Path]:
    """All Python files of a package in a fixed order, without tests and vendored code."""
    root = package_root(package)
    found = []
    for folder, folders, names in os.walk(root) if root is not None else ():
        folders[:] = sorted(name for name in folders if _is_public(name))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py") and _is_module(name)]
    if package == "transformers":
        # Four hundred models that are near copies of each other, generated into most of these files.
        found = [path for path in found if not path.name.startswith(("modeling_", "modular_", "convert_"))]
    return found


def documented(package: str, path: Path) -> Iterator[DocRecord]:
    """Everything public in one file that has a usable docstring; a file that does not parse has nothing."""
    source = path.read_bytes()
    if b'"""' not in source:
        return
    try:
        with warnings.catch_warnings():
            # Old packages have invalid escapes in their strings; that is not for our user to hear.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    parts = list(path.relative_to(package_root(package)).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if package != STANDARD_LIBRARY:
        parts.insert(0, package)
    elif parts[0].startswith("_"):
        # `_pydecimal` is `decimal` written in Python; other private modules are nobody's business.
        if not parts[0].startswith("_py"):
            return
        parts[0] = parts[0].removeprefix("_py")
    yield from _walk(tree, package, parts, in_class=False)


def summary_and_body(docstring: str) -> tuple[str, str]:
    """The first sentence of a docstring as plain text without its full stop, and the rest, cleaned of markup,
    examples and references. Either is empty where the docstring has none.

    >>> summary_and_body("Sort the `items` in place. The sort is stable.")
    ('Sort the items in place', 'The sort is stable.')
    """
    paragraphs = _paragraphs(docstring)
    if paragraphs and _SIGNATURE.match(paragraphs[0]):
        paragraphs.pop(0)
    if not paragraphs or _NO_SENTENCE.match(paragraphs[0]):
        return "", ""
    end = _sentence_end(paragraphs[0])
    summary, remainder = paragraphs[0][:end].strip(), paragraphs[0][end:].strip()
    if _UNFINISHED.search(summary):
        return "", ""
    return summary.rstrip(". "), "\n".join(filter(None, [remainder, *paragraphs[1:]]))


# -- finding ------------------------------------------------------------------------------------------------------


def _is_public(folder: str) -> bool:
    # `_core` is where numpy and others keep what they re-export; other private folders are for their own use.
    return folder.isidentifier() and folder not in _SKIPPED_FOLDERS and (folder == "_core" or folder[0] != "_")


def _is_module(name: str) -> bool:
    stem = name[:-3]
    return stem.isidentifier() and not stem.startswith(("test_", "conftest")) and not stem.endswith("_test")


def _walk(node: ast.AST, package: str, parts: list[str], in_class: bool) -> Iterator[DocRecord]:
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _walk(child, package, parts, in_class)
        elif isinstance(child, (ast.Expr, ast.Assign)) and isinstance(child.value, ast.Call):
            yield from _attached(child.value, package, parts)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith(("_", "test")):
                continue
            docstring = ast.get_docstring(child, clean=False)
            here = [*parts, child.name]
            if docstring:
                yield from _record(package, here, _signature(child, in_class), docstring)
            if isinstance(child, ast.ClassDef):
                yield from _walk(child, package, here, in_class=True)


def _attached(call: ast.Call, package: str, parts: list[str]) -> Iterator[DocRecord]:
    """Docstrings of compiled functions, which numpy and torch attach in calls such as `add_docstr(torch.abs, "…")`."""
    function = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if not function.endswith(("add_docstr", "add_docstr_all", "add_newdoc")) or len(call.args) < 2:
        return
    target = [a.value if isinstance(a, ast.Constant) else ast.unparse(a) for a in call.args[:-1]]
    strings = [n for n in ast.walk(call.args[-1]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    if not strings or not all(isinstance(name, str) for name in target):
        return
    name = ".".join(target)
    if function == "add_docstr_all":
        name = f"torch.Tensor.{name}"
    elif not name.startswith(f"{package}."):
        name = ".".join([*parts, name.rsplit(".", 1)[-1].removeprefix(f"{parts[-1]}_")])
    docstring = strings[0].value
    if isinstance(call.args[-1], ast.Call):  # "…{input}…".format(**common)
        docstring = _FIELD.sub("", docstring).replace("{{", "{").replace("}}", "}")
    first = re.match(r"\s*([A-Za-z_][\w.]*\([^\n]*?\))(?:\s*->[^\n]*)?\s*(?:\n|$)", docstring)
    signature = first.group(1) if first else name.rsplit(".", 1)[-1]
    if first:
        docstring = docstring[first.end() :]
    yield from _record(package, name.split("."), signature, inspect.cleandoc(docstring))


def _record(package: str, parts: list[str], signature: str, docstring: str) -> Iterator[DocRecord]:
    summary, body = summary_and_body(docstring)
    if summary and body:
        title = ".".join(part for part in parts if not part.startswith("_"))
        yield DocRecord(".".join(parts), title, package, signature, summary, body)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        made_by = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return f"class {node.name}({', '.join(_parameters(made_by, True)) if made_by else ''})"
    decorators = {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}
    if any(decorator.endswith("property") for decorator in decorators):
        return node.name
    bound = in_class and "staticmethod" not in decorators
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{node.name}({', '.join(_parameters(node, bound))})"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool, most: int = 12) -> list[str]:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_parameter(a, d) for a, d in zip(positional, defaults)][bound:]
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [_parameter(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return shown if len(shown) <= most else [*shown[:most], "..."]


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return argument.arg
    value = ast.unparse(default)
    return f"{argument.arg}={value if len(value) <= 16 else '...'}"


# -- cleaning -----------------------------------------------------------------------------------------------------

_FIELD = re.compile(r"(?<!\{)\{\w+\}(?!\})")
_LONGEST = 5000
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\([^)]*\)(\s*->.*)?$")
# Not a sentence: a parameter list, a section heading, a reference to something else, code.
_NO_SENTENCE = re.compile(
    r"(\w+ ?\(|\w+ ?: |\W|\d|(args|arguments|params|parameters|returns?|raises|yields|examples?|usage|notes?|warning"
    r"|see|same as|alias|deprecated|overrid\w*|copied|refer|todo|inherit\w*|implements?|reimplement\w*|equivalent to"
    r"|internal|private|like)\b(?! \w+ \w+ \w+ \w+ \w+ \w+)|(deprecated|see|todo|note|copied from|overrid\w*)\b"
    r"|returns?:|\w+::)",
    re.IGNORECASE,
)
_DROPPED_SECTIONS = frozenset(
    "example,examples,usage,references,reference,see also,usage example,usage examples,sample usage,doctest,"
    "doctests,citation,methods,attributes".split(",")
)
_GOOGLE_SECTION = re.compile(r"([A-Z][A-Za-z ]{2,24}?):{1,2}$")
_DROPPED_DIRECTIVE = re.compile(
    r"\.\. *(version\w*|deprecated|seealso|plot|code\w*|sourcecode|math|image|figure|testsetup|testcode|testoutput"
    r"|testcleanup|ipython|autosummary|index|only|currentmodule|highlight|include|rubric|todo|_[^:]*:|\[|\|)"
)
_DIRECTIVE = re.compile(r"\.\. *([\w-]+)::\s*")
_UNDERLINE = re.compile(r"\s*([-=~^*#\"'+.`_])\1{2,}[-=+ ]*$")
_UNFINISHED = re.compile(r"([:,;]|\b(a|an|and|are|as|at|by|for|from|in|is|of|on|or|such|that|the|to|via|where|with))$")

_LINE_STARTS = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in [
        (r"^[ \t]*:(?:param|parameter|arg|argument|keyword|type) (?:[\w.\[\]]+ )?(\*{0,2}\w+):", r"\1:"),
        (r"^[ \t]*:returns?:", "Returns:"),
        (r"^[ \t]*:raises? ?([\w.]*):", r"Raises \1:"),
        (r"^[ \t]*:[a-z]+(?: \w+)?:(?!`)[ \t]*", ""),
        (r"^[ \t]*@param (\w+):?", r"\1:"),
        (r"^[ \t]*@returns?:?", "Returns:"),
    ]
]
_INLINE = [
    (trigger, re.compile(pattern), replacement)
    for trigger, pattern, replacement in [
        ("[`", r"!?\[`[~.!]*(?:[\w.]*\.)?([^`\n]+)`\](?:\([^)\s]*\))?", r"\1"),  # [`~package.Name`]
        ("](", r"!?\[([^\]\n]+)\]\((?:https?:)?[^)\s]*\)", r"\1"),  # [text](link)
        (":`", r":[\w:+-]+:`([^`<\n]+?)\s*<[^`\n]*>`", r"\1"),  # :role:`text <target>`
        (":`", r":[\w:+-]*:?math:`([^`\n]*)`", r"\1"),
        (":`", r":[\w:+-]+:`[~!.]*(?:[\w.]*\.)?([^`\n]+)`", r"\1"),  # :role:`package.Name`
        ("`_", r"`([^`<\n]+?)\s*<[^`\n]*>`__?", r"\1"),  # `text <link>`_
        ("]_", r"\s?\[[\w*#-]+\]_", ""),  # footnotes
        ("``", r"``([^`\n]*)``", r"\1"),
        ("`", r"`[~!.]?([^`\n]*)`_{0,2}", r"\1"),
        ("`", r"`", ""),
        ("|", r"\|([A-Za-z][\w. ]*)\|", r"\1"),
        ("**", r"(?<![\w*])\*\*([^*\n]+?)\*\*(?![\w*])", r"\1"),
        ("*", r"(?<![\w*])\*([^*\s,)][^*\n]*?)\*(?![\w*])", r"\1"),
        ("<", r"</?(?:Tip|a|b|i|p|br|em|code|div|span|pre|ul|li|strong|sub|sup)\b[^>\n]{0,80}>", ""),
        ("http", r"https?://\S+", ""),
        ("\\", r"\\(?:text|math\w+|operatorname|boldsymbol|displaystyle)\*?\{([^{}\n]*)\}", r"\1"),
        ("\\", r"\\([A-Za-z]+|[*_`])", r"\1"),
        ("::", r"::(?=\s|$)", ":"),
        (" ", r"[ \t]+(?=[.,;](?:\s|$))", ""),
    ]
]


def _paragraphs(docstring: str) -> list[str]:
    lines = _without_blocks(inspect.cleandoc(docstring[:_LONGEST]).splitlines())
    text = "\n".join(lines)
    for pattern, replacement in _LINE_STARTS:
        text = pattern.sub(replacement, text)
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        line = " ".join(line.split())
        if not line:
            paragraphs.append([])
        elif _UNDERLINE.match(line):
            if paragraphs[-1]:  # the line above is a heading: a paragraph begins with it
                paragraphs.append([f"{paragraphs[-1].pop()}:"])
        elif _GOOGLE_SECTION.match(line):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
    text = "\n".join(" ".join(lines) for lines in paragraphs if lines)
    for trigger, pattern, replacement in _INLINE:
        if trigger in text:
            text = pattern.sub(replacement, text)
    # A heading is of use only with something under it.
    return [p for p in text.split("\n") if p.strip() and not re.fullmatch(r"[A-Z][A-Za-z]*( [A-Za-z]+)?:?", p.strip())]


def _without_blocks(lines: list[str]) -> list[str]:
    """Lines without doctests, code, footnotes and the sections of which a search has no use."""
    kept: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        text, indent = line.strip(), len(line) - len(line.lstrip())
        following = lines[position + 1] if position + 1 < len(lines) else ""
        if text.startswith(">>>"):
            while position < len(lines) and lines[position].strip():
                position += 1
        elif text.startswith(("```", "~~~")):
            fence, position = text[:3], position + 1
            while position < len(lines) and not lines[position].strip().startswith(fence):
                position += 1
            position += 1
        elif (title := _section(line, following)) is not None and title.lower() in _DROPPED_SECTIONS:
            position += 1 + bool(_UNDERLINE.match(following) and following.strip())
            while position < len(lines):
                ahead = lines[position + 1] if position + 1 < len(lines) else ""
                if _section(lines[position], ahead) is not None:
                    break
                position += 1
        elif _DROPPED_DIRECTIVE.match(text):
            position = _after_block(lines, position + 1, indent)
        elif directive := _DIRECTIVE.match(text):
            rest = text[directive.end() :]
            kept.append(" " * indent + f"{directive.group(1).capitalize()}: {rest}".rstrip())
            position += 1
        elif text.endswith("::") and not following.strip() and _section(line, following) is None:
            kept += [line[: line.rindex("::")] + ":", ""]
            position = _after_block(lines, position + 1, indent)
        else:
            kept.append(line)
            position += 1
    return kept


def _section(line: str, following: str) -> str | None:
    """The title, if an unindented `line` begins a section in the style of numpy or Google."""
    if line[:1].isspace() or not line.strip():
        return None
    if following.strip() and _UNDERLINE.match(following) and len(line) < 40:
        return line.strip().strip(":")
    match = _GOOGLE_SECTION.match(line.strip())
    return match.group(1) if match else None


def _after_block(lines: list[str], position: int, indent: int) -> int:
    """The first line after a block that is indented by more than `indent`."""
    while position < len(lines) and (
        not lines[position].strip() or len(lines[position]) - len(lines[position].lstrip()) > indent
    ):
        position += 1
    return position


def _sentence_end(paragraph: str) -> int:
    for match in re.finditer(r"[.!?](?=\s|$)", paragraph):
        word = re.search(r"[\w.]*$", paragraph[: match.start()]).group().lower()
        following = paragraph[match.end() :].lstrip()[:1]
        if match.group() == "." and (word in _ABBREVIATIONS or following.islower() or re.fullmatch(r"[a-z]", word)):
            continue
        return match.end()
    return len(paragraph)
