"""A summary out of the abstract's own sentences, without any model."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

from vitkit.catalogue.digests.row import Row, tidy
from vitkit.catalogue.summaries.sentences import sentences
from vitkit.errors import MissingExtra

#: of a summary, in all
MAX_WORDS = 110

_THIS = r"this (?:paper|work|study|article|thesis)"
#: how sentences of each role are recognised, in the order in which the roles choose
_ROLES = {
    "method": (
        rf"\b(?:we|authors|{_THIS}) (?:\w+ly |also |then )?"
        r"(?:propos|introduc|present|develop|design|devis|leverag|employ|build|combin)",
        r"\bour (?:\w+ )?(?:method|approach|framework|model|architecture)\b",
        r"\bis (?:proposed|introduced|presented)\b",
        r"\b(?:named|called|termed|dubbed|consists of|novel)\b",
    ),
    "result": (
        r"\b(?:outperform|achiev|surpass|improv|accurac|superior|demonstrat|reduc)",
        r"\b(?:state-of-the-art|sota|competitive|results|experiments|experimental|evaluations?)\b",
        r"\bshow(?:s|ed)? that\b",
        r"\bwe (?:find|found)\b",
        r"\d ?\\?%",
    ),
    "objective": (
        r"\b(?:aims?|goal|objective|purpose|however|crucial|underexplored)\b",
        r"\bto (?:address|tackle|overcome|solve|bridge|mitigate|alleviate)\b",
        r"\b(?:challeng|remain|suffer|limit|lack|problem|difficult)",
        rf"\b(?:we|{_THIS}) (?:investigat|explor|stud|examine|ask|address|focus)",
    ),
    "implication": (
        r"\b(?:enabl|potential|suggest|highlight|insight|practical|promising|implication|deploy|offer)",
        r"\b(?:underscor|contribut|generali[sz]|applicab|application)",
        r"\b(?:pav(?:e|es|ing)|real-world|future|opens?)\b",
        r"\bfor (?:clinical|resource|edge)",
    ),
}
_CUES = {role: re.compile("|".join(cues), re.IGNORECASE) for role, cues in _ROLES.items()}
#: where in an abstract a role usually stands, from 0 (begin) to 1 (end)
_PLACE = {"method": 0.4, "result": 0.75, "objective": 0.15, "implication": 1.0}
#: says where something is, not what was found
_NO_CONTENT = re.compile(
    r"https?:|\b(?:github|project page)\b|"
    r"\b(?:code|models?|datasets?|weights|checkpoints)\b.{0,60}\b(?:available|released?)\b",
    re.IGNORECASE,
)
_MEASURED = re.compile(r"\d\s?\\?%|\d\s?(?:×|x\b|\$?\\times)|\d\.\d")
#: hangs on a sentence before it
_HANGS = re.compile(
    r"(?:\(?[ivx\d]{1,4}\)|(?:this|these|they|it|such|those|both|furthermore|moreover|additionally|also|second|third)\b)",
    re.IGNORECASE,
)


def write(row: Row) -> str:
    """About one sentence each for objective, method, result and implication, at most :data:`MAX_WORDS` words.

    The sentences are those of the abstract, word for word and in its order. Which of them are taken is decided by
    LexRank (how central a sentence is), by words that mark a role (*we propose*, *outperforms*) and by where in an
    abstract a role usually stands. The four roles, their words and places are vitkit's own, not part of LexRank. The
    same abstract gives the same summary. A short abstract is its own summary; so is a sentence longer than the limit
    if there is no other.

    Raises: MissingExtra.

    Paper: Erkan and Radev, LexRank: Graph-based Lexical Centrality as Salience in Text Summarization, JAIR 22 (2004).
    """
    abstract = tidy(row.abstract)
    found = list(dict.fromkeys(sentences(abstract)))
    if len(found) <= len(_ROLES) and len(abstract.split()) <= MAX_WORDS:
        return " ".join(found)
    telling = [sentence for sentence in found if not _NO_CONTENT.search(sentence)] or found
    ranks = _lexrank(telling)
    taken: list[int] = []
    room = MAX_WORDS
    for role in _ROLES:
        scores = {
            i: _score(role, i / max(1, len(telling) - 1), sentence, ranks[i])
            for i, sentence in enumerate(telling)
            if i not in taken and len(sentence.split()) <= room
        }
        if scores:
            best = max(scores, key=lambda i: (scores[i], -i))
            taken.append(best)
            room -= len(telling[best].split())
    if not taken:
        taken = [min(range(len(telling)), key=lambda i: len(telling[i].split()))]
    return " ".join(telling[i] for i in sorted(taken))


def _score(role: str, place: float, sentence: str, rank: float) -> float:
    cues = len({match[0].lower() for match in _CUES[role].finditer(sentence)})
    # two cues say as much as many
    score = min(cues, 2) - abs(place - _PLACE[role]) + rank
    if role == "result" and _MEASURED.search(sentence):
        score += 0.5
    return score - 0.5 if _HANGS.match(sentence) else score


def _lexrank(found: Sequence[str]) -> list[float]:
    """LexRank of each sentence, relative to the largest."""
    summarizer = _summarizer()
    import numpy as np
    from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence

    document = ObjectDocumentModel([Paragraph([Sentence(sentence, _Words()) for sentence in found])])
    ranks = [0.0] * len(found)

    def note(infos: list[Any]) -> list[Any]:
        for info in infos:
            # sentences without a word that counts have no rank: 0/0
            ranks[info.order] = 0.0 if math.isnan(info.rating) else float(info.rating)
        return infos

    with np.errstate(invalid="ignore"):
        # in place of a number of sentences sumy takes a function of all of them with their ranks
        summarizer(document, note)
    largest = max(ranks) or 1.0
    return [rank / largest for rank in ranks]


@cache
def _summarizer() -> Any:
    try:
        from sumy.nlp.stemmers import Stemmer
        from sumy.summarizers.lex_rank import LexRankSummarizer
        from sumy.utils import get_stop_words
    except ImportError as error:
        raise MissingExtra("Summarising without an endpoint", "sumy", "papers") from error
    summarizer = LexRankSummarizer(Stemmer("english"))
    summarizer.stop_words = get_stop_words("english")
    return summarizer


class _Words:
    """The part of sumy's tokenizer that is needed here; its own one wants NLTK's data."""

    def to_words(self, sentence: str) -> list[str]:
        return [word for part in sentence.split() if (word := part.strip(string.punctuation))]
