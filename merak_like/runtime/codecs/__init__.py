"""What may be done to a tensor on a link, by name: ``codec("topk(0.1)+int4|int8")``.

A codec is a name, with arguments in parentheses; a number at the end of a name is its first argument, so ``int4`` is
``int(4)``. ``+`` sends through one codec after the other, ``|`` gives the backward direction its own. The text is
read, never run.
"""

from __future__ import annotations

import ast
import re
from difflib import get_close_matches
from typing import Any

from merak_like.runtime.codecs.aqsgd import AqSgd
from merak_like.runtime.codecs.chain import Duplex, chain
from merak_like.runtime.codecs.codec import Codec, Context, OutOfStep, arguments
from merak_like.runtime.codecs.convolution import C3SL
from merak_like.runtime.codecs.lossless import Deflate
from merak_like.runtime.codecs.plain import Bf16, Fp16, Identity
from merak_like.runtime.codecs.sign import Sign
from merak_like.runtime.codecs.sparse import RandTopK, TopK
from merak_like.runtime.codecs.uniform import Uniform

__all__ = ["CODECS", "Codec", "Context", "OutOfStep", "codec"]

CODECS: dict[str, type[Codec]] = {
    kind.name: kind for kind in (Identity, Fp16, Bf16, Uniform, Sign, TopK, RandTopK, AqSgd, C3SL, Deflate)
}
LONGEST_TEXT = 500


def codec(text: str, **given: Any) -> Codec:
    """Make a new codec, without state: ``codec("aqsgd", bits=4)`` or ``codec("aqsgd(4)|int8")``.

    Each end of a link makes its own, one for every value it carries. Raises ValueError for a name or an argument that
    nobody knows, with the nearest that is known.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"a codec's text has at most {LONGEST_TEXT} characters, found {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"the codec {text!r} cannot be read: write it as in 'topk(0.1)+int4|int8'") from error
    return _made(tree, given, text)


def _made(tree: ast.expr, given: dict[str, Any], text: str) -> Codec:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr | ast.Add):
        if given:
            raise ValueError(f"the codec {text!r} has several parts: write {', '.join(given)} into the one it is for")
        left, right = _made(tree.left, {}, text), _made(tree.right, {}, text)
        if isinstance(tree.op, ast.BitOr):
            return Duplex(left, right)
        return chain([*getattr(left, "codecs", [left]), right])
    if isinstance(tree, ast.Name):
        return _named(tree.id, [], given, text)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and all(k.arg for k in tree.keywords):
        try:
            positional = [ast.literal_eval(value) for value in tree.args]
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
        except ValueError:
            raise ValueError(f"the codec {text!r} has an argument that is no number, word or truth value") from None
        return _named(tree.func.id, positional, keywords | given, text)
    raise ValueError(f"the codec {text!r} cannot be read: write it as in 'topk(0.1)+int4|int8'")


def _named(name: str, positional: list[Any], given: dict[str, Any], text: str) -> Codec:
    numbered = re.fullmatch(r"(\w*?)(\d+)", name)
    if name not in CODECS and numbered and numbered[1] in CODECS:
        name, positional = numbered[1], [int(numbered[2]), *positional]
    if name not in CODECS:
        near = get_close_matches(name, CODECS, 1, cutoff=0)[0]
        raise ValueError(f"no codec {name!r} in {text!r}: did you mean {near!r}? There are {', '.join(CODECS)}")
    kind = CODECS[name]
    known = {argument.name: argument.default for argument in arguments(kind)}
    if len(positional) > len(known):
        raise ValueError(f"{name} takes {len(known)} arguments ({', '.join(known) or 'none'}), found {len(positional)}")
    words = dict(zip(known, positional, strict=False))
    for word, value in given.items():
        if word not in known:
            near = f": did you mean {get_close_matches(word, known, 1, cutoff=0)[0]!r}?" if known else ""
            raise ValueError(f"{name} has no argument {word!r}{near}")
        if word in words:
            raise ValueError(f"{name} is given {word} twice, {words[word]!r} and {value!r}")
        words[word] = value
    for word, value in words.items():
        _require_kind(name, word, value, known[word])
    return kind(**words)


def _require_kind(name: str, word: str, value: object, default: object) -> None:
    """Raises ValueError where a value is not of the kind its default is; a whole number may stand for a real one."""
    kinds = (float, int) if type(default) is float else (type(default),)
    if type(value) not in kinds:
        raise ValueError(f"{name}: {word} is of the kind of {default!r}, found {value!r}")
