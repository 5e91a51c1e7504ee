"""Opens a page in Chromium, and says what a reader would see."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# Runs in the page after it is laid out; the title takes the result out of the browser.
MEASURE = """<script>
const box = (element) => element.getBoundingClientRect();
const seen = (element) => box(element).width > 0 && box(element).height > 0;
const shown = (selector) => [...document.querySelectorAll(selector)].filter(seen);
document.title = JSON.stringify({
  text: document.body.innerText,
  headings: shown("h1, h2").map((heading) => heading.innerText),
  plots: shown("svg").map((plot) => [Math.round(box(plot).width), Math.round(box(plot).height)]),
  rows: shown("table tr").length,
  overflows: document.documentElement.scrollWidth > window.innerWidth,
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name),
});
</script>"""


def view(page, width=1000):
    """The visible text, headings, plots (width, height) and table rows of an HTML page; whether it is wider than the
    window; and the addresses that it fetched."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "Chromium is missing: scripts/test.sh installs it"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page + MEASURE)
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   f"--user-data-dir={folder}/profile", f"--window-size={width},800", "--dump-dom", file.as_uri()]
        dom = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom.decode(), re.S)[1]))


def check_report(page, heading, *texts):
    """Asserts that a report stands alone and is laid out: a heading, plots of a visible size, no part outside of the
    window, nothing fetched."""
    found = view(page)
    assert heading in found["headings"], found["headings"]
    assert found["plots"] and all(width >= 100 and height >= 50 for width, height in found["plots"]), found["plots"]
    assert not found["overflows"] and not found["fetched"], (found["overflows"], found["fetched"])
    missing = [text for text in texts if text not in found["text"]]
    assert not missing, (missing, found["text"][:3000])
    return found
