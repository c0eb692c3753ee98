"""Addresses of code in what authors write about their paper."""

from __future__ import annotations

import re

# what stands in the place of an owner and is a page of the host itself
_NO_OWNER = re.compile(
    r"about|apps|blog|collections|contact|customer-stories|datasets|docs|events|explore|features|issues|join|learn|"
    r"login|marketplace|new|notifications|organizations|orgs|papers|posts|pricing|pulls|search|security|settings|"
    r"site|sponsors|spaces|stars|tasks|topics|trending|user-attachments|users",
    re.IGNORECASE,
)
# most abstracts have none of these, and are done with after one look
_ANY = re.compile(r"github|gitlab|bitbucket|codeberg|huggingface|\bhf\.co", re.IGNORECASE)
_IMAGE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|bmp|ico)$|/badges?(?:[/.]|$)", re.IGNORECASE)
_HOST = (
    r"(?:www\.)?(?:github\.com|gitlab\.com|bitbucket\.org|codeberg\.org|huggingface\.co|hf\.co)"
    r"|[a-z\d](?:[a-z\d-]{0,62})\.github\.io"
)
_ADDRESS = re.compile(
    rf"(?:https?://|(?<![\w.-])git@|(?<![\w.@/-]))(?P<host>{_HOST})"
    # not the beginning of a longer name, like github.com.example.org
    r"(?![\w@-]|\.[\w-])(?:(?:/|:(?=[a-z]))(?P<path>[\w.~%+/-]*))?",
    re.IGNORECASE | re.ASCII,
)
_LATEX = re.compile(r"\\([_%#&$~-])|\{\\?_\}|\\_")
_SCHEME = re.compile(r"\b(https?)\s?:\s?//\s?", re.IGNORECASE)
# a line of a listing ends after a hyphen of an address, or after a slash
_AFTER_HYPHEN = re.compile(rf"((?:https?://|\b(?:{_HOST})/)[^\s{{}}<>\"]{{0,300}}-)\s+(?=\w)", re.IGNORECASE)
_AFTER_HOST = re.compile(rf"\b((?:{_HOST})/)\s+(?=[\w.-]+/[\w.-])", re.IGNORECASE | re.ASCII)
# a word that goes on here looks like a name, or has the end of the sentence behind it
_AFTER_OWNER = re.compile(
    r"\b((?:github\.com|gitlab\.com|bitbucket\.org|codeberg\.org|huggingface\.co|hf\.co)/[\w.-]+/)\s+"
    r"(?=[\w.]*[\d_-][\w-]*|[\w-]+[A-Z]\w*|[\w-]+(?:[.,;:)}\]]|\s*$))",
    re.ASCII,
)


def find(abstract: str, comment: str = "") -> str:
    r"""Addresses of repositories and project pages, those of the abstract first, separated by spaces.

    Repositories of GitHub, GitLab, Bitbucket, Codeberg and Hugging Face (models and spaces, not data sets), and pages
    of ``github.io``. Each is written in one way: ``https``, and of a repository's address only what names it. Addresses
    without ``https://``, in LaTeX, and broken over two lines after a slash or a hyphen are found too; owners without a
    repository, pictures and badges are not.

    >>> find(r"Code: \url{https://github.com/ETH-Lab/token\_merge/tree/main}.", "See eth-lab.github.io/tome/")
    'https://github.com/ETH-Lab/token_merge https://eth-lab.github.io/tome'
    """
    found: dict[str, str] = {}
    for text in (abstract, comment):
        for match in _ADDRESS.finditer(_joined(text)) if _ANY.search(text) else ():
            address = _address(match["host"].lower().removeprefix("www."), match["path"] or "")
            if address:
                # hosts do not tell upper from lower case
                found.setdefault(address.casefold(), address)
    return " ".join(found.values())


def _joined(text: str) -> str:
    text = _SCHEME.sub(r"\1://", _LATEX.sub(lambda m: m[1] or "_", text))
    text = _AFTER_HOST.sub(r"\1", text)
    text = _AFTER_OWNER.sub(r"\1", text)
    # an address has no more than a few lines
    for _ in range(4):
        text, number = _AFTER_HYPHEN.subn(r"\1", text)
        if not number:
            break
    return text


def _address(host: str, path: str) -> str:
    """The address in its one way of writing; empty if it is not one of code."""
    path = path.strip("/").rstrip(".-/")
    if _IMAGE.search(path):
        return ""
    parts = [part for part in path.split("/") if part]
    if host.endswith(".github.io"):
        if parts and re.fullmatch(r"index\.html?", parts[-1]):
            parts.pop()
        return "/".join([f"https://{host}", *parts])
    host = "huggingface.co" if host == "hf.co" else host
    space = host == "huggingface.co" and parts[:1] == ["spaces"]
    prefix, parts = (["spaces"], parts[1:]) if space else ([], parts)
    if host == "gitlab.com":
        # groups may lie in groups; what is no project stands behind a dash, or behind one of the old words
        end = (at for at, part in enumerate(parts) if at >= 2 and part in ("-", "tree", "blob", "raw"))
        parts = parts[: next(end, None)]
    else:
        parts = parts[:2]
    if len(parts) < 2 or _NO_OWNER.fullmatch(parts[0]):
        return ""
    parts[-1] = re.sub(r"\.git$", "", parts[-1])
    if not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part, re.ASCII) for part in parts):
        return ""
    return "/".join([f"https://{host}", *prefix, *parts])
