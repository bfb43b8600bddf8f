"""The page, as a person meets it in a browser."""

import shutil

import pytest
from serving_process import serving
from small_work import DESCRIPTIONS, make_work

from recexplore.serving import page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TOKEN = "0123456789abcdef"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium is not installed (Debian packages chromium and chromium-driver)",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_work(folder)
    return folder


@pytest.fixture(scope="module")
def served(work):
    with serving(work, options={}) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def until(browser, condition):
    """Waits; what the page replaces while it is being read is read again."""
    waiting = WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def rows(browser, table):
    """The text of a table's cells."""
    found = browser.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr")
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in found]


def opened(browser, address, history):
    browser.get("about:blank")
    browser.get(f"{address}/#{history}")
    until(browser, lambda: rows(browser, "found"))


def test_a_history_shows_its_clusters_with_both_scores_and_its_items(browser, served):
    opened(browser, served.address, "0,1")
    first, second = rows(browser, "found")
    assert (
        first[0].startswith(f"{DESCRIPTIONS[2]} #2") and "such as Title <2> · Title <8>" in first[0]
    )
    assert first[1:5] == ["0.62", "0.50", "−3.50", "0.50"]
    assert second[0].startswith(DESCRIPTIONS[3])
    assert "Level history, version 1" in text(browser, "#found-about")
    until(browser, lambda: rows(browser, "items"))
    assert "“Title <0>”, then “Title <1>”" in text(browser, "#items-about")
    assert [row[0] for row in rows(browser, "items")] == ["Title <0> i0", "Title <1> i1"]


def test_descriptions_are_text_and_nothing_is_loaded_from_elsewhere(browser, served):
    opened(browser, served.address, "0,1")
    assert DESCRIPTIONS[2] in text(browser, "#found")
    assert not browser.find_elements(By.CSS_SELECTOR, "#found b")
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith(served.address) for name in browser.execute_script(script))
    assert browser.get_log("browser") == []  # the policy has stopped nothing that the page needs


def test_a_history_is_typed_changed_and_goes_on_by_keyboard_and_button(browser, served):
    opened(browser, served.address, "0,1")
    browser.find_element(By.ID, "clear").click()
    until(browser, lambda: "Level popular" in text(browser, "#found-about"))
    entry = browser.find_element(By.ID, "history-input")
    entry.send_keys("BREAD", Keys.ENTER)
    until(browser, lambda: "cooking, bread" in text(browser, "#history"))
    entry.send_keys("1", Keys.ENTER)
    until(browser, lambda: "Level history" in text(browser, "#found-about"))
    assert browser.current_url.endswith("#0,1")
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    browser.find_element(By.ID, "banned-input").send_keys("space", Keys.ENTER)
    until(browser, lambda: len(rows(browser, "found")) == 1)
    browser.find_element(By.CSS_SELECTOR, "#found .add").click()
    until(browser, lambda: browser.current_url.endswith("#0,1,3"))
    until(browser, lambda: "shorter" in text(browser, "#found-about"))
    browser.find_element(By.CSS_SELECTOR, "#history [aria-label='Remove music, cello']").click()
    until(browser, lambda: browser.current_url.endswith("#0,1"))
    browser.find_element(By.ID, "random").click()
    until(browser, lambda: text(browser, "#history"))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("polka", "No cluster's description has “polka” in it."),
        ("cooking", "2 clusters have that in their description. Type more of it: cooking, bread"),
        ("6", "There is no cluster 6; the last is 5."),
    ],
)
def test_what_is_no_cluster_is_said(browser, served, typed, said):
    opened(browser, served.address, "0,1")
    browser.find_element(By.ID, "history-input").send_keys(typed, Keys.ENTER)
    until(browser, lambda: said in text(browser, "#problem"))
    assert len(rows(browser, "found")) == 2


def test_every_field_has_a_label_and_a_phone_shows_all_of_it(browser, served):
    browser.set_window_size(390, 800)
    try:
        opened(browser, served.address, "0,1")
        script = """
            return [...document.querySelectorAll("input, button")]
              .filter((field) => !(field.labels?.length || field.ariaLabel || field.textContent))
              .filter((field) => field.offsetParent).map((field) => field.outerHTML)"""
        assert browser.execute_script(script) == []
        script = (
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert browser.execute_script(script) <= 0
        assert first_line(rows(browser, "found")[0][0]) == f"{DESCRIPTIONS[2]} #2"
    finally:
        browser.set_window_size(1100, 900)


def first_line(told):
    return told.splitlines()[0]


def test_a_token_is_asked_for_and_kept_in_memory_only(browser, work, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with serving(work, "--token_file", str(tmp_path / "token")) as served:
        browser.get(f"{served.address}/#0,1")
        until(browser, lambda: "A token is needed" in text(browser, "#problem"))
        browser.find_element(By.ID, "token").send_keys("wrong", Keys.ENTER)
        until(browser, lambda: "The token is wrong" in text(browser, "#problem"))
        entry = browser.find_element(By.ID, "token")
        entry.clear()
        entry.send_keys(TOKEN, Keys.ENTER)
        until(browser, lambda: len(rows(browser, "found")) == 2)
        assert not browser.find_element(By.ID, "token-part").is_displayed()
        assert "no item model" in text(browser, "#items-about")
        script = "return localStorage.length + sessionStorage.length + document.cookie.length"
        assert browser.execute_script(script) == 0
    browser.find_element(By.ID, "random").click()
    until(browser, lambda: "The server doesn't answer" in text(browser, "#problem"))


def test_the_policy_lets_only_the_pages_own_script_run():
    _, headers = page.read()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2
