"""Personal data of a row, replaced by tags: the same value has the same tag in the prompt and in both answers.

A tag on one side of a pair only would be what the model learns, so a row is scrubbed as a whole. What is caught:

EMAIL  addresses with a dot in the domain, Unicode ones too, Mastodon's @name@host.tld, and the end of a password in
       an address such as postgres://name:secret@host.tld. Not git@host, package@1.2.3, logo@2x.png, a decorator,
       A@B.T or x@w.sum() in code, "name at host dot com".
PHONE  +CC and 00CC numbers of a real country code; North American numbers of ten digits with separators; numbers
       that begin with 0 and have separators, of 9 to 12 digits; 8 (495) 123-45-67, 138-1234-5678, (11) 91234-5678,
       612 34 56 78; and any 7 to 15 digits right after a word such as phone, Tel. or 手机. Not digits without a
       separator, a + or such a word (ids, counts); not 555-1234 alone; not 601 234 567, which is how numbers are
       written too; not dates, prices, decimals, products and differences, or a list of more than 12 numbers.
       An extension after the number stays.
CARD   13 to 19 digits, together or in the groups that cards have, of a prefix and length that cards have, whose
       last digit is right (Luhn); not inside a longer run of digits, a decimal or a word.
IBAN   of a country's length, together or in groups of four, whose check digits are right.
IP     public addresses of version 4 and 6. Not private, local or reserved ones, networks ending in .0.0, versions
       (v1.2.3.4, version 1.2.3.4, tool/1.2.3.4, 1.2.3.4-beta), or a few names known to all, such as 8.8.8.8.
KEY    OpenAI and the like (sk-), Stripe, GitHub, GitLab, AWS key ids, Slack, Google, Hugging Face, JSON web tokens
       and private keys in PEM. Not passwords and secrets without a prefix.

Names, addresses of homes, dates of birth, passport and tax numbers are not caught: that takes a model or a country's
rules. Digits of other scripts are not read. Tags that stand in a text stay and keep their numbers.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

Hit = tuple[int, int, str, str]
"""Where a value begins and ends, its type, and the value in the one form that it is compared in."""


def scrub(texts: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Return the texts of one row with personal data replaced by tags, and how often each type was replaced.

    A text that holds none is returned itself. Scrubbing what was scrubbed changes nothing.
    """
    found: Counter[str] = Counter()
    scrubbed = list(texts)
    tags: _Tags | None = None
    for index, text in enumerate(scrubbed):
        checks = _checks(text)
        if checks:
            tags = tags or _Tags(texts)
            scrubbed[index] = _replaced(text, checks, tags, found)
    return scrubbed, found


class _Tags:
    """The tags of one row."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._last: Counter[str] = Counter()
        for text in texts:
            for kind, number in _TAG.findall(text) if "<" in text else ():
                self._last[kind] = max(self._last[kind], int(number))
        self._tags: dict[tuple[str, str], str] = {}

    def of(self, kind: str, value: str) -> str:
        """Return the tag of a value: its own, or the next number of its type."""
        tag = self._tags.get((kind, value))
        if tag is None:
            self._last[kind] += 1
            tag = self._tags[kind, value] = f"<{kind}_{self._last[kind]}>"
        return tag


_TAG = re.compile(r"<(EMAIL|PHONE|CARD|IBAN|IP|KEY)_([0-9]{1,6})>")


def _replaced(text: str, checks: str, tags: _Tags, found: Counter[str]) -> str:
    """Return a text with its values replaced, until nothing that a replacement laid open is left."""
    while checks:
        before = text
        for check in checks:
            parts: list[str] = []
            end = 0
            for start, stop, kind, value in _FINDERS[check](text):
                parts += (text[end:start], tags.of(kind, value))
                end = stop
                found[kind] += 1
            if parts:
                text = "".join((*parts, text[end:]))
        if text is before:
            break
        checks = _checks(text)
    return text


# What a text can hold at all: most texts are left after this.

_SHAPE = bytes(
    0x30 if 0x30 <= byte <= 0x39
    else 0x78 if byte < 128 and chr(byte).isalpha()
    else byte if byte in b".:"
    else 0x20 if byte in b" -/()+\xc2\xa0\xe2\x80\xaf\x90\x91\x93"
    else 0x5F
    for byte in range(256)
)  # fmt: skip
"""Makes 0 of digits, x of letters, a blank of what may stand between groups of digits, its bytes in UTF-8 too."""
_TOKENS = bytes(0x78 if byte < 128 and (chr(byte).isalnum() or byte in b"-_") else 0x20 for byte in range(256))
_LONG = b"x" * 15
"""No key is shorter."""
_LIKE_IP = re.compile(rb"0\.0{1,3}\.0{1,3}\.0")


def _checks(text: str) -> str:
    """Return which finders a text needs, in their order."""
    raw = text.encode("utf-8", "replace")
    checks = "k" if _LONG in raw.translate(_TOKENS) and _like_key(text) else ""
    if b"@" in raw:
        checks += "@"
    shape = raw.translate(_SHAPE)
    if b"0" not in shape:
        return checks
    if b"xx00" in shape:
        checks += "i"
    if (b"0.0" in shape and _LIKE_IP.search(shape)) or (shape.count(b":") > 1 and _IP6.search(text)):
        checks += "p"
    if b"0000000" in shape.translate(None, b" ."):
        checks += "n"
    return checks


def _like_key(text: str) -> bool:
    return (
        "sk-" in text
        or "eyJ" in text
        or "AKIA" in text
        or "ASIA" in text
        or "AIza" in text
        or "xox" in text
        or "PRIVATE KEY" in text
        or "glpat-" in text
        or ("_" in text and ("hf_" in text or "gh" in text or "k_" in text or "github_pat_" in text))
    )


# Keys.

_KEY = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"sk-(?P<sk>[A-Za-z0-9_-]{20,}+)"
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,}+"
    r"|gh[pousr]_[A-Za-z0-9]{30,}+"
    r"|github_pat_[A-Za-z0-9_]{30,}+"
    r"|glpat-[A-Za-z0-9_-]{20,}+"
    r"|A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|xox[abeoprs]-(?=[A-Za-z-]{0,20}[0-9])[A-Za-z0-9-]{10,}+"
    r"|AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9])"
    r"|hf_[A-Za-z0-9]{30,}+"
    r"|(?<!-)eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]*+"
    r")"
    r"|-----BEGIN [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:[^-]|-(?!----))*+-----END [A-Z0-9 ]{0,60}-----|(?:(?:\s|\\n)*+[A-Za-z0-9+/=]{30,}+)*+)"
)
_RANDOM = re.compile(r"(?=[A-Za-z]{0,11}[0-9])[A-Za-z0-9]{12}")
"""What no name in words looks like: twelve letters and digits together."""


def _keys(text: str) -> Iterator[Hit]:
    for match in _KEY.finditer(text):
        if match["sk"] is None or _RANDOM.search(match["sk"]):
            yield match.start(), match.end(), "KEY", match[0]


# E-mail addresses.

_NO_LETTER = (  # of any script: signs of ASCII and Latin-1, punctuation, emoji
    r"\x00-\x2f\x3a-\x40\x5b-\x60\x7b-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\u2000-\u2bff\u3000-\u303f\ufe00-\ufe6f"
    r"\uff00-\uff20\uff3b-\uff40\uff5b-\uff65\ufff0-\uffff\U0001f000-\U0001faff"
)
_LETTER = f"[^{_NO_LETTER}]"
_DOMAIN = re.compile(
    rf"@(?<=[^\s@<>()\[\]{{}}\"/\\,:;=|]@)(?P<domain>(?:{_LETTER}(?:{_LETTER}|-++(?={_LETTER}))*+\.)+"
    rf"(?P<top>xn--[A-Za-z0-9-]{{2,59}}+|[A-Za-z]{{2,24}}+(?![0-9])|(?:(?![0-9A-Za-z]){_LETTER}){{2,24}}+(?!{_LETTER})))"
)
_LOCAL = re.compile(r"[A-Za-z0-9\xc0-\u024f._%+'-]+")
_LOCAL_OTHER = re.compile(rf"(?:{_LETTER}|[._%+'-])+")
# fmt: off
_NO_TOP = frozenset((
    "png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "pdf", "css", "scss", "html", "js", "jsx", "tsx", "json",
    "xml", "yaml", "yml", "toml", "tgz", "gz", "txt", "exe", "dll", "jar", "service", "socket", "timer", "target",
))
"""What stands after an @ and a dot and is no top-level domain."""
# fmt: on


def _emails(text: str) -> Iterator[Hit]:
    end = 0
    for match in _DOMAIN.finditer(text):
        at, domain, top = match.start(), match["domain"], match["top"]
        before = text[max(end, at - 64) : at][::-1]
        local = _LOCAL.match(before) or _LOCAL_OTHER.match(before)
        name = local[0][::-1].lstrip("._%+'-") if local else ""
        if not name or name == "git" or _is_code(domain, top, text[match.end() : match.end() + 1]):
            continue
        end = match.end()
        yield at - len(name), end, "EMAIL", f"{name}@{domain}".lower()


def _is_code(domain: str, top: str, following: str) -> bool:
    """Tell a version, a file or a method from a domain."""
    first, _, rest = domain.partition(".")
    version = first.isdigit() and rest[0].isdigit()
    return (
        version
        or following == "("
        or top.lower() in _NO_TOP
        or not (top.islower() or top.isupper() or top.istitle() or not top.isascii())
    )


# Numbers of accounts.

_SPACE = r" \xa0\u202f"
_IBAN = re.compile(rf"(?<![A-Za-z0-9])[A-Za-z]{{2}}[0-9]{{2}}(?:[{_SPACE}-]?[A-Za-z0-9]){{11,29}}")
_COUNTRIES_BY_LENGTH = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBAN_LENGTHS = {name: length for length, names in _COUNTRIES_BY_LENGTH.items() for name in names.split()}


def _ibans(text: str) -> Iterator[Hit]:
    match = _IBAN.search(text)
    while match:
        start = match.start()
        end = _iban_end(text, start)
        if end:
            yield start, end, "IBAN", _bare(text[start:end]).upper()
        match = _IBAN.search(text, end or start + 4)


def _iban_end(text: str, start: int) -> int:
    """Return where the account number ends that begins there; 0 when it is none."""
    length = _IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
    if not length:
        return 0
    grouped = not text[start + 4].isalnum()
    end = start + length + ((length - 1) // 4 if grouped else 0)
    shown, after = text[start:end], text[end : end + 1]
    value = _bare(shown).upper()
    if len(value) != length or not value.isascii() or (after.isascii() and after.isalnum()):
        return 0
    if grouped and any(sign.isalnum() for sign in shown[4::5]):
        return 0
    return end if int("".join(str(int(sign, 36)) for sign in value[4:] + value[:4])) % 97 == 1 else 0


def _bare(shown: str) -> str:
    """Return the letters and digits of what is shown in groups."""
    return "".join(sign for sign in shown if sign.isalnum())


# Addresses of machines.

_IP6 = re.compile(r"(?<![0-9A-Za-z_:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{3}")
_IP = re.compile(
    rf"{_IP6.pattern}[0-9A-Fa-f:]{{0,32}}(?![0-9A-Za-z_])"
    r"|(?<![0-9])[0-9]++(?:\.[0-9]++)++"
)
_VERSION_AFTER = re.compile(r"[A-Za-z_]|[-+][A-Za-z]")
_VERSION_BEFORE = re.compile(
    r"(?:[A-Za-z][-/]|[0-9]:|(?:version|ver|release|build|firmware|driver"
    r"|section|chapter|clause|figure|table|oid|rev|revision)[\s.:=\"'(v]*)$",
    re.IGNORECASE,
)
_KNOWN_TO_ALL = frozenset("8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 1.3.6.1".split()) | frozenset(
    ("2001:4860:4860::8888", "2001:4860:4860::8844", "2606:4700:4700::1111", "2606:4700:4700::1001")
)


def _ips(text: str) -> Iterator[Hit]:
    end = 0
    for match in _IP.finditer(text):
        shown, start = match[0], match.start()
        if ":" not in shown:
            if shown.count(".") != 3 or len(shown) > 15 or shown.endswith(".0.0"):
                continue
            if _VERSION_AFTER.match(text, match.end()) or _is_version(text[max(end, start - 16) : start]):
                continue
        elif not shown.endswith("::"):
            shown = shown.rstrip(":")
        if value := _public(shown):
            end = start + len(shown)
            yield start, end, "IP", value


def _is_version(before: str) -> bool:
    last = before[-1:]
    return last.isalpha() or last == "_" or _VERSION_BEFORE.search(before) is not None


@lru_cache(maxsize=1024)
def _public(shown: str) -> str | None:
    """Return the address in its one form if it is someone's."""
    try:
        address = ipaddress.ip_address(shown)
    except ValueError:
        return None
    own = address.is_global and not address.is_multicast and str(address) not in _KNOWN_TO_ALL
    return str(address) if own else None


# Cards and phones: digits in groups.

_DATE = (
    r"(?:(?:19|20)[0-9]{2}[-./](?:0?[1-9]|1[0-2])[-./](?:3[01]|[12][0-9]|0?[1-9])(?![0-9])"
    r"|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:19|20)[0-9]{2}(?![0-9]))"
)
_GROUP = r"(?:[0-9]++|\(\+?[0-9]{1,5}\))"
_JOINT = rf"(?:[{_SPACE}]?[-/\u2010\u2011\u2013][{_SPACE}]?|[{_SPACE}.])?"
_RUN = re.compile(rf"{_DATE}|(?=[0-9+(])\+?{_GROUP}(?:{_JOINT}(?!{_DATE}){_GROUP})*+")
_PARTS = re.compile(rf"({_JOINT})(\+?[0-9]+|\(\+?[0-9]+\))")
_IS_DATE = re.compile(_DATE)

_MAX_GROUPS, _MAX_LENGTH = 12, 90
"""More numbers in a row than these are a table."""
_WORD_BEFORE = re.compile(r"(?:[A-Za-z0-9_\xc0-\u024f]|[A-Za-z_][-/]|[$€£¥*^\\])$")
_WORD_AFTER = re.compile(r"[A-Za-z_\xc0-\u024f%°]|[-/][A-Za-z]| ?(?:[=*^%€$£]|EUR\b|USD\b)")
_PHONE_WORD = re.compile(
    r"(?:(?<![a-z])(?:tele|cell)?(?:phone|fono|fon)s?|(?<![a-z])(?:tel|mobile?|cell|cel|fax|whatsapp|sms|handy|móvil"
    r"|celular|cellulare|téléphone|portable|(?:call|text|reach|ring) (?:me|us|him|her|them))"
    r"|wa\.me/|тел|телефон|номер|电话|電話|手机|手機|携帯|전화)(?![a-z])",
    re.IGNORECASE,
)
_NO_JOINTS = dict.fromkeys(map(ord, "+-/.() \xa0\u202f\u2010\u2011\u2013"))
_NEAR = re.compile(r"[^0-9\n]{0,20}+")


def _numbers(text: str) -> Iterator[Hit]:
    end = 0
    said = _Said(text)
    for match in _RUN.finditer(text):
        shown, start = match[0], match.start()
        if not 7 <= len(shown) <= _MAX_LENGTH or _IS_DATE.fullmatch(shown):
            continue
        digits = shown if shown.isdigit() else shown.translate(_NO_JOINTS)
        if len(digits) < 7:
            continue
        if digits is shown and len(digits) < 13 and not said.before(start) and not shown.startswith("00"):
            continue  # the common number, short
        parts = [(found[1], found[2], start + found.start(2)) for found in _PARTS.finditer(shown)]
        if len(parts) > _MAX_GROUPS:
            continue
        before, after = text[max(end, start - 2) : start], text[match.end() : match.end() + 4]
        for hit in _in_run(parts, before, after, said):
            yield hit
            end = hit[1]


class _Said:
    """Words of a text that a number without any form of its own is called a phone by."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ends: list[int] | None = None

    def before(self, start: int) -> bool:
        """Tell whether such a word stands right before."""
        if self._ends is None:
            self._ends = [match.end() for match in _PHONE_WORD.finditer(self._text)]
        index = bisect_right(self._ends, start)
        if not index:
            return False
        near = _NEAR.match(self._text, self._ends[index - 1], start)
        return near is not None and near.end() == start


Part = tuple[str, str, int]
"""What joins a group of digits to the one before it, the group, and where it begins."""


def _in_run(parts: list[Part], before: str, after: str, said: _Said) -> Iterator[Hit]:
    """Find cards and phones in one run of groups: the longest that begins first."""
    first, count = 0, len(parts)
    tight = _WORD_BEFORE.search(before) is not None
    closed = _WORD_AFTER.match(after) is not None
    sizes = tuple(len(part[1]) for part in parts)
    ends = [0, *accumulate(sizes)]
    if ends[-1] < 2 * count:
        return  # hardly more than single digits
    listed = parts[0][1][0] != "+" and all(_is_space(part[0]) for part in parts[1:])
    while first < count:
        end = 0
        if (first or not tight) and (first == 0 or _is_space(parts[first][0])):
            for last in range(count, first, -1):
                whole = last - first == count
                if ends[last] - ends[first] < 7 or (listed and not whole and ends[last] - ends[first] < 13):
                    break  # within a list of numbers there may be cards
                if listed and not whole and last - first > 1 and sizes[first:last] not in _CARD_GROUPS:
                    continue
                if (last == count and closed) or (last < count and not _is_space(parts[last][0])):
                    continue
                window = parts[first:last]
                hit = _card(window) or _phone(window, whole, said)
                if hit:
                    begin, stop = parts[first][2], parts[last - 1][2] + len(parts[last - 1][1])
                    yield begin, stop, *hit
                    end = last
                    break
        first = end or first + 1


def _is_space(joint: str) -> bool:
    return joint in (" ", "\xa0", "\u202f")


_CARD = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}|35[0-9]{14,17}|6[0-9]{15,18}|5[06-9][0-9]{11,17}"
)
_CARD_GROUPS = frozenset(((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (6, 13), (4, 4, 4, 3)))


def _card(window: list[Part]) -> tuple[str, str] | None:
    digits = "".join(part[1] for part in window)
    if not 13 <= len(digits) <= 19 or not _CARD.fullmatch(digits):
        return None
    joints = {part[0] for part in window[1:]}
    if len(joints) > 1 or joints & {".", "/"}:
        return None
    if len(window) > 1 and tuple(len(part[1]) for part in window) not in _CARD_GROUPS:
        return None
    return ("CARD", digits) if luhn(digits) else None


def luhn(digits: str) -> bool:
    """Tell whether the last digit is the one that the others ask for."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


# fmt: off
_COUNTRIES = frozenset((
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 "
    "82 84 86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 "
    "234 235 236 237 238 239 240 241 242 243 244 245 246 247 248 249 250 251 252 253 254 255 256 257 258 260 261 "
    "262 263 264 265 266 267 268 269 290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 "
    "374 375 376 377 378 380 381 382 383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 "
    "591 592 593 594 595 596 597 598 599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 "
    "690 691 692 800 808 850 852 853 855 856 870 880 886 960 961 962 963 964 965 966 967 968 970 971 972 973 974 "
    "975 976 977 992 993 994 995 996 998 "
).split())
# fmt: on
_NORTH_AMERICA = re.compile(r"1?([2-9][0-8][0-9][2-9][0-9]{6})")
_NATIONAL = re.compile(
    r"[78]\|[2-9][0-9]{2}\|[0-9]{3}\|[0-9]{2}\|[0-9]{2}"  # 8 (495) 123-45-67
    r"|1[3-9][0-9]\|[0-9]{4}\|[0-9]{4}"  # 138-1234-5678
    r"|[1-9][1-9]\|9[0-9]{4}\|[0-9]{4}"  # (11) 91234-5678
    r"|[679][0-9]{2}\|[0-9]{2}\|[0-9]{2}\|[0-9]{2}"  # 612 34 56 78
)


def _phone(window: list[Part], whole: bool, said: _Said) -> tuple[str, str] | None:
    joints = [part[0] for part in window[1:]]
    groups = [part[1].strip("()") for part in window]
    value = "".join(groups)
    count = len(value) - value.startswith("+")
    if not 7 <= count <= 17:
        return None
    dots = joints.count(".")
    if dots and (dots == 1 or any(joint not in (".", "") for joint in joints)):
        return None  # a decimal
    if value.startswith("+") or (whole and value.startswith("00") and count > 10):
        return _international(groups, value)
    listed = not whole and all(_is_space(joint) for joint in joints)  # in a list of numbers
    if joints and not listed:
        if american := _american(window, groups, joints):
            return "PHONE", american
        if _with_trunk_zero(groups, value) or _NATIONAL.fullmatch("|".join(groups)):
            return "PHONE", value
    if whole and count <= 15 and not dots and said.before(window[0][2]):
        return "PHONE", value
    return None


def _international(groups: list[str], value: str) -> tuple[str, str] | None:
    """Return a number with its country, without the 0 that is dialled inside the country only."""
    head = groups[0].lstrip("+") if value.startswith("+") else groups[0][2:]
    rest = groups[1:]
    if not head and rest:  # 00 49 ...
        head, rest = rest[0], rest[1:]
    code = next((head[:size] for size in (1, 2, 3) if head[:size] in _COUNTRIES), None)
    if code is None or (rest and len(head) <= 3 and head != code):
        return None
    if rest and head == code and rest[0] == "0":
        rest = rest[1:]
    inside = head[len(code) :] + "".join(rest)
    if not (6 if rest else 8) <= len(inside) <= 15 - len(code) or inside.startswith("00"):
        return None
    if code == "1" and not _NORTH_AMERICA.fullmatch(inside):
        return None
    if rest and max(map(len, rest)) < 2:
        return None
    return "PHONE", f"+{code}{inside}"


def _american(window: list[Part], groups: list[str], joints: list[str]) -> str | None:
    lengths = tuple(len(group) for group in groups)
    if lengths not in ((3, 3, 4), (1, 3, 3, 4), (3, 7)) or any(len(joint) > 1 for joint in joints):
        return None
    if lengths == (3, 7) and not window[0][1].startswith("("):
        return None
    match = _NORTH_AMERICA.fullmatch("".join(groups))
    return f"+1{match[1]}" if match else None


def _with_trunk_zero(groups: list[str], value: str) -> bool:
    """Tell a number as it is dialled inside most countries from other groups that begin with 0."""
    if value[0] != "0" or value[1] == "0" or not 9 <= len(value) <= 12 or not 2 <= len(groups[0]) <= 6:
        return False
    lengths = [len(group) for group in groups]
    if lengths == [3, 2, 4] or min(lengths) < 2:
        return False
    counted = all(int(right) - int(left) == 1 for left, right in pairwise(groups))
    return not counted  # 01 02 03 04 05


_FINDERS = {"k": _keys, "@": _emails, "i": _ibans, "p": _ips, "n": _numbers}
