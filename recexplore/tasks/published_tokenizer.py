"""A work directory's tokenizer as a Hugging Face folder has it.

A pretrained tokenizer goes out as it came in. Our own vocabulary is written anew: transformers has
no class that reads just any SentencePiece model, but the tokenizer.json of its tokenizers library
can say all that ours does.
"""

import json

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from recexplore.errors import InputError
from recexplore.tasks.prompts import HISTORY_SEPARATOR, INSTRUCTIONS, PREFIX
from recexplore.tasks.tokenizer_files import SIDE_FILES
from recexplore.tasks.vocabulary import Vocabulary

_MODEL_CONFIG = "config.json"  # beside a pretrained tokenizer; an exported model has its own
_SPACE = "▁"
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files that transformers reads a vocabulary from: name → content.

    Raises:
      InputError: it is our own, and a tokenizer.json would split one of its pieces otherwise.
    """
    if vocabulary.is_own:
        return _as_json(vocabulary)
    beside = [vocabulary.path.with_name(name) for name in SIDE_FILES if name != _MODEL_CONFIG]
    return {path.name: path.read_bytes() for path in (vocabulary.path, *beside) if path.is_file()}


def token_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """What a model's config.json says about the tokens that begin, end and pad a text.

    Where it doesn't, transformers takes those of the family's first model.
    """
    return {
        "bos_token_id": vocabulary.begin[0] if vocabulary.begin else None,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }


def _as_json(vocabulary: Vocabulary) -> dict[str, bytes]:
    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.path.read_bytes())
    best = max(piece.score for piece in model.pieces if piece.type == _Piece.NORMAL)
    scores = [(piece.piece, _score(piece, best)) for piece in model.pieces]
    made = tokenizers.Tokenizer(
        models.Unigram(scores, unk_id=model.trainer_spec.unk_id, byte_fallback=False)
    )
    letters = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    made.normalizer = normalizers.Sequence(
        [letters, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = {p.piece for p in model.pieces if p.type in (_Piece.CONTROL, _Piece.UNKNOWN)}
    made.add_special_tokens(sorted(special))
    _check_same(vocabulary, made, [p.piece for p in model.pieces if p.piece not in special])
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": model.trainer_spec.eos_piece,
        "pad_token": model.trainer_spec.pad_piece,
        "unk_token": model.trainer_spec.unk_piece,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(names, indent=2) + "\n").encode(),
    }


def _score(piece: _Piece, best: float) -> float:
    """What a piece counts for: whole descriptions have no score, but go before all that is."""
    if piece.type != _Piece.USER_DEFINED:
        return piece.score
    return best * len(piece.piece.encode()) - 0.1  # as SentencePiece has it


def _check_same(vocabulary: Vocabulary, made: tokenizers.Tokenizer, pieces: list[str]) -> None:
    """Both split alike what prompts and answers are made of."""
    for piece in pieces:
        text = piece.replace(_SPACE, " ").strip()
        between = f"{PREFIX} {text}{HISTORY_SEPARATOR} {text} {text}{HISTORY_SEPARATOR}"
        for words in (text, f"{between} {' '.join(INSTRUCTIONS)}"):
            if vocabulary.encode(words) != made.encode(words, add_special_tokens=False).ids:
                raise InputError(
                    f"The vocabulary {vocabulary.path} can't be written for transformers: a "
                    f"tokenizer.json would split {words!r} otherwise. Describe clusters in plain "
                    "letters, or train from a pretrained model and its tokenizer."
                )
