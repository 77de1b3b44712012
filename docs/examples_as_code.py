"""For the API page: our docstrings call their doctests Example, griffe's parser Examples."""

from typing import Any

import griffe


class ExamplesAsCode(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
