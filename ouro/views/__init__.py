"""Pictures in HTML: self-contained, static, without scripts or network, for light and dark pages.

Every function returns a `View`: a notebook shows it, `save` writes a page of its own, `str` is the fragment.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> view = ouro.views.token_view(model.trace("One day Ann took"))
>>> view.save("steps.html")  # doctest: +SKIP
"""

from ouro.views.attention import attention_grid
from ouro.views.exits import exit_strip
from ouro.views.lens import lens_table
from ouro.views.page import View
from ouro.views.tokens import token_view

__all__ = ["View", "attention_grid", "exit_strip", "lens_table", "token_view"]
