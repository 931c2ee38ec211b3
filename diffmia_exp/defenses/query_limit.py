"""Query limit: a service that does not answer the same question for ever."""

from __future__ import annotations

from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import whole


class QueryLimit(Defense):
    """At most `variations` variations are given of an image, by its sample id. Nothing is trained, and no answer is another one.

    ReDiffuse (Li et al. 2024, arXiv 2405.20771) averages several variations of an image; with fewer it sees more of the service's
    noise. Attacks that ask the model itself (gray- and white-box) or for generated images alone do not meet it.

    Args:
        variations: of an image, at least 1.
    """

    trains = False

    def __init__(self, variations: int = 3) -> None:
        self.variations = whole("variations", variations, least=1)
