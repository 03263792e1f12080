"""Pages in a headless Chromium: what a JavaScript function finds in them, and what the browser complains about."""

import html
import json
import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--enable-logging=stderr",
    "--allow-file-access-from-files", "--dump-dom",
)  # fmt: skip


def find():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(pages, function, folder):
    """Load each page, at a width in CSS pixels, and apply a JavaScript function to its window.

    Args:
        pages: (file, width) of each.
        function: JavaScript; its values become JSON.
        folder: an empty folder for the browser.

    Returns:
        The values in order; errors of scripts.
    """
    frames = "".join(
        f'<iframe src="{page.absolute().as_uri()}" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for page, width in pages
    )
    script = f"const look = {function}; const frames = [...document.querySelectorAll('iframe')];"
    script += "onload = () => document.body.textContent = JSON.stringify(frames.map(f => look(f.contentWindow)));"
    (folder / "frames.html").write_text(f"<!DOCTYPE html><body>{frames}<script>{script}</script>")
    command = [find(), *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    shown = re.search("<body>(.*)</body>", done.stdout, re.DOTALL)
    assert shown, done.stderr
    return json.loads(html.unescape(shown[1])), [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
