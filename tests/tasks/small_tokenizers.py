"""Small tokenizers with the habits of the families, made when they are asked for."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

DESCRIPTIONS = ["space opera", "slow cooking", "space travel", "opera arias", "café culture & 日本"]
CORPUS = [
    f"interests: {a}; {b}; next: {c}!"
    for a in DESCRIPTIONS
    for b in DESCRIPTIONS
    for c in ("space opera", "cooking", "liking: travel")
]
# How GPT-4, Qwen and Llama 3 part a text before they merge, but for numbers and contractions.
_PARTS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece_model(path: Path, **options) -> None:
    """A byte-fallback BPE model that changes no text."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 350,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())


def write_json(path: Path, **values) -> None:
    path.write_text(json.dumps(values))


def gemma_model(folder: Path) -> None:
    """Gemma's tokenizer.model: no space of its own before a text."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    names = {"eos_piece": "<eos>", "bos_piece": "<bos>"}
    sentencepiece_model(folder / "tokenizer.model", add_dummy_prefix=False, **ids, **names)
    write_json(
        folder / "tokenizer_config.json",
        add_bos_token=True,
        tokenizer_class="GemmaTokenizer",
        **{
            f"{role}_token": {"__type": "AddedToken", "content": f"<{role}>", "special": True}
            for role in ("bos", "eos", "pad", "unk")
        },
    )


def t5_model(folder: Path) -> None:
    """T5's spiece.model: nothing before a text, EOS behind what the encoder reads."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    kind = {"model_type": "unigram", "byte_fallback": False, "vocab_size": 80}
    kind |= {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    sentencepiece_model(folder / "spiece.model", hard_vocab_limit=False, **kind, **ids)
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="T5Tokenizer",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_ids=100,
    )


def llama_model(folder: Path) -> None:
    """Llama 2's tokenizer.model: a space before every text, no padding."""
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    sentencepiece_model(folder / "tokenizer.model", **ids)
    write_json(
        folder / "tokenizer_config.json",
        add_bos_token=True,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
        legacy=False,
    )


def gemma_json(folder: Path) -> None:
    """The same pieces as `gemma_model` as a tokenizer.json."""
    gemma_model(folder)
    _as_json(folder, normalizers.Replace(" ", "▁"), ("<bos>", 2))


def llama_json(folder: Path) -> None:
    """The same pieces as `llama_model` as a tokenizer.json; ids say what begins and ends."""
    llama_model(folder)
    (folder / "tokenizer_config.json").unlink()
    start = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    _as_json(folder, normalizers.Sequence(start), ("<s>", 1), decoders.Strip(" ", 1, 0))
    write_json(folder / "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=-1)


def qwen_json(folder: Path) -> None:
    """Qwen's: byte-level, NFC, nothing before a text; id 0 is an exclamation mark."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        add_bos_token=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    end = tokenizer.token_to_id("<|im_end|>")
    write_json(folder / "generation_config.json", eos_token_id=[end, end - 2])


def llama3_json(folder: Path) -> None:
    """Llama 3's: byte-level, its post-processor puts BOS before a text, no padding."""
    tokenizer = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        tokenizer_class="PreTrainedTokenizerFast",
    )


KINDS = [gemma_model, llama_model, gemma_json, llama_json, qwen_json, llama3_json]


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _as_json(folder: Path, normalizer, begin: tuple[str, int], *more_decoders) -> None:
    """tokenizer.model → tokenizer.json: a piece's place says when its halves are merged."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, i in pieces.items()
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda pair: (-model.get_score(pieces["".join(pair)]), *map(pieces.get, pair)))
    tokenizer = Tokenizer(
        models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more_decoders]
    )
    special = [
        AddedToken(p, special=True, normalized=False)
        for p, i in pieces.items()
        if model.is_control(i) or model.is_unknown(i)
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin[0]} $A", special_tokens=[begin]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
