"""Pretrained tokenizers of all families against transformers, SentencePiece and one another."""

import copy
import itertools
import json

import numpy as np
import pytest
import small_tokenizers as small
import tensorflow as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tokenizers import DESCRIPTIONS, KINDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from recexplore import artifacts, explorer
from recexplore.errors import InputError
from recexplore.models import saved
from recexplore.models.transformer import Transformer, TransformerConfig
from recexplore.tasks import examples, prompts, seqio_tasks
from recexplore.tasks.examples import Example
from recexplore.tasks.seqio_vocabulary import description_tokens, prompt_tokens
from recexplore.tasks.vocabulary import (
    Vocabulary,
    check_embedding,
    pretrained_vocabulary,
    train_vocabulary,
)

PROMPTS = [
    make([a, b])
    for make in (prompts.novelty_prompt, prompts.alignment_prompt)
    for a, b in itertools.permutations(DESCRIPTIONS, 2)
]
TEXTS = st.text(max_size=20) | st.lists(
    st.sampled_from(["space", "opera ", " ", "é", "!", "▁", "<s>", "<|end_of_text|>", ";", "日本"])
).map("".join)
quickly = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
# seqio and tensorflow warn of their own ways
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in KINDS:
        found[kind.__name__] = tmp_path_factory.mktemp(kind.__name__)
        kind(found[kind.__name__])
    own = found["own"] = tmp_path_factory.mktemp("own")
    train_vocabulary(own, PROMPTS, DESCRIPTIONS, size=60, whole_descriptions=False)
    return found


@pytest.fixture(scope="module", params=[*(kind.__name__ for kind in KINDS), "own"])
def vocabulary(request, folders):
    return Vocabulary(folders[request.param])


def test_descriptions_survive_and_are_written_as_they_follow_a_prompt(vocabulary):
    for prompt, description in itertools.product(PROMPTS, DESCRIPTIONS):
        asked, answer = vocabulary.encode_prompt(prompt), vocabulary.encode_description(description)
        assert vocabulary.decode(answer) == description
        assert vocabulary.decode([*asked, *answer, 0, 0]) == f"{prompt} {description}"
        assert vocabulary.encode_prompt(f"{prompt} {description}") == [*asked, *answer[:-1]]
        assert answer[-1] == vocabulary.eos_id and vocabulary.eos_id not in answer[:-1]
        assert asked[: len(vocabulary.prefix)] == vocabulary.prefix
        assert vocabulary.pad_id not in [*asked, *answer] and max(*asked, *answer) < vocabulary.size


@pytest.mark.parametrize(
    ("kind", "begin", "eos", "pad", "lead"),
    [
        ("gemma_model", "<bos>", "<eos>", "<pad>", " "),
        ("gemma_json", "<bos>", "<eos>", "<pad>", " "),
        ("llama_model", "<s>", "</s>", None, ""),
        ("llama_json", "<s>", "</s>", None, ""),
        ("qwen_json", None, "<|im_end|>", "<|endoftext|>", " "),
        ("llama3_json", "<|begin_of_text|>", "<|end_of_text|>", None, " "),
    ],
)
def test_every_family_begins_and_ends_in_its_own_way(folders, kind, begin, eos, pad, lead):
    found = Vocabulary(folders[kind])
    id_of = found._pieces.id_of
    assert found.begin == (() if begin is None else (id_of(begin),))
    assert found.eos_id == id_of(eos) and found.lead == lead
    assert found.pad_id == (None if pad is None else id_of(pad))


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_tokens_are_those_of_transformers(folders, kind):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    folder = folders[kind]
    found = Vocabulary(folder)
    if (folder / "tokenizer_config.json").exists():
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        assert (reference.eos_token_id, reference.pad_token_id) == (found.eos_id, found.pad_id)
    else:
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json")
        )

    @quickly
    @given(TEXTS)
    def check(text):
        # SentencePiece takes no part in the reference, which has its own way with spaces at the
        # ends and with what looks like a special token.
        text = " ".join(text.replace("<", "").replace("▁", "").split()) or "x"
        plain = reference.encode(text, add_special_tokens=False)
        assert found.encode(text) == plain
        assert [*found.begin, *plain] == reference.encode(text)

    check()


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_tokenizer_json_and_a_sentencepiece_model_of_the_same_pieces_agree(folders, family):
    one, other = (Vocabulary(folders[f"{family}_{kind}"]) for kind in ("model", "json"))
    assert (one.size, one.lead, one.prefix) == (other.size, other.lead, other.prefix)

    @quickly
    @given(TEXTS)
    def check(text):
        assert one.encode_description(f"x{text}") == other.encode_description(f"x{text}")

    check()


def test_seqio_tokenizes_as_we_do(vocabulary):
    asked, answered = prompt_tokens(vocabulary), description_tokens(vocabulary)
    for tokens in (asked, answered):
        assert copy.deepcopy(tokens) == tokens  # gin copies arguments
        assert tokens.vocab_size == vocabulary.size and tokens.eos_id == vocabulary.eos_id
    assert asked.bos_id == (vocabulary.begin[0] if vocabulary.begin else None)
    assert (asked == answered) == (not vocabulary.begin and not vocabulary.lead)

    @quickly
    @given(TEXTS)
    @example("")
    def check(text):
        prompt, answer = f"{prompts.PREFIX} {text}", vocabulary.encode_description(text)
        expected = vocabulary.encode_prompt(prompt)
        assert asked.encode(prompt) == asked.encode_tf(prompt).numpy().tolist() == expected
        assert answered.encode(text) == answered.encode_tf(text).numpy().tolist() == answer[:-1]
        assert answered.decode(answer) == vocabulary.decode(answer)

    check()


def test_seqio_decodes_rows_of_any_rank(vocabulary):
    answered = description_tokens(vocabulary)
    rows = [vocabulary.encode_description(text) for text in DESCRIPTIONS[:4]]
    padded = np.zeros((2, 2, max(map(len, rows))), np.int32)
    for place, row in enumerate(rows):
        padded[place // 2, place % 2, : len(row)] = row
    texts = answered.decode_tf(tf.constant(padded)).numpy()
    assert [text.decode() for text in texts.ravel()] == DESCRIPTIONS[:4]
    assert answered.decode(tf.constant(padded[1, 1])) == DESCRIPTIONS[3]


def test_examples_come_back_from_batches_word_for_word(tmp_path, vocabulary):
    made = [Example(p, d) for p in PROMPTS[::4] for d in DESCRIPTIONS[:2]]
    seqio_tasks.write_examples(made, tmp_path, "train", vocabulary)
    longest = max(
        examples.longest_example(vocabulary, make, DESCRIPTIONS, 2)
        for make in (prompts.novelty_prompt, prompts.alignment_prompt)
    )
    batches = seqio_tasks.Batches(
        seqio_tasks.make_task(f"words_{tmp_path.name}", tmp_path, vocabulary),
        tmp_path,
        "train",
        batch_size=10,
        max_length=longest,
        longest_description=max(len(vocabulary.encode_description(d)) for d in DESCRIPTIONS),
        prefix_length=len(vocabulary.prefix),
        num_clusters=5,
    )
    batches.position()  # can be taken, whichever way the texts are tokenized
    seen = 0
    for batch in batches:
        for place, number in enumerate(batch["example_id"]):
            if number < 0:  # the last batch isn't full
                continue
            tokens, split = batch["tokens"][place], batch["prompt_lengths"][place]
            whole = tokens[: batch["lengths"][place]]
            assert whole[-1] == vocabulary.eos_id
            assert vocabulary.decode(tokens[:split]) == made[number].inputs
            assert vocabulary.decode(whole[split:]) == made[number].targets
            seen += 1
    assert seen == len(made)


def test_no_example_is_longer_than_the_longest(vocabulary):
    longest = examples.longest_example(vocabulary, prompts.novelty_prompt, DESCRIPTIONS, 2)
    lengths = [
        len(vocabulary.encode_prompt(prompts.novelty_prompt(pair)))
        + len(vocabulary.encode_description(answer))
        for pair in itertools.product(DESCRIPTIONS, repeat=2)
        for answer in DESCRIPTIONS
    ]
    assert max(lengths) == longest


@pytest.mark.parametrize("kind", ["qwen_json", "llama3_json", "gemma_json", "llama_json"])
def test_what_looks_like_a_special_token_is_text(folders, kind):
    found = Vocabulary(folders[kind])
    special = {i for i in range(found.size) if not found._pieces.is_text(i)}
    for i in special:
        text = f"space {found._pieces.decode([i])} opera"
        assert not special & set(found.encode_description(text)[:-1])
        assert found.decode(found.encode_description(text)) == text


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_letters_of_every_script_can_be_spelt_byte_by_byte(folders, kind):
    found = Vocabulary(folders[kind])
    for text in (
        "e\u0301te\u0301",
        "\u1112\u1161\u11ab",
        "日本",
        "a\u200db",
        "👩🏽\u200d🚀",
        "…\t",
    ):
        assert found.spells(text)


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_a_pretrained_tokenizer_is_copied_whole(tmp_path, folders, kind):
    source = folders[kind]
    (source / "model.safetensors").write_bytes(b"weights stay where they are")
    pretrained_vocabulary(tmp_path, PROMPTS, DESCRIPTIONS, pretrained=str(source))
    copied, given = Vocabulary(tmp_path), Vocabulary(source)
    for name in ("size", "begin", "lead", "eos_id", "pad_id", "prefix"):
        assert getattr(copied, name) == getattr(given, name)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {path.name for path in source.iterdir()} - {"model.safetensors"}
    assert not copied.is_own


def test_files_beside_a_tokenizer_are_believed_in_order(tmp_path, folders):
    text = (folders["qwen_json"] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    small.write_json(tmp_path / "generation_config.json", eos_token_id=[5, 6])
    found = Vocabulary(tmp_path)
    assert found.eos_id == 5 and found.begin == () and found.pad_id is None
    small.write_json(tmp_path / "config.json", eos_token_id=7, bos_token_id=8, pad_token_id=0)
    found = Vocabulary(tmp_path)
    assert found.eos_id == 7 and found.begin == ()
    assert found.pad_id is None  # whatever the file says, 0 is an exclamation mark
    special = {"content": "<|endoftext|>"}
    small.write_json(tmp_path / "special_tokens_map.json", eos_token=special, pad_token=special)
    end = found._pieces.id_of("<|endoftext|>")
    assert (Vocabulary(tmp_path).eos_id, Vocabulary(tmp_path).pad_id) == (end, None)
    small.write_json(tmp_path / "tokenizer_config.json", add_bos_token=True, eos_token="<|im_end|>")
    found = Vocabulary(tmp_path)
    assert (found.eos_id, found.pad_id, found.begin) == (end + 2, end, (8,))


def test_a_lone_sentencepiece_model_says_what_it_needs(tmp_path):
    for kind, begin, eos, pad in ((small.gemma_model, 2, 1, 0), (small.llama_model, 1, 2, None)):
        kind(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        found = Vocabulary(tmp_path)
        assert (found.begin, found.eos_id, found.pad_id) == ((begin,), eos, pad)
        small.write_json(tmp_path / "tokenizer_config.json", add_bos_token=False)
        assert Vocabulary(tmp_path).begin == ()


def test_t5s_tokenizer_is_read_in_both_forms(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    for name in ("model", "json"):
        (tmp_path / name).mkdir()
    small.t5_model(tmp_path / "model")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    reference.save_pretrained(tmp_path / "json")
    for name, file in (("model", "spiece.model"), ("json", "tokenizer.json")):
        found = Vocabulary(tmp_path / name)
        assert found.path.name == file
        assert (found.begin, found.eos_id, found.pad_id, found.lead) == ((), 1, 0, "")
        for text in (*PROMPTS, *DESCRIPTIONS):
            assert [*found.encode(text), 1] == reference.encode(text)
            assert found.decode(found.encode_description(text)) == text


def changed(folder, file, **values):
    """Rewrites a JSON file of a folder."""
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**before, **values}))


def words(folder):
    """A tokenizer of a few words; all others are unknown."""
    known = ["interests", ":", ";", "next", "liking", "space", "opera", "<end>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    changed(folder, "tokenizer_config.json", eos_token="<end>")


def letters(folder, merges=(), normalizer=None, without=""):
    """A tokenizer of the letters in the corpus; it drops all others without a word."""
    known = sorted({*"".join(small.CORPUS)} - {without})
    known += ["<end>", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(known)}, list(merges)))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.save(str(folder / "tokenizer.json"))
    changed(folder, "tokenizer_config.json", eos_token="<end>")


BAD = {
    "no folder": (lambda f: f.rmdir(), r"PRETRAINED\) is .*no folder; it should have a tok"),
    "nothing in it": (
        lambda f: None,
        "a folder without tokenizer.json or tokenizer.model or spiece.model. Name",
    ),
    "not JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        r"tokenizer.json is not a tokenizer of Hugging Face's library \(EOF",
    ),
    "not SentencePiece": (
        lambda f: (f / "tokenizer.model").write_text("IQ== 0\n"),
        "tokenizer.model is not a SentencePiece model. Get the pretrained",
    ),
    "no EOS": (
        lambda f: (small.llama3_json(f), (f / "tokenizer_config.json").unlink()),
        "tokenizer.json has no token that ends a text.* config.json or generation_config.json",
    ),
    "no EOS in a model": (
        lambda f: small.sentencepiece_model(f / "tokenizer.model", eos_id=-1),
        "tokenizer.model has no token that ends a text",
    ),
    "damaged config": (
        lambda f: (small.qwen_json(f), (f / "tokenizer_config.json").write_text("{'")),
        "tokenizer_config.json is not valid JSON",
    ),
    "strange config": (
        lambda f: (small.qwen_json(f), (f / "config.json").write_text("[1]")),
        "config.json is not a JSON object",
    ),
    "EOS of another": (
        lambda f: (small.qwen_json(f), changed(f, "tokenizer_config.json", eos_token="</s>")),
        "tokenizer_config.json says that eos_token is '</s>', but .*no such token",
    ),
    "EOS outside": (
        lambda f: (small.llama_json(f), changed(f, "config.json", eos_token_id=350)),
        r"config.json says that eos_token_id is 350, but .*tokenizer.json has the tokens 0..349",
    ),
    "unknown words": (words, "can't spell the description 'slow cooking'"),
    "dropped letters": (
        lambda f: letters(f, without="w"),
        "can't spell the description 'slow cooking'. Take another tokenizer, or",
    ),
    "no bytes": (
        lambda f: small.sentencepiece_model(
            f / "tokenizer.model", byte_fallback=False, vocab_size=60, character_coverage=0.98
        ),
        "tokenizer.model can't spell the description",
    ),
    "joined prefix": (
        lambda f: letters(f, merges=[(":", " ")]),
        "doesn't keep 'interests:' apart from the rest of the prompt .* Take another tokenizer",
    ),
    "no colon": (lambda f: letters(f, without=":"), "can't spell 'interests: space opera; next:'"),
}


@pytest.mark.parametrize("case", BAD)
def test_pretrained_tokenizers_that_do_not_do_are_refused(tmp_path, case):
    make, message = BAD[case]
    source, folder = tmp_path / "pretrained", tmp_path / "vocabulary"
    source.mkdir()
    make(source)
    with pytest.raises(InputError, match=message):
        pretrained_vocabulary(folder, PROMPTS, DESCRIPTIONS, pretrained=str(source))
    assert not folder.exists()


def test_descriptions_that_a_tokenizer_takes_for_one_are_refused(tmp_path):
    letters(tmp_path, normalizer=normalizers.Lowercase())
    with pytest.raises(InputError, match="can't tell the descriptions 'Opera' and 'opera' apart"):
        pretrained_vocabulary(tmp_path / "v", [], ["Opera", "opera"], pretrained=str(tmp_path))


def test_a_folder_without_a_vocabulary_is_an_error(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer: .* is missing. Run `recexplore tok"):
        Vocabulary(tmp_path)


def test_descriptions_must_differ_for_a_vocabulary_of_our_own_too(tmp_path):
    with pytest.raises(InputError, match="can't tell the descriptions 'part Ⅷ' and 'part VIII'"):
        train_vocabulary(tmp_path, PROMPTS, ["part Ⅷ", "part VIII", *DESCRIPTIONS])


def test_an_embedding_has_a_row_for_every_token(folders):
    pretrained, own = Vocabulary(folders["qwen_json"]), Vocabulary(folders["own"])
    for rows in (pretrained.size, pretrained.size + 100):
        check_embedding(pretrained, rows, "model.safetensors")
    rows = pretrained.size - 1
    message = f"^model.safetensors has a token embedding of {rows} rows, but .*tokenizer.json has "
    with pytest.raises(InputError, match=f"{message}{rows + 1} tokens: the tokenizer doesn't"):
        check_embedding(pretrained, rows, "model.safetensors")
    whole = own.embedding_rows
    assert whole % 128 == 0 and whole - 128 < own.size <= whole
    check_embedding(own, whole, "models/novelty")
    message = f"has {whole}: its {own.size} pieces, rounded up to a multiple of 128. Train the"
    for rows in (own.size - 1, own.size, whole + 128):
        with pytest.raises(InputError, match=f"of {rows} rows, but .*{message}"):
            check_embedding(own, rows, "models/novelty")


def test_special_tokens_beyond_the_embedding_do_not_count(tmp_path):
    """Gemma 3's, of which the last stands for pictures and has no row; EOS always counts."""
    small.gemma_json(tmp_path)
    before = Vocabulary(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_to_id("<image_soft_token>") == before.size
    found = Vocabulary(tmp_path)
    assert found.size == before.size
    check_embedding(found, before.size, "model.safetensors")
    assert found.encode("<image_soft_token>") == before.encode("<image_soft_token>")
    changed(tmp_path, "tokenizer_config.json", eos_token="<image_soft_token>")
    assert Vocabulary(tmp_path).size == before.size + 1
    tokenizer.add_tokens(["<a word>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary(tmp_path).size == before.size + 2


def test_a_model_is_not_loaded_with_a_tokenizer_that_has_more_tokens(tmp_path, folders):
    found = Vocabulary(folders["qwen_json"])
    sizes = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1)
    config = TransformerConfig(
        vocab_size=found.size - 1, model_dim=4, head_dim=4, mlp_dim=4, max_length=8, **sizes
    )
    artifacts.write_json(tmp_path / explorer.NETWORK, saved.describe(Transformer(config)))
    with pytest.raises(InputError, match="the tokenizer doesn't match the embedding"):
        explorer.load_model(tmp_path, found)


def test_descriptions_make_a_trie_whichever_ids_they_have(folders):
    found = Vocabulary(folders["qwen_json"])
    exclaimed = found.encode("!")
    assert exclaimed == [0]
    trie = explorer.description_trie(found, ["opera!", "opera"])
    assert found.decode(trie.sequences[0, : trie.lengths[0]]) == "opera!"
    assert 0 in trie.sequences[0, : trie.lengths[0]]
