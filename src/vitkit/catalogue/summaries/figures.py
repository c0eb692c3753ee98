r"""Do the figures of a summary occur in the abstract?

A figure is a number, with its unit, or a name with a digit in it (ViT-B/16, DINOv2, ResNet-50). What is the same:

- spellings of a number: ``1,000``, ``1000``, ``1k`` and *one thousand*; ``.5`` and ``0.50``; ``1e-3``, ``10⁻³`` and
  ``$10^{-3}$``. A rounded or converted number is another number (94 is not 94.3, 1 s is not 1000 ms).
- ``82.4%``, ``82.4 %``, ``82.4\%`` and *82.4 percent*; ``2x``, ``×2``, ``2 times``, *two-fold*, *twice* and
  *a factor of 2*. A number that the abstract has without % or × may not get one.
- known units, however they are spelt: *5 ms* is *5 milliseconds* and not *5 s*. Other words after a number are free.
- in lists and ranges the last unit belongs to all: *5, 7 and 10%*, *10–20k*.
- names without a look at case, hyphens, slashes and spaces: ``ResNet50`` is ``ResNet-50``. A number inside a name is no
  number of its own: *50 images* do not occur in *a ResNet-50*.
- dimensions, fractions and ratios only as a whole: ``16×16``, ``1/4``, ``1:10``.

Number words count from *two* on, with ``twice``, ``doubled``, ``halved`` and the like; *zero*, *one*, *first*, *both*,
*half*, *dozens* and *thousands* do not. Signs are not looked at.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vitkit.catalogue.digests.row import tidy

_MARK = re.compile(r"(?: ?\[not in the abstract: ([^\[\]]*)\])+$")

_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SPELT_OUT = {word: number for number, word in enumerate(["zero", *_ONES, *_TEENS])}
_SPELT_OUT |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LETTERS = {"k": 3, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12, "P": 15}
#: words that are a number and × at once
_MULTIPLES = {
    **dict.fromkeys(("twice", "doubles", "doubled", "doubling"), "2"),
    **dict.fromkeys(("thrice", "tripled", "tripling"), "3"),
    **dict.fromkeys(("halved", "halving"), "0.5"),
}
_UNITS = {
    "ms": "ms msec millisecond milliseconds",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "d": "day days",
    "KB": "KB KiB kB kilobyte kilobytes",
    "MB": "MB MiB megabyte megabytes",
    "GB": "GB GiB gigabyte gigabytes",
    "TB": "TB TiB terabyte terabytes",
    "fps": "fps FPS frames/s frame/s frames_per_second",
    "Hz": "Hz hertz",
    "kHz": "kHz kilohertz",
    "MHz": "MHz megahertz",
    "GHz": "GHz gigahertz",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "W": "W watt watts",
    "dB": "dB decibel decibels",
    "bit": "bit bits",
    "°": "° degree degrees deg",
}
_UNIT_OF = {spelling.replace("_", " "): unit for unit, spellings in _UNITS.items() for spelling in spellings.split()}

_END = r"(?![^\W_])"
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)*|(?<![\w.])\.\d+"
_SPELT = (
    rf"(?:{'|'.join(_MULTIPLES)}){_END}|"
    rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES)}){_END})?|{'|'.join(_TEENS)}|{'|'.join(_ONES)}|zero)"
    rf"(?:[- ]hundred)?(?=fold{_END}|{_END})|(?:{'|'.join(_POWERS)}){_END}"
)
_ATOM = re.compile(rf"(?P<number>(?:{_NUMBER})(?:[eE][+-]?\d{{1,4}}{_END})?)|(?P<spelt>(?i:{_SPELT}))|[^\W\d_]+")

_PERCENT = re.compile(rf"\s?%|[\s-]?(?i:percent|per cent|percentage|pp){_END}")
_TIMES = re.compile(rf"\s?(?:[xX]{_END}|×(?!\w))|[\s-]?(?i:times|folds?){_END}")
_SCALE = re.compile(rf"(?:([kKMBGT]){_END}|\s([KMBG])(?![\w-])|[\s-]?((?i:thousand|million|billion|trillion)){_END})")
_COMPUTE = re.compile(rf"[\s-]?([kKMGTP])?(?i:(flop|mac)s?){_END}")
_UNIT = re.compile(rf"[\s-]?({'|'.join(sorted(_UNIT_OF, key=len, reverse=True))}){_END}")

#: between numbers whose unit stands after the last
_LIST = re.compile(r"\s?(?:,|/|-|–|±|&|,?\s(?:and|or|to)|\svs\.?)\s?", re.IGNORECASE)
_FACTOR = re.compile(
    r"\bfactors?\sof\s(?:(?:about|around|almost|nearly|over|roughly|up\sto|more\sthan)\s|~\s?)?$", re.I
)
_FACTOR_CHARS = 30
#: inside a name as it is written, and as another may write it
_JOINED, _NEAR = re.compile(r"[-_/^]?"), re.compile(r"[-_/^ ]?")
_WHOLE = ("×", "/", ":", "^")
#: letters and numbers that a name may have before its last number, where another may write it in another way
_NAME_WORDS = 5

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_TEX = {
    "times": "×",
    "cdot": "×",
    "pm": "±",
    "circ": "°",
    "ell": "l",
    "sim": " ",
    "approx": " ",
    "to": " to ",
    "percent": "%",
}
_TEX |= dict.fromkeys(("le", "leq", "lt", "ge", "geq", "gt", "quad", "qquad"), " ")

#: mantissa without zeros at its ends, and exponent of ten; or the number as it stands
_Value = tuple[str, int]


def check(summary: str, abstract: str, title: str = "") -> list[str]:
    """Figures of a summary that occur neither in the abstract nor in the title.

    Args:
        summary: a mark that :func:`mark` made is not part of it.

    Returns: each once, in the summary's order and wording.

    >>> check("ViT-B/16 gains 2.1% and is 3× faster.", "With a ViT-B/16, accuracy rises by 2.13\\\\%; 3-fold speed.")
    ['2.1%']
    """
    said = _Text(_MARK.sub("", summary))
    known = _Known(f"{title} | {abstract}")
    return list(dict.fromkeys(figure.text for figure in said.figures() if not known.has(figure)))


def mark(summary: str, abstract: str, title: str = "") -> str:
    """The summary, with `` [not in the abstract: 94.3%, 12×]`` at its end if :func:`check` finds such figures.

    An older mark is replaced, so marking twice is marking once.

    >>> mark("It is right in 94% of cases.", "It is right in 93.9% of cases.")
    'It is right in 94% of cases. [not in the abstract: 94%]'
    """
    text = _MARK.sub("", summary)
    missing = check(text, abstract, title)
    return f"{text} [not in the abstract: {', '.join(missing)}]" if missing else text


def marked(summary: str) -> list[str]:
    """The figures that the mark at the end of a summary names.

    >>> marked("It needs 1,000 images. [not in the abstract: 1,000, 12×]")
    ['1,000', '12×']
    """
    found = _MARK.search(summary)
    return found[1].split(", ") if found else []


@dataclass(frozen=True)
class _Atom:
    """A number, a number in words, or a run of letters; ``gap`` is what stands before it."""

    kind: str
    text: str
    start: int
    end: int
    gap: str

    @property
    def folded(self) -> str:
        return self.text.replace(",", "").casefold()

    @cached_property
    def value(self) -> _Value:
        return _spelt_value(self.folded) if self.kind == "spelt" else _value(self.folded)


@dataclass(frozen=True)
class _Figure:
    """Something that must occur.

    Attributes:
        text: as the summary has it.
        name: its letters and numbers, if it is a name; with the word before it in ``longer``.
        values: of a number; of several for a whole such as 16×16, with what stands between them in ``between``.
        unit: "%", "×", a unit or nothing.
    """

    text: str
    name: str = ""
    longer: str = ""
    values: tuple[_Value, ...] = ()
    between: str = ""
    unit: str = ""


class _Text:
    """A text in one spelling, cut into atoms."""

    def __init__(self, text: str) -> None:
        self.text = _one_spelling(text)
        self.atoms: list[_Atom] = []
        end = 0
        for match in _ATOM.finditer(self.text):
            kind = match.lastgroup or "letters"
            self.atoms.append(_Atom(kind, match[0], match.start(), match.end(), self.text[end : match.start()]))
            end = match.end()

    def figures(self) -> Iterator[_Figure]:
        at = 0
        while at < len(self.atoms):
            if self.atoms[at].kind == "letters":
                at, figure = self._name(at)
            else:
                at, figure = self._number(at)
            if figure:
                yield figure

    def _name(self, first: int) -> tuple[int, _Figure | None]:
        """The name that begins with this atom, if there is a digit in it, and the atom after it."""
        last, at = first, first + 1
        while at < len(self.atoms) and _JOINED.fullmatch(self.atoms[at].gap):
            atom = self.atoms[at]
            if atom.kind == "spelt" or (atom.kind == "letters" and atom.gap == "/"):
                break
            # letters that touch the number are part of the name, others only if another number follows
            if atom.kind == "number" or (not atom.gap and self.atoms[at - 1].kind == "number"):
                last = at
            at += 1
        if last == first:
            return at, None
        name = _name(self.atoms[first : last + 1])
        text = self.text[self.atoms[first].start : self.atoms[last].end]
        return last + 1, _Figure(text, name=name, longer=self._word_before(first) + name)

    def _number(self, first: int) -> tuple[int, _Figure | None]:
        last = first
        while (
            last + 1 < len(self.atoms) and self.atoms[last + 1].kind == "number" and self.atoms[last + 1].gap in _WHOLE
        ):
            last += 1
        parts = self.atoms[first : last + 1]
        values = [atom.value for atom in parts]
        unit, power, end = self.unit(last)
        after = last + 1
        while after < len(self.atoms) and self.atoms[after].start < end:
            after += 1
        if parts[0].kind == "spelt" and values[0] in (("0", 0), ("1", 0)) and not power:
            return after, None
        values[-1] = _scaled(values[-1], power)
        # letters that touch it may make a name of it and the word before: GPT 4o
        glued = self.atoms[last + 1 : last + 2] if last + 1 < len(self.atoms) and not self.atoms[last + 1].gap else []
        before = self._word_before(first)
        return after, _Figure(
            self.text[parts[0].start : end],
            longer=before + _name([*parts, *(a for a in glued if a.kind == "letters")]) if before else "",
            values=tuple(values),
            between="".join(atom.gap for atom in parts[1:]),
            unit=unit,
        )

    def _word_before(self, at: int) -> str:
        if at and self.atoms[at].gap == " " and self.atoms[at - 1].kind == "letters":
            return self.atoms[at - 1].folded
        return ""

    def unit(self, at: int) -> tuple[str, int, int]:
        """Unit of a number, power of ten by which it must be multiplied, and where it ends."""
        atom = self.atoms[at]
        if atom.folded in _MULTIPLES:
            return "×", 0, atom.end
        end, power = atom.end, 0
        if match := _SCALE.match(self.text, end):
            power = _LETTERS[match[1] or match[2]] if match[1] or match[2] else _POWERS[match[3].lower()]
            end = match.end()
        if match := _PERCENT.match(self.text, end):
            return "%", power, match.end()
        if match := _TIMES.match(self.text, end):
            return "×", power, match.end()
        if match := _COMPUTE.match(self.text, end):
            return match[2].lower(), power + _LETTERS.get(match[1], 0), match.end()
        if match := _UNIT.match(self.text, end):
            return _UNIT_OF[match[1]], power, match.end()
        return "×" if self.text[atom.start - 1 : atom.start] == "×" else "", power, end


class _Known(_Text):
    """What an abstract says, in every way in which it can be read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        own = list(self.figures())
        self.wholes = {(figure.values, figure.between) for figure in own if figure.between}
        self.names = {figure.name for figure in own if figure.name}
        self.numbers: set[tuple[_Value, str]] = set()
        following: tuple[str, int, int] | None = None
        for at in reversed(range(len(self.atoms))):
            atom = self.atoms[at]
            if atom.kind == "letters":
                continue
            if atom.kind == "number":
                self.names.update(self._names(at))
            following = self._numbers(at, following)

    def has(self, figure: _Figure) -> bool:
        """Does the figure occur?"""
        if {figure.name, figure.longer} & self.names:
            return True
        if figure.between:
            return (figure.values, figure.between) in self.wholes
        if not figure.values:
            return False
        units = {unit for value, unit in self.numbers if value == figure.values[0]}
        if figure.unit in ("%", "×"):
            return figure.unit in units
        # of a number without a known unit it is not known what it counts
        return bool(units) and (not figure.unit or bool({figure.unit, ""} & units))

    def _numbers(self, at: int, following: tuple[str, int, int] | None) -> tuple[str, int, int] | None:
        """Take in a number; ``following`` is unit, power and place of the one after it. Returns those of this one."""
        atom = self.atoms[at]
        before = self.atoms[at - 1] if at else None
        joined = before and before.kind == "letters" and atom.kind == "number" and _JOINED.fullmatch(atom.gap)
        # part of a name, unless it is one like "sub-10 ms"
        if joined and not (atom.gap == "-" and before.text.islower()):
            return None
        unit, power, end = self.unit(at)
        readings = {(unit, power)}
        if following and not unit and _LIST.fullmatch(self.text, end, following[2]):
            unit, power = following[0], power or following[1]
            readings.add((unit, power))
        if _FACTOR.search(self.text, max(0, atom.start - _FACTOR_CHARS), atom.start):
            readings.add(("×", power))
        self.numbers.update((_scaled(atom.value, power), unit) for unit, power in readings)
        return unit, power, atom.start

    def _names(self, at: int) -> Iterator[str]:
        """All names that end with this number."""
        end = at + 1
        if end < len(self.atoms) and not self.atoms[end].gap and self.atoms[end].kind == "letters":
            end += 1
        tail = self.atoms[at:end]
        # in ResNet-18/50 the 50 is a ResNet as well
        for first in range(at, max(-1, at - _NAME_WORDS), -1):
            yield from self._prefixed(first, tail)
            if not (first and self.atoms[first].gap == "/" and self.atoms[first - 1].kind == "number"):
                return

    def _prefixed(self, at: int, tail: list[_Atom]) -> Iterator[str]:
        for first in range(at - 1, max(-1, at - 1 - _NAME_WORDS), -1):
            if not _NEAR.fullmatch(self.atoms[first + 1].gap):
                return
            if self.atoms[first].kind == "letters":
                yield _name([*self.atoms[first:at], *tail])


def _name(atoms: list[_Atom]) -> str:
    parts = [atom.folded for atom in atoms]
    if atoms[-1].kind == "letters" and len(parts) > 1:
        # a plural
        parts[-1] = parts[-1].removesuffix("s")
    # between two numbers something must stay
    return re.sub(r"(?<=\d) (?=\d)", "|", " ".join(parts)).replace(" ", "")


def _one_spelling(text: str) -> str:
    text = text.replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"(?<=\d)(?:\\,|\u00a0|\u2009|\u202f)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\([A-Za-z]+)\*?", lambda m: _TEX.get(m[1], " " if m[1].islower() and len(m[1]) < 3 else ""), text)
    text = re.sub(r"[{}$]|\\(?=[,;:! ])", "", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = tidy(unicodedata.normalize("NFKC", text)).replace("~", " ").replace("\u2044", "/").replace("^°", "°")
    text = re.sub(r"[\u2010\u2011\u2212]", "-", text)
    text = re.sub(r"-{2,}|[\u2012\u2013\u2014\u2015]", "–", text)
    text = re.sub(r"\d", lambda m: str(unicodedata.decimal(m[0])), text)
    text = re.sub(rf"(?<![\d.,])({_NUMBER})\s?[x×*·]\s?10\^\(?([+-]?\d{{1,4}})\)?", r"\1e\2", text)
    text = re.sub(r"(?<![\w.,])10\^\(?([+-]?\d{1,4})\)?", r"1e\1", text)
    text = re.sub(r"(?<=\d)\s?[xX×*]\s?(?=\d)", "×", text)
    text = re.sub(r"(?<=\d)[x×](?=[A-Z])", " ", text)
    return re.sub(r"(?<![^\W_])[xX](?=\d)", "×", text)


def _value(text: str) -> _Value:
    if text.count(".") > 1:
        return text, 0
    digits, _, exponent = text.partition("e")
    whole, _, fraction = digits.partition(".")
    mantissa = (whole + fraction).lstrip("0")
    stripped = mantissa.rstrip("0")
    if not stripped:
        return "0", 0
    return stripped, int(exponent or 0) - len(fraction) + len(mantissa) - len(stripped)


def _spelt_value(words: str) -> _Value:
    if words in _MULTIPLES:
        return _value(_MULTIPLES[words])
    number, power = 0, 0
    for word in re.split(r"[- ]", words):
        number += _SPELT_OUT.get(word, 0)
        power += _POWERS.get(word, 0)
    return _scaled(_value(str(number or 1 if power else number)), power)


def _scaled(value: _Value, power: int) -> _Value:
    return value if value[0] == "0" else (value[0], value[1] + power)
