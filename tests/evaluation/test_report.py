"""The report: self-contained, escaped, the same bytes for the same contents."""

import re

import numpy as np

from recexplore.evaluation import figures
from recexplore.evaluation.report import Contents, write_report


def contents(**changes):
    metrics = {}
    for method, base in (("popularity", 0.1), ("novelty", 0.2)):
        for column in ("recall@10", "ndcg@10", "recall@10_unseen", "ndcg@10_unseen"):
            metrics[f"{method}/{column}"] = base
            metrics[f"{method}/{column}_low"] = base - 0.01
            metrics[f"{method}/{column}_high"] = base + 0.01
    defaults = dict(
        metrics=metrics,
        methods={"popularity": "popularity", "novelty": "novelty model"},
        baselines=("popularity",),
        facts={"interactions": 1234.0, "shrinkage": 7.61},
        figures={"Reliability": figures.reliability(np.array([[0.1, 0.9], [0.2, 0.8], [5, 5]]))},
        explorations=[(["<b>bold</b>", "b & c"], [("space opera", 0.7, -2.5)])],
        configuration="a.b = '<script>'",
    )
    return Contents(**{**defaults, **changes})


def test_the_page_needs_no_network_and_escapes_what_it_is_given(tmp_path):
    write_report(tmp_path / "r.html", contents())
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)=['\"](https?:)?//", page)
    assert "<b>bold" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<script" not in page and "b &amp; c" in page


def test_the_best_of_each_column_is_bold(tmp_path):
    write_report(tmp_path / "r.html", contents())
    page = (tmp_path / "r.html").read_text()
    assert page.count("class='n best'>0.200") == 4 and "best'>0.100" not in page


def test_the_same_contents_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, contents())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_figure_is_svg():
    random = np.random.default_rng(0)
    made = [
        figures.training_curves(
            {"m": [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "validation_loss": 1.5}]}
        ),
        figures.scaling([1, 2, 5], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], 10),
        figures.cluster_map(
            random.normal(size=(9, 4)), np.arange(9), np.arange(9) % 3, [f"c {i}" for i in range(9)]
        ),
    ]
    assert all(svg.startswith("<svg") and svg.rstrip().endswith("</svg>") for svg in made)


def test_recommendations_and_values_are_shown_where_they_are_known(tmp_path):
    write_report(tmp_path / "plain.html", contents())
    plain = (tmp_path / "plain.html").read_text()
    assert "What is recommended" not in plain and "other policies" not in plain
    known = {
        "best_of_5/serendipity@10_unseen": 0.1234,
        "best_of_5/serendipity@10_unseen_low": 0.1111,
        "best_of_5/serendipity@10_unseen_high": 0.1357,
        "best_of_5/novelty@10_unseen": 6.789,
        "random_novel/off_policy_snips": 0.2345,
        "random_novel/off_policy_ess": 1234.4,
    }
    write_report(
        tmp_path / "r.html",
        contents(
            metrics=known,
            recommenders={"best_of_5": "best of <5>", "absent": "nobody"},
            policies={"random_novel": "random"},
        ),
    )
    page = (tmp_path / "r.html").read_text()
    row = page[page.index("best of &lt;5&gt;") :]
    assert "0.123<br><span class='interval'>0.111 – 0.136</span>" in row and ">6.79<" in row
    assert ">0.234<" in page and ">1,234<" in page and "nobody" not in page
