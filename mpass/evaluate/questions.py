"""Question answering over documents: RULER's two QA forms, over texts that are always there.

RULER takes paragraphs and questions of SQuAD (one document holds the answer) and HotpotQA (two are
needed). Here the documents are the docstrings of Python's standard library, one of a class, method
or function each, and the questions ask which of them says something. The answers stand in the
documents; what the questions quote stands nowhere else.
"""

from __future__ import annotations

import ast
import functools
import itertools
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpass.evaluate.samples import Puzzle

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
LONGEST = 600
"""Characters of a document; docstrings are cut at a paragraph before that."""


@dataclass(frozen=True)
class Document:
    """What a class, method or function of a module says of itself.

    owner: the class of a method; base: the first class that a class is derived from; sentence: the
    first of its text.
    """

    module: str
    name: str
    kind: str
    text: str
    sentence: str
    owner: str = ""
    base: str = ""

    def passage(self) -> str:
        """The document as it stands in a prompt."""
        about = f"{self.kind} {self.name} of the module {self.module}"
        if self.owner:
            about = f"method {self.name} of the class {self.owner}"
        elif self.base:
            about += f", derived from {self.base}"
        return f"Document: {about}\n{self.text}\n"


@functools.cache
def read_documents() -> tuple[Document, ...]:
    """Documents with a first sentence of their own, in the order of modules and lines."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[Document] = []
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            found += module_documents(path.stem, ast.parse(path.read_text(encoding="utf-8")))
    sentences = Counter(document.sentence for document in found)
    return tuple(document for document in found if sentences[document.sentence] == 1)


def module_documents(module: str, tree: ast.Module) -> Iterator[Document]:
    """Public functions, classes and their methods that have a docstring."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield from documents_of(module, node, "function")
        elif isinstance(node, ast.ClassDef):
            base = ast.unparse(node.bases[0]) if node.bases else ""
            yield from documents_of(module, node, "class", base=base)
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield from documents_of(module, part, "method", owner=node.name)


def documents_of(
    module: str,
    node: ast.FunctionDef | ast.ClassDef,
    kind: str,
    *,
    owner: str = "",
    base: str = "",
) -> Iterator[Document]:
    """The document of a definition, if it is public and says enough."""
    text = ast.get_docstring(node) or ""
    if node.name.startswith("_") or not re.fullmatch(r"[\w.]*", base):
        return
    first = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", first)[0].rstrip(".:")
    if 30 <= len(sentence) <= 150 and sentence[0].isupper():
        kept = text.split("\n\n")[0]
        for paragraph in text.split("\n\n")[1:]:
            if len(kept) + len(paragraph) > LONGEST:
                break
            kept += "\n\n" + paragraph
        yield Document(module, node.name, kind, kept, sentence, owner, base)


def one_document(rng: random.Random) -> Puzzle:
    """SQuAD's form: which function or class says this of itself?"""
    documents = read_documents()
    names = Counter(document.name for document in documents)
    chosen = rng.choice([d for d in documents if not d.owner and names[d.name] == 1])
    question = (
        f'Which {chosen.kind} is documented with the words "{chosen.sentence}"? '
        "Give its name alone."
    )
    return question_puzzle(rng, (chosen,), question, chosen.name)


def two_documents(rng: random.Random) -> Puzzle:
    """HotpotQA's bridge form: from which class is the class of this method derived?"""
    documents = read_documents()
    classes = Counter(d.name for d in documents if d.kind == "class")
    derived = {
        (d.module, d.name): d
        for d in documents
        if d.base and classes[d.name] == 1 and d.base not in ("object", "Exception")
    }
    pairs = [
        (method, derived[method.module, method.owner])
        for method in documents
        if (method.module, method.owner) in derived
    ]
    method, owner = rng.choice(pairs)
    question = (
        f'One method is documented with the words "{method.sentence}". '
        "From which class is the class of this method derived? Give its name alone."
    )
    both = [method, owner]
    rng.shuffle(both)
    return question_puzzle(rng, tuple(both), question, owner.base)


def question_puzzle(
    rng: random.Random, needed: tuple[Document, ...], question: str, answer: str
) -> Puzzle:
    """The needed documents at random places among others, then the question."""
    others = [document for document in read_documents() if document not in needed]
    seed = rng.getrandbits(64)

    def distractors() -> Iterator[str]:
        order = random.Random(seed)
        shuffled = others.copy()
        order.shuffle(shuffled)
        return itertools.cycle(document.passage() for document in shuffled)

    depths = [rng.random() for _ in needed]
    passages = (document.passage() for document in needed)
    return Puzzle(
        head=f"{INSTRUCTION}\n\nThe following are given documents.\n",
        filler=distractors,
        inserts=tuple(zip(depths, passages, strict=True)),
        tail=f"\n\n{INSTRUCTION}\n\nQuestion: {question} Answer:",
        answers=(answer,),
        separator="\n",
    )
