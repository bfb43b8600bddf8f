"""A `Vocabulary` as SeqIO wants it, so that our tasks and anyone's SeqIO code tokenize alike.

Prompts and descriptions are written differently (see recexplore.tasks.vocabulary), so a task has a
SeqIO vocabulary for each. SeqIO adds EOS itself, where a feature asks for it.
"""

import os
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from recexplore.tasks.vocabulary import Vocabulary


def prompt_tokens(vocabulary: Vocabulary) -> "Tokens":
    """Tokenizes prompts, as `Vocabulary.encode_prompt`."""
    return Tokens(vocabulary, begin=vocabulary.begin)


def description_tokens(vocabulary: Vocabulary) -> "Tokens":
    """Tokenizes descriptions, as `Vocabulary.encode_description` but for its EOS."""
    return Tokens(vocabulary, lead=vocabulary.lead)


class Tokens(seqio.Vocabulary):
    """One way of writing texts with a vocabulary.

    In a tf.data pipeline a SentencePiece model is run by TensorFlow itself, a tokenizer.json by
    Python, which needs some 50 microseconds a text and a process that has loaded it.

    Args:
      vocabulary: tokenizes.
      begin: token ids before every text.
      lead: what stands before every text.
    """

    def __init__(self, vocabulary: Vocabulary, begin: tuple[int, ...] = (), lead: str = ""):
        super().__init__()
        self._vocabulary = vocabulary
        self._begin = begin
        self._lead = lead
        in_graph = vocabulary.path.suffix == ".model"
        self._graph = (
            seqio.SentencePieceVocabulary(os.fspath(vocabulary.path)) if in_graph else None
        )

    @property
    def bos_id(self) -> int | None:
        """What begins a prompt, if one token does."""
        return self._vocabulary.begin[0] if len(self._vocabulary.begin) == 1 else None

    @property
    def eos_id(self) -> int:
        """What ends a description."""
        return self._vocabulary.eos_id

    @property
    def pad_id(self) -> int:
        """What fills arrays up; where the vocabulary has no such token, lengths must be known."""
        return self._vocabulary.pad_id or 0

    @property
    def unk_id(self) -> int | None:
        """None: texts with unknown tokens are refused before."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def decode(self, ids: Sequence[int] | np.ndarray | tf.Tensor) -> str:
        """The text of token ids up to EOS."""
        return self._decode(np.asarray(ids).tolist())

    def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """The texts of rows of token ids, each up to EOS: [..., T] → [...]."""
        return self._decode_tf(ids)

    def _encode(self, s: str) -> Sequence[int]:
        return [*self._begin, *self._vocabulary.encode(self._lead + s)]

    def _encode_tf(self, s: tf.Tensor | str) -> tf.Tensor:
        if self._graph is not None:
            tokens = self._graph.encode_tf(tf.strings.join([self._lead, s]))
            return tf.concat([tf.constant(self._begin, tf.int32), tokens], axis=0)

        def encode(text):  # bytes in a graph, an array of them outside
            return np.array(self._encode(np.asarray(text, object).item().decode()), np.int32)

        tokens = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32, stateful=False)
        tokens.set_shape([None])
        return tokens

    def _decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._vocabulary.decode(ids)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self._decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokens) and self._identity() == other._identity()

    def _identity(self) -> tuple[str, tuple[int, ...], str]:
        return os.fspath(self._vocabulary.path), self._begin, self._lead
