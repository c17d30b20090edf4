"""Numbers in sentences against values and intervals worked out by hand or by SciPy."""


import numpy as np
import pandas as pd
import pytest
from scipy import stats
from unravelling import wording
from unravelling.stored import KEYS, both, intact_error
from unravelling.wording import (
    about,
    error,
    label,
    listed,
    mean_interval,
    network_label,
    number,
    one_seed,
    over_seeds,
    paragraphs,
    pending,
    percent,
    points,
    rounded,
    seeds,
    share,
    side_by_side,
    span,
)


def table(*keys, **columns):
    return pd.DataFrame([("digits", *key) for key in keys], columns=KEYS).assign(**columns)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Results of two digits networks with three and two seeds, and of one CIFAR-10 network with one."""
    digits = [("resnet110", seed, "digits") for seed in range(3)] + [("plain20", seed, "digits") for seed in range(2)]
    made = {"digits": table(*digits), "cifar10": table(("resnet110", 0, "short")).assign(dataset="cifar10")}
    for dataset, rows in made.items():
        folder = tmp_path / "data/results" / dataset
        folder.mkdir(parents=True)
        rows = rows.assign(error=0.3, delta_error=0.2, images=1000)
        rows.to_csv(folder / "delete_random.csv", index=False)
        rows.to_csv(folder / "networks.csv", index=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet110", "ResNet-110"), ("plain20", "plain-20"), ("vgg15-nobn", "VGG-15 without batch norm"),
     ("resnet110-stem", "ResNet-110 with batch norm in the stem"),
     ("resnet20-joint6", "ResNet-20 times six, as one"),
     ("resnet20-post", "ResNet-20 of 2015"), ("vgg15-wide", "VGG-15 wide"), ("densenet", "densenet")],
)
def test_network_labels(name, expected):
    assert network_label(name) == expected


def test_lists():
    assert [listed(range(n)) for n in range(4)] == ["none", "0", "0 and 1", "0, 1 and 2"]
    assert listed([], "nothing") == "nothing"


def test_numbers_have_a_true_minus_sign_and_no_negative_zero():
    assert [number(x) for x in (-1.25, -0.04, 0, 2.449)] == ["−1.2", "0.0", "0.0", "2.4"]
    assert number(-0.001, "+.2f") == "0.00"
    assert number(-1e-7, ".1e") == "−1.0e−07"
    assert number(float("nan")) == "nan"
    assert 100 * 0.0865 < 8.65
    assert number(100 * 0.0865) == percent([0.0865])[:3] == share(0.0865 * 10_000, 10_000)[:3] == number(8.65) == "8.7"
    assert [rounded(x) for x in (0.0123, 3.14159, 34.4, 12345, -5.55)] == ["0.012", "3.1", "34", "12,000", "−5.5"]


def test_seeds_are_counted_for_each_network_and_recipe():
    assert seeds(table(("a", 4, "r"), ("a", 4, "r"))) == seeds(pd.DataFrame({"seed": [4]})) == "seed 4"
    assert seeds(table(("a", 0, "r"), ("a", 1, "r"), ("b", 0, "r"), ("b", 1, "r"))) == "2 seeds"
    assert seeds(table(("a", 0, "r"), ("a", 1, "r"), ("b", 1, "r"))) == "1 to 2 seeds"
    assert seeds(table(("a", 0, "r"), ("a", 1, "s"))) == "1 seed"


def test_one_seed_is_said_where_some_network_has_one():
    one, two = table(("a", 0, "r"), ("b", 0, "r")), table(("a", 0, "r"), ("a", 1, "r"))
    assert one_seed(two) == ""
    assert one_seed(one) == "One seed: no interval over seeds."
    assert one_seed(pd.concat([one, two])) == "Where no interval is given, there is one seed."


@pytest.mark.parametrize(
    ("networks", "digits", "cifar10"),
    [
        (["resnet110"], "digits, recipe digits, 3 seeds", "CIFAR-10, recipe short, seed 0"),
        (["resnet110", "plain20"], "digits, recipe digits, 2 to 3 seeds", "CIFAR-10, recipe short, seed 0"),
        (["plain20"], "digits, recipe digits, 2 seeds", "CIFAR-10"),
    ],
)
def test_about_says_images_recipe_and_seeds(project, networks, digits, cifar10):
    tables = both("delete_random", *networks)
    assert {name: about(name, rows) for name, rows in tables.items()} == {"digits": digits, "cifar10": cifar10}


def test_labels_are_about_all_networks_of_a_recipe(project):
    assert label("digits") == "digits, recipe digits, 2 to 3 seeds"
    assert label("cifar10") == label("cifar10", "short") == "CIFAR-10, recipe short, seed 0"
    assert label("cifar10", "paper") == "CIFAR-10, recipe paper, no network yet"


def test_pending_names_what_is_missing_where_and_the_command(project):
    tables = both("delete_random", "resnet110", "plain20")
    text = "Not measured yet on CIFAR-10, recipe short: plain-20; `make paper` does that."
    assert pending(tables, "resnet110", "plain20") == text
    assert pending(tables, "resnet110") == pending({}, "resnet110") == ""
    assert pending(both("reorder"), "plain20", "vgg15").count("plain-20, VGG-15") == 2


def test_paragraphs_open_with_what_they_are_about_and_say_once_that_there_is_one_seed(project):
    tables = both("delete_random", "resnet110")
    text = paragraphs(tables, lambda rows: f"{len(rows)} rows.", "resnet110", "vgg15")
    missing = [
        "Not measured yet on the digits, recipe digits: VGG-15", "Not measured yet on CIFAR-10, recipe short: VGG-15",
    ]
    assert text.split("\n\n") == [
        "**digits, recipe digits, 3 seeds** (10.0 % intact, 1,000 images): 3 rows.",
        "**CIFAR-10, recipe short, seed 0** (10.0 % intact, 1,000 images): 1 rows. "
        "One seed: no interval over seeds.",
        " ".join(f"{sentence}; `make paper` does that." for sentence in missing),
    ]
    several = paragraphs(both("delete_random"), lambda rows: "x.")
    assert several.startswith("**digits, recipe digits, 2 to 3 seeds** (1,000 images): x.\n\n")
    assert paragraphs(both("reorder"), lambda rows: "never") == ""


def test_data_sets_side_by_side_have_a_column_each_and_a_dash_where_one_says_nothing(project):
    def say(rows):
        of = {"rows": str(len(rows))}
        return of if rows["dataset"].iloc[0] == "digits" else {"rows, too": "0"} | of

    text = side_by_side(both("delete_random", "resnet110"), say, "resnet110", "vgg15")
    assert text.split("\n\n") == [
        "|  | digits, recipe digits, 3 seeds (10.0 % intact, 1,000 images) | "
        "CIFAR-10, recipe short, seed 0 (10.0 % intact, 1,000 images) |\n| :-- | --: | --: |\n| rows | 3 | 1 |\n"
        "| rows, too | – | 0 |",
        "One seed: no interval over seeds.",
        pending(both("delete_random", "resnet110"), "resnet110", "vgg15"),
    ]
    assert side_by_side(both("reorder"), lambda rows: {"never": ""}) == ""
    one = both("delete_random", "resnet110")["cifar10"]
    assert side_by_side({"cifar10": one, "digits": one}, lambda rows: {"rows": "1"}).count("One seed") == 1


VALUES = [0.1, 0.2, 0.4]
LOW, HIGH = stats.t.interval(0.95, 2, np.mean(VALUES), stats.sem(VALUES))


def test_intervals_over_values():
    assert mean_interval(pd.Series(VALUES)) == pytest.approx((np.mean(VALUES), LOW, HIGH))
    mean, *ends = mean_interval(0.3)
    assert mean == 0.3
    assert np.isnan(ends).all()


def test_means_have_an_interval_only_where_there_are_several_values():
    words = f"23.3 % (95 % interval over 3 seeds −{-100 * LOW:.1f} to {100 * HIGH:.1f})"
    assert over_seeds(pd.Series(VALUES)) == words
    assert over_seeds([2.5], scale=1, unit=" blocks") == "2.5 blocks"
    assert over_seeds(VALUES, digits=0).startswith("23 % (95 % interval over 3 seeds −15 to 61)")
    assert percent(VALUES) == f"23.3 % (0.0 to {100 * HIGH:.1f})"
    assert percent([0.9, 1.0, 0.95], 0) == "95 % (83 to 100)"
    assert percent(0.0123) == percent([0.0123]) == "1.2 %"
    assert points(VALUES) == f"23.3 points (−{-100 * LOW:.1f} to {100 * HIGH:.1f})"
    assert points(0.0123, 2, "+") == "+1.23 points"


def test_spans():
    assert span([3, 1.04, 2]) == "1.0 to 3.0"
    assert span(pd.Series([0.5, 0.5004]), ".1f", scale=100, unit=" %") == "50.0 %"
    assert span([-2, -1], ".0f", unit=" points") == "−2 to −1 points"


def test_shares_carry_wilsons_interval():
    low, high = (100 * end for end in stats.binomtest(7, 500).proportion_ci(0.95, "wilson"))
    assert share(7, 500) == f"1.4 % (95 % Wilson interval {low:.1f} to {high:.1f})"
    assert share(7, 500, of="digits") == f"1.4 % of 500 digits (95 % Wilson interval {low:.1f} to {high:.1f})"


SAID = {
    seeds: ["network", "seed", "recipe"],
    one_seed: ["network", "seed", "recipe"],
    error: ["seed", "test_error", "test_images"],
    (lambda rows: about("digits", rows)): ["network", "seed", "recipe"],
    (lambda rows: pending({"digits": rows}, "resnet20")): ["network"],
    (lambda rows: paragraphs({"digits": rows}, lambda rows: "")): ["network", "seed", "recipe"],
    (lambda rows: side_by_side({"digits": rows}, lambda rows: {})): ["network", "seed", "recipe"],
    intact_error: ["error", "delta_error"],
}


@pytest.mark.parametrize(("say", "columns"), SAID.items())
def test_what_a_table_lacks_is_named_with_what_makes_such_a_table(say, columns):
    rows = table(("a", 0, "r"), ("a", 1, "r"), test_error=0.1, test_images=500, error=0.2, delta_error=0.1)
    say(rows)
    for column in columns:
        source = r"Take one of unravelling\.(stored\.stored|stored\.both|lesion\.delete_each)$"
        with pytest.raises(ValueError, match=rf"^there is no column '{column}' in the table: it has .*\. {source}"):
            say(rows.drop(columns=column))
    with pytest.raises(TypeError, match=r"^table is a list: expected a DataFrame"):
        say([1])
    if say in (seeds, one_seed, error, intact_error):  # the others have something to say of nothing
        with pytest.raises(ValueError, match=rf"^the table has no rows: expected at least one\. {source}"):
            say(rows[:0])


@pytest.mark.parametrize("say", [percent, points, over_seeds, span, mean_interval])
@pytest.mark.parametrize("nothing", [[], pd.Series(dtype=float), np.zeros((0, 2))])
def test_of_no_values_there_is_nothing_to_say(say, nothing):
    with pytest.raises(ValueError, match=r"^values is empty: expected at least one member$"):
        say(nothing)


def test_what_would_be_said_wrongly_is_refused():
    assert over_seeds([0.1, np.nan, 0.1]) == "10.0 % (95 % interval over 2 seeds 10.0 to 10.0)"
    with pytest.raises(ValueError, match=r"^count is 0\.0865: expected a number of images, not a share of them$"):
        share(0.0865, 500)
    assert share(0.0123556 * 45_000, 45_000) == share(556, 45_000)  # as an error is stored
    rows = table(("a", 0, "r"), ("b", 0, "r"), test_error=0.1, test_images=500)
    with pytest.raises(ValueError, match=r"^several rows of the table have one seed: choose those of one network and"):
        error(rows)


def test_errors_are_over_seeds_or_over_images():
    rows = table(("a", 0, "r"), ("a", 1, "r"), test_error=[0.014, 0.02], test_images=500)
    rows = rows.assign(train_error=0.0, train_images=10)
    assert error(rows.iloc[:1]) == wording.share(7, 500, of="test images")
    assert error(rows) == f"{over_seeds([0.014, 0.02])} of 500 test images"
    assert error(rows.iloc[1:], "train") == share(0, 10, of="training images")
    low, high = (100 * end for end in stats.binomtest(7, 500).proportion_ci(0.95, "wilson"))
    assert error(rows.iloc[:1], brief=True) == f"1.4 % ({low:.1f} to {high:.1f})"
    assert error(rows, brief=True) == percent([0.014, 0.02])
