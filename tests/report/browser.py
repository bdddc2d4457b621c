"""A page in headless Chromium: what it asks the network for, what it says on the console, how wide it is."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # it asks its maker for this and that all the same
)
_ITS_OWN = "not an origin"  # who asks, where no page does
# A page beside the other may look into it, which the other does not let its own scripts do.
_FRAME = """<!DOCTYPE html><title>frame</title>
<iframe id="page" style="width:{width}px;height:2000px;border:0"></iframe>
<pre id="seen"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  const style = frame.contentWindow.getComputedStyle(frame.contentDocument.body);
  const images = [...frame.contentDocument.images].map((each) => each.naturalWidth);
  const drawn = [...frame.contentDocument.querySelectorAll("svg text")];
  const letters = drawn.map((each) => each.getBoundingClientRect().height);
  document.getElementById("seen").textContent = JSON.stringify({{
    width: root.scrollWidth, background: style.backgroundColor, colour: style.color, images, letters,
  }});
}};
frame.src = "{address}";
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a page did.

    Attributes:
        requests: addresses that it asked for over the network.
        console: lines.
    """

    requests: list[str]
    console: list[str]


def open_page(page, scratch):
    """Load a file, and write down what it asks for and says."""
    log = scratch / "net.json"
    done = _chromium(
        scratch, f"--log-net-log={log}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.resolve().as_uri()
    )
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")["events"]
    asked = [event["params"] for event in events if event.get("params", {}).get("initiator", _ITS_OWN) != _ITS_OWN]
    requests = sorted({each["url"] for each in asked if re.match(r"(https?|wss?|ftp):", each["url"])})
    return Seen(requests, re.findall(r"CONSOLE[:(].*", done.stderr))


def measure(page, scratch, width, dark=False):
    """Widths and colours of the page in a window of so many pixels."""
    frame = scratch / f"frame-{width}.html"
    frame.write_text(_FRAME.format(width=width, address=page.resolve().as_uri()))
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = _chromium(
        scratch,
        "--allow-file-access-from-files",
        theme,
        "--virtual-time-budget=3000",
        "--dump-dom",
        f"--window-size={width + 40},900",
        frame.as_uri(),
    )
    return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])


def _chromium(scratch: Path, *arguments):
    profile = scratch / "profile"
    command = [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
