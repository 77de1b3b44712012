"""report.html in headless Chromium: every control does what it says, and nobody is left out.

Debian's chromium is driven by playwright; axe looks for what keeps people out. Both schemes, a phone's width, with
scripts and without.
"""

import shutil

import pytest

from tests.report.paged import record_page
from tests.report.test_page import HOSTILE, own_run
from tracefl.report import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright (uv sync)")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="they need axe-playwright-python (uv sync)")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root in a container
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages by name: of a usual run, of hostile names, of many clients, of texts, and of an own app."""
    folder, many = tmp_path_factory.mktemp("pages"), [str(n) for n in range(120)]
    runs = {
        "usual": record_page(folder / "usual", faulty=["1"], coalitions=True),
        "nobody": record_page(folder / "nobody"),
        "hostile": record_page(folder / "hostile", HOSTILE, HOSTILE, faulty=HOSTILE[:2], num_inputs=28),
        "many": record_page(
            folder / "many", many, [f"a long class {n}" for n in range(30)], num_inputs=90, num_rounds=3
        ),
        "texts": record_page(folder / "texts", num_inputs=2, texts=["the cat sat <b> here", "x" * 90]),
        "own": own_run(folder / "own").path,
    }
    return {name: write_page(run) for name, run in runs.items()}


@pytest.fixture
def opened(browser, pages):
    """`opened("usual", width=320)`: the page, and what its console said."""
    contexts = []

    def open_page(name, scheme="light", width=1200, scripts=True):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=scripts
        )
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page, said, asked = context.new_page(), list[str](), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{pages[name]}")
        page.said, page.asked = said, asked
        return page

    yield open_page
    for context in contexts:
        context.close()


NAMES = ("usual", "nobody", "hostile", "many", "texts", "own")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 320)])
def test_axe_finds_nothing(opened, name, scheme, width):
    page = opened(name, scheme, width)
    found = axe.Axe().run(page).response["violations"]
    assert [(entry["id"], entry["nodes"][0]["html"][:200]) for entry in found] == []
    assert page.said == []
    assert all(url.startswith(("file://", "data:")) for url in page.asked)
    assert sum(url.startswith("file://") for url in page.asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1200, 320])
def test_it_reads_without_scripts(opened, name, width):
    page = opened(name, width=width, scripts=False)
    assert page.locator("h1").inner_text()
    assert page.locator("button:visible, select:visible").count() == 0
    if name in ("usual", "hostile"):
        details = page.locator("details")
        assert details.count() == (8 if name == "usual" else 24)
        for i in range(3):
            if not details.nth(i).evaluate("entry => entry.open"):
                details.nth(i).locator("summary").click()
            assert details.nth(i).locator("tbody tr:visible").count() >= 5
    assert page.said == []


def shown(page):
    """The heading of the prediction, and the cells of its table of clients."""
    rows = "body => [...body.rows].map(row => [...row.cells].map(cell => cell.textContent))"
    return page.locator("#prediction h3").inner_text(), page.locator("#prediction tbody").first.evaluate(rows)


def test_every_choice_shows_its_prediction(opened):
    page = opened("usual")
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    for one in data["predictions"]:
        page.select_option("#round", str(one["r"]))
        page.select_option("#method", one["m"])
        page.select_option("#input", str(one["i"]))
        title, table = shown(page)
        assert title == f"Input {one['i']}, round {one['r']}"
        assert [row[0] for row in table] == [data["clients"]["client"][who] for who in one["c"]]
        numbers = [float(row[1].replace("−", "-")) for row in table]
        assert numbers == pytest.approx(one["v"], rel=6e-3)
        assert [row[-1] != "–" for row in table] == [place in one["in"] for place in range(5)]
        held = [data["label_counts"][who][one["p"]] for who in one["c"]]
        assert [row[-2] for row in table] == [str(count) for count in held]
        right = "which is the true class" if one["p"] == one["y"] else f"true class {data['classes'][one['y']]}"
        assert right in page.locator("#prediction").inner_text()
        picture = page.locator("#prediction img").get_attribute("src")
        assert picture == f"data:image/png;base64,{data['inputs'][str(one['i'])]['picture']}"
        if one["m"] != "shapley":
            assert "Coalition truth" in page.locator("#prediction").inner_text()
            assert page.locator("#prediction table").nth(1).locator("tbody tr").count() == len(one["l"])
        if one["m"] == "influence":
            assert (
                "The server itself added +0.250, of which its noise +0.125." in page.locator("#prediction").inner_text()
            )
    assert page.said == []


def test_it_starts_at_the_last_round(opened):
    page = opened("usual")
    assert page.input_value("#round") == "2"
    assert page.input_value("#method") == "influence"
    assert shown(page)[0] == "Input 0, round 2"


def test_steps_pictures_and_the_filter(opened):
    page = opened("usual")
    assert page.locator("#previous").is_disabled()
    page.click("#next")
    assert shown(page)[0].startswith("Input 1,")
    page.click("#previous")
    assert shown(page)[0].startswith("Input 0,")
    page.locator("#thumbs button").nth(7).click()
    assert shown(page)[0].startswith("Input 7,")
    assert page.locator("#thumbs button[aria-pressed=true]").get_attribute("data-input") == "7"
    assert page.locator("#next").is_disabled()
    assert "Input 7, predicted" in page.locator("#status").inner_text()
    page.check("#wrong")
    assert page.locator("#input option").evaluate_all("all => all.map(one => one.value)") == ["1", "3", "5", "7"]
    page.uncheck("#wrong")
    assert page.locator("#input option").count() == 8


def test_the_address_keeps_the_choice(opened):
    page = opened("usual")
    page.select_option("#round", "1")
    page.select_option("#method", "neuron")
    page.select_option("#input", "3")
    address = page.url
    again = opened("own")
    again.goto(address)
    assert again.input_value("#method") == "neuron"
    assert shown(again)[0] == "Input 3, round 1"
    again.goto(address.split("#")[0] + "#r=99&i=x&m=<b>")
    again.reload()
    assert shown(again)[0] == "Input 0, round 2"
    assert again.said == []


def test_links_into_the_page_lead_there(opened, pages):
    page = opened("own")
    page.emulate_media(reduced_motion="reduce")  # at once
    for anchor, name in (("again", "again"), ("r=1&m=neuron&i=3", "predictions")):
        page.goto("about:blank")
        page.goto(f"file://{pages['usual']}#{anchor}")
        assert page.url.endswith(f"#{anchor}")  # kept, also when it is copied again
        inside = f"document.getElementById('{name}').getBoundingClientRect().top < innerHeight && scrollY > 0"
        assert page.evaluate(inside)
    page.evaluate("location.hash = '#r=2&m=influence&i=5'")
    page.locator("#prediction-head", has_text="Input 5, round 2").wait_for()


def test_the_keyboard_is_not_lost_at_the_ends(opened):
    page = opened("usual")
    page.focus("#next")
    for _ in range(7):
        page.keyboard.press("Enter")
    assert shown(page)[0].startswith("Input 7,")
    assert page.evaluate("document.activeElement.id") == "previous"


def test_the_script_and_the_plain_page_say_the_same(opened):
    page, plain = opened("usual"), opened("usual", scripts=False)
    said = plain.locator("details p").first.inner_text()
    assert "with confidence 0.9" in said
    assert page.locator("#prediction p").nth(1).inner_text() == said


def test_the_buttons_copy_the_command_beside_them(opened):
    page = opened("usual")
    buttons = page.locator("button.copy:visible")
    assert buttons.count() == 2
    for i in range(2):
        command = buttons.nth(i).locator("xpath=..").locator("code").inner_text()
        buttons.nth(i).click()
        assert page.evaluate("navigator.clipboard.readText()") == command
        assert buttons.nth(i).inner_text() == "Copied"
    assert page.locator("#prediction code").inner_text().endswith("--round 2 --index 0 --method influence")
    page.select_option("#method", "neuron")
    assert page.locator("#prediction code").inner_text() == "python -m tracefl.main"
    assert page.said == []


def test_without_the_clipboard_the_command_is_selected(opened):
    page = opened("usual")
    page.evaluate(
        "navigator.clipboard.writeText = () => Promise.reject(new Error()); document.execCommand = () => false"
    )
    page.locator("button.copy:visible").last.click()
    assert page.evaluate("String(getSelection())") == "python -m tracefl.main"
    assert page.locator("button.copy:visible").last.inner_text() == "Selected"


def test_everything_is_reached_by_keys_and_seen(opened):
    page = opened("usual")
    reached, outlined = [], True
    for _ in range(80):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.id || e.dataset.input || e.className || e.textContent, e === document.body,
                    s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2] }"""
        )
        if here[1]:
            break
        reached.append(here[0])
        outlined = outlined and here[2]
    assert {"round", "method", "input", "wrong", "next", "copy", "7"} <= set(reached)
    assert reached[0] == "skip"
    assert outlined
    page.locator("#thumbs button").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.input") == "2"
    assert shown(page)[0].startswith("Input 2,")


def test_hostile_names_are_shown_and_do_nothing(opened):
    page = opened("hostile")
    inputs = page.locator("#input option").evaluate_all("all => all.map(one => one.value)")
    for row in inputs:
        page.select_option("#input", row)
    text = page.locator("#prediction").inner_text()
    assert "</script><img src=x onerror=alert(1)>" in text
    assert "{{ 7 * 7 }}" in text
    assert page.locator("img[src=x]").count() == 0
    assert page.said == []


def test_a_text_is_quoted(opened):
    page = opened("texts")
    assert page.locator("#prediction blockquote").inner_text() == "the cat sat <b> here"
    page.click("#next")
    assert page.locator("#prediction blockquote").inner_text() == "x" * 90
    assert page.locator("#thumbs button").count() == 0


def test_it_prints_without_its_controls(opened):
    page = opened("usual")
    page.emulate_media(media="print")
    assert page.locator("button:visible, select:visible, nav:visible").count() == 0
    assert page.locator("#prediction table:visible").count() == 2


def test_in_a_frame_as_a_notebook_shows_it(opened, pages, tmp_path):
    page = opened("own")
    page.goto("about:blank")
    page.set_content("<iframe width=900 height=600></iframe>")
    page.locator("iframe").evaluate("(frame, text) => { frame.srcdoc = text }", pages["usual"].read_text("utf-8"))
    frame = page.frame_locator("iframe")
    frame.locator("#next").click()
    assert frame.locator("#prediction h3").inner_text() == "Input 1, round 2"
    assert page.said == []


def test_it_prints_in_the_colours_of_paper(opened):
    names = "[...document.querySelectorAll('.chart .name, .bar .plus, .bar .minus')].map(e => getComputedStyle(e).fill)"
    printed = {}
    for scheme in ("light", "dark"):
        page = opened("usual", scheme)
        page.emulate_media(media="print", color_scheme=scheme)
        printed[scheme] = page.evaluate(names)
    assert printed["light"] == printed["dark"]
    assert len(set(printed["dark"])) > 3
