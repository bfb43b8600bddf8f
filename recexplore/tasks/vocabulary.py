"""The SentencePiece vocabulary of prompts and descriptions, without TensorFlow."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.tasks.prompts import HISTORY_SEPARATOR, INSTRUCTIONS, PREFIX

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_FILE = "sentencepiece.model"


def train_vocabulary(
    folder: Path,
    prompts: Sequence[str],
    descriptions: Sequence[str],
    *,
    size: int = 1024,
    whole_descriptions: bool = True,
) -> None:
    """Trains a unigram SentencePiece model and checks that it can spell every description.

    Id 0 is padding and 1 is EOS, as SeqIO expects; they are never real tokens.

    Args:
      folder: gets sentencepiece.model.
      prompts: a sample of the prompts.
      descriptions: all descriptions of clusters.
      size: number of pieces at most, besides whole descriptions; a small corpus gives fewer.
      whole_descriptions: every description is one piece, with and without the separator. A small
        model that is trained from nothing then learns about clusters directly, and prompts are
        short; with word pieces it would first have to learn that "crime thriller" and "thriller
        drama" are different things.

    Raises:
      InputError: the size is too small for the characters alone, or a description can't be spelt.
    """
    # Words count as much as prompts, so that those of rare clusters become pieces too.
    words = sorted({word for text in descriptions for word in text.split()})
    repeats = 1 + len(prompts) // max(len(words), 1)
    whole = list(INSTRUCTIONS)
    if whole_descriptions:  # as an answer, and as an entry of a history
        whole += [text + end for text in descriptions for end in ("", HISTORY_SEPARATOR)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*prompts, *(words * repeats)]),
            model_writer=model,
            vocab_size=size + len(whole),
            model_type="unigram",
            hard_vocab_limit=False,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            user_defined_symbols=[f"▁{text.replace(' ', '▁')}" for text in whole],
            character_coverage=1.0,
            num_threads=1,  # more would make the result depend on timing
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"vocabulary.train_vocabulary.size is {size}; SentencePiece can't make a vocabulary "
            f"of that size from these descriptions ({str(error).splitlines()[0]}). Try a larger "
            "one."
        ) from error
    with artifacts.new_file(folder / _FILE) as temporary:
        temporary.write_bytes(model.getvalue())
    vocabulary = Vocabulary(folder)
    for description in descriptions:
        if UNKNOWN_ID in vocabulary.encode(description):
            raise InputError(
                f"The vocabulary can't spell the description {description!r}. Give "
                "vocabulary.train_vocabulary.size a larger value."
            )


class Vocabulary:
    """Text → token ids and back.

    Args:
      folder: as written by `train_vocabulary`.

    Raises:
      InputError: the model file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / _FILE
        if not self.path.exists():
            raise InputError(f"{self.path} is missing. Run `recexplore tokenize` first.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=os.fspath(self.path))
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"{self.path} is not a SentencePiece model. Run `recexplore tokenize` again."
            ) from error

    @property
    def size(self) -> int:
        """V, the number of pieces."""
        return self._processor.vocab_size()

    @property
    def prefix(self) -> list[int]:
        """Token ids of what all prompts begin with."""
        return self.encode(PREFIX)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS."""
        return self._processor.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; padding and EOS give nothing."""
        return self._processor.decode([int(t) for t in tokens if t not in (PAD_ID, EOS_ID)])

    def encode_description(self, description: str) -> list[int]:
        """Token ids of a description as a model emits it, ending in EOS."""
        return [*self.encode(description), EOS_ID]

    def encode_prompts(
        self, prompts: Sequence[str], max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of prompts after the prefix, right-padded: [B, S] and lengths [B], both int32.

        A prompt longer than `max_length`, prefix and all, loses the oldest tokens after the prefix,
        as in training.

        Raises:
          InputError: the vocabulary joins the end of the prefix with what follows.
        """
        prefix = self.prefix
        rows = [self.encode(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if row[: len(prefix)] != prefix:
                raise InputError(
                    f"The vocabulary {self.path} doesn't keep {PREFIX!r} apart from the rest of "
                    f"the prompt {prompt!r}, so it can't be read beforehand. Make the vocabulary "
                    "again with `recexplore tokenize`."
                )
        rows = [row[max(len(prefix), len(row) - (max_length - len(prefix))) :] for row in rows]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), max(lengths, default=0)), PAD_ID, np.int32)
        for row, target in zip(rows, tokens, strict=True):
            target[: len(row)] = row
        return tokens, lengths
