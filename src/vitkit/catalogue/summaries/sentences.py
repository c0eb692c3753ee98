"""The sentences of an abstract, word for word."""

from __future__ import annotations

from functools import cache
from typing import Any

from vitkit.errors import MissingExtra

#: small letters, without the last full stop
_ABBREVIATIONS = (
    "e.g i.e al etc vs cf fig figs eq eqs sec secs tab ref refs no nos vol pp ch app approx resp w.r.t wrt w.l.o.g "
    "i.i.d dr prof mr mrs ms st jr ca viz incl est max min avg dept univ inc ltd co a.k.a aka u.s u.k"
)
#: a sentence may end with an abbreviation if one of these comes next
_STARTERS = (
    "we our in this these the to it its however moreover furthermore additionally also finally here experiments "
    "extensive results code therefore thus when while although although such as by with for on at from unlike compared "
    "based specifically notably despite an using they their there although both first second existing recent recently"
)


def sentences(text: str) -> list[str]:
    """Cut a text into sentences, without any data but a list of abbreviations.

    Args:
        text: on one line, as in a :class:`vitkit.catalogue.digests.Row`.

    Returns: parts of the text in its order; only the white space between them is gone.

    Raises: MissingExtra.

    >>> sentences("We cut 98.5% (Fig. 3), as Li et al. did. It works with a ResNet-50. We go on.")
    ['We cut 98.5% (Fig. 3), as Li et al. did.', 'It works with a ResNet-50.', 'We go on.']
    """
    return [text[start:end] for start, end in _punkt().span_tokenize(text)]


@cache
def _punkt() -> Any:
    # Punkt usually learns these lists from a corpus that would have to be downloaded
    try:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    except ImportError as error:
        raise MissingExtra("Cutting abstracts into sentences", "nltk", "papers") from error
    parameters = PunktParameters()
    parameters.abbrev_types.update(_ABBREVIATIONS.split())
    parameters.sent_starters.update(_STARTERS.split())
    return PunktSentenceTokenizer(parameters)
