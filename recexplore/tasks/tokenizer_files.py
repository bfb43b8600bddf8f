"""What lies in a tokenizer's folder: its pieces, and which of them begin, end and pad a text.

A folder holds one of three kinds: a SentencePiece model of our own, a pretrained one, or the
tokenizer.json of Hugging Face's tokenizers library. What a pretrained model's other files say about
special tokens is read from beside it; transformers follows the same rules.
"""

import functools
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from recexplore.errors import InputError

OWN = "sentencepiece.model"
# Where a folder has several: tokenizer.json is what transformers reads too, and a tokenizer.model
# beside it need not be of SentencePiece (Llama 3). T5's SentencePiece model is spiece.model.
MODEL_FILES = (OWN, "tokenizer.json", "tokenizer.model", "spiece.model")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NAMES = (_TOKENIZER_CONFIG, "special_tokens_map.json")  # say which tokens are special
_IDS = ("config.json", "generation_config.json")  # say their ids
SIDE_FILES = (*_NAMES, *_IDS)
_VISIBLE = "LNPS"  # categories of letters, numbers, punctuation and symbols


class SpecialTokens(NamedTuple):
    """Token ids that are no text.

    Attributes:
      begin: what every prompt begins with; empty in families that want nothing there.
      eos_id: ends an answer.
      pad_id: padding and nothing else; None where there is none, and every id may be a token.
    """

    begin: tuple[int, ...]
    eos_id: int
    pad_id: int | None


class SentencePieces:
    """Pieces of a SentencePiece model.

    Args:
      path: of the model.

    Attributes:
      size: ids are below it.
      text_size: ids that a text can have are below it.

    Raises:
      InputError: it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is not a SentencePiece model. {_remedy(path)}") from error
        self.size = self.text_size = self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text and nothing around it."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._processor.decode(list(ids))

    def spells(self, text: str) -> bool:
        """Whether all of a text has pieces."""
        return self._processor.unk_id() not in self.encode(text)

    def id_of(self, token: str) -> int | None:
        """The id of a token, if there is such a one."""
        found = self._processor.piece_to_id(token)
        unknown = found == self._processor.unk_id()
        return None if unknown and self._processor.id_to_piece(found) != token else found

    def is_text(self, token_id: int) -> bool:
        """Whether a text can have this token."""
        return not (self._processor.is_control(token_id) or self._processor.is_unknown(token_id))

    def own_id(self, role: str) -> int | None:
        """What the model itself says about 'bos', 'eos' or 'pad'."""
        found = getattr(self._processor, f"{role}_id")()
        return None if found < 0 else found

    def begin(self) -> tuple[int, ...]:
        """What the model itself puts before a text: nothing."""
        return ()


class JsonPieces:
    """Pieces of a tokenizer.json.

    Text is only ever text: what looks like a special token in it is split into pieces.

    Args:
      path: of the file.

    Attributes:
      size: ids are below it.
      text_size: ids that a text can have are below it. Special tokens may lie beyond, without a row
        in the model's embedding (Gemma 3's <image_soft_token>).

    Raises:
      InputError: it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
            self._unknown = _unknown_id(self._tokenizer, path)
        except Exception as error:  # the library raises nothing more special
            raise InputError(
                f"{path} is not a tokenizer of Hugging Face's library "
                f"({str(error).splitlines()[0]}). {_remedy(path)}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._shows = functools.cache(lambda letter: self.decode(self.encode(letter)).strip())
        # Ids may have gaps, so their number says too little.
        ids = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.size = 1 + max(ids, default=-1)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} - {self._unknown}
        self.text_size = 1 + max(ids - special, default=-1)

    def __reduce__(self):
        return JsonPieces, (self.path,)  # the library's own copies forget a setting

    def encode(self, text: str) -> list[int]:
        """Token ids of a text and nothing around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def spells(self, text: str) -> bool:
        """Whether all of a text has pieces: no unknown token, and no letter that is dropped."""
        if self._unknown is not None:
            return self._unknown not in self.encode(text)
        return all(unicodedata.category(c)[0] not in _VISIBLE or self._shows(c) for c in {*text})

    def id_of(self, token: str) -> int | None:
        """The id of a token, if there is such a one."""
        return self._tokenizer.token_to_id(token)

    def is_text(self, token_id: int) -> bool:
        """Whether a text can have this token."""
        added = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return added is None or not added.special

    def own_id(self, role: str) -> int | None:
        """What the file itself says about 'bos', 'eos' or 'pad': nothing."""
        return None

    def begin(self) -> tuple[int, ...]:
        """What the file's own post-processor puts before a text."""
        found = self._tokenizer.encode("a")
        special = [*found.special_tokens_mask, 0]
        return tuple(found.ids[: special.index(0)])


def read_pieces(folder: Path) -> SentencePieces | JsonPieces:
    """The pieces of whichever kind of tokenizer lies in a folder.

    Raises:
      InputError: there is none, or it is damaged.
    """
    for name in MODEL_FILES:
        path = folder / name
        if path.is_file():
            pieces = JsonPieces(path) if name.endswith(".json") else SentencePieces(path)
            if not pieces.size:
                raise InputError(f"{path} has no tokens at all. {_remedy(path)}")
            return pieces
    raise InputError(
        f"{folder} has no tokenizer: {' or '.join(MODEL_FILES)} is missing. Run `recexplore "
        "tokenize` first."
    )


def special_tokens(pieces: SentencePieces | JsonPieces) -> SpecialTokens:
    """Which tokens begin, end and pad a text.

    For a pretrained tokenizer the first of tokenizer_config.json, special_tokens_map.json,
    config.json and generation_config.json beside it that names a token is followed, and then the
    model itself. A prompt begins with what the post-processor of a tokenizer.json puts before a
    text, otherwise with BOS where `add_bos_token` says so or, if nothing does, where a
    SentencePiece model has one.

    Raises:
      InputError: nothing says what ends a text, one of those files is damaged or names a token that
        doesn't exist.
    """
    path = pieces.path
    own = path.name == OWN
    stated = {} if own else {name: _read_object(path.parent / name) for name in SIDE_FILES}

    @functools.cache
    def find(role: str) -> int | None:
        return next(_stated_ids(pieces, stated, role), pieces.own_id(role))

    bos_id, eos_id, pad_id = map(find, ("bos", "eos", "pad"))
    if eos_id is None:
        raise InputError(
            f"{path} has no token that ends a text: neither it nor {' or '.join(SIDE_FILES)} "
            "beside it names an eos_token. Put the model's own tokenizer_config.json beside it."
        )
    wanted = stated.get(_TOKENIZER_CONFIG, {}).get("add_bos_token")
    if wanted is None:
        wanted = pieces.own_id("bos") is not None
    begin = pieces.begin() or ((bos_id,) if wanted and bos_id is not None else ())
    if pad_id in (*begin, eos_id) or (pad_id is not None and pieces.is_text(pad_id)):
        pad_id = None
    return SpecialTokens(begin, eos_id, pad_id)


def _stated_ids(
    pieces: SentencePieces | JsonPieces, stated: dict[str, dict[str, Any]], role: str
) -> Iterator[int]:
    """What the files beside a tokenizer say about 'bos', 'eos' or 'pad', in order."""
    for name in _NAMES:
        token = stated.get(name, {}).get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        found = pieces.id_of(token) if isinstance(token, str) else None
        if found is None:
            raise InputError(
                f"{pieces.path.parent / name} says that {role}_token is {token!r}, but "
                f"{pieces.path} has no such token. Take both from the same model."
            )
        yield found
    for name in _IDS:
        number = stated.get(name, {}).get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number is None or number == -1:  # either means none
            continue
        if not isinstance(number, int) or not 0 <= number < pieces.size:
            raise InputError(
                f"{pieces.path.parent / name} says that {role}_token_id is {number!r}, but "
                f"{pieces.path} has the tokens 0..{pieces.size - 1}. Take both from the same model."
            )
        yield number


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). {_remedy(path)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object. {_remedy(path)}")
    return found


def _unknown_id(tokenizer: tokenizers.Tokenizer, path: Path) -> int | None:
    """The token that stands for what has no pieces, if there is one."""
    model = tokenizer.model
    if hasattr(model, "unk_token"):
        return tokenizer.token_to_id(model.unk_token) if model.unk_token else None
    return json.loads(path.read_text(encoding="utf-8"))["model"].get("unk_id")  # Unigram hides it


def _remedy(path: Path) -> str:
    if path.name == OWN:
        return "Run `recexplore tokenize` again."
    return "Get the pretrained model's tokenizer files again, unchanged."
