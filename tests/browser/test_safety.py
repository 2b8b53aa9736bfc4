"""What the running server tells whom, and a report on a machine without a network."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.report import write_report
from workbench.store.results import Store

pytestmark = pytest.mark.browser


def knock(server, **headers):
    """The answer to somebody who wants the connection that carries a page's content."""
    address = urlsplit(server.url)
    line = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    line.putrequest("GET", "/_stcore/stream", skip_host=True)
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    for name, value in {**upgrade, **headers}.items():
        line.putheader(name, value)
    line.endheaders()
    status = line.getresponse().status
    line.close()
    return status


def test_pages_of_other_hosts_get_no_content(server):
    here = urlsplit(server.url).netloc
    evil = f"evil.example:{urlsplit(server.url).port}"
    assert knock(server, Host=here, Origin=server.url) == 101
    assert knock(server, Host=here, Origin="http://evil.example") == 403
    # A name of somebody's name server for this address: page and request agree, and it is refused.
    assert knock(server, Host=evil, Origin=f"http://{evil}") == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_file_without_the_tabs_token_is_refused(server, method):
    request = urllib.request.Request(
        f"{server.url}/_stcore/upload_file/a/b", data=b"x", method=method
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_the_server_listens_on_this_machine_only(server):
    port = urlsplit(server.url).port
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = {
        local.split(":")[0]
        for _, local, _, state, *_ in rows
        if state == "0A" and int(local.split(":")[1], 16) == port
    }
    assert listening == {"0100007F"}  # 127.0.0.1, and neither 0.0.0.0 nor ::


def test_a_page_asks_no_other_host_for_anything(tab, measured):
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.open("attention-sinks", key=measured["stock"].key)
    others = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} - {
        urlsplit(tab.server.url).netloc
    }
    assert others == set()


def test_a_report_opens_offline_and_draws_its_figures(server, chromium, measured, expect, tmp_path):
    path = write_report(Store(server.store), tmp_path / "report.html")
    context, broken, asked = chromium.new_context(offline=True), [], []
    page = context.new_page()
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    drawn = page.locator(".js-plotly-plot .main-svg")
    expect(drawn.first).to_be_attached()
    page.get_by_role("link", name="attention-sinks").first.click()
    expect(page.get_by_text("Heads that send their attention").first).to_be_in_viewport()
    context.close()
    assert broken == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
