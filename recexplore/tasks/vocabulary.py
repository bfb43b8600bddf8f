"""Text → tokens and back, without TensorFlow: a vocabulary of our own or a pretrained model's.

How texts become tokens:

    prompt       begin + encode("interests: a; b; next:")
    description  encode(lead + description) + EOS

`begin` is what the model family puts before every text (Gemma's and Llama's BOS; Qwen has none).
Prompt and description are two lists of tokens that are joined and never tokenized together, so that
training, the trie and sampling agree. `lead` is a space where the tokenizer needs one to write a
word as it stands inside a text (byte-level BPE, Gemma), and empty where it adds one by itself
(our own vocabulary, Llama 2): either way the model answers with the tokens that it has seen follow
a colon in its pretraining.
"""

import functools
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int

from recexplore import artifacts
from recexplore.errors import InputError
from recexplore.tasks.prompts import (
    HISTORY_SEPARATOR,
    INSTRUCTIONS,
    PREFIX,
    alignment_prompt,
    novelty_prompt,
)
from recexplore.tasks.tokenizer_files import (
    MODEL_FILES,
    OWN,
    SIDE_FILES,
    read_pieces,
    special_tokens,
)

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2  # of our own vocabulary
_ROWS_MULTIPLE = 128  # what matrix units and most meshes divide by
_FILLER = 0  # stands in arrays where no token is; lengths say where that is, whatever 0 means


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
      InputError: the size is too small for the characters alone, a description can't be spelt, or
        two can't be told apart.
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
    with artifacts.new_file(folder / OWN) as temporary:
        temporary.write_bytes(model.getvalue())
    Vocabulary(folder).encode_descriptions(descriptions)


def read_pretrained(pretrained: str) -> "Vocabulary":
    """The vocabulary of a pretrained model.

    Args:
      pretrained: its folder.

    Raises:
      InputError: the folder has no tokenizer, or see `Vocabulary`.
    """
    source = Path(pretrained)
    if not any((source / name).is_file() for name in MODEL_FILES):
        raise InputError(
            f"vocabulary.pretrained_vocabulary.pretrained (PRETRAINED) is {pretrained!r}, which is "
            f"{'a folder without' if source.is_dir() else 'no folder; it should have a'} "
            f"{' or '.join(MODEL_FILES[1:])}. Name the folder of a pretrained model."
        )
    return Vocabulary(source)


def pretrained_vocabulary(
    folder: Path, prompts: Sequence[str], descriptions: Sequence[str], *, pretrained: str
) -> None:
    """Copies a pretrained model's tokenizer and checks that it can say what it has to.

    Args:
      folder: gets tokenizer.json or a SentencePiece model, and what lies beside it about special
        tokens.
      prompts: a sample of the prompts.
      descriptions: all descriptions of clusters.
      pretrained: folder of the pretrained model.

    Raises:
      InputError: the folder has no tokenizer, or a damaged one, or one that can't spell a
        description, can't tell two apart, or joins the end of what all prompts begin with to what
        follows.
    """
    vocabulary, source = read_pretrained(pretrained), Path(pretrained)
    vocabulary.encode_descriptions(descriptions)
    for prompt in (novelty_prompt(descriptions[:1]), alignment_prompt(descriptions[:1])):
        if not vocabulary.spells(prompt):
            raise InputError(
                f"{vocabulary.path} can't spell {prompt!r}, as prompts are. Take another tokenizer."
            )
    for prompt in prompts:
        vocabulary.encode_prompt(prompt)
    for path in (vocabulary.path, *(source / name for name in SIDE_FILES)):
        if path.is_file():
            with artifacts.new_file(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def check_embedding(vocabulary: "Vocabulary", num_rows: int, model: Path | str) -> None:
    """Checks that a model's token embedding has a row for every token.

    A pretrained embedding may have more rows, which are padding; a model of ours has
    `Vocabulary.embedding_rows`.

    Args:
      vocabulary: the tokens.
      num_rows: of the embedding.
      model: the file or folder that it is from.

    Raises:
      InputError: it hasn't.
    """
    if vocabulary.is_own and num_rows != vocabulary.embedding_rows:
        raise InputError(
            f"{model} has a token embedding of {num_rows} rows, but a model for {vocabulary.path} "
            f"has {vocabulary.embedding_rows}: its {vocabulary.size} pieces, rounded up to a "
            f"multiple of {_ROWS_MULTIPLE}. Train the model again."
        )
    if num_rows < vocabulary.size:
        raise InputError(
            f"{model} has a token embedding of {num_rows} rows, but {vocabulary.path} has "
            f"{vocabulary.size} tokens: the tokenizer doesn't match the embedding. Take both from "
            "the same pretrained model (PRETRAINED)."
        )


class Vocabulary:
    """Text → token ids and back, by whichever tokenizer lies in a folder.

    Args:
      folder: as written by `train_vocabulary` or `pretrained_vocabulary`, or a pretrained model's.

    Attributes:
      path: the tokenizer's file.
      begin: token ids before every prompt's text; see the top of this file.
      lead: what stands before a description's text.
      eos_id: ends a description.
      pad_id: never a token; None where every id may be one.

    Raises:
      InputError: there is no tokenizer, it is damaged, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        self._pieces = read_pieces(Path(folder))
        self.path = self._pieces.path
        self.begin, self.eos_id, self.pad_id = special_tokens(self._pieces)
        before, word = PREFIX, "word"
        inside = self.encode(f"{before} {word}")[len(self.encode(before)) :]
        self.lead = "" if self.encode(word) == inside else " "

    @property
    def is_own(self) -> bool:
        """Whether it was made by `train_vocabulary`."""
        return self.path.name == OWN

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file and of the tokens around prompts and descriptions."""
        around = json.dumps([self.path.name, self.begin, self.eos_id, self.pad_id])
        return hashlib.sha256(around.encode() + self.path.read_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """V: what can occur, in a text or around it, is below it."""
        around = (*self.begin, self.eos_id, -1 if self.pad_id is None else self.pad_id)
        return max(self._pieces.text_size, 1 + max(around))

    @property
    def embedding_rows(self) -> int:
        """Rows of the token embedding of a model made for this vocabulary: V, rounded up."""
        return -(-self.size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE

    @functools.cached_property
    def prefix(self) -> list[int]:
        """Token ids of what all prompts begin with."""
        return [*self.begin, *self.encode(PREFIX)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text and nothing around it."""
        return self._pieces.encode(text)

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text of a prompt's or a description's token ids, or of both joined, up to EOS.

        What stands before every prompt, padding, a description's lead and ids that are no token of
        the vocabulary, for which an embedding may have rows, give nothing. Where `pad_id` is None,
        zeros that fill up an array of prompts can't be told from tokens: cut a row to its length
        first.
        """
        ids = [int(token) for token in tokens]
        if self.begin and tuple(ids[: len(self.begin)]) == self.begin:
            ids = ids[len(self.begin) :]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        real = [i for i in ids if i != self.pad_id and i < self._pieces.size]
        return self._pieces.decode(real).removeprefix(self.lead)

    def spells(self, text: str) -> bool:
        """Whether all of a text has tokens."""
        return self._pieces.spells(text)

    def encode_description(self, description: str) -> list[int]:
        """Token ids of a description as a model emits it, ending in EOS."""
        return [*self.encode(self.lead + description), self.eos_id]

    def encode_descriptions(self, descriptions: Sequence[str]) -> list[list[int]]:
        """`encode_description` of all clusters' descriptions, checked.

        Raises:
          InputError: one can't be spelt, or two can't be told apart.
        """
        sequences = [self.encode_description(text) for text in descriptions]
        spelt: dict[tuple[int, ...], int] = {}
        for place, (text, sequence) in enumerate(zip(descriptions, sequences, strict=True)):
            if not self.spells(self.lead + text):
                remedy = (
                    "Give vocabulary.train_vocabulary.size a larger value."
                    if self.is_own
                    else "Take another tokenizer, or describe clusters in letters that it has."
                )
                raise InputError(
                    f"The vocabulary {self.path} can't spell the description {text!r}. {remedy}"
                )
            other = spelt.setdefault(tuple(sequence), place)
            if other != place:
                raise InputError(
                    f"The vocabulary {self.path} can't tell the descriptions "
                    f"{descriptions[other]!r} and {text!r} apart. Clusters must differ in words "
                    "that it knows."
                )
        return sequences

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, which begin with `prefix`.

        Raises:
          InputError: the vocabulary joins the end of the prefix with what follows.
        """
        tokens = [*self.begin, *self.encode(prompt)]
        if tokens[: len(self.prefix)] != self.prefix:
            remedy = (
                "Make the vocabulary again with `recexplore tokenize`."
                if self.is_own
                else "Take another tokenizer."
            )
            raise InputError(
                f"The vocabulary {self.path} doesn't keep {PREFIX!r} apart from the rest of the "
                f"prompt {prompt!r}, so it can't be read beforehand. {remedy}"
            )
        return tokens

    def encode_prompts(
        self, prompts: Sequence[str], max_length: int
    ) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B"]]:
        """Token ids of prompts after the prefix, right-padded: [B, S] and lengths [B], both int32.

        A prompt longer than `max_length`, prefix and all, loses the oldest tokens after the prefix,
        as in training.

        Raises:
          InputError: the vocabulary joins the end of the prefix with what follows.
        """
        prefix = len(self.prefix)
        rows = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [row[max(prefix, len(row) - (max_length - prefix)) :] for row in rows]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), max(lengths, default=0)), _FILLER, np.int32)
        for row, target in zip(rows, tokens, strict=True):
            target[: len(row)] = row
        return tokens, lengths
