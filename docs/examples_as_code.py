"""For the API page: docstrings as Markdown has them."""

import re
from typing import Any

import griffe


class ExamplesAsCode(griffe.Extension):
    """Doctests stand below Example, where griffe looks for Examples; <W, G> is no HTML."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r"<(\w_[^<>]*)>", r"⟨\1⟩", text)
