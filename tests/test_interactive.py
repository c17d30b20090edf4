"""The figures that answer back, each on a small page of its own in a browser, against numbers computed from the tables.

Skipped where no Chromium is installed. Nothing is downloaded.
"""

import json
import re
import sys
from html import escape
from io import BytesIO
from itertools import combinations, pairwise, product
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from unravelling.data import digits

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import interactive  # noqa: E402  (it lies beside the notebooks that use it)

INK = {"light": ("#fff", "#222"), "dark": ("#14181e", "#ced6dd")}
NAMES = "lesion_bench", "unravelled_network", "path_lengths", "reordering", "damage_map"
MAKERS = {name: getattr(interactive, name) for name in NAMES}
FIGURES = sorted(MAKERS)

@pytest.fixture(scope="session")
def made():
    """Each figure's HTML, made once."""
    cache = {}

    def make(name):
        if name not in cache:
            cache[name] = MAKERS[name]().data
        return cache[name]

    return make


@pytest.fixture
def show(new_context, made):
    """`show(name, width, theme)` opens a page that holds one figure; it notes requests and complaints in `.faults`."""

    def go(name, width=1300, theme="light", markup=None, **options):
        context = new_context(viewport={"width": width, "height": 900}, color_scheme=theme, is_mobile=width < 600,
                              has_touch=width < 600, **options)
        faults = []
        context.route("**/*", lambda route: (faults.append(route.request.url), route.abort()))
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        ground, ink = INK[theme]
        page.set_content(
            f'<!doctype html><html lang="en" data-theme="{theme}"><meta charset="utf-8"><title>One figure</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<body style="margin: 16px; font: 16px sans-serif; color-scheme: {theme}; background: {ground}; '
            f'color: {ink}">'
            f"<main>{markup or made(name)}</main>")
        page.faults = faults
        return page

    return go


def status(page):
    return page.get_by_role("status").inner_text()


def table(name):
    """A stored table as it lies in its file, rows of the recipe that the book shows."""
    rows = pd.read_csv(ROOT / f"data/results/{name}.csv")
    return rows[rows["recipe"] == {"digits": "digits", "cifar10": "short"}[name.split("/")[0]]]


def percent(part):
    return f"{100 * round(part, 9):.1f} %"  # a mean of 0.0325 may come as 0.032499999999999994


def embedded(markup):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', markup, re.S)[1])


# -- all figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_data_are_small_and_stand_alone(made, name):
    markup = made(name)
    assert len(json.dumps(embedded(markup), separators=(",", ":"))) <= 150_000
    assert not re.search(r"(?:src|href)=|@import|\bimport\(|\bfetch\(|https?://(?!www\.w3\.org/2000/svg)", markup)


def test_data_cannot_end_their_script():
    text = '</script><script>document.title = "broken"</script><!-- & \' "'
    markup = interactive.figure("lesion_bench", {"text": text}, "Label", "Hint").data
    assert embedded(markup) == {"text": text}
    assert markup.count("</script>") == 2  # of the data and of the script


def test_too_much_data_are_refused():
    with pytest.raises(ValueError, match="at most 150,000"):
        interactive.figure("lesion_bench", "x" * 150_000, "Label", "Hint")


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        interactive.figure("lesion_bench", [float("nan")], "Label", "Hint")


@pytest.mark.parametrize("theme", INK)
@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_appears_without_faults(show, name, width, theme):
    page = show(name, width, theme)
    assert len(status(page).split()) > 5
    assert page.locator(".unravelling-fallback").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.unravelling *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
    sizes = "[...document.querySelectorAll('.unravelling svg text')].map(t => parseFloat(getComputedStyle(t).fontSize))"
    assert min(page.evaluate(sizes), default=12) >= 12
    assert page.faults == []
    folder = ROOT / "_build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"interactive-{name}-{width}-{theme}.png", full_page=True)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_says_why_it_is_missing_without_scripts(show, name):
    page = show(name, java_script_enabled=False)
    assert page.locator(".unravelling-fallback").is_visible()
    assert page.locator(".unravelling svg, .unravelling input").count() == 0


@pytest.mark.parametrize("name", FIGURES)
def test_figure_leaves_paper_to_the_static_one(show, name):
    page = show(name)
    page.emulate_media(media="print")
    assert page.locator(".unravelling").is_hidden()


@pytest.mark.parametrize("name", FIGURES)
def test_shown_twice_both_answer(show, made, name):
    page = show(name, markup=made(name) * 2)
    assert page.get_by_role("status").count() == 2
    assert page.locator(".unravelling[data-ready]").count() == 2
    assert page.faults == []


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_accessible(show, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for theme in INK:
        found = axe.run(show(name, 390, theme)).response["violations"]
        grave = [v["id"] + ": " + v["nodes"][0]["html"][:100] for v in found if v["impact"] in ("critical", "serious")]
        assert grave == []


def test_digits_keep_their_pixels_in_either_scheme(show):
    shots = []
    for theme in INK:
        page = show("damage_map", theme=theme)
        page.get_by_role("slider", name="Cell").focus()
        page.keyboard.press("ArrowDown")
        shots.append(Image.open(BytesIO(page.locator("canvas.digit").screenshot())).convert("L"))
    light, dark = (np.asarray(shot, float)[2:-2, 2:-2] for shot in shots)
    assert light.std() > 30, "there is a digit to see"
    assert np.abs(light - dark).max() <= 2


# -- in the outputs of Jupyter and Colab ---------------------------------------------------------------------

JUPYTERLAB = """markup => {
    const host = document.querySelector('main');
    host.innerHTML = markup;
    for (const script of host.querySelectorAll('script')) {  // which innerHTML does not run
        const fresh = document.createElement('script');
        for (const { name, value } of script.attributes) fresh.setAttribute(name, value);
        fresh.textContent = script.textContent;
        script.replaceWith(fresh);
    } }"""


@pytest.mark.parametrize("name", FIGURES)
def test_figure_works_when_inserted_as_jupyterlab_does(show, made, name):
    page = show(name, markup="<p>to come</p>")
    page.evaluate(JUPYTERLAB, made(name))
    assert page.locator(".unravelling[data-ready]").count() == 1
    assert len(status(page).split()) > 5
    assert page.locator(".unravelling-fallback").is_hidden()
    page.evaluate(JUPYTERLAB, made(name))  # the cell is run again
    assert page.get_by_role("status").count() == 1
    assert page.faults == []


@pytest.mark.parametrize("name", FIGURES)
def test_figure_says_why_it_is_missing_in_a_notebook_that_is_not_trusted(show, made, name):
    """Jupyter takes scripts and styles out of outputs then; GitHub does so always."""
    clean = re.sub(r"<(script|style)\b.*?</\1>", "", made(name), flags=re.S)
    page = show(name, markup=clean)
    assert page.locator(".unravelling-fallback").is_visible()
    assert page.locator("main").inner_text().strip() == interactive.FALLBACK


ANSWERS = {
    "lesion_bench": ("slider", "Unit", "ArrowRight"),
    "unravelled_network": ("button", "branch 2", "Enter"),
    "path_lengths": ("slider", "Blocks n", "ArrowLeft"),
    "reordering": ("button", "Shuffle every stage", "Enter"),
    "damage_map": ("slider", "Cell", "ArrowDown"),
}
"""A control of each figure, and a key to which it answers."""


@pytest.mark.parametrize("name", FIGURES)
def test_figure_works_in_a_frame_that_reaches_nothing(show, made, name):
    """As in Colab, whose outputs lie in a frame of another origin: no cookies, no storage, no parent, no network."""
    frame = f'<iframe sandbox="allow-scripts" title="Output" width="700" height="900" srcdoc="{escape(made(name))}">'
    page = show(name, markup=f"{frame}</iframe>")
    output = page.frame_locator("iframe")
    output.locator(".unravelling[data-ready]").wait_for()
    assert len(output.get_by_role("status").inner_text().split()) > 5
    assert output.locator(".unravelling-fallback").is_hidden()
    before = output.get_by_role("status").inner_text()
    role, label, key = ANSWERS[name]
    output.get_by_role(role, name=label).press(key)
    assert output.get_by_role("status").inner_text() != before, "it answers"
    assert page.faults == []


# -- lesion bench --------------------------------------------------------------------------------------------


def choose(page, group, label):
    page.get_by_role("group", name=group, exact=True).get_by_label(label, exact=True).check()


def of_unit(dataset, network, unit):
    rows = table(f"{dataset}/delete_each").query("network == @network and unit == @unit")
    return rows["error"], rows.iloc[0]


def test_bench_shows_error_interval_and_stage_of_a_unit(show):
    page = show("lesion_bench")
    strip = page.get_by_role("slider", name="Unit")
    strip.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    errors, row = of_unit("digits", "resnet110", 3)
    where = f"ResNet-110 on digits without unit 3 (stage {row['stage']}): error {percent(errors.mean())}"
    assert where in status(page)
    assert f"mean of 5 trainings, which range from {percent(errors.min())} to {percent(errors.max())}" in status(page)
    assert strip.get_attribute("aria-valuenow") == "3"
    assert strip.get_attribute("aria-valuetext") == status(page)
    page.keyboard.press("End")
    errors, _ = of_unit("digits", "resnet110", 53)
    assert "unit 53" in status(page)
    assert f"error {percent(errors.mean())}" in status(page)
    page.keyboard.press("ArrowRight")  # there is no further one
    assert "unit 53" in status(page)


def test_bench_follows_pointer_and_finger(show):
    page = show("lesion_bench")
    box = page.locator("[data-unit='18']").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 40)
    assert "without unit 18 (stage 2, a transition)" in status(page)
    page = show("lesion_bench", 390)
    box = page.locator("[data-unit='30']").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"])
    assert "without unit 30 " in status(page)


def test_bench_shows_every_network_of_both_data_sets(show):
    page = show("lesion_bench")
    for label, dataset in {"Digits": "digits", "CIFAR-10": "cifar10"}.items():
        choose(page, "Images", label)
        every = table(f"{dataset}/delete_each")
        tried = every.groupby("network")["seed"].nunique()
        networks = every[every["error"] - every["delta_error"] < 0.45].groupby("network")  # what learned the task
        group = page.get_by_role("group", name="Network", exact=True)
        assert group.get_by_role("radio").count() == len(networks)
        for name, rows in networks:
            first = rows[rows["unit"] == 0]
            label = interactive.network_label(name)
            label += f" ({len(first)} of {tried[name]} trainings)" if len(first) < tried[name] else ""
            choose(page, "Network", label)
            assert f"{label} on {dataset.replace('cifar10', 'CIFAR-10')} without unit 0" in status(page)
            assert f"error {percent(first['error'].mean())}" in status(page)
            assert f"Intact: {percent((rows['error'] - rows['delta_error']).mean())}" in status(page)
            if len(first) == 1:
                assert f"interval over the images {percent(first.iloc[0]['error_low'])} to" in status(page)
            assert page.locator("[data-unit]").count() == rows["unit"].nunique()


def drawn(dataset, network, k):
    """Stored draws of k units with the intact errors, as trained and with what new statistics change of them."""
    rows = table(f"{dataset}/delete_reestimated").query("network == @network and k == @k")
    rows = rows.sort_values(["seed", "trial"])
    whole = table(f"{dataset}/intact").query("network == @network").set_index("seed")
    change = (whole["reestimated_error"] - whole["error"]).reindex(rows["seed"]).to_numpy()
    rows = rows.assign(intact=rows["error"] - rows["delta_error"])
    return rows.assign(anew=rows["intact"] + change).reset_index(drop=True)


def nearest_to_the_median(rows):
    return int(np.argmin((rows["error"] - rows["error"].median()).abs().round(9)))


@pytest.mark.parametrize(("dataset", "label"), [("digits", "Digits"), ("cifar10", "CIFAR-10")])
def test_bench_switches_the_statistics_of_a_stored_draw(show, dataset, label):
    page = show("lesion_bench")
    choose(page, "Images", label)
    choose(page, "Delete", "several at random")
    page.get_by_role("slider", name="How many").focus()
    page.keyboard.press("End")
    rows = drawn(dataset, "resnet110", 30)
    first = nearest_to_the_median(rows)
    switch = page.get_by_label("collect new batch-norm statistics")
    for step in range(4):
        number = (first + step) % len(rows)
        row = rows.loc[number]
        units = row.units.split()
        assert f"seed {row.seed}, draw {number + 1} of {len(rows)}" in status(page)
        assert f"without units {', '.join(units[:-1])} and {units[-1]}," in status(page)
        assert f"error {percent(row.error)} with the batch-norm statistics of the intact network" in status(page)
        assert f"Intact: {percent(row.intact)}, with new statistics {percent(row.anew)}." in status(page)
        assert page.locator("[data-unit].gone:visible").count() == 30
        assert page.locator(".plot .strong").all_text_contents() == ["old statistics", percent(row.error)]
        switch.check()
        assert f"error {percent(row.reestimated_error)} with new batch-norm statistics" in status(page)
        assert f"Intact: {percent(row.intact)}, with new statistics {percent(row.anew)}." in status(page)
        assert page.locator(".plot .strong").all_text_contents() == ["new statistics", percent(row.reestimated_error)]
        switch.uncheck()
        page.get_by_role("button", name="Next draw").press("Enter")
    for _ in range(5):
        page.get_by_role("button", name="Previous draw").click()
    assert f"draw {(first - 1) % len(rows) + 1} of {len(rows)}" in status(page)
    assert page.faults == []


def test_several_opens_where_new_statistics_do_most(show):
    """Ten units, or as many as were drawn, and the draw nearest to the median: half falls to near nothing on digits."""
    page = show("lesion_bench")
    choose(page, "Delete", "several at random")
    rows = drawn("digits", "resnet110", 10)
    row = rows.loc[nearest_to_the_median(rows)]
    assert f"error {percent(row.error)} with" in status(page)
    assert abs(row.error - rows["error"].median()) < 0.01
    assert 0.4 < row.error < 0.6
    page.get_by_label("collect new batch-norm statistics").check()
    assert f"error {percent(row.reestimated_error)} with new" in status(page)
    assert row.reestimated_error < 0.05
    lines = page.locator(".plot:visible .dashed").evaluate_all("lines => lines.map(line => line.getAttribute('x1'))")
    ends = page.locator(".plot:visible .bar").evaluate_all(
        "bars => bars.map(bar => [+bar.getAttribute('x'), +bar.getAttribute('width')])")
    start, scale = ends[0][0], ends[0][1] / row.error
    assert [(float(x) - start) / scale for x in lines] == pytest.approx([row.intact, row.anew], abs=1e-3)
    choose(page, "Network", "ResNet-20")
    assert page.get_by_role("slider", name="How many").get_attribute("aria-valuetext") == "7 units"


def test_what_is_left_is_no_bar_that_reads_like_an_error(show):
    for width in (390, 1300):
        page = show("lesion_bench", width)
        choose(page, "Delete", "several at random")
        marks = page.locator(".plot:visible rect:not(.bar)")
        sizes = marks.evaluate_all("marks => marks.map(m => m.getBoundingClientRect()).map(r => [r.width, r.height])")
        assert len(sizes) == 54
        assert max(height for _, height in sizes) <= 16
        assert np.ptp(sizes, axis=0) == pytest.approx([0, 0], abs=0.1)


def test_bench_offers_no_statistics_where_there_is_no_batch_norm(made):
    networks = embedded(made("lesion_bench"))["datasets"][0]["networks"]
    empty = [network["name"] for network in networks if not network["draws"]]
    measured = set(table("digits/delete_reestimated")["network"])
    assert set(empty) == {network["name"] for network in networks} - measured
    assert "resnet110-nobn" in empty


def test_bench_leaves_out_trainings_that_failed(made):
    networks = embedded(made("lesion_bench"))["datasets"][0]["networks"]
    labels = {network["name"]: network["label"] for network in networks}
    assert "vgg15-nobn" not in labels  # none of five learned the task
    assert labels["resnet110-nobn"] == "ResNet-110 without batch norm (4 of 5 trainings)"


# -- unravelled network --------------------------------------------------------------------------------------


def counted(page):
    """The table of paths: what is left of each length, and of how many."""
    rows = [row.locator("td").all_inner_texts() for row in page.locator("table.counts tr").all()]
    return [tuple(map(int, column)) for column in zip(*rows, strict=True)]


def test_block_2_of_3_halves_the_paths(show):
    page = show("unravelled_network")
    assert "8 of 8 paths left" in status(page)
    page.locator("[data-block='2'] rect").click()
    assert "f₂ is off: 4 of 8 paths left, 1 of length 0, 2 of length 1 and 1 of length 2." in status(page)
    assert counted(page) == [(0, 1, 1), (1, 3, 2), (2, 3, 1), (3, 1, 0)]
    assert page.locator("ul.paths li:not(.off)").all_inner_texts() == ["y₀", "f₁(y₀)", "f₃(y₀)", "f₃(f₁(y₀))"]
    assert page.locator("ul.paths li.off").all_inner_texts() == ["f₂(y₀)", "f₂(f₁(y₀))", "f₃(f₂(y₀))", "f₃(f₂(f₁(y₀)))"]
    whole = "y₃ = y₀ + f₁(y₀) + f₂(y₀ + f₁(y₀)) + f₃(y₀ + f₁(y₀) + f₂(y₀ + f₁(y₀)))"
    assert page.locator(".formula").inner_text() == whole
    assert page.locator(".formula .off").all_text_contents() == [" + f₂(y₀ + f₁(y₀))"] * 2
    assert page.locator("[data-block].off").get_attribute("data-block") == "2"
    page.locator("[data-block='2'] rect").click()
    assert "8 of 8 paths left" in status(page)


def test_every_choice_of_branches_leaves_the_paths_that_avoid_the_others(show):
    page = show("unravelled_network")
    page.get_by_role("slider", name="Blocks").focus()
    page.keyboard.press("ArrowRight")
    n = 4
    for off in [set(some) for size in range(n + 1) for some in combinations(range(1, n + 1), size)]:
        for i in range(1, n + 1):
            switch = page.get_by_role("button", name=f"branch {i}")
            if (switch.get_attribute("aria-pressed") == "false") != (i in off):
                switch.press("Space")
        paths = [[i for i, bit in enumerate(bits, 1) if bit] for bits in product((0, 1), repeat=n)]
        left = [path for path in paths if not off & set(path)]
        assert f"{len(left)} of 16 paths left" in status(page)
        assert counted(page) == [(k, comb(n, k), sum(len(path) == k for path in left)) for k in range(n + 1)]
        assert page.locator("ul.paths li:not(.off)").count() == len(left) == 2 ** (n - len(off))
        exact = "≠" not in page.locator(".key").inner_text()
        assert exact == (n - len(off) < 2)


def test_the_number_of_blocks_goes_from_one_to_six(show):
    page = show("unravelled_network", 390)
    blocks = page.get_by_role("slider", name="Blocks")
    blocks.focus()
    page.keyboard.press("End")
    page.get_by_role("button", name="branch 6").tap()
    assert "f₆ is off: 32 of 64 paths left" in status(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    blocks.focus()
    page.keyboard.press("Home")
    assert "2 of 2 paths left" in status(page)  # and the sixth branch is forgotten
    assert page.get_by_role("button", name="branch").count() == 1


def test_gradient_is_the_sum_over_paths_and_the_output_is_not(show):
    page = show("unravelled_network")
    assert "the sum over these paths is not" in status(page)
    choose(page, "Sum over paths", "gradient")
    assert "The gradient is exactly the sum over these paths." in status(page)
    assert page.locator(".formula").inner_text() == "g₀ = (1 + J₁ᵀ) (1 + J₂ᵀ) (1 + J₃ᵀ) g₃"
    assert page.locator(".key").inner_text() == "g₀ = the sum over paths:"
    assert page.locator("ul.paths li").all_inner_texts()[-1] == "J₁ᵀ J₂ᵀ J₃ᵀ g₃"


def test_seven_blocks_are_too_many():
    with pytest.raises(ValueError, match="expected 1 to 6"):
        interactive.unravelled_network(7)


# -- path lengths --------------------------------------------------------------------------------------------


def set_slider(page, name, value):
    page.get_by_role("slider", name=name).fill(str(value))


@pytest.mark.parametrize(("n", "decay"), [(54, 0.26), (9, 0.5), (100, 1.0), (1, 0.02)])
def test_lengths_follow_count_and_decay(show, n, decay):
    page = show("path_lengths")
    set_slider(page, "Blocks n", n)
    set_slider(page, "Decay per block", decay)
    counts = np.array([comb(n, k) for k in range(n + 1)], float)
    both = counts * decay ** np.arange(n + 1)
    for values in (counts, both):
        values /= values.sum()
    means = [f"{(values * np.arange(n + 1)).sum():.1f}" for values in (counts, both)]
    inside = [percent(values[5:18].sum()) for values in (counts, both)]
    assert f"{means[0]} branches on average, weighted with what they carry {means[1]}." in status(page)
    assert f"5 to 17 hold {inside[0]} of the paths and {inside[1]} of the product" in status(page)


@pytest.mark.parametrize(("dataset", "label"), [("digits", "Digits"), ("cifar10", "CIFAR-10")])
def test_exact_spectrum_is_the_stored_one_at_every_epoch(show, dataset, label):
    page = show("path_lengths")
    choose(page, "Exact spectrum", f"ResNet-110, {label}")
    rows = table(f"{dataset}/spectrum_training").query("network == 'resnet110'")
    epochs = sorted(rows["epoch"].unique())
    slider = page.get_by_role("slider", name="Epoch")
    for stop in reversed(range(len(epochs))):
        share = rows[rows["epoch"] == epochs[stop]].groupby("length")["share"].mean()
        after = f"after {epochs[stop]} epoch" + ("s" if epochs[stop] != 1 else "")
        said = re.search(rf"{after} .*: ([\d.]+) % of the gradient, mean length ([\d.]+)\.$", status(page))
        assert float(said[1]) == pytest.approx(100 * share.loc[5:17].sum(), abs=0.06)
        assert float(said[2]) == pytest.approx((share * share.index).sum(), abs=0.06)
        slider.press("ArrowLeft")
    assert page.get_by_role("slider", name="Blocks n").is_disabled()
    choose(page, "Exact spectrum", "none")
    assert page.get_by_role("slider", name="Blocks n").is_enabled()
    assert "Exact" not in status(page)
    assert page.faults == []


# -- reordering ----------------------------------------------------------------------------------------------


def test_every_network_opens_on_a_unit_that_can_move(show, made):
    page = show("reordering")
    for network in embedded(made("reordering"))["networks"]:
        page.get_by_label("Network").select_option(network["label"])
        assert page.get_by_role("button", name="Move right").is_enabled()


def test_networks_take_one_line_on_a_phone(show, made):
    page = show("reordering", 390)
    networks = page.get_by_role("combobox", name="Network")
    assert networks.bounding_box()["height"] < 50
    assert page.get_by_role("radio").count() == 0
    networks.press("ArrowDown")
    assert embedded(made("reordering"))["networks"][1]["label"] in status(page)


def order_of(page):
    """Which unit stands at each place, read from the strip by walking along it."""
    strip = page.get_by_role("slider", name="Place")
    strip.press("Home")
    order = [strip.get_attribute("aria-valuetext")]
    while len(order) <= int(strip.get_attribute("aria-valuemax")):
        strip.press("ArrowRight")
        order.append(strip.get_attribute("aria-valuetext"))
    return [int(re.search(r"unit (\d+)", text)[1]) for text in order]


def signed(number):
    return f"{number:.3f}".replace("-", "−")


def movable(dataset, network):
    units = table(f"{dataset}/delete_each").query("network == @network and seed == 0").sort_values("unit")
    return units["stage"].where(~units["is_transition"], 0).tolist()


def check_order(page, dataset, network):
    order, stages = order_of(page), movable(dataset, network)
    n = len(stages)
    assert sorted(order) == list(range(n))
    assert [stages[unit] for unit in order] == stages
    pairs = [order[i] < order[j] for i, j in combinations(range(n), 2) if stages[i] == stages[j] > 0]
    tau, within = kendalltau(range(n), order).statistic, 2 * np.mean(pairs) - 1
    assert f"τ = {signed(tau)}, within stages {signed(within)}." in status(page)
    rows = table(f"{dataset}/reorder").query("network == @network")
    distance = (rows["tau"] - tau).abs().round(9)
    said = re.search(r"nearest in τ \(([\d.−]+)\) has error ([\d.]+ %)", status(page))
    nearest = rows[distance == distance.min()]
    assert said[2] in [percent(error) for error in nearest["error"]]
    assert said[1] in [signed(value) for value in nearest["tau"]]
    return order


def test_a_unit_moves_by_buttons_within_its_stage(show):
    page = show("reordering")
    strip, right = page.get_by_role("slider", name="Place"), page.get_by_role("button", name="Move right")
    errors = table("digits/reorder").query("network == 'resnet110'")
    assert f"Intact error: {percent((errors['error'] - errors['delta_error']).mean())}." in status(page)
    strip.press("Home")
    for _ in range(3):
        right.press("Enter")
    assert check_order(page, "digits", "resnet110")[:5] == [1, 2, 3, 0, 4]
    page.evaluate("() => { let x = 1; Math.random = () => (x = (16807 * x) % 2147483647) / 2147483647; }")
    for _ in range(4):  # the same shuffles in every run
        page.get_by_role("button", name="Shuffle every stage").click()
        assert check_order(page, "digits", "resnet110")[18] == 18
    strip.press("Home")
    for _ in range(18):
        strip.press("ArrowRight")
    assert "unit 18, a transition" in status(page)
    assert right.is_disabled()
    assert page.get_by_role("button", name="Move left").is_disabled()
    page.get_by_role("button", name="Trained order").click()
    assert order_of(page) == list(range(54))


def test_a_unit_moves_by_dragging(show):
    page = show("reordering")
    page.get_by_label("Network").select_option("plain-20 on digits")
    place = [page.locator(f"[data-place='{i}']").bounding_box() for i in range(9)]
    page.mouse.move(place[0]["x"] + 5, place[0]["y"] + 20)
    page.mouse.down()
    for i in (1, 2, 4, 7):  # past the end of its stage
        page.mouse.move(place[i]["x"] + place[i]["width"] / 2, place[i]["y"] + 20)
    page.mouse.up()
    assert check_order(page, "digits", "plain20")[:4] == [1, 2, 0, 3]
    assert page.faults == []


# -- damage map ----------------------------------------------------------------------------------------------


def losses_of(image, unit, seed=0):
    row = table("digits/damage").query("network == 'resnet110' and seed == @seed and image == @image").iloc[0]
    return row["loss"], row["loss"] + row[f"unit{unit}"]


def said_in(page):
    """Image, unit, loss and margin with the unit, loss and margin without it."""
    pattern = (r"Image (\d+), a .*: with unit (\d+) its loss is ([\d.]+) and its margin ([−\d.]+); "
               r"without it, loss ([\d.]+) and margin ([−\d.]+)\.")
    return [float(part.replace("−", "-")) for part in re.search(pattern, status(page)).groups()]


def check_cell(page):
    image, unit, *said = said_in(page)
    with_it, without = losses_of(image, int(unit))
    odds = [-np.log(np.expm1(value)) for value in (with_it, without)]
    assert said == pytest.approx([with_it, odds[0], without, odds[1]], rel=5e-3, abs=6e-3)
    return int(image), int(unit)


def test_map_says_what_an_image_loses(show):
    page = show("damage_map")
    cell = page.get_by_role("slider", name="Cell")
    labels = table("digits/damage").query("network == 'resnet110' and seed == 0").set_index("image")["label"]
    order = sorted(labels.index, key=lambda image: (labels[image], image))
    assert check_cell(page) == (order[0], 0)
    moves = ("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("End", 1, 53), ("Home", 1, 0), ("ArrowUp", 0, 0)
    for key, row, unit in moves:
        cell.press(key)
        assert check_cell(page) == (order[row], unit)
    cell.press("PageDown")
    assert labels[check_cell(page)[0]] == 1
    cell.press("PageUp")
    assert check_cell(page) == (order[0], 0)
    assert cell.get_attribute("aria-valuetext") == status(page)


def test_map_follows_the_pointer(show):
    page = show("damage_map")
    box = page.locator("canvas.map").bounding_box()
    seen = set()
    for x, y in ((0.1, 0.2), (0.5, 0.5), (0.99, 0.9)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        seen.add(check_cell(page))
        assert check_cell(page)[1] == int(54 * x)
    assert len(seen) == 3


def test_map_moves_by_buttons_under_a_finger(show):
    page = show("damage_map", 390)
    labels = table("digits/damage").query("network == 'resnet110' and seed == 0").set_index("image")["label"]
    order = sorted(labels.index, key=lambda image: (labels[image], image))
    for name, row, unit in [("Unit −", 0, 0), ("Unit +", 0, 1), ("Unit +", 0, 2), ("Unit −", 0, 1),
                            ("Image −", 0, 1), ("Image +", 1, 1), ("Image +", 2, 1), ("Image −", 1, 1)]:
        button = page.get_by_role("button", name=name)
        assert button.bounding_box()["height"] >= 24
        button.tap()
        assert check_cell(page) == (order[row], unit)


@pytest.mark.parametrize("width", [390, 1300])
def test_map_has_a_scale_with_numbers(show, width):
    """Each tick stands where the scale has the colour that the map gives to its damage; no two ticks touch."""
    page = show("damage_map", width)
    ramp = page.locator(".ramp").bounding_box()
    ticks = [(tick.inner_text(), tick.bounding_box()) for tick in page.locator(".ticks span").all()]
    assert [text for text, _ in ticks] == ["−10", "−1", "−0.1", "−0.01", "0", "0.01", "0.1", "1", "10"]
    for text, box in ticks:
        value = float(text.replace("−", "-"))
        size = np.sign(value) * min(np.log10(1 + abs(value) / 1e-3) / 4, 1)
        place = (box["x"] + box["width"] / 2 - ramp["x"]) / ramp["width"]
        assert place == pytest.approx((1 + size) / 2, abs=0.01)
    for (_, one), (_, other) in pairwise(ticks):
        assert one["x"] + one["width"] + 2 < other["x"]


def test_map_shows_the_digit_and_its_colours(show):
    page = show("damage_map")
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    image, _ = check_cell(page)
    drawn = np.array(page.locator("canvas.digit").evaluate(read)).reshape(8, 8, 4)[..., 0]
    ours = digits().test.images[image, 0].numpy().astype(float)
    assert np.corrcoef(drawn.ravel(), ours.ravel())[0, 1] > 0.9999
    everything = np.rint(load_digits().images / 16 * 255)
    assert (np.abs(everything - drawn).max(axis=(1, 2)) <= 1).any()  # it is one of scikit-learn's
    for scale in ("loss", "margin"):
        choose(page, "Damage to the", scale)
        colours = np.array(page.locator("canvas.map").evaluate(read)).reshape(-1, 54, 4)
        row = table("digits/damage").query("network == 'resnet110' and seed == 0 and image == @image").iloc[0]
        added = row.filter(regex=r"^unit\d+$").to_numpy(float)
        strong = np.abs(added) > 0.05
        assert strong.any()
        assert ((colours[0, :, 0] > colours[0, :, 2]) == (added > 0))[strong].all()  # orange where the loss grows


def test_map_shows_the_damage_with_statistics_re_estimated(show):
    damage = np.full((500, 2), -0.5)
    damage[:, 1] = np.arange(500) / 100
    page = show("damage_map", markup=interactive.damage_map(0, ([7, 3], damage)).data)
    image, _ = check_cell(page)
    choose(page, "Damage to the", "margin, statistics re-estimated")
    assert "Only units 3 and 7 were re-estimated." in status(page)
    cell = page.get_by_role("slider", name="Cell")
    for _ in range(3):
        cell.press("ArrowRight")
    said = re.search(r"re-estimated the margin loses ([\d.]+)\.$", status(page))
    assert float(said[1]) == pytest.approx(image / 100, abs=2e-3)
    for _ in range(4):
        cell.press("ArrowRight")
    assert re.search(r"re-estimated the margin gains 0\.50*\.$", status(page))
    assert page.faults == []


def test_map_names_a_single_unit_that_was_re_estimated(show):
    page = show("damage_map", markup=interactive.damage_map(0, ([3], np.zeros((500, 1)))).data)
    choose(page, "Damage to the", "margin, statistics re-estimated")
    assert "Only unit 3 was re-estimated." in status(page)


@pytest.mark.parametrize("damage", [66.0, np.nan])
def test_map_refuses_damage_that_two_bytes_do_not_hold(damage):
    with pytest.raises(ValueError, match=r"^values of up to (66|nan) do not fit into two bytes: take larger steps"):
        interactive.damage_map(0, ([1], np.full((500, 1), damage)))


def test_map_knows_margins_beyond_every_exponential(monkeypatch):
    tables = interactive.both("damage")
    tables["digits"]["loss"] = 800.0
    monkeypatch.setattr(interactive, "both", lambda name: tables)
    with np.errstate(over="raise", invalid="raise"), pytest.raises(ValueError, match=r"^values of up to 8\d\d"):
        interactive.damage_map()


def test_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="seed 99"):
        interactive.damage_map(99)
    with pytest.raises(ValueError, match=r"expected \(500, 2\)"):
        interactive.damage_map(0, ([1, 2], np.zeros((500, 3))))
