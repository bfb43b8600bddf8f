"""Vocabulary, examples and SeqIO batches."""

import numpy as np
import pyarrow as pa
import pytest

from recexplore.errors import InputError
from recexplore.tasks import examples, prompts, seqio_tasks
from recexplore.tasks.examples import Example
from recexplore.tasks.vocabulary import EOS_ID, PAD_ID, UNKNOWN_ID, Vocabulary, train_vocabulary

DESCRIPTIONS = ["space opera", "slow cooking", "space travel", "opera arias"]
PROMPTS = [
    make([a, b])
    for make in (prompts.novelty_prompt, prompts.alignment_prompt)
    for a in DESCRIPTIONS
    for b in DESCRIPTIONS
]
# seqio and tensorflow warn of their own ways
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=[True, False], ids=["phrases", "pieces"])
def vocabulary(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(folder, PROMPTS, DESCRIPTIONS, size=60, whole_descriptions=request.param)
    return Vocabulary(folder)


def test_text_survives_encoding_and_reserved_ids_are_never_tokens(vocabulary):
    for text in [*PROMPTS, *DESCRIPTIONS]:
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert not {PAD_ID, EOS_ID, UNKNOWN_ID} & set(tokens)


def test_whole_descriptions_are_one_token_and_pieces_are_shared(tmp_path):
    train_vocabulary(tmp_path, PROMPTS, DESCRIPTIONS, size=60, whole_descriptions=True)
    whole = Vocabulary(tmp_path)
    assert [len(whole.encode(text)) for text in DESCRIPTIONS] == [1] * 4
    assert len(whole.encode(PROMPTS[1])) == 4  # interests: | a; | b; | next:


def test_training_the_vocabulary_again_gives_the_same_bytes(tmp_path):
    contents = []
    for name in ("a", "b"):
        train_vocabulary(tmp_path / name, PROMPTS, DESCRIPTIONS, size=60)
        contents.append((tmp_path / name / "sentencepiece.model").read_bytes())
    assert contents[0] == contents[1]


def test_vocabularies_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match="vocabulary.train_vocabulary.size is 3"):
        train_vocabulary(tmp_path, PROMPTS, DESCRIPTIONS, size=3, whole_descriptions=False)
    with pytest.raises(InputError, match="is missing. Run `recexplore tokenize`"):
        Vocabulary(tmp_path / "nowhere")
    (tmp_path / "sentencepiece.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        Vocabulary(tmp_path)


def some_examples(count):
    return [
        Example(
            PROMPTS[i % 16], DESCRIPTIONS[i % 4], seen=[i % 4, 3], label=i / count, weight=1.0 + i
        )
        for i in range(count)
    ]


def longest_description(vocabulary):
    return max(len(vocabulary.encode_description(d)) for d in DESCRIPTIONS)


def batches_of(folder, vocabulary, count=40, **options):
    seqio_tasks.write_examples(some_examples(count), folder, "train", vocabulary)
    task = seqio_tasks.make_task(f"task_{folder.name}", folder, vocabulary)
    settings = {
        "batch_size": 8,
        "max_length": 40,
        "longest_description": longest_description(vocabulary),
        "prefix_length": len(vocabulary.prefix),
        "num_clusters": 4,
    }
    return seqio_tasks.Batches(task, folder, "train", **{**settings, **options})


def test_batches_hold_what_inference_will_see(tmp_path, vocabulary):
    rows = some_examples(40)
    count = 0
    for batch in batches_of(tmp_path, vocabulary):
        for place in range(8):
            example = rows[batch["example_id"][place]]
            length, split = batch["lengths"][place], batch["prompt_lengths"][place]
            tokens = batch["tokens"][place]
            prompt, lengths = vocabulary.encode_prompts([example.inputs], 100)
            assert tokens[:split].tolist() == [
                *vocabulary.prefix,
                *prompt[0, : lengths[0]].tolist(),
            ]
            assert tokens[split:length].tolist() == vocabulary.encode_description(example.targets)
            assert (tokens[length:] == PAD_ID).all()
            assert np.flatnonzero(batch["seen"][place]).tolist() == sorted(set(example.seen))
            assert batch["label"][place] == pytest.approx(example.label)
            assert batch["weight"][place] == example.weight
            count += 1
    assert count == 40


def test_the_last_batch_is_filled_with_weightless_examples(tmp_path, vocabulary):
    weights = np.concatenate([b["weight"] for b in batches_of(tmp_path, vocabulary, count=20)])
    assert len(weights) == 24 and (weights > 0).sum() == 20


def test_a_long_prompt_loses_its_oldest_tokens(tmp_path, vocabulary):
    room = len(vocabulary.prefix) + 1
    rows = some_examples(40)
    length = longest_description(vocabulary) + room
    for batch in batches_of(tmp_path, vocabulary, max_length=length):
        ids, splits = batch["example_id"], batch["prompt_lengths"]
        for index, tokens, split in zip(ids, batch["tokens"], splits, strict=True):
            asked, lengths = vocabulary.encode_prompts([rows[index].inputs], room)
            assert tokens[:split].tolist() == [*vocabulary.prefix, *asked[0, : lengths[0]].tolist()]
            assert split == room


def test_a_description_that_leaves_no_room_is_an_error(tmp_path, vocabulary):
    longest = longest_description(vocabulary)
    with pytest.raises(InputError, match=f"longest description alone has {longest} tokens"):
        batches_of(tmp_path, vocabulary, max_length=longest)


def test_a_position_is_restored_exactly_whatever_the_shuffling(tmp_path, vocabulary):
    options = {"shuffle": True, "seed": 5, "repeat": True}
    first = batches_of(tmp_path, vocabulary, **options)
    for _ in range(7):  # into the second epoch
        next(first)
    position = first.position()
    expected = [next(first)["example_id"].tolist() for _ in range(12)]
    again = batches_of(tmp_path, vocabulary, **options)
    again.move_to(position)
    assert [next(again)["example_id"].tolist() for _ in range(12)] == expected


def test_missing_examples_are_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no validation examples"):
        seqio_tasks.count_examples(tmp_path, "validation")


def transitions(targets):
    count = len(targets)
    return pa.table(
        {
            "split": ["train"] * count,
            "history": [[0, 1, 2]] * count,
            "next_cluster": pa.array(targets, pa.int32()),
            "seen": [[0, 1, 2]] * count,
            "skipped": [False] * count,
        }
    )


def test_no_target_keeps_more_than_its_share():
    table = transitions([3] * 80 + [2] * 15 + [1] * 5)
    kept = examples.diversify(table, max_share_per_cluster=0.2)["next_cluster"].to_numpy()
    assert np.bincount(kept).tolist() == [0, 5, 15, 20]
    again = examples.diversify(table, max_share_per_cluster=0.2)["next_cluster"].to_numpy()
    assert kept.tolist() == again.tolist()
    with pytest.raises(InputError, match="max_share_per_cluster is 0"):
        examples.diversify(table, max_share_per_cluster=0.0)


def test_longer_histories_are_second_examples():
    table, make = transitions([3] * 20), examples.novelty_examples
    made = make(table, DESCRIPTIONS, 1, exclude_seen=False, longer=3, half_life=0.5, seed=1)
    plain = make(table, DESCRIPTIONS, 1, exclude_seen=False, half_life=0.5)
    assert made[:20] == plain and plain[-1].weight == 1.0 and plain[9].weight == 0.5
    named = [example.inputs.count(";") for example in made[20:]]
    assert set(named) == {2, 3}
    for example, count in zip(made[20:], named, strict=True):
        assert example.targets == plain[0].targets and example.seen == [0, 1, 2][-count:]
    assert [e.weight for e in made[20:]] == [e.weight for e in plain]
    assert make(table, DESCRIPTIONS, 1, exclude_seen=False, longer=3, half_life=0.5, seed=1) == made


@pytest.mark.parametrize("longer", [1, 2])
def test_longer_histories_are_longer(longer):
    with pytest.raises(InputError, match=rf"longer is {longer}, but .*longer_histories must name"):
        examples.novelty_examples(
            transitions([3]), DESCRIPTIONS, 2, exclude_seen=False, longer=longer
        )


def test_examples_say_the_last_clusters_of_the_history():
    for exclude_seen, excluded in ((True, [0, 1, 2]), (False, [1, 2])):
        (example,) = examples.novelty_examples(
            transitions([3]), DESCRIPTIONS, 2, exclude_seen=exclude_seen
        )
        assert example.inputs == "interests: slow cooking; space travel; next:"
        assert example.targets == "opera arias" and example.seen == excluded


def collective(rows):
    histories, targets, labels, counts = zip(*rows, strict=True)
    return pa.table(
        {
            "split": ["train"] * len(rows),
            "history": histories,
            "next_cluster": pa.array(targets, pa.int32()),
            "label": pa.array(labels, pa.float32()),
            "weight": pa.array(counts, pa.float32()),
        }
    )


FEEDBACK = collective(
    [([0, 1], 2, 0.2, 1), ([1, 0], 3, 0.9, 4), ([0, 1], 3, 0.8, 99), ([1, 0], 2, 0.9, 4)]
)


@pytest.mark.parametrize(("weighting", "power"), [("count", 1), ("sqrt", 0.5), ("none", 0)])
def test_feedback_of_many_users_can_weigh_more(weighting, power):
    made = examples.alignment_examples(FEEDBACK, "train", DESCRIPTIONS, count_weighting=weighting)
    assert [example.weight for example in made] == pytest.approx(
        [count**power for count in (1, 4, 99, 4)]
    )
    (pair,) = examples.pairwise_examples(FEEDBACK, "train", DESCRIPTIONS, count_weighting=weighting)
    assert pair.weight == pytest.approx((2 * 1 * 99 / (1 + 99)) ** power)
    assert examples.alignment_examples(FEEDBACK, "validation", DESCRIPTIONS) == []


def test_pairs_come_from_one_history_and_different_labels():
    (pair,) = examples.pairwise_examples(FEEDBACK, "train", DESCRIPTIONS, min_gap=0.6)
    assert pair.inputs == prompts.alignment_prompt(["space opera", "slow cooking"])
    assert (pair.targets, pair.rejected) == ("opera arias", "space travel")
    assert pair.label == pytest.approx(0.8)


def test_pairs_are_all_pairs_with_the_gap():
    random = np.random.default_rng(1)
    labels = np.round(random.random(30) * 20) / 20
    names = [f"cluster {i}" for i in range(40)]
    table = collective([([38, 39], i, label, 1) for i, label in enumerate(labels)])
    made = examples.pairwise_examples(
        table, "train", names, min_gap=0.25, max_pairs_per_history=1000
    )
    expected = {
        (names[a], names[b])
        for a in range(30)
        for b in range(30)
        if round((labels[a] - labels[b]) * 20) >= 5
    }
    assert {(e.targets, e.rejected) for e in made} == expected and len(made) == len(expected)


def test_a_busy_history_keeps_so_many_pairs_whatever_else_there_is():
    names = [f"cluster {i}" for i in range(40)]
    busy = [([38, 39], i, i / 30, 1) for i in range(30)]
    quiet = [([1, 2], 3, 0.1, 1), ([1, 2], 4, 0.9, 1)]
    made = examples.pairwise_examples(
        collective(quiet + busy), "train", names, max_pairs_per_history=20, seed=1
    )
    assert len(made) == 21 and len(set(map(repr, made))) == 21
    alone = examples.pairwise_examples(
        collective(busy[::-1]), "train", names, max_pairs_per_history=20, seed=1
    )
    assert alone == made[1:]
    other = examples.pairwise_examples(
        collective(busy), "train", names, max_pairs_per_history=20, seed=2
    )
    assert other != alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": 0.95}, "No history of the train split.*min_gap = 0.95"),
        ({"min_gap": -1.0}, "min_gap is -1.0; it must be between 0 and 1"),
        ({"max_pairs_per_history": 0}, "max_pairs_per_history is 0; it must be a whole number"),
        ({"count_weighting": "log"}, "count_weighting is 'log'; there is: 'count', 'sqrt', 'none'"),
    ],
)
def test_pairs_that_cannot_be_made_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        examples.pairwise_examples(FEEDBACK, "train", DESCRIPTIONS, **options)
